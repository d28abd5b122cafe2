"""Attention for models whose `layers` may be torch.nn, which has none of an encoder-decoder's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.nn import AttentionDecoder, DecoderState, ProjectedKeys
from seqkern.ops import use_backend
from seqkern.ops._attention import valid_from_lengths


def backend_of(layers: Any) -> str | None:
    """The backend of a model's attention: None, the fastest, with seqkern's layers; "eager", the formula in
    PyTorch's own operations, with layers that lack it, torch.nn's."""
    return None if hasattr(layers, "AdditiveAttention") else "eager"


class EagerAttentionDecoder(AttentionDecoder):
    """seqkern.nn.AttentionDecoder with a GRU on PyTorch's own operations: torch.nn.GRUCell, the additive
    attention's formula, one step after the other."""

    def __init__(self, input_size: int, hidden_size: int, key_dim: int, **options: Any) -> None:
        super().__init__(input_size, hidden_size, key_dim, cell="gru", **options)
        self.cell.__class__ = nn.GRUCell  # its parameters as they are: a new one would draw random numbers

    def _is_fused(self, x: Tensor) -> bool:
        return False

    def _step(
        self, x: Tensor, keys: ProjectedKeys, state: DecoderState
    ) -> tuple[Tensor, DecoderState, Tensor, Tensor]:
        with use_backend("eager"):
            return super()._step(x, keys, state)


def gru_attention_decoder(
    layers: Any, input_size: int, hidden_size: int, key_dim: int, **options: Any
) -> AttentionDecoder:
    """seqkern.nn.AttentionDecoder with a GRU, or its twin on torch.nn's cell."""
    if backend_of(layers) == "eager":
        return EagerAttentionDecoder(input_size, hidden_size, key_dim, **options)
    return AttentionDecoder(input_size, hidden_size, key_dim, cell="gru", **options)


# ---- Transformer stacks ------------------------------------------------------------------------------------


def run_encoder(
    encoder: nn.TransformerEncoder,
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """A TransformerEncoder of seqkern.nn or torch.nn.

    Args:     x: [B, L, E], or [L, B, E] as its layers say;  lengths: [B] in 0..L;  mask: as it takes it, None
              with is_causal
    Returns:  like x, zero beyond each row's length
    """
    if isinstance(encoder, seqkern.nn.TransformerEncoder):
        return encoder(x, mask=mask, is_causal=is_causal or None, lengths=lengths)
    batch_first = encoder.layers[0].self_attn.batch_first
    steps = x.shape[1 if batch_first else 0]
    if is_causal:
        mask = _later(steps, x.device)
    if lengths is None:
        return encoder(x, mask=mask, is_causal=is_causal)
    padding = ~valid_from_lengths(lengths, steps)
    y = encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=is_causal)
    return _zeroed(y, lengths, batch_first)


def run_decoder(
    decoder: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    tgt_lengths: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """A causal TransformerDecoder of seqkern.nn or torch.nn, batch first: [B, L, E], zero in the padding."""
    if isinstance(decoder, seqkern.nn.TransformerDecoder):
        return decoder(
            tgt, memory, tgt_is_causal=True, tgt_lengths=tgt_lengths, memory_lengths=memory_lengths
        )
    L = tgt.shape[1]
    y = decoder(
        *(tgt, memory, _later(L, tgt.device)),
        tgt_is_causal=True,
        tgt_key_padding_mask=None if tgt_lengths is None else ~valid_from_lengths(tgt_lengths, L),
        memory_key_padding_mask=(
            None if memory_lengths is None else ~valid_from_lengths(memory_lengths, memory.shape[1])
        ),
    )
    return y if tgt_lengths is None else _zeroed(y, tgt_lengths, True)


def _later(L: int, device: torch.device) -> Tensor:
    return torch.ones((L, L), dtype=torch.bool, device=device).triu(1)


def _zeroed(y: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """As seqkern's stacks leave it; of an empty row torch.nn's encoder may make NaN."""
    valid = valid_from_lengths(lengths, y.shape[1 if batch_first else 0])
    return torch.where((valid if batch_first else valid.T).unsqueeze(2), y, 0)
