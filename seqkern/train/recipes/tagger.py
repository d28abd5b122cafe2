"""A tag for each word: named entities (CoNLL columns, BIO) or parts of speech (CoNLL-U)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import Tensor, nn

from seqkern.models import BiLSTMCRF, CharacterOptions, RNNTagger
from seqkern.nn import bio_constraints
from seqkern.text import Tagged, Vocabulary, collate_pairs, read_conll, read_conllu, toy
from seqkern.train.batches import ExampleBatches, to_device
from seqkern.train.config import Schedule, Training, changed, option
from seqkern.train.metrics import accuracy, span_f1
from seqkern.train.recipes._characters import character_ids, character_vocabulary
from seqkern.train.recipes._recipe import (
    PAD,
    UNK,
    Recipe,
    bucketed,
    by_length,
    device_of,
    find,
    found,
    scale_embedding,
)


@dataclass(frozen=True)
class TaggerConfig(Training):
    task: Literal["ner", "pos"] = option("ner", "ner (judged by the entities' F1) or pos (by accuracy)")
    crf: Literal["auto", "yes", "no"] = option("auto", "a CRF over the tags: yes, no, or auto: for ner")
    epochs: int = changed("epochs", 15)
    batch: int = option(16, "sentences in a batch of all processes together")
    lr: float = changed("lr", 3e-3)
    clip: float = changed("clip", 5.0)
    schedule: Schedule = changed("schedule", "cosine")
    orthogonal: bool = changed("orthogonal", True)
    embed_dim: int = option(100, "size of the words' vectors")
    embed_std: float = option(0.1, "deviation of the words' vectors before training")
    hidden_size: int = option(200, "of each direction")
    num_layers: int = option(1, "recurrent layers")
    dropout: float = option(0.3, "of words' vectors, between layers and before the output")
    word_dropout: float = option(0.15, "share of the words that training replaces by the unknown one")
    characters: Literal["none", "lstm", "cnn"] = option(
        "cnn", "what reads the words' characters, if anything"
    )
    char_dim: int = option(30, "size of the characters' vectors")
    char_size: int = option(100, "of what is read of a word's characters")
    column: str = option("upos", "of CoNLL-U: upos, xpos or another")


class Tagger(Recipe):
    name = "tagger"

    def __init__(self, config: Training) -> None:
        super().__init__(config)
        self.metric = "f1" if self.config.task == "ner" else "accuracy"

    def read(self, path: Path | None) -> None:
        config = self.config
        if path is None:
            sentences = toy.entities() if config.task == "ner" else toy.parts_of_speech()
            train, valid = sentences[100:], sentences[:100]
        elif path.is_file():
            sentences = self._read(path)
            train, valid = [s for i, s in enumerate(sentences) if i % 10], sentences[::10]
        else:
            train, valid = (self._read(found(find(path, split), path, split)) for split in ("train", "valid"))
        words = [[normal(word) for word in sentence.tokens] for sentence in train]
        self.vocabularies["tokens"] = Vocabulary.build(words, specials=("<unk>", "<pad>"))
        tags = sorted({tag for sentence in train for tag in sentence.tags})
        self.vocabularies["tags"] = Vocabulary(tags, specials=(), default=None)
        self.vocabularies["characters"] = character_vocabulary(word for s in train for word in s.tokens)
        self.valid = valid
        order = bucketed([len(s.tokens) for s in train], config.batch, config.seed)
        self.batches = ExampleBatches(train, order, self.collate, lambda batch: int(batch[1].sum()))

    def _read(self, path: Path) -> list[Tagged]:
        """CoNLL-U where the name says so, else columns."""
        if ".conllu" in path.name:
            return list(read_conllu(path, column=self.config.column))
        return list(read_conll(path))

    def read_split(self, path: Path, split: str) -> list[Tagged]:
        return self._read(path if path.is_file() else found(find(path, split), path, split))

    def collate(self, sentences: Sequence[Tagged]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Words [B, T], lengths [B], tags [B, T], characters [B, T, C]."""
        tokens, tags = self.vocabularies["tokens"], self.vocabularies["tags"]
        rows = [
            (
                tokens.encode([normal(w) for w in s.tokens]),
                tags.encode(s.tags) if s.tags else [0] * len(s.tokens),
            )
            for s in sentences
        ]
        ids, lengths, targets, _ = collate_pairs(rows, pad=PAD, target_pad=0)
        return ids, lengths, targets, self._characters(sentences)

    def _characters(self, sentences: Sequence[Tagged]) -> Tensor | None:
        if self.config.characters == "none":
            return None
        return character_ids(self.vocabularies["characters"], [s.tokens for s in sentences])

    def build(self, layers: ModuleType) -> nn.Module:
        c = self.config
        chars = None
        if c.characters != "none":
            chars = CharacterOptions(
                len(self.vocabularies["characters"]),
                c.char_dim,
                c.characters,
                hidden_size=c.char_size // 2,
                filters=((3, c.char_size),),
                dropout=0.3 * c.dropout,
            )
        tags = self.vocabularies["tags"].tokens
        sizes = (len(self.vocabularies["tokens"]), len(tags), c.embed_dim, c.hidden_size)
        options: dict[str, Any] = dict(
            chars=chars,
            num_layers=c.num_layers,
            dropout=c.dropout,
            word_dropout=c.word_dropout,
            unk_idx=UNK,
            padding_idx=PAD,
            layers=layers,
        )
        if c.crf == "yes" or (c.crf == "auto" and c.task == "ner"):
            constraints = bio_constraints(tags) if _are_bio(tags) else None
            model: nn.Module = BiLSTMCRF(*sizes, constraints=constraints, **options)
        else:
            model = RNNTagger(*sizes, bidirectional=True, **options)
        return scale_embedding(model, c.embed_std)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        ids, lengths, tags, chars = batch
        return model.negative_log_likelihood(model(ids, lengths, chars), tags, lengths).sum()

    def tags(self, model: nn.Module, sentences: Sequence[Tagged]) -> list[list[str]]:
        """The best tags of each sentence."""
        names = self.vocabularies["tags"].tokens
        results: list[list[str]] = [[] for _ in sentences]
        for indices in by_length([len(s.tokens) for s in sentences], 64):
            untagged = [Tagged(sentences[i].tokens, []) for i in indices]
            ids, lengths, _, chars = to_device(self.collate(untagged), device_of(model))
            for i, row in zip(indices, model.decode(ids, lengths, chars), strict=True):
                results[i] = [names[tag] for tag in row]
        return results

    def figures(self, model: nn.Module, examples: Any, *, final: bool = False) -> dict[str, float]:
        guesses, wanted = self.tags(model, examples), [s.tags for s in examples]
        each = accuracy([t for row in guesses for t in row], [t for row in wanted for t in row])
        return {"accuracy": each} | (span_f1(guesses, wanted) if self.config.task == "ner" else {})

    def predict(self, model: nn.Module, texts: Sequence[str]) -> Iterator[str]:
        """word/TAG of the words that spaces part."""
        sentences = [Tagged(text.split(), []) for text in texts]
        for sentence, tags in zip(sentences, self.tags(model, sentences), strict=True):
            yield " ".join(f"{word}/{tag}" for word, tag in zip(sentence.tokens, tags, strict=True))


def normal(word: str) -> str:
    """What a word's own vector is of: its letters in lower case, digits as 0. Characters tell the rest."""
    return re.sub(r"\d", "0", word.lower())


def _are_bio(tags: Sequence[str]) -> bool:
    return all(tag == "O" or tag.startswith(("B-", "I-")) for tag in tags)
