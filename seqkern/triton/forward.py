"""Attention forward.

    out(l) = sum over s of (P ∘ D)(l, s) v(s),   P = softmax over the allowed s of score
    lse(l) = log(sum over the allowed s of exp(score(l, s)))

computed online: m, the largest score so far, and the sum of exp2(score2 - m); when m grows, what was summed
is rescaled.

Layout: see tiles.py; out as q with Ev columns, by strides; lse by strides, float32 (float64 for float64).
Ownership: one program per (b, n, tile of BLOCK_L queries); its q tile, m and the sums stay in registers or
shared memory while it walks the key tiles that its window and the padding leave. It overwrites its rows of
out and lse, the rows of padding with 0 and -inf.
Columns of q, k and v are split in two parts where that saves padding (E = 96 = 64 + 32): part 1 is absent
where BLOCK_E1 (BLOCK_EV1) is 0.
"""

import triton
import triton.language as tl

from seqkern.triton.tiles import (
    LN2,
    LOG2E,
    NO_BIAS,
    PACKED,
    UNSPECIALIZED,
    count_tiles,
    dot,
    dropout_keep,
    extent,
    in_window,
    load_rows,
    pick_tile,
    row_of_program,
    scores,
    store_rows,
    trips,
    valid_rows,
    window_range,
)


