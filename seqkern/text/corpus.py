"""Texts for language models: whole files or their ends held out, ids in one stream, windows of it.

read_texts / standard_library   files of a path, or of Python's own standard library
  → CharCorpus.from_texts       whole files held out by a hash of their names; characters become ids
    WordCorpus.from_texts       the same with words, <eos> after each line
    WordCorpus.from_lines       files that are split already, such as WikiText's
    → Windows                   [T, B] inputs and targets for truncated BPTT; row b goes on in the next window
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seqkern.text.characters import CharVocabulary
from seqkern.text.files import CorpusError, Text, read_lines
from seqkern.text.tokenization import word_tokenize
from seqkern.text.vocabulary import Vocabulary

EOS = "<eos>"


def split(texts: Sequence[Text], held_out: float) -> tuple[list[Text], list[Text]]:
    """Training and held-out files, by a hash of each file's name; both in hash order (a fixed shuffle).

    A share of about `held_out`, at least one file, at most all but one; its name decides a file's side.
    A single file is cut instead: its end is held out.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    if not texts:
        raise CorpusError("corpus: no files")
    if len(texts) == 1:
        (only,) = texts
        cut = min(round(len(only.text) * (1 - held_out)), len(only.text) - 1)
        return [Text(only.name, only.text[:cut])], [Text(f"{only.name} (its end)", only.text[cut:])]
    shuffled = sorted(texts, key=lambda text: _hash_of(text.name))
    n = sum(_hash_of(text.name) < held_out for text in shuffled)
    n = min(max(n, 1), len(texts) - 1)
    return shuffled[n:], shuffled[:n]


def _hash_of(name: str) -> float:
    """A number in [0, 1) that depends on `name` only: Python's own hash() changes with every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _first_characters(texts: Sequence[Text], limit: int) -> list[Text]:
    """The first `limit` characters of `texts`: whole files, then the beginning of one."""
    kept = []
    for text in texts:
        if limit <= 0:
            break
        kept.append(Text(text.name, text.text[:limit]))
        limit -= len(text.text)
    return kept


@dataclass(frozen=True)
class CharCorpus:
    """A corpus as ids.

    train:     int64 [N], the training files one after the other, a boundary before each and after the last
    held_out:  one int64 [n] per held-out file, a boundary first
    """

    vocabulary: CharVocabulary
    train: Tensor
    held_out: list[Tensor]

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[Text],
        *,
        held_out: float = 0.05,
        min_share: float = 0.0,
        max_characters: int | None = None,
    ) -> CharCorpus:
        """Splits, takes the vocabulary from the training files alone, and encodes.

        max_characters: at most so many of the training files together, and a tenth as many of the others
        """
        train, held = split(texts, held_out)
        if max_characters is not None:
            train = _first_characters(train, max_characters)
            held = _first_characters(held, max_characters // 10)
        vocabulary = CharVocabulary.of("".join(text.text for text in train), min_share=min_share)
        boundary = torch.tensor([vocabulary.BOUNDARY])
        stream = [piece for text in train for piece in (boundary, vocabulary.encode(text.text))]
        files = [torch.cat([boundary, vocabulary.encode(text.text)]) for text in held]
        return cls(vocabulary, torch.cat([*stream, boundary]), files)


def read_words(
    path: str | Path, *, tokenize: Callable[[str], list[str]] = word_tokenize, encoding: str = "utf-8"
) -> Iterator[list[str]]:
    """The tokens of each line of a text file, blank ones included, with <eos> after them. Streams.

    So WikiText-2 is read: 2,088,628, 217,646 and 245,569 tokens.

    Raises:   CorpusError: as read_lines
    """
    return ([*tokenize(line), EOS] for line in read_lines(path, encoding=encoding))


@dataclass(frozen=True)
class WordCorpus:
    """A corpus as ids of words; the vocabulary is that of the training part, with <unk> 0 and <eos> 1.

    train:     int64 [N]
    held_out:  one int64 [n] per held-out file
    """

    vocabulary: Vocabulary
    train: Tensor
    held_out: list[Tensor]

    @classmethod
    def from_lines(
        cls,
        train: Iterable[Sequence[str]],
        held_out: Sequence[Iterable[Sequence[str]]] = (),
        *,
        min_freq: int = 1,
        max_size: int | None = None,
    ) -> WordCorpus:
        """
        Args:     train: token lists, as read_words gives them
                  held_out: the same of each other file
                  min_freq, max_size: as Vocabulary.build has them
        """
        # The training part is read once: ids by appearance first, from which the real ones are looked up.
        seen: dict[str, int] = {}
        stream = array("q")
        for line in train:
            stream.extend(seen.setdefault(token, len(seen)) for token in line)
        if not stream:
            raise CorpusError("corpus: no tokens to learn from")
        ids = torch.frombuffer(stream, dtype=torch.int64)
        counts = dict(zip(seen, torch.bincount(ids).tolist(), strict=True))
        vocabulary = Vocabulary.from_counts(
            counts, min_freq=min_freq, max_size=max_size, specials=("<unk>", EOS)
        )
        held = [
            torch.tensor([i for line in lines for i in vocabulary.encode(line)], dtype=torch.int64)
            for lines in held_out
        ]
        return cls(vocabulary, torch.tensor(vocabulary.encode(list(seen)))[ids], held)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[Text],
        *,
        tokenize: Callable[[str], list[str]] = word_tokenize,
        held_out: float = 0.05,
        min_freq: int = 1,
        max_size: int | None = None,
    ) -> WordCorpus:
        """Splits, takes the vocabulary from the training files alone, and encodes, <eos> after each line."""

        def lines(text: Text) -> Iterator[list[str]]:
            return ([*tokenize(line), EOS] for line in text.text.removesuffix("\n").split("\n"))

        train, held = split(texts, held_out)
        words = (line for text in train for line in lines(text))
        return cls.from_lines(words, list(map(lines, held)), min_freq=min_freq, max_size=max_size)


class Windows:
    """A stream cut into B contiguous rows, and the rows into windows of T steps.

        stream:   [N] ids
        self[i]:  inputs [T, B], targets [T, B]; targets[t] is the id after inputs[t], and
                  self[i + 1] goes on, in every row, where self[i] stopped.

    Raises:   CorpusError: the stream is too short for one window
    """

    def __init__(self, stream: Tensor, B: int, T: int) -> None:
        (N,) = stream.shape
        self.T = T
        self._length = (N // B - 1) // T
        if self._length < 1:
            raise CorpusError(
                f"corpus: {N} ids are too few for {B} rows of {T} steps (at least {B * (T + 1)})"
            )
        self._rows = stream[: N // B * B].view(B, N // B).t()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < self._length:
            raise IndexError(f"window {i} of {self._length}")
        start, stop = i * self.T, (i + 1) * self.T
        return self._rows[start:stop].contiguous(), self._rows[start + 1 : stop + 1].contiguous()
