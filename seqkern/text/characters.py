"""Text for character-level language models: files in, id tensors out.

read_texts / standard_library   files of a path, or of Python's own standard library
  → CharCorpus.from_texts       whole files held out by a hash of their names; characters become ids
    → Windows                   [T, B] inputs and targets for truncated BPTT; row b goes on in the next window
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Tables, tests (often of invalid code) and other people's packages: not the text that one would learn from.
_NOT_LIBRARY_CODE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}


class CorpusError(ValueError):
    """A corpus that is missing, unreadable, empty or too short; the message says which."""


@dataclass(frozen=True)
class Text:
    """One file's contents. `name` is relative to the corpus' root: a split does not depend on the machine."""

    name: str
    text: str


def standard_library() -> list[Text]:
    """Python's own standard library: the .py files, without tests, encoding tables and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in root.rglob("*.py") if not _NOT_LIBRARY_CODE & set(file.relative_to(root).parts))
    return _read(root, files)


def read_texts(path: str | Path) -> list[Text]:
    """A text file, or every one below a folder; hidden files and what is not UTF-8 text are passed over.

    Raises:   CorpusError: nothing at `path`, or no text in it
    """
    path = Path(path)
    if path.is_file():
        texts = _read(path.parent, [path])
    elif path.is_dir():
        visible = (file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)))
        texts = _read(path, visible)
    else:
        raise CorpusError(f"corpus: no file or folder at {path}")
    if not texts:
        raise CorpusError(f"corpus: {path} holds no UTF-8 text")
    return texts


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _read(root: Path, files: Iterable[Path]) -> list[Text]:
    texts = []
    for file in sorted(files):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and "\0" not in text:
            texts.append(Text(file.relative_to(root).as_posix(), text))
    return texts


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


class CharVocabulary:
    """Characters ↔ ids. Id 0 is any unknown character, id 1 the boundary before and after each file.

    Decoding writes an unknown character as U+FFFD and a boundary as nothing.
    """

    UNKNOWN = 0
    BOUNDARY = 1

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self._to_text = ["\N{REPLACEMENT CHARACTER}", "", *self.characters]
        self._to_id = torch.full((0x110000,), self.UNKNOWN)
        self._to_id[_code_points(self.characters)] = torch.arange(2, len(self))

    @classmethod
    def of(cls, text: str, *, min_share: float = 0.0) -> CharVocabulary:
        """The characters of `text` that make up a share of at least `min_share` of it."""
        counts = torch.bincount(_code_points(text))
        common = (counts >= max(min_share * len(text), 1)).nonzero()[:, 0]
        return cls("".join(map(chr, common.tolist())))

    def __len__(self) -> int:
        return len(self._to_text)

    def encode(self, text: str) -> Tensor:
        """int64 [len(text)]"""
        return self._to_id[_code_points(text)]

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        return "".join(self._to_text[int(i)] for i in ids)


def _code_points(text: str) -> Tensor:
    """int64 [len(text)]: what ord() says of each character, without a Python loop."""
    if not text:
        return torch.empty(0, dtype=torch.int64)
    data = bytearray(text.encode("utf-32-le", "surrogatepass"))
    return torch.frombuffer(data, dtype=torch.int32).long()


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
                f"corpus: {N} characters are too few for {B} rows of {T} steps (at least {B * (T + 1)})"
            )
        self._rows = stream[: N // B * B].view(B, N // B).t()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < self._length:
            raise IndexError(f"window {i} of {self._length}")
        start, stop = i * self.T, (i + 1) * self.T
        return self._rows[start:stop].contiguous(), self._rows[start + 1 : stop + 1].contiguous()
