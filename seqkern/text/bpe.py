"""Byte-pair encoding: subword units, learned by merging the most frequent pairs. On the package `tokenizers`.

Source: Sennrich, Haddow and Birch 2016, "Neural machine translation of rare words with subword units"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class BytePairEncoding:
    """Text ↔ ids of subword units; the specials have the first ids, in their order.

    BytePairEncoding.train(texts, vocab_size=8000), .load(path)
    encode, decode, encode_batch, decode_batch; encoding["[PAD]"], len(encoding), encoding.tokens(text)

    A text that spells a special, such as "[PAD]", is encoded like any other text.
    """

    SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a tokenizers.Tokenizer"""
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int = 30000,
        min_freq: int = 2,
        specials: Sequence[str] = SPECIALS,
        default: str = "[UNK]",
        byte_level: bool = True,
    ) -> BytePairEncoding:
        """
        Args:     vocab_size: at most so many units, specials and single characters or bytes included
                  min_freq: pairs that occur at least so often are merged
                  byte_level: units are of bytes, every text has an encoding, and decoding gives it back.
                  False: M's: units of characters within words that spaces and punctuation part; a character
                  not met in training is `default`; decoding puts a space between units
        Raises:   ImportError: without the package tokenizers
                  ValueError: `default` not among the specials; vocab_size too small for them
        """
        tokenizers = _tokenizers()
        if default not in specials:
            raise ValueError(f"default: expected one of the specials {tuple(specials)}, got {default!r}")
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if byte_level else []
        if vocab_size < len(specials) + len(alphabet):
            least = f"{len(specials)} specials and {len(alphabet)} bytes"
            raise ValueError(f"vocab_size: expected room for {least}, got {vocab_size}")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=default))
        if byte_level:
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = tokenizers.decoders.ByteLevel()
        else:
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_freq,
            special_tokens=list(specials),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __contains__(self, unit: str) -> bool:
        return self._tokenizer.token_to_id(unit) is not None

    def __getitem__(self, unit: str) -> int:
        """The id of a special or another unit. ValueError: there is none."""
        i = self._tokenizer.token_to_id(unit)
        if i is None:
            raise ValueError(f"unit {unit!r} is not among the {len(self)} of this encoding")
        return i

    def tokens(self, text: str) -> list[str]:
        """The units of a text; of bytes, as printable characters ("Ġ" is a space)."""
        return self._tokenizer.encode(text, add_special_tokens=False).tokens

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """In parallel."""
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids (ints, or a tensor [T]); specials are left out. ValueError: an id out of range"""
        return self._tokenizer.decode(self._checked(ids))

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        return self._tokenizer.decode_batch([self._checked(ids) for ids in batch])

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self):
                raise ValueError(f"id: expected 0 to {len(self) - 1}, got {i}")
        return ids

    def to_dict(self) -> dict[str, str]:
        """Strings only: for a checkpoint that torch.load(weights_only=True) reads."""
        return {"tokenizer": self._tokenizer.to_str()}

    @classmethod
    def from_dict(cls, state: dict[str, str]) -> BytePairEncoding:
        """What `to_dict` gave."""
        return cls(_tokenizers().Tokenizer.from_str(state["tokenizer"]))

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json, which Hugging Face's libraries read, too."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> BytePairEncoding:
        """Reads what `save` wrote. ValueError: a file that holds anything else."""
        text = Path(path).read_text("utf-8")
        try:
            return cls.from_dict({"tokenizer": text})
        except ImportError:
            raise
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from error


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("byte-pair encoding needs tokenizers: pip install 'seqkern[text]'") from error
    return tokenizers