@triton.jit
def _walk(
    b_o0, b_o1, b_m, b_l, b_q0, b_q1, o_l, o_bl, i_b, i_bn, offset, p_k, p_v, p_bias, p_key, p_tiles, p_seed,
    stride_ks, stride_vs, stride_bl, stride_bs, n, n_left, n_part, first_full, first_left, first_part,
    first_right, S, length, scale2, left, right, threshold, E: tl.constexpr, EV: tl.constexpr,
    BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_EV0: tl.constexpr, BLOCK_EV1: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, KEYS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds n tiles of keys, full or EDGE ones, to b_o0, b_o1, b_m, b_l."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    o_t = tl.arange(0, BLOCK_S)
    o_e0 = tl.arange(0, BLOCK_E0)
    o_ev0 = tl.arange(0, BLOCK_EV0)
    for i in range(trips(n)):
        s_0 = BLOCK_S * pick_tile(
            p_tiles, i, n_left, n_part, first_full, first_left, first_part, first_right, KEYS, EDGE
        )
        o_s = s_0 + o_t
        b_valid = o_s < length
        if EDGE:
            b_valid = valid_rows(p_key, i_b, o_s, S, length, KEYS)
        p_k_tile = p_k + s_0.to(tl.int64) * stride_ks
        p_v_tile = p_v + s_0.to(tl.int64) * stride_vs

        b_k = load_rows(p_k_tile, o_t, o_e0, stride_ks, b_valid, E, E >= BLOCK_E0, EDGE)
        b_s = dot(b_q0, tl.trans(b_k), tl.zeros([BLOCK_L, BLOCK_S], ACC), DTYPE, PRECISION, INTERPRET)
        if BLOCK_E1 > 0:
            o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1)
            b_k = load_rows(p_k_tile, o_t, o_e1, stride_ks, b_valid, E, E == BLOCK_E0 + BLOCK_E1, EDGE)
            b_s = dot(b_q1, tl.trans(b_k), b_s, DTYPE, PRECISION, INTERPRET)

        b_allowed = b_valid[None, :]
        o_bs = o_s
        if EDGE:
            if LEFT or RIGHT:
                b_allowed = b_allowed & in_window(
                    o_l[:, None], o_s[None, :], offset, left, right, LEFT, RIGHT
                )
            o_bs = tl.minimum(o_s, S - 1)
        if EDGE or BIAS != NO_BIAS:
            b_s = scores(
                b_s,
                scale2,
                p_bias,
                o_bl[:, None],
                o_bs[None, :],
                stride_bl,
                stride_bs,
                b_allowed,
                ACC,
                BIAS,
                EDGE,
            )
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_m_safe = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
            b_p = tl.exp2(b_s - b_m_safe[:, None])
        else:  # one multiply and add per score
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale2)
            b_m_safe = b_m_new
            b_p = tl.exp2(b_s * scale2 - b_m_new[:, None])
        b_alpha = tl.exp2(b_m - b_m_safe)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_m = b_m_new
        if DROPOUT:
            b_p = tl.where(dropout_keep(p_seed, o_l, i_bn, s_0, threshold, BLOCK_L, BLOCK_S), b_p, 0.0)

        b_v = load_rows(p_v_tile, o_t, o_ev0, stride_vs, b_valid, EV, EV >= BLOCK_EV0, EDGE)
        b_o0 = dot(b_p, b_v, b_o0 * b_alpha[:, None], DTYPE, PRECISION, INTERPRET)
        if BLOCK_EV1 > 0:
            o_ev1 = BLOCK_EV0 + tl.arange(0, BLOCK_EV1)
            b_v = load_rows(p_v_tile, o_t, o_ev1, stride_vs, b_valid, EV, EV == BLOCK_EV0 + BLOCK_EV1, EDGE)
            b_o1 = dot(b_p, b_v, b_o1 * b_alpha[:, None], DTYPE, PRECISION, INTERPRET)
    return b_o0, b_o1, b_m, b_l


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    p_q, p_k, p_v, p_bias, p_query, p_key, p_tiles, p_seed, p_out, p_lse, stride_qb, stride_qn, stride_ql,
    stride_kb, stride_kn, stride_ks, stride_vb, stride_vn, stride_vs, stride_bb, stride_bn, stride_bl,
    stride_bs, stride_ob, stride_on, stride_ol, stride_lb, stride_ln, B, N, GROUP, L, S, total_q, total_k, T,
    scale, left, right, bottom_right, threshold, rescale, section, E: tl.constexpr, EV: tl.constexpr,
    BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_EV0: tl.constexpr, BLOCK_EV1: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out, lse: overwritten. Grid: (B * N * ceil(L / BLOCK_L),). L, S: packed, the longest; T: tiles per row
    of p_tiles. scale: the factor's absolute value; NEGATIVE: it was, so q is negated, and the largest product
    is the largest score.
    """
    n_tiles = (L + BLOCK_L - 1) // BLOCK_L
    i_l, i_bn = row_of_program(tl.program_id(0), n_tiles, B * N, section, True)
    i_b = i_bn // N
    i_n = i_bn % N
    first_q, length_q = extent(p_query, i_b, L, total_q, QUERIES)
    first_k, length_k = extent(p_key, i_b, S, total_k, KEYS)
    offset = bottom_right * (length_k - length_q)

    i_b64 = i_b.to(tl.int64)
    i_n64 = i_n.to(tl.int64)
    i_kn64 = (i_n // GROUP).to(tl.int64)
    l_0 = i_l * BLOCK_L
    o_t = tl.arange(0, BLOCK_L)
    o_l = l_0 + o_t
    o_bl = tl.minimum(o_l, L - 1)
    b_valid = valid_rows(p_query, i_b, o_l, L, length_q, QUERIES)
    p_q += i_b64 * stride_qb + i_n64 * stride_qn + (first_q + l_0) * stride_ql
    p_k += i_b64 * stride_kb + i_kn64 * stride_kn + first_k * stride_ks
    p_v += i_b64 * stride_vb + i_kn64 * stride_vn + first_k * stride_vs
    if BIAS != NO_BIAS:
        p_bias += i_b64 * stride_bb + i_n64 * stride_bn
    if p_tiles is not None:
        p_tiles += i_b64 * 5 * (T + 1)

    o_e0 = tl.arange(0, BLOCK_E0)
    o_ev0 = tl.arange(0, BLOCK_EV0)
    scale2 = tl.cast(scale, ACC) * LOG2E  # scalars come as float32
    b_q0 = load_rows(p_q, o_t, o_e0, stride_ql, b_valid, E, E >= BLOCK_E0, True)
    if NEGATIVE:
        b_q0 = -b_q0
    b_q1 = b_q0
    if BLOCK_E1 > 0:
        o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1)
        b_q1 = load_rows(p_q, o_t, o_e1, stride_ql, b_valid, E, E == BLOCK_E0 + BLOCK_E1, True)
        if NEGATIVE:
            b_q1 = -b_q1
    b_m = tl.full([BLOCK_L], float("-inf"), ACC)
    b_l = tl.zeros([BLOCK_L], ACC)
    b_o0 = tl.zeros([BLOCK_L, BLOCK_EV0], ACC)
    b_o1 = b_l
    if BLOCK_EV1 > 0:
        b_o1 = tl.zeros([BLOCK_L, BLOCK_EV1], ACC)

    lo, full_lo, full_hi, hi = window_range(
        l_0, tl.minimum(l_0 + BLOCK_L, length_q), offset, left, right, length_k, BLOCK_S, LEFT, RIGHT
    )
    n_full, n_edge, n_left, n_part, first_full, first_left, first_part, first_right = count_tiles(
        p_tiles, T, lo, full_lo, full_hi, hi, KEYS
    )
    some = tl.max(b_valid.to(tl.int32), 0)  # a tile of padding visits nothing
    b_o0, b_o1, b_m, b_l = _walk(
        b_o0, b_o1, b_m, b_l, b_q0, b_q1, o_l, o_bl, i_b, i_bn, offset, p_k, p_v, p_bias, p_key, p_tiles,
        p_seed, stride_ks, stride_vs, stride_bl, stride_bs, n_full * some, n_left, n_part, first_full,
        first_left, first_part, first_right, S, length_k, scale2, left, right, threshold, E, EV, BLOCK_E0,
        BLOCK_E1, BLOCK_EV0, BLOCK_EV1, BLOCK_L, BLOCK_S, KEYS, LEFT, RIGHT, BIAS, DROPOUT, ACC, PRECISION,
        INTERPRET, False,
    )  # fmt: skip
    b_o0, b_o1, b_m, b_l = _walk(
        b_o0, b_o1, b_m, b_l, b_q0, b_q1, o_l, o_bl, i_b, i_bn, offset, p_k, p_v, p_bias, p_key, p_tiles,
        p_seed, stride_ks, stride_vs, stride_bl, stride_bs, n_edge * some, n_left, n_part, first_full,
        first_left, first_part, first_right, S, length_k, scale2, left, right, threshold, E, EV, BLOCK_E0,
        BLOCK_E1, BLOCK_EV0, BLOCK_EV1, BLOCK_L, BLOCK_S, KEYS, LEFT, RIGHT, BIAS, DROPOUT, ACC, PRECISION,
        INTERPRET, True,
    )  # fmt: skip

    b_some = b_valid & (b_m > float("-inf"))
    b_l = tl.where(b_some, b_l, 1.0)
    b_lse = tl.where(b_some, b_m * LN2 + tl.log(b_l), float("-inf"))
    b_factor = tl.where(b_some, rescale / b_l, 0.0)[:, None]
    b_inside = o_l < L
    if QUERIES == PACKED:
        b_inside = o_l < length_q
    p_out += i_b64 * stride_ob + i_n64 * stride_on + (first_q + l_0) * stride_ol
    p_lse += i_b64 * stride_lb + i_n64 * stride_ln + first_q + l_0
    tl.store(p_lse + o_t, b_lse, mask=b_inside)
    b_o0 = tl.where(b_some[:, None], b_o0 * b_factor, 0.0)
    store_rows(p_out, o_t, o_ev0, stride_ol, 1, b_o0, b_inside, EV, EV >= BLOCK_EV0)
    if BLOCK_EV1 > 0:
        o_ev1 = BLOCK_EV0 + tl.arange(0, BLOCK_EV1)
        b_o1 = tl.where(b_some[:, None], b_o1 * b_factor, 0.0)
        store_rows(p_out, o_t, o_ev1, stride_ol, 1, b_o1, b_inside, EV, EV == BLOCK_EV0 + BLOCK_EV1)
