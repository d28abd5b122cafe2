"""Sentiment of reviews: IMDB's folder aclImdb, or files of labels and texts (SST-2's, or tab-separated).

SST-2, whose sentences are few and short:
    train sentiment --data SST2 model=gru num_layers=1 hidden_size=128 embed_dim=200 min_freq=2 batch=16 \\
        epochs=10 weight_decay=3e-5
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from seqkern.models import (
    GRUClassifier,
    GRUWithAttention,
    LSTMClassifier,
    SentimentLSTMWithAttention,
    TransformerClassifier,
)
from seqkern.text import Labelled, basic_english, read_imdb, read_labelled_lines, read_tsv, toy
from seqkern.train.config import Schedule, changed, option
from seqkern.train.recipes._classification import Classification, ClassificationConfig
from seqkern.train.recipes._recipe import PAD, device_of, find, found, scale_embedding


@dataclass(frozen=True)
class SentimentConfig(ClassificationConfig):
    epochs: int = changed("epochs", 6)
    schedule: Schedule = changed("schedule", "cosine")
    warmup: int = changed("warmup", 200)
    weight_decay: float = changed("weight_decay", 1e-5)
    average: float = changed("average", 0.998)
    orthogonal: bool = changed("orthogonal", True)
    min_freq: int = option(5, "tokens that occur less often in the training data are unknown")
    word_dropout: float = option(0.1, "share of the tokens that training replaces by the unknown one")
    model: Literal["lstm", "gru", "lstm-attention", "gru-attention", "transformer"] = option(
        "lstm", "lstm, gru, lstm-attention, gru-attention or transformer"
    )
    embed_dim: int = option(128, "size of the tokens' vectors; the Transformer's d_model")
    hidden_size: int = option(256, "of each direction; the Transformer's inner layer")
    num_layers: int = option(2, "recurrent or Transformer layers (gru-attention has one)")
    num_heads: int = option(4, "the Transformer's")
    dropout: float = option(
        0.5, "before the classifier and between layers; in the Transformer's layers 0.2 of it"
    )
    embedding_dropout: float = option(0.5, "of the tokens' vectors (not gru-attention, transformer)")
    pooling: Literal["last", "mean", "max"] = option(
        "max", "what lstm and gru classify: the last states, or the mean or maximum of all outputs"
    )
    tokens: Literal["basic-english", "spaces"] = option(
        "basic-english", "basic-english, or spaces: lower case, what they part, as in SST-2's n't and 's"
    )
    valid_rows: int = option(5000, "last training rows kept for validation, at most a fifth")


class Sentiment(Classification):
    name = "sentiment"

    def records(self, path: Path | None) -> tuple[list[Labelled], list[Labelled]]:
        if path is None:
            rows, valid = toy.sentiment(), []
        elif path.is_dir() and not _is_imdb_folder(path):
            rows = _read_file(found(find(path, "train"), path, "train"))
            file = find(path, "valid")
            valid = _read_file(file) if file else []
        else:
            rows, valid = self._read(path, "train"), []
        if not valid:
            n = min(self.config.valid_rows, len(rows) // 5)
            rows, valid = rows[: len(rows) - n], rows[len(rows) - n :]
        return rows, valid

    def read_split(self, path: Path, split: str) -> list[tuple[list[int], int]]:
        if _is_imdb_folder(path) and split == "valid":
            return self.encode(self.records(path)[1])
        if path.is_file() or _is_imdb_folder(path):
            return self.encode(self._read(path, split))
        file = find(path, split)
        if file is None and split == "valid":
            return self.encode(self.records(path)[1])
        return self.encode(_read_file(found(file, path, split)))

    @staticmethod
    def _read(path: Path, split: str) -> list[Labelled]:
        if path.is_file():
            return _read_file(path)
        rows = list(read_imdb(path, split))
        random.Random(0).shuffle(rows)  # in the folder, all negative ones come first
        return rows

    def tokenize(self, text: str) -> list[str]:
        return text.lower().split() if self.config.tokens == "spaces" else basic_english(text)

    def attention(self, model: nn.Module, text: str) -> tuple[Tensor, list[str], list[str]]:
        """What the class, in one row, is read from."""
        if "attention" not in self.config.model:
            return super().attention(model, text)
        tokens = self.tokenize(text)[: self.config.max_tokens]
        ids = torch.tensor([self.vocabularies["tokens"].encode(tokens)], device=device_of(model))
        logits, weights = model(ids, torch.tensor([len(tokens)], device=ids.device), need_weights=True)
        return weights, [self.vocabularies["labels"].token(int(logits.argmax()))], tokens

    def build(self, layers: ModuleType) -> nn.Module:
        model = self._build(layers)
        return model if self.config.model == "transformer" else scale_embedding(model, self.config.embed_std)

    def _build(self, layers: ModuleType) -> nn.Module:
        c = self.config
        V, classes = len(self.vocabularies["tokens"]), len(self.vocabularies["labels"])
        if c.model == "transformer":
            return TransformerClassifier(
                *(c.num_layers, c.embed_dim, c.num_heads, c.hidden_size, V, classes),
                maximum_position_encoding=c.max_tokens,
                dropout=0.2 * c.dropout,
                layers=layers,
            )
        if c.model == "gru-attention":
            return GRUWithAttention(V, c.embed_dim, c.hidden_size, classes, padding_idx=PAD, layers=layers)
        common = {"embedding_dropout": c.embedding_dropout, "padding_idx": PAD, "layers": layers}
        if c.model == "lstm-attention":
            return SentimentLSTMWithAttention(
                V, c.embed_dim, c.hidden_size, c.num_layers, classes, c.dropout, **common
            )
        kind = LSTMClassifier if c.model == "lstm" else GRUClassifier
        return kind(
            *(V, c.embed_dim, c.hidden_size, classes, c.num_layers),
            dropout=c.dropout,
            layer_dropout=c.dropout,
            pooling=c.pooling,
            **common,
        )


def _is_imdb_folder(path: Path) -> bool:
    return (path / "pos").is_dir() or (path / "train").is_dir() or (path / "test").is_dir()


def _read_file(path: Path) -> list[Labelled]:
    """Tab-separated where the name says so, else lines `label text`."""
    read = read_tsv if path.name.removesuffix(".gz").endswith(".tsv") else read_labelled_lines
    return list(read(path))
