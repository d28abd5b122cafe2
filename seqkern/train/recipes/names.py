"""Names of people: which language one is of (task=classify), or new ones of a language (task=generate)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models import RNNLanguageModel
from seqkern.text import CorpusError, Labelled, Vocabulary, collate_pairs, read_names, read_tsv, toy
from seqkern.train.batches import ExampleBatches, to_device
from seqkern.train.config import Schedule, changed, option
from seqkern.train.metrics import perplexity
from seqkern.train.recipes._classification import Classification, ClassificationConfig
from seqkern.train.recipes._recipe import PAD, Recipe, bucketed, by_length, device_of

EOS = "<eos>"


@dataclass(frozen=True)
class NamesConfig(ClassificationConfig):
    task: Literal["classify", "generate"] = option("classify", "classify or generate")
    epochs: int = changed("epochs", 20)
    lr: float = changed("lr", 2e-3)
    schedule: Schedule = changed("schedule", "cosine")
    orthogonal: bool = changed("orthogonal", True)
    cell: str = option("lstm", "lstm, gru, rnn or another recurrent layer of seqkern.nn")
    embed_dim: int = option(64, "size of the letters' vectors")
    hidden_size: int = option(128, "of each direction")
    num_layers: int = option(1, "recurrent layers")
    dropout: float = option(0.3, "before the output and between layers")


def names(config: NamesConfig) -> Recipe:
    """The recipe of the config's task."""
    return NamesClassification(config) if config.task == "classify" else NamesGeneration(config)


def _records(path: Path | None) -> tuple[list[Labelled], list[Labelled]]:
    """Nine tenths of the names to learn from, a tenth for validation."""
    rows = toy.names() if path is None else _read(path)
    random.Random(0).shuffle(rows)  # files are in the order of their languages
    n = len(rows) // 10
    return rows[n:], rows[:n]


def _read(path: Path) -> list[Labelled]:
    """A folder of languages, or a file `language TAB name`."""
    return list(read_names(path) if path.is_dir() else read_tsv(path))


def _read_split(path: Path, split: str) -> list[Labelled]:
    if path.is_file():
        return _read(path)
    if (path / split).is_dir():
        return _read(path / split)
    if split == "valid":
        return _records(path)[1]
    raise CorpusError(f"corpus: no folder {split} in {path}")


class NamesClassification(Classification):
    name = "names"

    def records(self, path: Path | None) -> tuple[list[Labelled], list[Labelled]]:
        return _records(path)

    def read_split(self, path: Path, split: str) -> list[tuple[list[int], int]]:
        return self.encode(_read_split(path, split))

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def build(self, layers: ModuleType) -> nn.Module:
        return self.build_rnn(layers)


class NamesGeneration(Recipe):
    """A language model over letters whose first token is the language: <Russian> I v a n o v <eos>."""

    name = "names"
    metric = "nats"
    minimise = True

    def read(self, path: Path | None) -> None:
        train, valid = _records(path)
        tokens = [[_tag(record.label), *record.text, EOS] for record in train]
        self.vocabularies["tokens"] = Vocabulary.build(tokens, specials=("<unk>", "<pad>"))
        examples = self._encode(tokens)
        self.valid = self.encode(valid)
        order = bucketed([len(ids) for ids, _ in examples], self.config.batch, self.config.seed)
        self.batches = ExampleBatches(examples, order, self.collate, lambda batch: int(batch[1].sum()))

    def encode(self, records: list[Labelled]) -> list[tuple[list[int], list[int]]]:
        return self._encode([[_tag(record.label), *record.text, EOS] for record in records])

    def _encode(self, tokens: list[list[str]]) -> list[tuple[list[int], list[int]]]:
        """Inputs, and targets that are a step ahead."""
        ids = [self.vocabularies["tokens"].encode(row) for row in tokens]
        return [(row[:-1], row[1:]) for row in ids]

    def read_split(self, path: Path, split: str) -> list[tuple[list[int], list[int]]]:
        return self.encode(_read_split(path, split))

    @staticmethod
    def collate(examples: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        ids, lengths, targets, _ = collate_pairs(examples, pad=PAD, target_pad=-100)
        return ids, lengths, targets

    def build(self, layers: ModuleType) -> nn.Module:
        c = self.config
        return RNNLanguageModel(
            *(len(self.vocabularies["tokens"]), c.embed_dim, c.hidden_size),
            cell=c.cell,
            num_layers=c.num_layers,
            dropout=c.dropout,
            logits=True,
            padding_idx=PAD,
            layers=layers,
        )

    def loss(self, model: nn.Module, batch: Any, smoothing: float | None = None) -> Tensor:
        ids, lengths, targets = batch
        logits, _ = model(ids, lengths=lengths)
        smoothing = self.config.label_smoothing if smoothing is None else smoothing
        return F.cross_entropy(logits.mT, targets, label_smoothing=smoothing, reduction="sum")

    def figures(self, model: nn.Module, examples: Any, *, final: bool = False) -> dict[str, float]:
        total = 0.0
        for indices in by_length([len(ids) for ids, _ in examples], 256):
            batch = to_device(self.collate([examples[i] for i in indices]), device_of(model))
            total += self.loss(model, batch, 0.0).item()
        nats = total / sum(len(ids) for ids, _ in examples)
        return {"nats": nats, "perplexity": perplexity(nats)}

    def generate(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, **sampling: Any
    ) -> str:
        """A name of the language `prompt` names, whose beginning may follow after a space."""
        language, _, beginning = prompt.partition(" ")
        tokens = self.vocabularies["tokens"]
        if _tag(language) not in tokens:
            known = ", ".join(
                t.strip("<>") for t in tokens.tokens if len(t) > 1 and t not in ("<unk>", "<pad>", EOS)
            )
            raise ValueError(f"generate: expected one of {known}, got {language!r}")
        ids = torch.tensor(tokens.encode([_tag(language), *beginning])).to(device_of(model))
        drawn = model.generate(ids, length, generator=generator, eos_idx=tokens[EOS], **sampling)
        letters = tokens.decode(drawn[1:].tolist())
        return "".join(letters).partition(EOS)[0]


def _tag(language: str) -> str:
    return f"<{language}>"
