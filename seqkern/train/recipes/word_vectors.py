"""Word vectors: a word from the mean of its neighbours (CBOW), or each neighbour from a word (skip-gram).

Source: Mikolov et al. 2013, "Efficient Estimation of Word Representations in Vector Space", and, of leaving
out frequent words at random, "Distributed Representations of Words and Phrases and their Compositionality".
The softmax is over the whole vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models import EmbeddingModel
from seqkern.text import CorpusError, Vocabulary, WordVectors, basic_english
from seqkern.train.batches import ExampleBatches, shuffled, to_device
from seqkern.train.config import Training, changed, option
from seqkern.train.metrics import perplexity
from seqkern.train.recipes._recipe import PAD, UNK, Recipe, device_of, text_split, training_texts


@dataclass(frozen=True)
class WordVectorsConfig(Training):
    epochs: int = changed("epochs", 5)
    batch: int = option(512, "examples in a batch of all processes together")
    lr: float = changed("lr", 2e-3)
    model: Literal["cbow", "skip-gram"] = option("cbow", "cbow or skip-gram")
    embed_dim: int = option(100, "size of the vectors")
    window: int = option(4, "words on either side")
    min_freq: int = option(5, "words that occur less often in the training data are unknown")
    max_size: int = option(10_000, "most words in the vocabulary")
    subsample: float = option(
        1e-3, "a word's share of the text above which some of it is left out (0: none is)"
    )
    held_out: float = option(0.1, "share of the text kept for validation, where it has no file of its own")


class Vectors(Recipe):
    name = "word-vectors"
    metric = "nats"
    minimise = True

    def read(self, path: Path | None) -> None:
        config = self.config
        train, valid = training_texts(path, self.config.held_out)
        words = [basic_english(text) for text in train]
        self.vocabularies["tokens"] = Vocabulary.build(
            words, min_freq=config.min_freq, max_size=config.max_size, specials=("<unk>", "<pad>")
        )
        inputs, targets = self._examples(words, config.subsample)
        self.valid = self.encode(valid)

        def collate(indices: list[int]) -> tuple[Tensor, Tensor]:
            return inputs[indices], targets[indices]

        order = shuffled(len(targets), config.batch, config.seed)
        self.batches = ExampleBatches(range(len(targets)), order, collate)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self._examples([basic_english(text) for text in texts], 0.0)

    def _examples(self, texts: list[list[str]], subsample: float) -> tuple[Tensor, Tensor]:
        """Inputs [N, C] and targets [N].

        CBOW's inputs are 2·window neighbours, at a text's ends padding; skip-gram's are one word.
        """
        w, vocabulary = self.config.window, self.vocabularies["tokens"]
        generator = torch.Generator().manual_seed(self.config.seed)
        contexts, centres = [], []
        for text in texts:
            ids = torch.tensor(vocabulary.encode(text), dtype=torch.int64)
            ids = ids[ids != UNK]
            if subsample:
                share = torch.bincount(ids, minlength=len(vocabulary))[ids] / max(len(ids), 1)
                ids = ids[torch.rand(len(ids), generator=generator) < (subsample / share).sqrt()]
            if len(ids) > 1:
                padded = F.pad(ids, (w, w), value=PAD).unfold(0, 2 * w + 1, 1)  # [n, 2w + 1]
                contexts.append(torch.cat([padded[:, :w], padded[:, w + 1 :]], 1))
                centres.append(ids)
        if not centres:
            raise CorpusError("corpus: too little text: no two known words follow each other")
        context, centre = torch.cat(contexts), torch.cat(centres)
        if self.config.model == "cbow":
            return context, centre
        rows, columns = (context != PAD).nonzero(as_tuple=True)
        return centre[rows].unsqueeze(1), context[rows, columns]

    def read_split(self, path: Path, split: str) -> tuple[Tensor, Tensor]:
        return self.encode(text_split(path, split, self.config.held_out))

    def build(self, layers: ModuleType) -> nn.Module:
        return EmbeddingModel(
            len(self.vocabularies["tokens"]), self.config.embed_dim, padding_idx=PAD, layers=layers
        )

    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(*_left_aligned(inputs))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        smoothing = self.config.label_smoothing
        return F.cross_entropy(
            self._logits(model, inputs), targets, label_smoothing=smoothing, reduction="sum"
        )

    def figures(self, model: nn.Module, examples: Any, *, final: bool = False) -> dict[str, float]:
        total, device = 0.0, device_of(model)
        for inputs, targets in zip(*(part.split(4096) for part in examples), strict=True):
            inputs, targets = to_device((inputs, targets), device)
            total += F.cross_entropy(self._logits(model, inputs), targets, reduction="sum").item()
        nats = total / len(examples[1])
        return {"nats": nats, "perplexity": perplexity(nats)}

    def predict(self, model: nn.Module, texts: Sequence[str]) -> Iterator[str]:
        """The words nearest to a word, or to an analogy such as "king - man + woman"."""
        vectors = WordVectors(self.vocabularies["tokens"].tokens, model.embedding.weight.cpu())
        for text in texts:
            signs, words = [1], []
            for part in text.split():
                if part in "+-":
                    signs.append(1 if part == "+" else -1)
                else:
                    words.append(part)
            if len(words) != len(signs):
                raise ValueError(f"predict: expected a word, or words joined by + and -, got {text!r}")
            positive = [word for sign, word in zip(signs, words, strict=True) if sign > 0]
            negative = [word for sign, word in zip(signs, words, strict=True) if sign < 0]
            nearest = vectors.analogy(positive, negative, k=10)
            yield json.dumps(
                {"words": text, "nearest": [[word, round(cosine, 4)] for word, cosine in nearest]}
            )


def _left_aligned(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with their padding at the end, and their lengths: a mean does not mind the order."""
    return inputs.sort(dim=1, descending=True).values, (inputs != PAD).sum(1)
