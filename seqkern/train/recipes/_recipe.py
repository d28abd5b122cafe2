"""What every recipe is: a config, data read into examples, a model, its loss, figures and predictions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.text import (
    BucketSampler,
    BytePairEncoding,
    CharVocabulary,
    CorpusError,
    Vocabulary,
    read_texts,
    toy,
)
from seqkern.text import split as split_texts
from seqkern.train.config import Training
from seqkern.train.optim import orthogonal_
from seqkern.train.trainer import Task

# Of the vocabularies here that have padding, as the reference models have it.
UNK, PAD = 0, 1

VOCABULARIES = {kind.__name__: kind for kind in (Vocabulary, BytePairEncoding, CharVocabulary)}


class Recipe(Task):
    """One task with its data, model, loss and figures.

        recipe.read(path);  recipe.make(layers)    to train: data and vocabularies; the model, of either nn
        recipe.restore(checkpoint)                 to use: vocabularies and the trained model

    A recipe defines read, read_split, build, loss and figures; those whose models say something about a text
    also predict. `vocabularies` holds, by name, what it reads text with; all of it goes into checkpoints.
    """

    name: ClassVar[str]
    config: Any

    def __init__(self, config: Training) -> None:
        self.config = config
        self.vocabularies: dict[str, Any] = {}
        self.valid: Any = None

    def read(self, path: Path | None) -> None:
        """Reads training and validation data (None: a corpus at hand); sets vocabularies, valid and batches.

        Raises:   CorpusError: no such data at `path`
        """
        raise NotImplementedError

    def read_split(self, path: Path, split: str) -> Any:
        """The examples of a split ("valid", "test") of the data at `path`; of a file: all of it.

        Raises:   CorpusError: no such split
        """
        raise NotImplementedError

    def build(self, layers: ModuleType) -> nn.Module:
        """The model, given config and vocabularies."""
        raise NotImplementedError

    def figures(self, model: nn.Module, examples: Any, *, final: bool = False) -> dict[str, float]:
        """How well the model does on examples; `final`: as well as it can, whatever the time."""
        raise NotImplementedError

    def predict(self, model: nn.Module, texts: Sequence[str]) -> Iterator[str]:
        """A line about each text."""
        raise ValueError(f"predict: a {self.name} checkpoint predicts nothing about a text")

    def generate(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, **sampling: Any
    ) -> str:
        """The prompt and what the model writes after it."""
        raise ValueError(f"generate: a {self.name} checkpoint writes no text")

    def attention(self, model: nn.Module, text: str) -> tuple[Tensor, list[str], list[str]]:
        """Weights [rows, columns] of what attends in rows to what columns name."""
        raise ValueError(f"attention: a {self.name} checkpoint has no attention to draw")

    # ---- shared ----------------------------------------------------------------------------------------

    def make(self, layers: ModuleType = seqkern.nn) -> None:
        """Builds the model from the config's seed: the same parameters on any `layers`."""
        torch.manual_seed(self.config.seed)
        self.model = self.build(layers)
        if self.config.orthogonal:
            orthogonal_(self.model)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.figures(model, self.valid)

    def description(self) -> dict[str, Any]:
        return {
            "recipe": self.name,
            "config": dataclasses.asdict(self.config),
            "vocabularies": {name: _to_state(v) for name, v in self.vocabularies.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the vocabularies and the trained model of a checkpoint; the model is in eval mode."""
        for name, vocabulary in state["vocabularies"].items():
            self.vocabularies[name] = _from_state(vocabulary)
        self.make()
        self.model.load_state_dict(state["model"])
        self.model.eval()


def _to_state(vocabulary: Any) -> dict[str, Any]:
    return {"kind": type(vocabulary).__name__, **vocabulary.to_dict()}


def _from_state(state: dict[str, Any]) -> Any:
    values = {key: value for key, value in state.items() if key != "kind"}
    return VOCABULARIES[state["kind"]].from_dict(values)


# ---- finding files -----------------------------------------------------------------------------------

_SPLITS = {"train": "train(ing)?", "valid": "valid(ation)?|val|dev(el)?|testa", "test": "testb?"}


def find(path: Path, split: str, ending: str = "") -> Path | None:
    """The file of a folder whose name tells the split: train.tsv.gz, en_ewt-ud-dev.conllu, TREC.test.all, …

    Args:     split: "train", "valid" or "test";  ending: what the name ends with, but for .gz
    Raises:   CorpusError: no such folder
    """
    if not path.is_dir():
        raise CorpusError(f"corpus: no file or folder at {path}")
    word = re.compile(rf"(?<![a-z])({_SPLITS[split]})(?![a-z])")
    for file in sorted(path.iterdir()):
        name = file.name.lower().removesuffix(".gz")
        documents = name.startswith((".", "_", "readme", "license")) or name.endswith(".md")
        if file.is_file() and not documents and word.search(name) and name.endswith(ending):
            return file
    return None


def found(file: Path | None, path: Path, split: str, ending: str = "") -> Path:
    """`file`. CorpusError where it is None: `path` has no such split."""
    if file is None:
        raise CorpusError(f"corpus: no file of the {split} split (a name such as {split}…{ending}) in {path}")
    return file


def training_texts(path: Path | None, held_out: float) -> tuple[list[str], list[str]]:
    """Training and validation texts: of a folder the files of these names, else a share is held out.

    Without a path, English at hand: docstrings of the standard library.
    """
    if path is not None and path.is_dir():
        train_file, valid_file = find(path, "train"), find(path, "valid")
        if train_file is not None and valid_file is not None:
            train, valid = read_texts(train_file), read_texts(valid_file)
            return [text.text for text in train], [text.text for text in valid]
    train, valid = split_texts(toy.prose() if path is None else read_texts(path), held_out)
    return [text.text for text in train], [text.text for text in valid]


def text_split(path: Path, split: str, held_out: float) -> list[str]:
    """The texts of a split of a folder, or of a file.

    Raises:   CorpusError: no such split
    """
    file = path if path.is_file() else find(path, split)
    if file is None and split == "valid":
        return training_texts(path, held_out)[1]
    return [text.text for text in read_texts(found(file, path, split))]


# ---- batches -------------------------------------------------------------------------------------------


def bucketed(lengths: Sequence[int], batch: int, seed: int) -> Callable[[int], list[list[int]]]:
    """An order for ExampleBatches: batches of like length."""
    sampler = BucketSampler(lengths, batch, seed=seed)

    def order(epoch: int) -> list[list[int]]:
        sampler.set_epoch(epoch)
        return list(sampler)

    return order


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """The indices of `lengths` in batches, the shortest first: for evaluation."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def drop_words(ids: Tensor, rate: float) -> Tensor:
    """ids with a share of them unknown: what is learned of <unk>, and without each word, serves new text."""
    return torch.where(torch.rand(ids.shape, device=ids.device) < rate, UNK, ids) if rate else ids


def scale_embedding(model: Any, deviation: float) -> Any:
    """Gives the model's embedding small values in the place of torch's, of deviation 1.

    Vectors of rare words stay near where they began: small ones say little, large ones much at random.
    """
    with torch.no_grad():
        model.embedding.weight.mul_(deviation)
    return model


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
