"""Fake kernels: the shapes, dtypes and devices of the operators' outputs, for torch.compile, torch.export and
meta tensors.

The recurrent layers' schemas are in csrc/operators.h; without the compiled extension there is nothing to
register for them. Attention's are in _attention.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _additive, _attention, _cells, attention_decoder, crf  # noqa: F401  (define operators)
from seqkern.ops._attention import AVERAGED, NO_WEIGHTS, Problem
from seqkern.ops._backend import WHY_NO_KERNELS

RESERVE_SLOTS = {"lstm": 5, "gru": 4}  # values kept per step and hidden unit for backward
RESERVE_MULTIPLE = 16  # hidden units are padded to a multiple of this in the reserve


def _y(x: Tensor, h0: Tensor) -> Tensor:
    """[T, B, D*P] of x's dtype, or [N, D*P] for packed x."""
    D, _, P = h0.shape
    return x.new_empty((*x.shape[:-1], D * P))


def _reserve(op: str, x: Tensor, state: Tensor, save: bool) -> Tensor:
    """[rows, D*S*Hp] when saving, else [0]; state is [D, B, H]."""
    if not save:
        return x.new_empty((0,))
    D, _, H = state.shape
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    return x.new_empty((rows, D * RESERVE_SLOTS[op] * _padded(H)))


def _padded(H: int) -> int:
    return (H + RESERVE_MULTIPLE - 1) // RESERVE_MULTIPLE * RESERVE_MULTIPLE


