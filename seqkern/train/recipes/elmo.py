"""Contextual word vectors: a language model in both directions, over words read from their characters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from seqkern.models import BidirectionalLanguageModel, CharacterOptions
from seqkern.text import CorpusError, Vocabulary, basic_english, collate
from seqkern.train.batches import ExampleBatches, to_device
from seqkern.train.config import Schedule, Training, changed, option
from seqkern.train.metrics import perplexity
from seqkern.train.recipes._characters import character_ids, character_vocabulary
from seqkern.train.recipes._recipe import (
    PAD,
    Recipe,
    bucketed,
    by_length,
    device_of,
    text_split,
    training_texts,
)

BEGIN, END = "<s>", "</s>"


@dataclass(frozen=True)
class ElmoConfig(Training):
    batch: int = option(32, "sentences in a batch of all processes together")
    schedule: Schedule = changed("schedule", "cosine")
    char_dim: int = option(16, "size of the characters' vectors")
    filters: int = option(32, "convolutions of width 1 and of 2; of 3 twice, of 4 four times as many")
    highways: int = option(1, "highway layers behind the convolutions")
    hidden_size: int = option(512, "of each LSTM's cell")
    proj_size: int = option(128, "of each LSTM's output: a word's vectors have twice as many elements")
    num_layers: int = option(2, "LSTMs in each direction")
    dropout: float = option(0.1, "of each LSTM's input, and before the output")
    min_freq: int = option(2, "words that occur less often in the training data are predicted as unknown")
    max_size: int = option(20_000, "most words that are predicted")
    max_words: int = option(60, "longer lines are cut into pieces of so many")
    held_out: float = option(0.1, "share of the text kept for validation, where it has no file of its own")


class Elmo(Recipe):
    name = "elmo"
    metric = "nats"
    minimise = True

    def read(self, path: Path | None) -> None:
        train, valid = map(self._sentences, training_texts(path, self.config.held_out))
        if not train or not valid:
            raise CorpusError(
                "corpus: too little text: expected lines to learn from and lines to validate with"
            )
        c = self.config
        self.vocabularies["tokens"] = Vocabulary.build(
            train, min_freq=c.min_freq, max_size=c.max_size, specials=("<unk>", "<pad>")
        )
        self.vocabularies["characters"] = character_vocabulary(word for s in train for word in s)
        self.valid = valid
        order = bucketed([len(sentence) for sentence in train], c.batch, c.seed)
        self.batches = ExampleBatches(train, order, self.collate, _targets)

    def _sentences(self, texts: Sequence[str]) -> list[list[str]]:
        n = self.config.max_words
        lines = (basic_english(line) for text in texts for line in text.splitlines())
        return [[BEGIN, *line[i : i + n], END] for line in lines for i in range(0, len(line), n)]

    def read_split(self, path: Path, split: str) -> list[list[str]]:
        return self._sentences(text_split(path, split, self.config.held_out))

    def collate(self, sentences: Sequence[list[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """Characters [B, T, C], words [B, T], lengths [B]."""
        tokens = self.vocabularies["tokens"]
        words, lengths, _ = collate([(tokens.encode(s), 0) for s in sentences], pad=PAD)
        return character_ids(self.vocabularies["characters"], sentences), words, lengths

    def build(self, layers: ModuleType) -> nn.Module:
        c = self.config
        n = c.filters
        chars = CharacterOptions(
            len(self.vocabularies["characters"]),
            c.char_dim,
            "cnn",
            filters=((1, n), (2, n), (3, 2 * n), (4, 4 * n)),
            highways=c.highways,
        )
        return BidirectionalLanguageModel(
            len(self.vocabularies["tokens"]),
            chars,
            c.hidden_size,
            c.num_layers,
            proj_size=c.proj_size,
            dropout=c.dropout,
            layers=layers,
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        chars, words, lengths = batch
        return model.loss(chars, words, lengths) * _targets(batch)

    def figures(self, model: nn.Module, examples: Any, *, final: bool = False) -> dict[str, float]:
        total, targets = 0.0, 0
        for indices in by_length([len(s) for s in examples], 64):
            batch = self.collate([examples[i] for i in indices])
            total += self.loss(model, to_device(batch, device_of(model))).item()
            targets += _targets(batch)
        nats = total / targets
        return {"nats": nats, "perplexity": perplexity(nats)}

    def predict(self, model: nn.Module, texts: Sequence[str]) -> Iterator[str]:
        """Each text's words and their vectors: the mean of the layers, as an untrained ScalarMix gives it."""
        for text in texts:
            words = basic_english(text)
            chars, _, lengths = to_device(self.collate([[BEGIN, *words, END]]), device_of(model))
            vectors = model.vectors(chars, lengths).mean(0)[0, 1:-1]
            yield json.dumps({"words": words, "vectors": vectors.cpu().tolist()})


def _targets(batch: tuple[Tensor, Tensor, Tensor]) -> int:
    """Predictions in both directions: two for each pair of neighbours."""
    return 2 * int((batch[2] - 1).clamp(min=0).sum())
