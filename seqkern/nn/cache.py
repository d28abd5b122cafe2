"""The key-value cache of attention: what was attended to before need not be projected again."""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 64  # keys that a fresh buffer has room for at least


class KeyValueCache:
    """Keys and values of one attention, for decoding step by step.

    Under torch.no_grad they are appended to a buffer that doubles when it is full; else they are
    concatenated, so that everything stays differentiable.

    Construct:  KeyValueCache() for self-attention: every call appends its keys;
                KeyValueCache(fixed=True) for attention over an encoder's output: the first call fills it,
                later ones read it and look at no key or value
    Shapes:     key, value: [B, num_kv_heads, S, head_dim], of what was appended so far; None while empty
    """

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed
        self.length = 0
        self._key: Tensor | None = None  # [B, Nk, room, Eh]
        self._value: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Does it hold all that there is to attend to?"""
        return self.fixed and self._key is not None

    @property
    def key(self) -> Tensor | None:
        return None if self._key is None else self._key[:, :, : self.length]

    @property
    def value(self) -> Tensor | None:
        return None if self._value is None else self._value[:, :, : self.length]

    def update(self, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append key and value [B, Nk, S, Eh], if any; returns all keys and all values."""
        if key is not None and value is not None:
            if self._key is not None and (key.shape[:2], key.shape[3]) != (
                self._key.shape[:2],
                self._key.shape[3],
            ):
                B, Nk, _, Eh = self._key.shape
                raise ValueError(
                    f"cache: expected keys [B, num_kv_heads, S, head_dim] = {(B, Nk, 'S', Eh)}, got "
                    f"{tuple(key.shape)}"
                )
            self._key = self._append(self._key, key)
            self._value = self._append(self._value, value)
            self.length += key.shape[2]
        if self._key is None or self._value is None:
            raise ValueError("cache: expected key and value, as it is empty; got None")
        return self._key[:, :, : self.length], self._value[:, :, : self.length]

    def _append(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        B, Nk, S, Eh = new.shape
        old = None if buffer is None else buffer[:, :, : self.length]
        if torch.is_grad_enabled():
            return new if old is None else torch.cat([old, new], 2)
        total = self.length + S
        locked = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if buffer is None or buffer.shape[2] < total or buffer.requires_grad or locked or self.fixed:
            room = total if self.fixed else max(ROOM, 2 * total)
            buffer = new.new_empty((B, Nk, room, Eh))
            if old is not None:
                buffer[:, :, : self.length] = old
        buffer[:, :, self.length : total] = new
        return buffer

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, for beam search; index: [B'] int64, B' may differ from B.

        Raises:   ValueError: index is not a 1-D integer tensor
        """
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"index: expected [B] int64, got {tuple(index.shape)} {index.dtype}")
        if self._key is not None and self._value is not None:
            self._key = self._key.index_select(0, index)
            self._value = self._value.index_select(0, index)

    def __repr__(self) -> str:
        shape = None if self._key is None else (*self._key.shape[:2], self.length, self._key.shape[3])
        return f"KeyValueCache(fixed={self.fixed}, key={shape})"
