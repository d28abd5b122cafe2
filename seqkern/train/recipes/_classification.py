"""What the recipes that give a text one of several labels share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models import RNNClassifier
from seqkern.text import Labelled, Vocabulary, collate
from seqkern.train.batches import ExampleBatches, to_device
from seqkern.train.config import Training, option
from seqkern.train.metrics import accuracy, f1
from seqkern.train.recipes._recipe import (
    PAD,
    Recipe,
    bucketed,
    by_length,
    device_of,
    drop_words,
    scale_embedding,
)


@dataclass(frozen=True)
class ClassificationConfig(Training):
    min_freq: int = option(1, "tokens that occur less often in the training data are unknown")
    max_tokens: int = option(400, "of a longer text, the first quarter of this and the last three are read")
    embed_std: float = option(0.3, "deviation of the tokens' vectors before training (not transformer)")
    word_dropout: float = option(0.0, "share of the tokens that training replaces by the unknown one")


class Classification(Recipe):
    """A recipe defines records, tokenize and build; its model is called with (ids [B, T], lengths [B])."""

    metric = "accuracy"

    def records(self, path: Path | None) -> tuple[list[Labelled], list[Labelled]]:
        """Training and validation data."""
        raise NotImplementedError

    def tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def build_rnn(self, layers: ModuleType, **options: Any) -> nn.Module:
        """The bidirectional RNNClassifier that a config of cell, sizes and dropout describes."""
        c = self.config
        model = RNNClassifier(
            len(self.vocabularies["tokens"]),
            *(c.embed_dim, c.hidden_size, len(self.vocabularies["labels"])),
            cell=c.cell,
            num_layers=c.num_layers,
            bidirectional=True,
            dropout=c.dropout,
            padding_idx=PAD,
            layers=layers,
            **options,
        )
        return scale_embedding(model, c.embed_std)

    def read(self, path: Path | None) -> None:
        config = self.config
        train, valid = self.records(path)
        tokens = [self.tokenize(record.text) for record in train]
        self.vocabularies["tokens"] = Vocabulary.build(
            tokens, min_freq=config.min_freq, specials=("<unk>", "<pad>")
        )
        labels = sorted({record.label for record in train})
        self.vocabularies["labels"] = Vocabulary(labels, specials=(), default=None)
        examples = [(self._ids(t), self._label(r)) for t, r in zip(tokens, train, strict=True)]
        self.valid = self.encode(valid)
        order = bucketed([len(ids) for ids, _ in examples], config.batch, config.seed)
        self.batches = ExampleBatches(examples, order, self.collate, lambda batch: len(batch[2]))

    def encode(self, records: Sequence[Labelled]) -> list[tuple[list[int], int]]:
        return [(self._ids(self.tokenize(record.text)), self._label(record)) for record in records]

    def _ids(self, tokens: list[str]) -> list[int]:
        ids = self.vocabularies["tokens"].encode(tokens)
        if len(ids) <= self.config.max_tokens:
            return ids
        # Head and tail of long texts: Sun et al. 2019, "How to Fine-Tune BERT for Text Classification"
        head = self.config.max_tokens // 4
        return ids[:head] + ids[head - self.config.max_tokens :]

    def _label(self, record: Labelled) -> int:
        return self.vocabularies["labels"][record.label]

    @staticmethod
    def collate(examples: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
        return collate(examples, pad=PAD)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        ids, lengths, labels = batch
        logits = model(drop_words(ids, self.config.word_dropout), lengths)
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing, reduction="sum")

    def log_probabilities(self, model: nn.Module, examples: Sequence[tuple[list[int], int]]) -> Tensor:
        """[N, classes], on the CPU."""
        result = torch.empty(len(examples), len(self.vocabularies["labels"]))
        for indices in by_length([len(ids) for ids, _ in examples], 2 * self.config.batch):
            ids, lengths, _ = to_device(self.collate([examples[i] for i in indices]), device_of(model))
            result[indices] = F.log_softmax(model(ids, lengths), -1).float().cpu()
        return result

    def figures(self, model: nn.Module, examples: Any, *, final: bool = False) -> dict[str, float]:
        log_p = self.log_probabilities(model, examples)
        labels = [label for _, label in examples]
        guesses = log_p.argmax(1).tolist()
        return {
            "accuracy": accuracy(guesses, labels),
            "f1": f1(guesses, labels),
            "loss": F.nll_loss(log_p, torch.tensor(labels)).item(),
        }

    def predict(self, model: nn.Module, texts: Sequence[str]) -> Iterator[str]:
        examples = [(self._ids(self.tokenize(text)), 0) for text in texts]
        labels = self.vocabularies["labels"].tokens
        for row in self.log_probabilities(model, examples).exp().tolist():
            shares = {label: round(p, 4) for label, p in zip(labels, row, strict=True)}
            yield json.dumps({"label": max(shares, key=shares.__getitem__), "probabilities": shares})
