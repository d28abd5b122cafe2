"""Attention weights after dropout, averaged over the heads or per head.

    w(b, l, s) = 1/N sum over n of (P ∘ D)(b, n, l, s)   or   w(b, n, l, s) = (P ∘ D)(b, n, l, s)
    P = exp(score - lse)

Layout: w [B, L, S] or [B, N, L, S] by strides; the rest as in tiles.py; nothing is packed here.
Ownership: one program per (b, tile of BLOCK_L queries, tile of BLOCK_S keys), and per n if not averaged; it
overwrites its tile of w once, after a loop over the heads with the sum in registers. A tile where nobody
attends becomes 0 at once.
"""

import triton
import triton.language as tl

from seqkern.triton.tiles import (
    LOG2E,
    NO_BIAS,
    dot,
    dropout_keep,
    extent,
    in_window,
    load_rows,
    scores,
    trips,
    valid_rows,
    window_range,
)


@triton.jit(do_not_specialize=["B", "N", "L", "S", "left", "right", "bottom_right", "threshold"])
def attention_weights_kernel(
    p_q, p_k, p_bias, p_query, p_key, p_seed, p_lse, p_w, stride_qb, stride_qn, stride_ql, stride_kb,
    stride_kn, stride_ks, stride_bb, stride_bn, stride_bl, stride_bs, stride_lb, stride_ln, stride_wb,
    stride_wn, stride_wl, B, N, GROUP, L, S, scale, left, right, bottom_right, threshold, rescale,
    E: tl.constexpr, BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, AVERAGE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """w: overwritten. Grid: (ceil(S / BLOCK_S) * ceil(L / BLOCK_L) * B * (1 if AVERAGE else N),)."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    pid = tl.program_id(0)
    n_s = (S + BLOCK_S - 1) // BLOCK_S
    n_l = (L + BLOCK_L - 1) // BLOCK_L
    i_s = pid % n_s
    i_l = pid // n_s % n_l
    i_row = pid // n_s // n_l
    if AVERAGE:
        i_b = i_row
        n_0 = i_row * 0
        n_heads = n_0 + N
        share = rescale / N
    else:
        i_b = i_row // N
        n_0 = i_row % N
        n_heads = n_0 * 0 + 1
        share = rescale
    _, length_q = extent(p_query, i_b, L, 0, QUERIES)
    _, length_k = extent(p_key, i_b, S, 0, KEYS)
    offset = bottom_right * (length_k - length_q)
    i_b64 = i_b.to(tl.int64)
    l_0 = i_l * BLOCK_L
    s_0 = i_s * BLOCK_S
    o_t = tl.arange(0, BLOCK_L)
    o_u = tl.arange(0, BLOCK_S)
    o_l = l_0 + o_t
    o_s = s_0 + o_u
    b_query = valid_rows(p_query, i_b, o_l, L, length_q, QUERIES)
    b_key = valid_rows(p_key, i_b, o_s, S, length_k, KEYS)
    b_allowed = b_query[:, None] & b_key[None, :]
    lo, _, _, hi = window_range(
        l_0, tl.minimum(l_0 + BLOCK_L, length_q), offset, left, right, length_k, BLOCK_S, LEFT, RIGHT
    )
    some = tl.max(b_query.to(tl.int32), 0) * tl.max(b_key.to(tl.int32), 0)
    if (i_s < lo) | (i_s >= hi) | (some == 0):
        n_heads = n_heads * 0
    if LEFT or RIGHT:
        b_allowed = b_allowed & in_window(o_l[:, None], o_s[None, :], offset, left, right, LEFT, RIGHT)
    o_bl = tl.minimum(o_l, L - 1)
    o_bs = tl.minimum(o_s, S - 1)

    b_w = tl.zeros([BLOCK_L, BLOCK_S], ACC)
    o_e0 = tl.arange(0, BLOCK_E0)
    for i in range(trips(n_heads)):
        i_n = n_0 + i
        i_n64 = i_n.to(tl.int64)
        i_kn64 = (i_n // GROUP).to(tl.int64)
        p_q_tile = p_q + i_b64 * stride_qb + i_n64 * stride_qn + l_0.to(tl.int64) * stride_ql
        p_k_tile = p_k + i_b64 * stride_kb + i_kn64 * stride_kn + s_0.to(tl.int64) * stride_ks
        p_lse_tile = p_lse + i_b64 * stride_lb + i_n64 * stride_ln + l_0
        b_lse = tl.load(p_lse_tile + o_t, mask=b_query, other=float("inf"))
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E
        b_q = load_rows(p_q_tile, o_t, o_e0, stride_ql, b_query, E, E >= BLOCK_E0, True)
        b_k = load_rows(p_k_tile, o_u, o_e0, stride_ks, b_key, E, E >= BLOCK_E0, True)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_L, BLOCK_S], ACC), DTYPE, PRECISION, INTERPRET)
        if BLOCK_E1 > 0:
            o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1)
            b_q = load_rows(p_q_tile, o_t, o_e1, stride_ql, b_query, E, E == BLOCK_E0 + BLOCK_E1, True)
            b_k = load_rows(p_k_tile, o_u, o_e1, stride_ks, b_key, E, E == BLOCK_E0 + BLOCK_E1, True)
            b_s = dot(b_q, tl.trans(b_k), b_s, DTYPE, PRECISION, INTERPRET)
        p_bias_row = p_bias
        if BIAS != NO_BIAS:
            p_bias_row = p_bias + i_b64 * stride_bb + i_n64 * stride_bn
        b_s = scores(
            b_s, tl.cast(scale, ACC) * LOG2E, p_bias_row, o_bl[:, None], o_bs[None, :], stride_bl, stride_bs,
            b_allowed, ACC, BIAS, True
        )  # fmt: skip
        b_p = tl.exp2(b_s - b_lse[:, None])
        if DROPOUT:
            b_keep = dropout_keep(p_seed, o_l, i_b * N + i_n, s_0, threshold, BLOCK_L, BLOCK_S)
            b_p = tl.where(b_keep, b_p, 0.0)
        b_w += b_p
    p_w += i_b64 * stride_wb + l_0.to(tl.int64) * stride_wl + s_0
    if not AVERAGE:
        p_w += n_0.to(tl.int64) * stride_wn
    p_w_tile = p_w + o_t[:, None].to(tl.int64) * stride_wl + o_u[None, :]
    b_inside = (o_l < L)[:, None] & (o_s < S)[None, :]
    tl.store(p_w_tile, (b_w * share).to(p_w.dtype.element_ty), mask=b_inside)
