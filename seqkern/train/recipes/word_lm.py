"""A word-level language model: WikiText's files, any other text, or the standard library's docstrings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from seqkern.text import WordCorpus, read_texts, read_words, toy
from seqkern.train.config import changed, option
from seqkern.train.metrics import perplexity
from seqkern.train.recipes._language import LanguageConfig, LanguageModelling
from seqkern.train.tbptt import nats_per_token


@dataclass(frozen=True)
class WordLMConfig(LanguageConfig):
    epochs: int = changed("epochs", 40)
    window: int = option(70, "steps through which gradients go")
    clip: float = changed("clip", 0.25)
    weight_decay: float = changed("weight_decay", 1e-6)
    embed_dim: int = option(650, "size of the tokens' vectors")
    hidden_size: int = option(650, "of each layer")
    num_layers: int = option(2, "recurrent layers")
    dropout: float = option(0.5, "of embedded words, between layers and before the output")
    embedding_dropout: float = option(0.1, "share of the vocabulary left out at each update")
    tie: bool = option(True, "output and embedding share their weights: embed_dim = hidden_size")
    min_freq: int = option(1, "words that occur less often in the training data are unknown")
    max_size: int = option(50_000, "most words in the vocabulary")


class WordLM(LanguageModelling):
    name = "word-lm"

    def read(self, path: Path | None) -> None:
        corpus = self.corpus(path)
        self.vocabularies["tokens"] = corpus.vocabulary
        self.train, self.valid = corpus.train, corpus.held_out
        self.make_batches()

    def corpus(self, path: Path | None) -> WordCorpus:
        limits = {"min_freq": self.config.min_freq, "max_size": self.config.max_size}
        if path is not None and (files := self.files(path)):
            train, valid = (read_words(file) for file in files)
            return WordCorpus.from_lines(train, [valid], **limits)
        texts = toy.prose() if path is None else read_texts(path)
        return WordCorpus.from_texts(texts, held_out=self.config.held_out, **limits)

    def streams(self, path: Path) -> list[Tensor]:
        vocabulary = self.vocabularies["tokens"]
        return [torch.tensor([i for line in read_words(path) for i in vocabulary.encode(line)])]

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.vocabularies["tokens"].encode(text.split()), dtype=torch.int64)

    def decode(self, ids: list[int]) -> str:
        words = self.vocabularies["tokens"].decode(ids)
        return " ".join(words).replace(" <eos> ", "\n").replace("<eos>", "\n")

    def figures(self, model: nn.Module, examples: list[Tensor], *, final: bool = False) -> dict[str, float]:
        nats = nats_per_token(model, examples, T=256)
        return {"nats": nats, "perplexity": perplexity(nats)}
