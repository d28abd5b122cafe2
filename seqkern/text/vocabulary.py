"""Tokens ↔ ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Vocabulary:
    """Tokens ↔ ids: the specials first, in their order, then the tokens, in theirs.

    vocabulary["the"], vocabulary.encode(["the", "cat"])   ids; unknown tokens get the id of `default`
    vocabulary.token(5), vocabulary.decode([5, 6])         tokens
    "the" in vocabulary, len(vocabulary), vocabulary.tokens (all of them, in the order of their ids)

    Args:     specials: such as ("<pad>", "<unk>"), ("<unk>", "<pad>", "<sos>", "<eos>"), ("<PAD>", "<UNK>")
              default: the token that stands for every unknown one; None: an unknown token is an error
    Raises:   ValueError: a token twice, or a default that is not in the vocabulary
    """

    def __init__(
        self,
        tokens: Iterable[str],
        *,
        specials: Sequence[str] = ("<pad>", "<unk>"),
        default: str | None = "<unk>",
    ) -> None:
        self.specials = tuple(specials)
        self.tokens = [*self.specials, *tokens]
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) < len(self.tokens):
            twice = next(token for token, count in Counter(self.tokens).items() if count > 1)
            raise ValueError(f"tokens: expected each once, got {twice!r} at least twice")
        if default is not None and default not in self._ids:
            raise ValueError(f"default: expected a token or one of {self.specials}, got {default!r}")
        self.default = default
        self._default_id = None if default is None else self._ids[default]

    @classmethod
    def build(
        cls,
        sentences: Iterable[Iterable[str]],
        *,
        min_freq: int = 1,
        max_size: int | None = None,
        specials: Sequence[str] = ("<pad>", "<unk>"),
        default: str | None = "<unk>",
    ) -> Vocabulary:
        """The tokens of `sentences`, the most frequent first, equally frequent ones by their text. Streams.

        M's Vocabulary(freq_threshold) with build_vocabulary(sentences) is
        build(sentences, min_freq=freq_threshold, specials=("<PAD>", "<UNK>"), default="<UNK>").

        Args:     sentences: token lists
                  min_freq: tokens that occur at least so often
                  max_size: at most so many tokens besides the specials
        Raises:   ValueError: a sentence that is a string, min_freq < 1, max_size < 0
        """
        counts: Counter[str] = Counter()
        for sentence in sentences:
            counts.update(_no_string("sentences", sentence))
        return cls.from_counts(
            counts, min_freq=min_freq, max_size=max_size, specials=specials, default=default
        )

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, int],
        *,
        min_freq: int = 1,
        max_size: int | None = None,
        specials: Sequence[str] = ("<pad>", "<unk>"),
        default: str | None = "<unk>",
    ) -> Vocabulary:
        """As `build`, from token → how often it occurs."""
        if min_freq < 1:
            raise ValueError(f"min_freq: expected at least 1, got {min_freq}")
        if max_size is not None and max_size < 0:
            raise ValueError(f"max_size: expected at least 0 or None, got {max_size}")
        special = set(specials)
        kept = [token for token, count in counts.items() if count >= min_freq and token not in special]
        kept.sort(key=lambda token: (-counts[token], token))
        return cls(kept[:max_size], specials=specials, default=default)

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def __getitem__(self, token: str) -> int:
        """The id of `token`, or of `default`. ValueError: unknown, and there is no default."""
        i = self._ids.get(token, self._default_id)
        if i is None:
            raise ValueError(f"token {token!r} is not in the vocabulary of {len(self)}, which has no default")
        return i

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """The ids of a list of tokens. ValueError: a string (split it first), a token without an id."""
        _no_string("tokens", tokens)
        if self._default_id is None:
            return [self[token] for token in tokens]
        return [self._ids.get(token, self._default_id) for token in tokens]

    numericalize = encode  # M's name

    def token(self, i: int) -> str:
        """The token of an id. ValueError: outside 0 … len(self) - 1"""
        if not 0 <= i < len(self.tokens):
            raise ValueError(f"id: expected 0 to {len(self) - 1}, got {i}")
        return self.tokens[i]

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False) -> list[str]:
        """The tokens of ids: ints, or a tensor [T]. ValueError: an id outside 0 … len(self) - 1"""
        first = len(self.specials) if skip_specials else 0
        return [self.token(i) for i in map(int, ids) if not 0 <= i < first]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens, specials={self.specials}, default={self.default!r})"

    def to_dict(self) -> dict[str, Any]:
        """Strings and lists only: for JSON, or for a checkpoint that torch.load(weights_only=True) reads."""
        tokens = self.tokens[len(self.specials) :]
        return {"specials": list(self.specials), "default": self.default, "tokens": tokens}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Vocabulary:
        """What `to_dict` gave."""
        return cls(state["tokens"], specials=state["specials"], default=state["default"])

    def save(self, path: str | Path) -> None:
        """Writes a JSON file in UTF-8, a token a line."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=0) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads what `save` wrote. ValueError: a file that holds anything else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text("utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a vocabulary as Vocabulary.save writes it: {error}") from error


def _no_string(name: str, tokens: Iterable[str]) -> Iterable[str]:
    if isinstance(tokens, str):
        raise ValueError(f"{name}: expected a list of tokens, got the string {tokens[:40]!r}: split it first")
    return tokens
