"""Words as their characters, for the models that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from seqkern.text import Vocabulary, pad_sequences

MAX_CHARACTERS = 40  # of a longer word the rest is not read


def character_vocabulary(words: Iterable[str]) -> Vocabulary:
    """<pad> 0, <unk> 1, then the characters."""
    return Vocabulary.build(words_as_lists(words))


def words_as_lists(words: Iterable[str]) -> Iterable[list[str]]:
    return (list(word) for word in words)


def character_ids(vocabulary: Vocabulary, sentences: Sequence[Sequence[str]]) -> Tensor:
    """[B, T, C] int64, 0 behind words and sentences."""
    T = max(map(len, sentences))
    empty: list[str] = []
    rows = [
        vocabulary.encode(list(word[:MAX_CHARACTERS]))
        for sentence in sentences
        for word in [*sentence, *[empty] * (T - len(sentence))]
    ]
    ids = pad_sequences(rows)
    return (
        ids.view(len(sentences), T, ids.shape[1])
        if T
        else torch.zeros(len(sentences), 0, 1, dtype=torch.int64)
    )
