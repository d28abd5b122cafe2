"""Characters ↔ ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


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

    def to_dict(self) -> dict[str, str]:
        """A string only: for a checkpoint that torch.load(weights_only=True) reads."""
        return {"characters": self.characters}

    @classmethod
    def from_dict(cls, state: Mapping[str, str]) -> CharVocabulary:
        """What `to_dict` gave."""
        return cls(state["characters"])


def _code_points(text: str) -> Tensor:
    """int64 [len(text)]: what ord() says of each character, without a Python loop."""
    if not text:
        return torch.empty(0, dtype=torch.int64)
    data = bytearray(text.encode("utf-32-le", "surrogatepass"))
    return torch.frombuffer(data, dtype=torch.int32).long()
