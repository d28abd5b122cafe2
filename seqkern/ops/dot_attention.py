"""Dot-product attention and its weights, soft or hard, on scaled dot-product attention's kernels."""

import torch
from torch import Tensor

from seqkern.ops import _layers
from seqkern.ops._attention import PER_HEAD, Problem, valid_from_lengths
from seqkern.ops.attention import attention, autocast_dtype, check_alike, checked_lengths, valid_mask


def dot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float = 1.0,
    hard: bool = False,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention scored by scale * query · key, and its weights.

    A row without a valid key gives zeros and no gradient.

    Args:
        query: [B, L, E] float32, bfloat16, float16 or float64, any strides
        key: [B, S, E];  value: [B, S, D]
        scale: factor of the scores
        hard: all weight on the key with the largest score (of equal ones the first). Its gradient is that of
            the soft weights: straight through
        key_padding_mask: [B, S] bool, True is padding
        lengths: [B] integers in 0..S on query's device: row b has lengths[b] keys. Not with key_padding_mask
        backend: "eager", "cpu" or "triton"; None: the fastest that is correct. See seqkern.use_backend
    Returns:
        context: [B, L, D];  weights: [B, L, S]; dtype of query
    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; a named backend cannot serve the request
        ValueError: a wrong padding mask or lengths; no such backend
    Source:
        Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015,
        section 3.1; straight through: Bengio, Léonard and Courville, https://arxiv.org/abs/1308.3432
    """
    if _layers.autocast_active(query):
        dtype = autocast_dtype(query)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value)
    B, S, _ = key.shape
    device = query.device
    key_valid = valid_mask("key_padding_mask", key_padding_mask, B, S, device)
    lengths = checked_lengths("lengths", lengths, "key_padding_mask", key_padding_mask, B, S, device)
    q, k, v = (x.unsqueeze(1) for x in (query, key, value))
    problem = Problem(q, k, v, key_valid=key_valid, key_lengths=lengths, scale=float(scale))
    context, _, weights = attention(problem, PER_HEAD, False, backend)
    context, weights = context.squeeze(1), weights.squeeze(1)
    if not hard or S == 0:
        return context, weights
    if lengths is not None:
        key_valid = valid_from_lengths(lengths, S)
    if key_valid is not None:
        value = torch.where(key_valid.unsqueeze(-1), value, 0)
    largest, place = weights.detach().max(-1, keepdim=True)
    chosen = torch.zeros_like(weights).scatter(-1, place, (largest > 0).to(weights.dtype))
    weights = chosen + (weights - weights.detach())
    with torch.autocast(device.type, enabled=False):
        return weights @ value, weights


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_alike(query, key, value)
    named = (("query", query, "[B, L, E]"), ("key", key, "[B, S, E]"), ("value", value, "[B, S, D]"))
    for name, x, letters in named:
        if x.dim() != 3:
            raise RuntimeError(f"{name}: expected {letters}, got {tuple(x.shape)}")
    B, S = query.shape[0], key.shape[1]
    for name, x, size, letters in (
        ("key", key, query.shape[-1], "[B, S, E]"),
        ("value", value, value.shape[-1], "[B, S, D]"),
    ):
        if tuple(x.shape) != (B, S, size):
            raise RuntimeError(f"{name}: expected {letters} = {(B, S, size)}, got {tuple(x.shape)}")
