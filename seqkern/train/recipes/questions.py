"""What a question asks for: TREC's lines `label question`, in Latin-1 as it is shipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from torch import nn

from seqkern.text import Labelled, basic_english, read_labelled_lines, toy
from seqkern.train.config import Schedule, changed, option
from seqkern.train.recipes._classification import Classification, ClassificationConfig
from seqkern.train.recipes._recipe import find, found


@dataclass(frozen=True)
class QuestionsConfig(ClassificationConfig):
    epochs: int = changed("epochs", 15)
    batch: int = option(32, "examples in a batch of all processes together")
    schedule: Schedule = changed("schedule", "cosine")
    orthogonal: bool = changed("orthogonal", True)
    word_dropout: float = option(0.1, "share of the tokens that training replaces by the unknown one")
    cell: str = option("lstm", "lstm, gru, rnn or another recurrent layer of seqkern.nn")
    embed_dim: int = option(200, "size of the tokens' vectors")
    hidden_size: int = option(150, "of each direction")
    num_layers: int = option(1, "recurrent layers")
    dropout: float = option(0.5, "before the classifier and between layers")
    pooling: Literal["last", "mean", "max"] = option(
        "max", "what is classified: last states, mean or maximum"
    )


class Questions(Classification):
    name = "questions"

    def records(self, path: Path | None) -> tuple[list[Labelled], list[Labelled]]:
        if path is None:
            rows = toy.questions()
        elif path.is_file():
            rows = _read(path)
        else:
            rows = _read(found(find(path, "train"), path, "train"))
            if file := find(path, "valid"):
                return rows, _read(file)
        # Every tenth: files may be in the order of their labels.
        return [r for i, r in enumerate(rows) if i % 10], rows[::10]

    def read_split(self, path: Path, split: str) -> list[tuple[list[int], int]]:
        if path.is_dir() and split == "valid" and find(path, split) is None:
            return self.encode(self.records(path)[1])
        return self.encode(_read(path if path.is_file() else found(find(path, split), path, split)))

    def tokenize(self, text: str) -> list[str]:
        return basic_english(text)

    def build(self, layers: ModuleType) -> nn.Module:
        return self.build_rnn(layers, pooling=self.config.pooling)


def _read(path: Path) -> list[Labelled]:
    return list(read_labelled_lines(path, encoding="latin-1"))
