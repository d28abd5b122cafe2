"""A character-level language model: of a text file (its end is held out), or a folder of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from seqkern.text import CharCorpus, CharVocabulary, CorpusError, read_texts, standard_library
from seqkern.train.config import changed, option
from seqkern.train.metrics import bits
from seqkern.train.recipes._language import LanguageConfig, LanguageModelling
from seqkern.train.tbptt import nats_per_token


@dataclass(frozen=True)
class CharLMConfig(LanguageConfig):
    epochs: int = changed("epochs", 15)
    lr: float = changed("lr", 3e-3)
    evaluate_every: int = changed("evaluate_every", 1000)
    dropout: float = option(0.2, "of embedded characters, between layers and before the output")
    max_characters: int = option(4_000_000, "of the training text (0: all)")


class CharLM(LanguageModelling):
    name = "char-lm"

    def read(self, path: Path | None) -> None:
        limit = self.config.max_characters or None
        files = path and self.files(path)
        if files:
            train, valid = ([text.text for text in read_texts(file)] for file in files)
            self.vocabularies["tokens"] = CharVocabulary.of("".join(train)[:limit])
            self.train, self.valid = self._stream("".join(train)[:limit]), [self._stream(v) for v in valid]
        else:
            corpus = self.corpus(path)
            self.vocabularies["tokens"] = corpus.vocabulary
            self.train, self.valid = corpus.train, corpus.held_out
        self.make_batches()

    def corpus(self, path: Path | None) -> CharCorpus:
        """Text without files of its own for validation."""
        texts = standard_library() if path is None else read_texts(path)
        if not texts:
            raise CorpusError("corpus: this Python's standard library comes without .py files; name --data")
        limit = self.config.max_characters or None
        return CharCorpus.from_texts(
            texts, held_out=self.config.held_out, min_share=1e-6, max_characters=limit
        )

    def streams(self, path: Path) -> list[Tensor]:
        return [self._stream(text.text) for text in read_texts(path)]

    def _stream(self, text: str) -> Tensor:
        """A file's ids, a boundary first, as CharCorpus has them."""
        boundary = torch.tensor([self.vocabularies["tokens"].BOUNDARY])
        return torch.cat([boundary, self.encode(text)])

    def encode(self, text: str) -> Tensor:
        return self.vocabularies["tokens"].encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.vocabularies["tokens"].decode(ids)

    def figures(self, model: nn.Module, examples: list[Tensor], *, final: bool = False) -> dict[str, float]:
        nats = nats_per_token(model, examples, T=256)
        return {"nats": nats, "bits": bits(nats)}
