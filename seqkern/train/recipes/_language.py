"""What the recipes of recurrent language models over a stream share: truncated BPTT, nats, sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models import RNNLanguageModel
from seqkern.text import Windows
from seqkern.train.batches import WindowBatches
from seqkern.train.config import Schedule, Training, changed, option
from seqkern.train.recipes._recipe import Recipe, device_of, find, found
from seqkern.train.tbptt import State, detach_state


@dataclass(frozen=True)
class LanguageConfig(Training):
    batch: int = option(32, "rows that are read side by side, in all processes together")
    window: int = option(100, "steps through which gradients go")
    schedule: Schedule = changed("schedule", "cosine")
    cell: str = option("lstm", "lstm, gru, rnn or another recurrent layer of seqkern.nn")
    embed_dim: int = option(128, "size of the tokens' vectors")
    hidden_size: int = option(512, "of each layer")
    num_layers: int = option(1, "recurrent layers")
    dropout: float = option(0.0, "of embedded tokens, between layers and before the output")
    locked: bool = option(True, "one dropout mask for all steps")
    embedding_dropout: float = option(0.0, "share of the vocabulary left out at each update")
    weight_dropout: float = option(0.0, "of the recurrent weights (seqkern's layers alone have it)")
    tie: bool = option(False, "output and embedding share their weights: embed_dim = hidden_size")
    held_out: float = option(0.1, "share of the text kept for validation, where it has no file of its own")


class LanguageModelling(Recipe):
    """A recipe sets, in read, train (a stream of ids) and valid (a list of them), and calls make_batches."""

    metric = "nats"
    minimise = True
    train: Tensor

    def make_batches(self) -> None:
        self.batches = WindowBatches(Windows(self.train, self.config.batch, self.config.window))
        self.state: State | None = None

    def build(self, layers: ModuleType) -> nn.Module:
        c = self.config
        regularisers = {"weight_dropout": c.weight_dropout} if c.weight_dropout else {}
        return RNNLanguageModel(
            *(len(self.vocabularies["tokens"]), c.embed_dim, c.hidden_size),
            cell=c.cell,
            num_layers=c.num_layers,
            dropout=c.dropout,
            locked=c.locked,
            embedding_dropout=c.embedding_dropout,
            tie_weights=c.tie,
            logits=True,
            batch_first=False,
            layers=layers,
            **regularisers,
        )

    def start_epoch(self) -> None:
        self.state = None

    def carried(self) -> Any:
        return self.state

    def carry(self, value: Any) -> None:
        self.state = value

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        logits, state = model(inputs, self.state)
        self.state = detach_state(state)
        smoothing = self.config.label_smoothing
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing, reduction="sum"
        )

    def generate(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, **sampling: Any
    ) -> str:
        ids = self.encode(prompt)
        if not len(ids):
            raise ValueError("generate: expected a prompt of at least one token")
        drawn = model.generate(ids.to(device_of(model)), length, generator=generator, **sampling)
        return self.decode(drawn.tolist())

    def read_split(self, path: Path, split: str) -> list[Tensor]:
        if path.is_dir():
            file = find(path, split)
            if file is None and split == "valid":
                return self.corpus(path).held_out
            path = found(file, path, split)
        return self.streams(path)

    def corpus(self, path: Path | None) -> Any:
        """Training data and held_out streams."""
        raise NotImplementedError

    def streams(self, path: Path) -> list[Tensor]:
        """A file's ids."""
        raise NotImplementedError

    def encode(self, text: str) -> Tensor:
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    @staticmethod
    def files(path: Path) -> tuple[Path, Path] | None:
        """The files of training and validation, of a folder that has both."""
        if path.is_file():
            return None
        train, valid = find(path, "train"), find(path, "valid")
        return (train, valid) if train and valid else None