def _contiguous_like(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _dx(x: Tensor, need: bool) -> Tensor:
    return _contiguous_like(x) if need else x.new_empty((0,))


def _dparams(params: Sequence[Tensor], need: bool) -> list[Tensor]:
    return [_contiguous_like(p) for p in params] if need else []


def rnn_forward(
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    relu: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _y(x, h0), _contiguous_like(h0), x.new_empty((0,))


def gru_forward(
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _y(x, h0), _contiguous_like(h0), _reserve("gru", x, h0, save)


def lstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _y(x, h0), _contiguous_like(h0), _contiguous_like(c0), _reserve("lstm", x, c0, save)


def rnn_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    relu: bool,
    need_dx: bool,
    need_dparams: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _dx(x, need_dx), _contiguous_like(h0), _dparams(params, need_dparams)


def gru_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    need_dx: bool,
    need_dparams: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _dx(x, need_dx), _contiguous_like(h0), _dparams(params, need_dparams)


def lstm_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    need_dx: bool,
    need_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return _dx(x, need_dx), _contiguous_like(h0), _contiguous_like(c0), _dparams(params, need_dparams)


def recurrent_forward(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Any],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    mask: Tensor | None,
    h_scale: Tensor | None,
    *scalars: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    keep_h, keep_c, _, cell_clip, proj_clip, _, save = scalars
    regularised = mask is not None or any((keep_h, keep_c)) or min(cell_clip, proj_clip) < math.inf
    spec = _cells.CELLS[cell]
    heads = params[1].shape[0] if spec.has_heads else 1
    parts = states[0].shape[0] * heads
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    width = parts * spec.reserve_width(params[0].shape[0] // spec.gates // heads, regularised)
    reserve = x.new_empty((rows, width) if save and width else (0,))
    return _y(x, states[0]), [_contiguous_like(s) for s in states], reserve


def recurrent_backward(
    cell: str,
    dy: Tensor | None,
    dfinals: Sequence[Tensor | None],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    *options: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    need_dx, need_dparams = options[-2:]
    dparams = [x.new_empty((0,)) if p is None else _contiguous_like(p) for p in params]
    return _dx(x, need_dx), [_contiguous_like(s) for s in states], dparams if need_dparams else []


def recurrent_mask(
    seed: Tensor, probabilities: Sequence[float], t: Tensor, b: Tensor, layer: int, D: int, H: int
) -> Tensor:
    return seed.new_empty((*t.shape, D * H), dtype=torch.uint8)


OPERATORS = (
    *(rnn_forward, gru_forward, lstm_forward, rnn_backward, gru_backward, lstm_backward),
    *(recurrent_forward, recurrent_backward, recurrent_mask),
)

if WHY_NO_KERNELS is None:
    for _kernel in OPERATORS:
        torch.library.register_fake(f"seqkern::{_kernel.__name__}", _kernel)


def attention_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *problem, weights, need_lse = arguments
    p = Problem(*problem)
    N, Ev = p.q.shape[1], p.v.shape[-1]
    lse_dtype = _attention.accumulator(p.q.dtype)
    if p.cu_q is not None:
        out = p.q.new_empty((p.q.shape[0], N, Ev))
        lse = p.q.new_empty((N, p.q.shape[0]), dtype=lse_dtype)
    else:
        B, _, L, _ = p.q.shape
        out = p.q.new_empty((B, L, N, Ev)).transpose(1, 2)
        lse = p.q.new_empty((B, N, L), dtype=lse_dtype)
    if not need_lse:
        lse = p.q.new_empty((0,), dtype=lse_dtype)
    if weights == NO_WEIGHTS:
        return out, lse, p.q.new_empty((0,))
    if p.cu_q is not None:
        rows = (p.cu_q.shape[0] - 1, p.max_q, p.max_k)
    else:
        rows = (p.q.shape[0], p.q.shape[2], p.k.shape[2])
    return out, lse, p.q.new_empty(rows if weights == AVERAGED else (rows[0], N, *rows[1:]))


def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    weights: int,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *problem, need_dq, need_dk, need_dv, need_dbias = rest
    p = Problem(*problem)
    found = [
        torch.empty_like(t) if need else p.q.new_empty((0,))
        for t, need in ((p.q, need_dq), (p.k, need_dk), (p.v, need_dv))
    ]
    return (
        *found,
        p.q.new_empty((0,)) if p.bias is None or not need_dbias else p.bias.new_empty(p.bias.shape),
    )


torch.library.register_fake("seqkern::attention_forward", attention_forward)
torch.library.register_fake("seqkern::attention_backward", attention_backward)


def additive_attention_forward(
    query: Tensor, key: Tensor, v: Tensor, value: Tensor, key_valid: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, L, _ = query.shape
    weights_dtype = _attention.accumulator(query.dtype)
    return query.new_empty((B, L, value.shape[-1])), query.new_empty(
        (B, L, key.shape[1]), dtype=weights_dtype
    )


def additive_attention_backward(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    key: Tensor,
    v: Tensor,
    value: Tensor,
    key_valid: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor,
    *needed: bool,
) -> tuple[Tensor, ...]:
    return tuple(
        _contiguous_like(t) if need else t.new_empty((0,))
        for t, need in zip((query, key, v, value), needed, strict=True)
    )


torch.library.register_fake("seqkern::additive_attention_forward", additive_attention_forward)
torch.library.register_fake("seqkern::additive_attention_backward", additive_attention_backward)


def attention_decoder_forward(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_context: Tensor,
    w_query: Tensor,
    key: Tensor,
    v: Tensor,
    value: Tensor,
    key_valid: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, ...]:
    (T, B, GH), H, (_, S, A) = gates.shape, h0.shape[1], key.shape
    cells = gates.new_empty((T, B, H) if c0 is not None else (0,))
    saved = gates.new_empty((T, B, 5 if c0 is not None else 4, H))
    y, context = gates.new_empty((T, B, H)), gates.new_empty((T, B, value.shape[2]))
    return y, cells, context, gates.new_empty((B, T, S)), gates.new_empty((T, B, A + GH)), saved


def attention_decoder_backward(
    dy: Tensor | None,
    dc_n: Tensor | None,
    dcontext: Tensor | None,
    dweights: Tensor | None,
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    w_context, w_query, key, v, value = rest[:5]
    dc0 = h0.new_empty((h0.shape[0] if c0 is not None else 0, h0.shape[1]))
    db_hh = h0.new_empty((0,) if b_hh is None else b_hh.shape)
    first = (_contiguous_like(gates), _contiguous_like(h0), dc0, _contiguous_like(w_hh), db_hh)
    return (*first, *(_contiguous_like(t) for t in (w_context, w_query, key, v, value)))


torch.library.register_fake("seqkern::attention_decoder_forward", attention_decoder_forward)
torch.library.register_fake("seqkern::attention_decoder_backward", attention_decoder_backward)


def crf_forward(
    emissions: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    T, B, K = emissions.shape
    padded = (K + crf.ALPHAS_MULTIPLE - 1) // crf.ALPHAS_MULTIPLE * crf.ALPHAS_MULTIPLE
    return emissions.new_empty((B,)), emissions.new_empty((B, T, padded) if save else (0,))


def crf_backward(
    dvalue: Tensor,
    emissions: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    alphas: Tensor,
    need_dparams: bool,
) -> tuple[Tensor, ...]:
    T, B, K = emissions.shape
    if emissions.stride(2) == 1 and emissions.stride(0) < emissions.stride(1):
        demissions = emissions.new_empty((B, T, K)).transpose(0, 1)
    else:
        demissions = emissions.new_empty((T, B, K))
    return demissions, *(_dparams((start, end, transitions), need_dparams) or _nothing(dvalue))


def crf_decode(
    emissions: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    n: int,
) -> tuple[Tensor, Tensor]:
    T, B, _ = emissions.shape
    return emissions.new_empty((n, B, T), dtype=torch.int64), emissions.new_empty((n, B))


def _nothing(x: Tensor) -> list[Tensor]:
    return [x.new_empty((0,)) for _ in range(3)]


torch.library.register_fake("seqkern::crf_forward", crf_forward)
torch.library.register_fake("seqkern::crf_backward", crf_backward)
torch.library.register_fake("seqkern::crf_decode", crf_decode)
