"""Attention as the backends see it: the problem, its operators' schemas, and the eager backend.

Letters: B batch, N query heads, Nk key and value heads, L queries, S keys, E head dim of q and k, Ev of v.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.ops import _layers
from seqkern.reference import attention as reference_attention

NO_WEIGHTS, AVERAGED, PER_HEAD = 0, 1, 2


class Problem(NamedTuple):
    """What attention is computed of, already checked. The operators take its fields in this order.

    Packed problems (cu_q is given) hold their sequences one after the other, without padding.
    """

    q: Tensor  # [B, N, L, E], any strides; packed: [Tq, N, E]
    k: Tensor  # [B, Nk, S, E];             packed: [Tk, Nk, E]
    v: Tensor  # [B, Nk, S, Ev];            packed: [Tk, Nk, Ev]
    bias: Tensor | None = None  # 4-D, each size 1 or full of [B, N, L, S]; bool: True attends; not packed
    key_valid: Tensor | None = None  # [B, S] bool; at most one of this and key_lengths; not packed
    key_lengths: Tensor | None = None  # [B] int64
    query_valid: Tensor | None = None  # [B, L] bool; at most one of this and query_lengths; not packed
    query_lengths: Tensor | None = None  # [B] int64
    cu_q: Tensor | None = None  # [B + 1] int32 or int64: where the sequences begin and the last one ends
    cu_k: Tensor | None = None
    max_q: int = 0  # packed: no sequence is longer
    max_k: int = 0
    seed: Tensor | None = None  # [1] int64, given if dropout_p > 0
    scale: float = 1.0
    left: int = -1  # keys with -left <= s - l - offset <= right are allowed; -1: no limit
    right: int = -1
    bottom_right: bool = False  # offset: the sequence's number of keys less that of its queries, else 0
    dropout_p: float = 0.0


SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_valid, Tensor? key_lengths, "
    "Tensor? query_valid, Tensor? query_lengths, Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, "
    "Tensor? seed, float scale, SymInt left, SymInt right, bool bottom_right, float dropout_p"
)

# In Python, so that an install without a compiler has them. The kernels: attention_cpu.py and seqkern.triton.
LIBRARY = torch.library.Library("seqkern", "FRAGMENT")
LIBRARY.define(
    f"attention_forward({SCHEMA}, int weights, bool need_lse) -> (Tensor out, Tensor lse, Tensor weights)"
)
LIBRARY.define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor? dweights, int weights, Tensor out, Tensor lse, "
    f"{SCHEMA}, bool need_dq, bool need_dk, bool need_dv, bool need_dbias) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, and of lse, for inputs of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def valid_from_lengths(lengths: Tensor, size: int) -> Tensor:
    """[B] -> [B, size] bool."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def can_look(x: Tensor) -> bool:
    """May values be looked at here, at no cost to what comes after?"""
    return x.is_cpu and not torch.compiler.is_compiling() and _layers.has_values(x)


def eager(p: Problem, weights: int) -> tuple[Tensor, Tensor, Tensor]:
    """The eager backend: (out, lse, weights) by the formula; weights is [0] where none are asked for.

    16-bit inputs are computed in float32 and rounded once.
    """
    dtype = p.q.dtype
    wide = accumulator(dtype) if dtype in _layers.SIXTEEN_BITS else dtype
    q, k, v = p.q.to(wide), p.k.to(wide), p.v.to(wide)
    key_valid, query_valid = p.key_valid, p.query_valid
    if p.cu_q is not None:
        rows_q, lengths_q = _rows(p.cu_q, p.max_q)
        rows_k, lengths_k = _rows(p.cu_k, p.max_k)
        q, k, v = _unpack(q, rows_q), _unpack(k, rows_k), _unpack(v, rows_k)
    else:
        lengths_q, lengths_k = p.query_lengths, p.key_lengths
    S, L = k.shape[2], q.shape[2]
    if lengths_k is not None:
        key_valid = valid_from_lengths(lengths_k, S)
    if lengths_q is not None:
        query_valid = valid_from_lengths(lengths_q, L)
    offset: int | Tensor = 0
    if p.bottom_right:
        offset = (S if lengths_k is None else lengths_k) - (L if lengths_q is None else lengths_q)
    out, lse, w = reference_attention(
        q,
        k,
        v,
        p.bias,
        key_valid,
        query_valid,
        scale=p.scale,
        left=p.left,
        right=p.right,
        offset=offset,
        dropout_p=p.dropout_p,
        seed=p.seed,
    )
    if p.cu_q is not None:
        out = _pack(out, p.cu_q, p.q.shape[0], 0.0)
        lse = _pack(lse, p.cu_q, p.q.shape[0], -torch.inf).transpose(0, 1)
    if weights == NO_WEIGHTS:
        w = w.new_empty((0,))
    elif weights == AVERAGED:
        w = w.mean(1)
    return out.to(dtype), lse, w.to(dtype)


def _rows(cu: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Of packed sequences: the row of each padded position, [B, longest], and the lengths, [B]."""
    lengths = cu[1:] - cu[:-1]
    return cu[:-1, None] + torch.arange(longest, device=cu.device), lengths


def _unpack(x: Tensor, rows: Tensor) -> Tensor:
    """[T, N, E] -> [B, N, longest, E]; beyond a sequence's end stand the next one's values."""
    if x.shape[0] == 0:  # its sum keeps x in the graph
        return x.new_zeros((rows.shape[0], x.shape[1], rows.shape[1], x.shape[2])) + x.sum()
    return x[rows.clamp(max=x.shape[0] - 1)].transpose(1, 2)


def _pack(x: Tensor, cu: Tensor, T: int, rest: float) -> Tensor:
    """[B, N, longest, ...] -> [T, N, ...]; `rest` in rows of no sequence."""
    if x.shape[0] == 0 or x.shape[2] == 0:
        return x.new_full((T, x.shape[1], *x.shape[3:]), rest) + x.sum()
    t = torch.arange(T, device=cu.device, dtype=cu.dtype)
    b = (torch.searchsorted(cu, t, right=True) - 1).clamp(0, x.shape[0] - 1)
    place = t - cu[b]
    used = (place >= 0) & (place < (cu[1:] - cu[:-1])[b])
    rows = x[b, :, place.clamp(0, x.shape[2] - 1)]
    return torch.where(used.view(-1, *[1] * (rows.dim() - 1)), rows, rest)
