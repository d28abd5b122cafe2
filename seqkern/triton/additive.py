"""Additive attention on a GPU: kernels and launchers. ops/ checks the meaning.

    score(l, s) = sum over h of v(h) tanh(q(l, h) + k(s, h))
    w = softmax over the valid s of score                  context = w value
    dw = dcontext value' + dweights                        ds = w (dw - sum over s of w dw)
    dq(l, h) = v(h) sum over s of ds(l, s) (1 - tanh^2)    dk(s, h) = v(h) sum over l of the same
    dv(h) = sum over b, l, s of ds(l, s) tanh              dvalue = w' dcontext

Layout: q [B, L, H], k [B, S, H], value [B, S, D], context and their gradients by strides, the last dimension
contiguous; score, w, dw, ds [B, L, S] contiguous, in ACC: float32 (float64 for float64), as all sums are.
What bounds the keys (p_key, KEYS): tiles.py.
Ownership: each program has one tile of one result, which it overwrites; a tanh exists only in registers, in
tiles [BLOCK_L, BLOCK_S, BLOCK_H], and is computed three times: in forward, for dq and dv, and for dk. dv is
summed here per tile of queries, by torch over those, in their order. Tiles without a valid key are skipped.

Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
2015
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqkern.triton.attention import bounds, on_device, rows_contiguous
from seqkern.triton.tiles import INTERPRET, dot, extent, trips, valid_rows

# Tiles of tanh, and tiles of the products with the values.
TANH = dict(BLOCK_L=4, BLOCK_S=16, BLOCK_H=32, num_warps=4)
PRODUCT = dict(BLOCK_L=16, BLOCK_S=32, BLOCK_D=64, num_warps=4)
UNSPECIALIZED = ["L", "S"]


@triton.jit
def tanh(b_x, ACC: tl.constexpr):
    """In float32 within a few ulp, near zero too: a polynomial there (Cephes' tanhf)."""
    b_a = tl.abs(b_x)
    b_e = tl.exp(-2 * b_a)
    b_t = (1 - b_e) / (1 + b_e)
    if ACC == tl.float32:  # noqa: SIM300
        b_z = b_x * b_x
        b_p = b_z * -5.70498872745e-3 + 2.06390887954e-2
        b_p = b_p * b_z - 5.37397155531e-2
        b_p = b_p * b_z + 1.33314422036e-1
        b_p = b_p * b_z - 3.33332819422e-1
        b_t = tl.where(b_a < 0.625, b_p * b_z * b_a + b_a, b_t)
    return tl.where(b_x < 0, -b_t, b_t)


@triton.jit
def load_tile(p_base, o_r, o_c, stride, b_rows, columns, ACC: tl.constexpr):
    """Rows o_r where b_rows, columns o_c below `columns`, of p_base: [BLOCK, BLOCK] in ACC, else zeros."""
    p_tile = p_base + o_r[:, None].to(tl.int64) * stride + o_c[None, :]
    return tl.load(p_tile, mask=b_rows[:, None] & (o_c < columns)[None, :], other=0.0).to(ACC)


@triton.jit
def store_tile(p_base, o_r, o_c, stride, b_x, b_rows, columns):
    """Overwrites rows o_r where b_rows, columns o_c below `columns`."""
    p_tile = p_base + o_r[:, None].to(tl.int64) * stride + o_c[None, :]
    tl.store(p_tile, b_x.to(p_base.dtype.element_ty), mask=b_rows[:, None] & (o_c < columns)[None, :])


@triton.jit
def tanh_tile(b_q, b_k, ACC: tl.constexpr):
    """[BLOCK_L, BLOCK_S, BLOCK_H] of q [BLOCK_L, BLOCK_H] and k [BLOCK_S, BLOCK_H]."""
    return tanh(b_q[:, None, :] + b_k[None, :, :], ACC)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def additive_score_kernel(
    p_q, p_k, p_v, p_key, p_score, stride_qb, stride_ql, stride_kb, stride_ks, L, S, H: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, KEYS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """score: overwritten at valid keys. Grid: (ceil(S / BLOCK_S) * ceil(L / BLOCK_L) * B,)."""
    pid = tl.program_id(0)
    n_s = (S + BLOCK_S - 1) // BLOCK_S
    n_l = (L + BLOCK_L - 1) // BLOCK_L
    i_b = pid // n_s // n_l
    i_b64 = i_b.to(tl.int64)
    o_s = pid % n_s * BLOCK_S + tl.arange(0, BLOCK_S)
    o_l = pid // n_s % n_l * BLOCK_L + tl.arange(0, BLOCK_L)
    _, length = extent(p_key, i_b, S, 0, KEYS)
    b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
    b_query = o_l < L
    p_q += i_b64 * stride_qb
    p_k += i_b64 * stride_kb
    some = tl.max(b_key.to(tl.int32), 0)
    b_sum = tl.zeros([BLOCK_L, BLOCK_S, BLOCK_H], ACC)
    for i in range(trips((H + BLOCK_H - 1) // BLOCK_H * some)):
        o_h = i * BLOCK_H + tl.arange(0, BLOCK_H)
        b_q = load_tile(p_q, o_l, o_h, stride_ql, b_query, H, ACC)
        b_k = load_tile(p_k, o_s, o_h, stride_ks, b_key, H, ACC)
        b_v = tl.load(p_v + o_h, mask=o_h < H, other=0.0).to(ACC)
        b_sum += b_v[None, None, :] * tanh_tile(b_q, b_k, ACC)
    p_tile = p_score + (i_b64 * L + o_l[:, None]) * S + o_s[None, :]
    tl.store(p_tile, tl.sum(b_sum, 2), mask=b_query[:, None] & b_key[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def additive_context_kernel(
    p_score, p_value, p_key, p_w, p_context, stride_vb, stride_vs, L, S, D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """w, context: overwritten. Grid: (ceil(L / BLOCK_L) * B,)."""
    pid = tl.program_id(0)
    n_l = (L + BLOCK_L - 1) // BLOCK_L
    i_b = pid // n_l
    i_b64 = i_b.to(tl.int64)
    o_l = pid % n_l * BLOCK_L + tl.arange(0, BLOCK_L)
    o_t = tl.arange(0, BLOCK_S)
    b_query = o_l < L
    _, length = extent(p_key, i_b, S, 0, KEYS)
    n_s = (length + BLOCK_S - 1) // BLOCK_S
    p_rows = (i_b64 * L + o_l[:, None]) * S
    p_value += i_b64 * stride_vb
    b_m = tl.full([BLOCK_L], float("-inf"), ACC)
    b_l = tl.zeros([BLOCK_L], ACC)
    for i in range(trips(n_s)):
        o_s = i * BLOCK_S + o_t
        b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
        b_inside = b_query[:, None] & b_key[None, :]
        b_s = tl.load(p_score + p_rows + o_s[None, :], mask=b_inside, other=float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))  # a NaN gets into the sum
        b_m_safe = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
        b_l = b_l * tl.exp(b_m - b_m_safe) + tl.sum(tl.exp(b_s - b_m_safe[:, None]), 1)
        b_m = b_m_new
    b_m = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_l = tl.where(b_l == 0, 1.0, b_l)
    for i in range(trips((S + BLOCK_S - 1) // BLOCK_S)):
        o_s = i * BLOCK_S + o_t
        b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
        b_s = tl.load(
            p_score + p_rows + o_s[None, :], mask=b_query[:, None] & b_key[None, :], other=float("-inf")
        )
        b_w = tl.exp(b_s - b_m[:, None]) / b_l[:, None]
        tl.store(p_w + p_rows + o_s[None, :], b_w, mask=b_query[:, None] & (o_s < S)[None, :])
    for i_d in range((D + BLOCK_D - 1) // BLOCK_D):
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        b_context = tl.zeros([BLOCK_L, BLOCK_D], ACC)
        for i in range(trips(n_s)):
            o_s = i * BLOCK_S + o_t
            b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
            b_s = tl.load(
                p_score + p_rows + o_s[None, :], mask=b_query[:, None] & b_key[None, :], other=float("-inf")
            )
            b_w = tl.exp(b_s - b_m[:, None]) / b_l[:, None]
            b_value = load_tile(p_value, o_s, o_d, stride_vs, b_key, D, ACC)
            b_context = dot(b_w, b_value, b_context, ACC, "ieee", INTERPRET)
        store_tile(p_context + i_b64 * L * D, o_l, o_d, D, b_context, b_query, D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def additive_dw_kernel(
    p_dcontext, p_dweights, p_value, p_key, p_dw, stride_cb, stride_cl, stride_vb, stride_vs, L, S,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    DCONTEXT: tl.constexpr, DWEIGHTS: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dw: overwritten at valid keys. Grid: (ceil(S / BLOCK_S) * ceil(L / BLOCK_L) * B,)."""
    pid = tl.program_id(0)
    n_s = (S + BLOCK_S - 1) // BLOCK_S
    n_l = (L + BLOCK_L - 1) // BLOCK_L
    i_b = pid // n_s // n_l
    i_b64 = i_b.to(tl.int64)
    o_s = pid % n_s * BLOCK_S + tl.arange(0, BLOCK_S)
    o_l = pid // n_s % n_l * BLOCK_L + tl.arange(0, BLOCK_L)
    _, length = extent(p_key, i_b, S, 0, KEYS)
    b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
    b_query = o_l < L
    b_inside = b_query[:, None] & b_key[None, :]
    o_tile = (i_b64 * L + o_l[:, None]) * S + o_s[None, :]
    b_dw = tl.zeros([BLOCK_L, BLOCK_S], ACC)
    if DCONTEXT:
        some = tl.max(b_key.to(tl.int32), 0)
        for i in range(trips((D + BLOCK_D - 1) // BLOCK_D * some)):
            o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
            b_dcontext = load_tile(p_dcontext + i_b64 * stride_cb, o_l, o_d, stride_cl, b_query, D, ACC)
            b_value = load_tile(p_value + i_b64 * stride_vb, o_s, o_d, stride_vs, b_key, D, ACC)
            b_dw = dot(b_dcontext, tl.trans(b_value), b_dw, ACC, "ieee", INTERPRET)
    if DWEIGHTS:
        b_dw += tl.load(p_dweights + o_tile, mask=b_inside, other=0.0)
    tl.store(p_dw + o_tile, b_dw, mask=b_inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def additive_ds_kernel(
    p_w, p_dw, p_key, p_ds, L, S, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, KEYS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """ds: overwritten at valid keys. Grid: (ceil(L / BLOCK_L) * B,)."""
    pid = tl.program_id(0)
    n_l = (L + BLOCK_L - 1) // BLOCK_L
    i_b = pid // n_l
    o_l = pid % n_l * BLOCK_L + tl.arange(0, BLOCK_L)
    o_t = tl.arange(0, BLOCK_S)
    b_query = o_l < L
    _, length = extent(p_key, i_b, S, 0, KEYS)
    n_s = (length + BLOCK_S - 1) // BLOCK_S
    o_rows = (i_b.to(tl.int64) * L + o_l[:, None]) * S
    b_share = tl.zeros([BLOCK_L], ACC)
    for i in range(trips(n_s)):
        o_s = i * BLOCK_S + o_t
        b_inside = b_query[:, None] & valid_rows(p_key, i_b, o_s, S, length, KEYS)[None, :]
        b_w = tl.load(p_w + o_rows + o_s[None, :], mask=b_inside, other=0.0)
        b_share += tl.sum(b_w * tl.load(p_dw + o_rows + o_s[None, :], mask=b_inside, other=0.0), 1)
    for i in range(trips(n_s)):
        o_s = i * BLOCK_S + o_t
        b_inside = b_query[:, None] & valid_rows(p_key, i_b, o_s, S, length, KEYS)[None, :]
        b_w = tl.load(p_w + o_rows + o_s[None, :], mask=b_inside, other=0.0)
        b_dw = tl.load(p_dw + o_rows + o_s[None, :], mask=b_inside, other=0.0)
        tl.store(p_ds + o_rows + o_s[None, :], b_w * (b_dw - b_share[:, None]), mask=b_inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def additive_dq_kernel(
    p_q, p_k, p_v, p_key, p_ds, p_dq, p_dv, stride_qb, stride_ql, stride_kb, stride_ks, L, S, H: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, KEYS: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq, and dv [B * ceil(L / BLOCK_L), H] of each tile of queries: overwritten.
    Grid: (ceil(H / BLOCK_H) * ceil(L / BLOCK_L) * B,)."""
    pid = tl.program_id(0)
    n_h = (H + BLOCK_H - 1) // BLOCK_H
    n_l = (L + BLOCK_L - 1) // BLOCK_L
    i_row = pid // n_h
    i_b = i_row // n_l
    i_b64 = i_b.to(tl.int64)
    o_h = pid % n_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_l = i_row % n_l * BLOCK_L + tl.arange(0, BLOCK_L)
    b_query = o_l < L
    _, length = extent(p_key, i_b, S, 0, KEYS)
    b_q = load_tile(p_q + i_b64 * stride_qb, o_l, o_h, stride_ql, b_query, H, ACC)
    b_v = tl.load(p_v + o_h, mask=o_h < H, other=0.0).to(ACC)
    p_k += i_b64 * stride_kb
    o_rows = (i_b64 * L + o_l[:, None]) * S
    b_dq = tl.zeros([BLOCK_L, BLOCK_S, BLOCK_H], ACC)
    b_dv = tl.zeros([BLOCK_L, BLOCK_S, BLOCK_H], ACC)
    for i in range(trips((length + BLOCK_S - 1) // BLOCK_S)):
        o_s = i * BLOCK_S + tl.arange(0, BLOCK_S)
        b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
        for _i in range(trips(tl.max(b_key.to(tl.int32), 0))):  # once, or where no key is valid not at all
            b_inside = b_query[:, None] & b_key[None, :]
            b_ds = tl.load(p_ds + o_rows + o_s[None, :], mask=b_inside, other=0.0)[:, :, None]
            b_t = tanh_tile(b_q, load_tile(p_k, o_s, o_h, stride_ks, b_key, H, ACC), ACC)
            if NEED_DQ:
                b_dq += b_ds * (1 - b_t * b_t)
            if NEED_DV:
                b_dv += b_ds * b_t
    if NEED_DQ:
        store_tile(p_dq + i_b64 * L * H, o_l, o_h, H, tl.sum(b_dq, 1) * b_v[None, :], b_query, H)
    if NEED_DV:
        tl.store(p_dv + i_row.to(tl.int64) * H + o_h, tl.sum(tl.sum(b_dv, 1), 0), mask=o_h < H)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def additive_dk_kernel(
    p_q, p_k, p_v, p_key, p_ds, p_dk, stride_qb, stride_ql, stride_kb, stride_ks, L, S, H: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, KEYS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dk: overwritten, with zeros in padding. Grid: (ceil(H / BLOCK_H) * ceil(S / BLOCK_S) * B,)."""
    pid = tl.program_id(0)
    n_h = (H + BLOCK_H - 1) // BLOCK_H
    n_s = (S + BLOCK_S - 1) // BLOCK_S
    i_b = pid // n_h // n_s
    i_b64 = i_b.to(tl.int64)
    o_h = pid % n_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_s = pid // n_h % n_s * BLOCK_S + tl.arange(0, BLOCK_S)
    _, length = extent(p_key, i_b, S, 0, KEYS)
    b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
    some = tl.max(b_key.to(tl.int32), 0)
    b_k = load_tile(p_k + i_b64 * stride_kb, o_s, o_h, stride_ks, b_key, H, ACC)
    b_v = tl.load(p_v + o_h, mask=o_h < H, other=0.0).to(ACC)
    p_q += i_b64 * stride_qb
    b_dk = tl.zeros([BLOCK_L, BLOCK_S, BLOCK_H], ACC)
    for i in range(trips((L + BLOCK_L - 1) // BLOCK_L * some)):
        o_l = i * BLOCK_L + tl.arange(0, BLOCK_L)
        b_query = o_l < L
        b_q = load_tile(p_q, o_l, o_h, stride_ql, b_query, H, ACC)
        p_tile = p_ds + (i_b64 * L + o_l[:, None]) * S + o_s[None, :]
        b_ds = tl.load(p_tile, mask=b_query[:, None] & b_key[None, :], other=0.0)
        b_t = tanh_tile(b_q, b_k, ACC)
        b_dk += b_ds[:, :, None] * (1 - b_t * b_t)
    b_sum = tl.where(b_key[:, None], tl.sum(b_dk, 0) * b_v[None, :], 0.0)
    store_tile(p_dk + i_b64 * S * H, o_s, o_h, H, b_sum, o_s < S, H)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def additive_dvalue_kernel(
    p_dcontext, p_w, p_key, p_dvalue, stride_cb, stride_cl, L, S, D: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dvalue: overwritten, with zeros in padding. Grid: (ceil(D / BLOCK_D) * ceil(S / BLOCK_S) * B,)."""
    pid = tl.program_id(0)
    n_d = (D + BLOCK_D - 1) // BLOCK_D
    n_s = (S + BLOCK_S - 1) // BLOCK_S
    i_b = pid // n_d // n_s
    i_b64 = i_b.to(tl.int64)
    o_d = pid % n_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_s = pid // n_d % n_s * BLOCK_S + tl.arange(0, BLOCK_S)
    _, length = extent(p_key, i_b, S, 0, KEYS)
    b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
    some = tl.max(b_key.to(tl.int32), 0)
    b_dvalue = tl.zeros([BLOCK_S, BLOCK_D], ACC)
    for i in range(trips((L + BLOCK_L - 1) // BLOCK_L * some)):
        o_l = i * BLOCK_L + tl.arange(0, BLOCK_L)
        b_query = o_l < L
        p_tile = p_w + (i_b64 * L + o_l[:, None]) * S + o_s[None, :]
        b_w = tl.load(p_tile, mask=b_query[:, None] & b_key[None, :], other=0.0)
        b_dcontext = load_tile(p_dcontext + i_b64 * stride_cb, o_l, o_d, stride_cl, b_query, D, ACC)
        b_dvalue = dot(tl.trans(b_w), b_dcontext, b_dvalue, ACC, "ieee", INTERPRET)
    b_dvalue = tl.where(b_key[:, None], b_dvalue, 0.0)
    store_tile(p_dvalue + i_b64 * S * D, o_s, o_d, D, b_dvalue, o_s < S, D)


# ---- launchers ---------------------------------------------------------------------------------------------


def _common(query: Tensor, key_valid: Tensor | None, lengths: Tensor | None) -> dict[str, Any]:
    mode, rows = bounds(None, lengths, key_valid)
    wide = query.dtype is torch.float64
    return dict(p_key=rows, KEYS=mode, ACC=tl.float64 if wide else tl.float32, L=query.shape[1])


def _scored(query: Tensor, key: Tensor, v: Tensor) -> dict[str, Any]:
    return dict(
        p_q=query, p_k=key, p_v=v, stride_qb=query.stride(0), stride_ql=query.stride(1),
        stride_kb=key.stride(0), stride_ks=key.stride(1), H=query.shape[2], S=key.shape[1], **TANH,
    )  # fmt: skip


def _grid(B: int, *sizes: tuple[int, int]) -> tuple[int]:
    for size, block in sizes:
        B *= triton.cdiv(size, block)
    return (B,)


def additive_forward(
    query: Tensor, key: Tensor, v: Tensor, value: Tensor, key_valid: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Args:     as the operator seqkern::additive_attention_forward
    Returns:  context: [B, L, D], dtype of query;  weights: [B, L, S] float32 (float64 for float64)
    """
    query, key, value, v = (
        rows_contiguous(query),
        rows_contiguous(key),
        rows_contiguous(value),
        v.contiguous(),
    )
    B, L, _ = query.shape
    _, S, D = value.shape
    context = query.new_empty((B, L, D))
    weights = query.new_empty(
        (B, L, S), dtype=torch.float64 if query.dtype is torch.float64 else torch.float32
    )
    if 0 in (B, L, S):
        return context.zero_(), weights
    common = _common(query, key_valid, lengths)
    score = torch.empty_like(weights)
    with on_device(query):
        tiles = (S, TANH["BLOCK_S"]), (L, TANH["BLOCK_L"])
        additive_score_kernel[_grid(B, *tiles)](**_scored(query, key, v), **common, p_score=score)
        additive_context_kernel[_grid(B, (L, PRODUCT["BLOCK_L"]))](
            p_score=score, p_value=value, p_w=weights, p_context=context, stride_vb=value.stride(0),
            stride_vs=value.stride(1), S=S, D=D, INTERPRET=INTERPRET, **common, **PRODUCT,
        )  # fmt: skip
    return context, weights


def additive_backward(
    dcontext: Tensor | None, dweights: Tensor | None, query: Tensor, key: Tensor, v: Tensor, value: Tensor,
    key_valid: Tensor | None, lengths: Tensor | None, weights: Tensor, need_dquery: bool, need_dkey: bool,
    need_dv: bool, need_dvalue: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of additive_forward; the same bits each time.

    Args:     as the operator seqkern::additive_attention_backward
    Returns:  dquery, dkey, dv, dvalue: as query, key, v, value; of size [0] where not needed
    """
    query, key, value, v = (
        rows_contiguous(query),
        rows_contiguous(key),
        rows_contiguous(value),
        v.contiguous(),
    )
    B, L, H = query.shape
    _, S, D = value.shape
    pairs = ((query, need_dquery), (key, need_dkey), (v, need_dv), (value, need_dvalue))
    dq, dk, dv, dvalue = (x.new_empty(x.shape if need else 0) for x, need in pairs)
    if 0 in (B, L, S):
        return dq.zero_(), dk.zero_(), dv.zero_(), dvalue.zero_()
    common = _common(query, key_valid, lengths)
    dcontext = None if dcontext is None else rows_contiguous(dcontext)
    dweights = None if dweights is None else dweights.contiguous()
    of_context = dict(
        p_dcontext=dcontext,
        stride_cb=0 if dcontext is None else dcontext.stride(0),
        stride_cl=0 if dcontext is None else dcontext.stride(1),
    )
    BLOCK_L, BLOCK_S, BLOCK_D = PRODUCT["BLOCK_L"], PRODUCT["BLOCK_S"], PRODUCT["BLOCK_D"]
    with on_device(query):
        if need_dquery or need_dkey or need_dv:
            dw, ds = torch.empty_like(weights), torch.empty_like(weights)
            additive_dw_kernel[_grid(B, (S, BLOCK_S), (L, BLOCK_L))](
                **of_context, p_dweights=dweights, p_value=value, p_dw=dw, stride_vb=value.stride(0),
                stride_vs=value.stride(1), S=S, D=D, DCONTEXT=dcontext is not None,
                DWEIGHTS=dweights is not None, INTERPRET=INTERPRET, **common, **PRODUCT,
            )  # fmt: skip
            additive_ds_kernel[_grid(B, (L, BLOCK_L))](
                p_w=weights, p_dw=dw, p_ds=ds, S=S, BLOCK_L=BLOCK_L, BLOCK_S=BLOCK_S, num_warps=4, **common
            )
            scored = _scored(query, key, v) | dict(p_ds=ds)
            of_queries, of_keys = (L, TANH["BLOCK_L"]), (S, TANH["BLOCK_S"])
            if (need_dquery or need_dv) and H:
                parts = ds.new_empty((B * triton.cdiv(*of_queries), H) if need_dv else (0,))
                additive_dq_kernel[_grid(B, (H, TANH["BLOCK_H"]), of_queries)](
                    **scored, **common, p_dq=dq, p_dv=parts, NEED_DQ=need_dquery, NEED_DV=need_dv
                )
                if need_dv:
                    dv.copy_(parts.sum(0))
            if need_dkey and H:
                additive_dk_kernel[_grid(B, (H, TANH["BLOCK_H"]), of_keys)](**scored, **common, p_dk=dk)
        if need_dvalue and dcontext is None:
            dvalue.zero_()
        elif need_dvalue and D:
            additive_dvalue_kernel[_grid(B, (D, BLOCK_D), (S, BLOCK_S))](
                p_dcontext=dcontext, p_w=weights, p_dvalue=dvalue, stride_cb=of_context["stride_cb"],
                stride_cl=of_context["stride_cl"], S=S, D=D, INTERPRET=INTERPRET, **common, **PRODUCT,
            )  # fmt: skip
    return dq, dk, dv, dvalue
