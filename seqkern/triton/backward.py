"""Attention backward, deterministic: every sum is made by one program, in a fixed order.

    P = exp(score - lse)                   dP = D ∘ (dout vᵀ + dW [/N if averaged])
    delta(l) = sum over s of (P ∘ dP)(l, s) - dlse(l)
             = dout(l) · out(l) + sum over s of (P ∘ D ∘ dW)(l, s) [/N] - dlse(l)
    dS = P ∘ (dP - delta)
    dv(s) = sum over l of (P ∘ D)(l, s) dout(l)           and over the heads of the group
    dk(s) = scale * sum over l of dS(l, s) q(l)           likewise
    dq(l) = scale * sum over s of dS(l, s) k(s)
    dbias = dS, summed over the dimensions that bias broadcasts

Layout: dq, dk, dv by strides, also of the last dimension; delta as lse; dW [B, L, S] or [B, N, L, S] by
strides; the rest as in tiles.py and forward.py. Columns come in two parts as in forward.py.
Ownership: one program per
    (b, n, tile of queries)      delta: overwrites delta; walks the keys only if there is a dW
    (b, key head, tile of keys)  dk and dv: k and v tile and both sums stay while it walks the query tiles of
                                 every head of its group; overwrites dk, dv
    (b, n, tile of queries)      dq: q and dout tile and the sum stay while it walks the key tiles
    tile of dbias                dbias: walks all (b, n, tile of queries, tile of keys) that share the tile
Rows of padding never count: their q, dout, k and v load as zeros, their lse as +inf, and their gradients are
stored as 0.
"""

import triton
import triton.language as tl

from seqkern.triton.tiles import (
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
def _load_lse2(p_lse, o_r, b_valid, ROWS: tl.constexpr):
    """lse in base 2; +inf, under which every probability is 0, in rows that attend to nothing."""
    if ROWS:  # noqa: SIM108
        b_lse = tl.load(p_lse + o_r, mask=b_valid, other=float("inf"))
    else:
        b_lse = tl.load(p_lse + o_r)
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E


@triton.jit
def _load_dw(p_dw, o_l, o_s, stride_dwl, stride_dws, b_inside, share, ACC: tl.constexpr):
    """share * dW of a tile; o_l, o_s and b_inside broadcast to it."""
    p_tile = p_dw + o_l.to(tl.int64) * stride_dwl + o_s.to(tl.int64) * stride_dws
    return tl.load(p_tile, mask=b_inside, other=0.0).to(ACC) * share


# ---- delta -------------------------------------------------------------------------------------------------


@triton.jit
def _walk_delta(
    b_delta, b_q0, b_q1, b_lse, b_query, o_l, o_bl, i_b, i_bn, offset, p_k, p_bias, p_key, p_tiles, p_seed,
    p_dw, stride_ks, stride_bl, stride_bs, stride_dwl, stride_dws, n, n_left, n_part, first_full, first_left,
    first_part, first_right, S, length, scale2, left, right, threshold, share, E: tl.constexpr,
    BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    KEYS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """b_delta + sum over n tiles of keys of P ∘ D ∘ dW; share holds D's factor."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    o_u = tl.arange(0, BLOCK_S)
    o_e0 = tl.arange(0, BLOCK_E0)
    for i in range(trips(n)):
        s_0 = BLOCK_S * pick_tile(
            p_tiles, i, n_left, n_part, first_full, first_left, first_part, first_right, KEYS, EDGE
        )
        o_s = s_0 + o_u
        b_key = o_s < length
        if EDGE:
            b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
        p_k_tile = p_k + s_0.to(tl.int64) * stride_ks
        b_k = load_rows(p_k_tile, o_u, o_e0, stride_ks, b_key, E, E >= BLOCK_E0, EDGE)
        b_s = dot(b_q0, tl.trans(b_k), tl.zeros([BLOCK_L, BLOCK_S], ACC), DTYPE, PRECISION, INTERPRET)
        if BLOCK_E1 > 0:
            o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1)
            b_k = load_rows(p_k_tile, o_u, o_e1, stride_ks, b_key, E, E == BLOCK_E0 + BLOCK_E1, EDGE)
            b_s = dot(b_q1, tl.trans(b_k), b_s, DTYPE, PRECISION, INTERPRET)
        b_allowed = b_query[:, None] & b_key[None, :]
        o_bs = o_s
        if EDGE:
            if LEFT or RIGHT:
                b_allowed = b_allowed & in_window(
                    o_l[:, None], o_s[None, :], offset, left, right, LEFT, RIGHT
                )
            o_bs = tl.minimum(o_s, S - 1)
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
        b_p = tl.exp2(b_s - b_lse[:, None])
        if DROPOUT:
            b_p = tl.where(dropout_keep(p_seed, o_l, i_bn, s_0, threshold, BLOCK_L, BLOCK_S), b_p, 0.0)
        b_dw = _load_dw(p_dw, o_l[:, None], o_s[None, :], stride_dwl, stride_dws, b_allowed, share, ACC)
        b_delta += tl.sum(tl.where(b_p > 0, b_p * b_dw, 0.0), 1)
    return b_delta


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_delta_kernel(
    p_q, p_k, p_bias, p_query, p_key, p_tiles, p_seed, p_out, p_lse, p_dout, p_dlse, p_dw, p_delta, stride_qb,
    stride_qn, stride_ql, stride_kb, stride_kn, stride_ks, stride_bb, stride_bn, stride_bl, stride_bs,
    stride_ob, stride_on, stride_ol, stride_lb, stride_ln, stride_dob, stride_don, stride_dol, stride_dlb,
    stride_dln, stride_dll, stride_dwb, stride_dwn, stride_dwl, stride_dws, B, N, GROUP, L, S, total_q,
    total_k, T, scale, left, right, bottom_right, threshold, share, section, E: tl.constexpr,
    EV: tl.constexpr, BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DLSE: tl.constexpr,
    DW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """delta: overwritten, strides of lse. Grid: (B * N * ceil(L / BLOCK_L),). share: what multiplies a kept
    dW."""
    n_tiles = (L + BLOCK_L - 1) // BLOCK_L
    i_l, i_bn = row_of_program(tl.program_id(0), n_tiles, B * N, section, True)
    i_b = i_bn // N
    i_n = i_bn % N
    first_q, length_q = extent(p_query, i_b, L, total_q, QUERIES)
    i_b64 = i_b.to(tl.int64)
    i_n64 = i_n.to(tl.int64)
    l_0 = i_l * BLOCK_L
    o_t = tl.arange(0, BLOCK_L)
    o_l = l_0 + o_t
    b_query = valid_rows(p_query, i_b, o_l, L, length_q, QUERIES)
    o_ev = tl.arange(0, BLOCK_EV)
    row = first_q + l_0
    lse_row = i_b64 * stride_lb + i_n64 * stride_ln + row
    p_out += i_b64 * stride_ob + i_n64 * stride_on + row * stride_ol
    p_dout += i_b64 * stride_dob + i_n64 * stride_don + row * stride_dol
    b_out = load_rows(p_out, o_t, o_ev, stride_ol, b_query, EV, EV == BLOCK_EV, True).to(ACC)
    b_dout = load_rows(p_dout, o_t, o_ev, stride_dol, b_query, EV, EV == BLOCK_EV, True).to(ACC)
    b_delta = tl.sum(b_out * b_dout, 1)
    if DLSE:
        p_dlse += i_b64 * stride_dlb + i_n64 * stride_dln + row * stride_dll
        b_delta -= tl.load(p_dlse + o_t.to(tl.int64) * stride_dll, mask=b_query, other=0.0).to(ACC)
    if DW:
        _, length_k = extent(p_key, i_b, S, total_k, KEYS)
        offset = bottom_right * (length_k - length_q)
        i_kn64 = (i_n // GROUP).to(tl.int64)
        p_q += i_b64 * stride_qb + i_n64 * stride_qn + row * stride_ql
        p_k += i_b64 * stride_kb + i_kn64 * stride_kn
        p_dw += i_b64 * stride_dwb + i_n64 * stride_dwn
        if BIAS != NO_BIAS:
            p_bias += i_b64 * stride_bb + i_n64 * stride_bn
        if p_tiles is not None:
            p_tiles += i_b64 * 5 * (T + 1)
        b_lse = _load_lse2(p_lse + lse_row, o_t, b_query, True)
        b_q0 = load_rows(p_q, o_t, tl.arange(0, BLOCK_E0), stride_ql, b_query, E, E >= BLOCK_E0, True)
        b_q1 = b_q0
        if BLOCK_E1 > 0:
            o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1)
            b_q1 = load_rows(p_q, o_t, o_e1, stride_ql, b_query, E, E == BLOCK_E0 + BLOCK_E1, True)
        lo, full_lo, full_hi, hi = window_range(
            l_0, tl.minimum(l_0 + BLOCK_L, length_q), offset, left, right, length_k, BLOCK_S, LEFT, RIGHT
        )
        n_full, n_edge, n_left, n_part, first_full, first_left, first_part, first_right = count_tiles(
            p_tiles, T, lo, full_lo, full_hi, hi, KEYS
        )
        some = tl.max(b_query.to(tl.int32), 0)
        o_bl = tl.minimum(o_l, L - 1)
        b_delta = _walk_delta(
            b_delta, b_q0, b_q1, b_lse, b_query, o_l, o_bl, i_b, i_bn, offset, p_k, p_bias, p_key, p_tiles,
            p_seed, p_dw, stride_ks, stride_bl, stride_bs, stride_dwl, stride_dws, n_full * some, n_left,
            n_part, first_full, first_left, first_part, first_right, S, length_k, tl.cast(scale, ACC) * LOG2E,
            left, right, threshold, share, E, BLOCK_E0, BLOCK_E1, BLOCK_L, BLOCK_S, KEYS, LEFT, RIGHT, BIAS,
            DROPOUT, ACC, PRECISION, INTERPRET, False,
        )  # fmt: skip
        b_delta = _walk_delta(
            b_delta, b_q0, b_q1, b_lse, b_query, o_l, o_bl, i_b, i_bn, offset, p_k, p_bias, p_key, p_tiles,
            p_seed, p_dw, stride_ks, stride_bl, stride_bs, stride_dwl, stride_dws, n_edge * some, n_left,
            n_part, first_full, first_left, first_part, first_right, S, length_k, tl.cast(scale, ACC) * LOG2E,
            left, right, threshold, share, E, BLOCK_E0, BLOCK_E1, BLOCK_L, BLOCK_S, KEYS, LEFT, RIGHT, BIAS,
            DROPOUT, ACC, PRECISION, INTERPRET, True,
        )  # fmt: skip
    b_attends = b_query & (tl.load(p_lse + lse_row + o_t, mask=b_query, other=float("-inf")) > float("-inf"))
    b_inside = o_l < L
    if QUERIES == PACKED:
        b_inside = o_l < length_q
    tl.store(p_delta + lse_row + o_t, tl.where(b_attends, b_delta, 0.0), mask=b_inside)


# ---- dk, dv ------------------------------------------------------------------------------------------------


@triton.jit
def _walk_queries(
    b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, b_key, o_s, o_bs, i_b, i_bn, offset, p_q, p_dout,
    p_bias, p_query, p_tiles, p_seed, p_lse, p_delta, p_dw, stride_ql, stride_dol, stride_bl, stride_bs,
    stride_dwl, stride_dws, n, n_left, n_part, first_full, first_left, first_part, first_right, s_0, L,
    length, scale2, left, right, threshold, rescale, share, E: tl.constexpr, EV: tl.constexpr,
    BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_EV0: tl.constexpr, BLOCK_EV1: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, QUERIES: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DW: tl.constexpr, NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Adds n tiles of queries of one head to b_dk (without scale) and b_dv (without D's factor). Tiles are
    transposed, [BLOCK_S, BLOCK_L]: P and dS are then left operands, which may come from registers. Keys of
    padding need no mask: what they gather stays in their own rows, which are not stored."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    o_t = tl.arange(0, BLOCK_L)
    o_e0 = tl.arange(0, BLOCK_E0)
    o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1 if BLOCK_E1 > 0 else 16)
    o_ev0 = tl.arange(0, BLOCK_EV0)
    o_ev1 = BLOCK_EV0 + tl.arange(0, BLOCK_EV1 if BLOCK_EV1 > 0 else 16)
    for i in range(trips(n)):
        l_0 = BLOCK_L * pick_tile(
            p_tiles, i, n_left, n_part, first_full, first_left, first_part, first_right, QUERIES, EDGE
        )
        o_l = l_0 + o_t
        b_query = o_l < length
        o_bl = o_l
        if EDGE:
            b_query = valid_rows(p_query, i_b, o_l, L, length, QUERIES)
            o_bl = tl.minimum(o_l, L - 1)
        p_q_tile = p_q + l_0.to(tl.int64) * stride_ql
        p_dout_tile = p_dout + l_0.to(tl.int64) * stride_dol

        b_q0 = load_rows(p_q_tile, o_t, o_e0, stride_ql, b_query, E, E >= BLOCK_E0, EDGE)
        b_s = dot(b_k0, tl.trans(b_q0), tl.zeros([BLOCK_S, BLOCK_L], ACC), DTYPE, PRECISION, INTERPRET)
        b_q1 = b_q0
        if BLOCK_E1 > 0:
            b_q1 = load_rows(p_q_tile, o_t, o_e1, stride_ql, b_query, E, E == BLOCK_E0 + BLOCK_E1, EDGE)
            b_s = dot(b_k1, tl.trans(b_q1), b_s, DTYPE, PRECISION, INTERPRET)
        b_allowed = b_query[None, :]
        if EDGE and (LEFT or RIGHT):
            b_allowed = b_allowed & in_window(o_l[None, :], o_s[:, None], offset, left, right, LEFT, RIGHT)
        b_s = scores(
            b_s, scale2, p_bias, o_bl[None, :], o_bs[:, None], stride_bl, stride_bs, b_allowed, ACC, BIAS,
            EDGE and (LEFT or RIGHT),
        )  # fmt: skip
        b_lse = _load_lse2(p_lse + l_0, o_t, b_query, EDGE)
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_pd = b_p
        if DROPOUT:
            b_keep = tl.trans(dropout_keep(p_seed, o_l, i_bn, s_0, threshold, BLOCK_L, BLOCK_S))
            b_pd = tl.where(b_keep, b_p, 0.0)

        b_dout0 = load_rows(p_dout_tile, o_t, o_ev0, stride_dol, b_query, EV, EV >= BLOCK_EV0, EDGE)
        b_dout1 = b_dout0
        if BLOCK_EV1 > 0:
            b_dout1 = load_rows(
                p_dout_tile, o_t, o_ev1, stride_dol, b_query, EV, EV == BLOCK_EV0 + BLOCK_EV1, EDGE
            )
        if NEED_DV:
            b_dv0 = dot(b_pd, b_dout0, b_dv0, DTYPE, PRECISION, INTERPRET)
            if BLOCK_EV1 > 0:
                b_dv1 = dot(b_pd, b_dout1, b_dv1, DTYPE, PRECISION, INTERPRET)
        if NEED_DK:
            b_dp = dot(
                b_v0, tl.trans(b_dout0), tl.zeros([BLOCK_S, BLOCK_L], ACC), DTYPE, PRECISION, INTERPRET
            )
            if BLOCK_EV1 > 0:
                b_dp = dot(b_v1, tl.trans(b_dout1), b_dp, DTYPE, PRECISION, INTERPRET)
            if DW:
                b_inside = b_key[:, None] & b_allowed
                b_dp += _load_dw(
                    p_dw, o_l[None, :], o_s[:, None], stride_dwl, stride_dws, b_inside, share, ACC
                )
            if DROPOUT:
                b_dp = tl.where(b_keep, b_dp * rescale, 0.0)
            if EDGE:
                b_delta = tl.load(p_delta + l_0 + o_t, mask=b_query, other=0.0)
            else:
                b_delta = tl.load(p_delta + l_0 + o_t)
            b_ds = b_p * (b_dp - b_delta[None, :])
            if DW and BIAS != NO_BIAS:
                b_ds = tl.where(b_p > 0, b_ds, 0.0)  # dW may be NaN where nobody attends
            b_dk0 = dot(b_ds, b_q0, b_dk0, DTYPE, PRECISION, INTERPRET)
            if BLOCK_E1 > 0:
                b_dk1 = dot(b_ds, b_q1, b_dk1, DTYPE, PRECISION, INTERPRET)
    return b_dk0, b_dk1, b_dv0, b_dv1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dkdv_kernel(
    p_q, p_k, p_v, p_bias, p_query, p_key, p_tiles, p_seed, p_lse, p_delta, p_dout, p_dw, p_dk, p_dv,
    stride_qb, stride_qn, stride_ql, stride_kb, stride_kn, stride_ks, stride_vb, stride_vn, stride_vs,
    stride_bb, stride_bn, stride_bl, stride_bs, stride_lb, stride_ln, stride_dob, stride_don, stride_dol,
    stride_dwb, stride_dwn, stride_dwl, stride_dws, stride_dkb, stride_dkn, stride_dks, stride_dke,
    stride_dvb, stride_dvn, stride_dvs, stride_dve, B, N, GROUP, L, S, total_q, total_k, T, scale, left,
    right, bottom_right, threshold, rescale, share, section, E: tl.constexpr, EV: tl.constexpr,
    BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_EV0: tl.constexpr, BLOCK_EV1: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DW: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dk, dv: overwritten. Grid: (B * Nk * ceil(S / BLOCK_S),). p_tiles: of the queries, in tiles of
    BLOCK_L."""
    n_tiles = (S + BLOCK_S - 1) // BLOCK_S
    heads = N // GROUP
    i_s, i_row = row_of_program(tl.program_id(0), n_tiles, B * heads, section, False)
    i_b = i_row // heads
    i_kn = i_row % heads
    first_q, length_q = extent(p_query, i_b, L, total_q, QUERIES)
    first_k, length_k = extent(p_key, i_b, S, total_k, KEYS)
    offset = bottom_right * (length_k - length_q)
    i_b64 = i_b.to(tl.int64)
    i_kn64 = i_kn.to(tl.int64)
    s_0 = i_s * BLOCK_S
    o_u = tl.arange(0, BLOCK_S)
    o_s = s_0 + o_u
    o_bs = tl.minimum(o_s, S - 1)
    b_key = valid_rows(p_key, i_b, o_s, S, length_k, KEYS)
    row = first_k + s_0
    p_k += i_b64 * stride_kb + i_kn64 * stride_kn + row * stride_ks
    p_v += i_b64 * stride_vb + i_kn64 * stride_vn + row * stride_vs
    if p_tiles is not None:
        p_tiles += i_b64 * 5 * (T + 1)

    o_e0 = tl.arange(0, BLOCK_E0)
    o_ev0 = tl.arange(0, BLOCK_EV0)
    b_k0 = load_rows(p_k, o_u, o_e0, stride_ks, b_key, E, E >= BLOCK_E0, True)
    b_v0 = load_rows(p_v, o_u, o_ev0, stride_vs, b_key, EV, EV >= BLOCK_EV0, True)
    b_dk0 = tl.zeros([BLOCK_S, BLOCK_E0], ACC)
    b_dv0 = tl.zeros([BLOCK_S, BLOCK_EV0], ACC)
    b_k1 = b_k0
    b_v1 = b_v0
    b_dk1 = tl.zeros([BLOCK_S], ACC)
    b_dv1 = b_dk1
    if BLOCK_E1 > 0:
        o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1)
        b_k1 = load_rows(p_k, o_u, o_e1, stride_ks, b_key, E, E == BLOCK_E0 + BLOCK_E1, True)
        b_dk1 = tl.zeros([BLOCK_S, BLOCK_E1], ACC)
    if BLOCK_EV1 > 0:
        o_ev1 = BLOCK_EV0 + tl.arange(0, BLOCK_EV1)
        b_v1 = load_rows(p_v, o_u, o_ev1, stride_vs, b_key, EV, EV == BLOCK_EV0 + BLOCK_EV1, True)
        b_dv1 = tl.zeros([BLOCK_S, BLOCK_EV1], ACC)

    lo, full_lo, full_hi, hi = window_range(
        s_0, tl.minimum(s_0 + BLOCK_S, length_k), -offset, right, left, length_q, BLOCK_L, RIGHT, LEFT
    )
    n_full, n_edge, n_left, n_part, first_full, first_left, first_part, first_right = count_tiles(
        p_tiles, T, lo, full_lo, full_hi, hi, QUERIES
    )
    some = tl.max(b_key.to(tl.int32), 0)
    scale2 = tl.cast(scale, ACC) * LOG2E  # scalars come as float32
    for i_g in range(trips(GROUP)):
        i_n = i_kn * GROUP + i_g
        i_bn = i_b * N + i_n
        i_n64 = i_n.to(tl.int64)
        p_q_head = p_q + i_b64 * stride_qb + i_n64 * stride_qn + first_q * stride_ql
        p_dout_head = p_dout + i_b64 * stride_dob + i_n64 * stride_don + first_q * stride_dol
        lse_row = i_b64 * stride_lb + i_n64 * stride_ln + first_q
        p_bias_head = p_bias
        if BIAS != NO_BIAS:
            p_bias_head = p_bias + i_b64 * stride_bb + i_n64 * stride_bn
        p_dw_head = p_dw
        if DW:
            p_dw_head = p_dw + i_b64 * stride_dwb + i_n64 * stride_dwn
        b_dk0, b_dk1, b_dv0, b_dv1 = _walk_queries(
            b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, b_key, o_s, o_bs, i_b, i_bn, offset, p_q_head,
            p_dout_head, p_bias_head, p_query, p_tiles, p_seed, p_lse + lse_row, p_delta + lse_row, p_dw_head,
            stride_ql, stride_dol, stride_bl, stride_bs, stride_dwl, stride_dws, n_full * some, n_left,
            n_part, first_full, first_left, first_part, first_right, s_0, L, length_q, scale2, left, right,
            threshold, rescale, share, E, EV, BLOCK_E0, BLOCK_E1, BLOCK_EV0, BLOCK_EV1, BLOCK_L, BLOCK_S,
            QUERIES, LEFT, RIGHT, BIAS, DROPOUT, DW, NEED_DK, NEED_DV, ACC, PRECISION, INTERPRET, False,
        )  # fmt: skip
        b_dk0, b_dk1, b_dv0, b_dv1 = _walk_queries(
            b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, b_key, o_s, o_bs, i_b, i_bn, offset, p_q_head,
            p_dout_head, p_bias_head, p_query, p_tiles, p_seed, p_lse + lse_row, p_delta + lse_row, p_dw_head,
            stride_ql, stride_dol, stride_bl, stride_bs, stride_dwl, stride_dws, n_edge * some, n_left,
            n_part, first_full, first_left, first_part, first_right, s_0, L, length_q, scale2, left, right,
            threshold, rescale, share, E, EV, BLOCK_E0, BLOCK_E1, BLOCK_EV0, BLOCK_EV1, BLOCK_L, BLOCK_S,
            QUERIES, LEFT, RIGHT, BIAS, DROPOUT, DW, NEED_DK, NEED_DV, ACC, PRECISION, INTERPRET, True,
        )  # fmt: skip

    b_inside = o_s < S
    if KEYS == PACKED:
        b_inside = o_s < length_k
    if NEED_DK:
        p_dk += i_b64 * stride_dkb + i_kn64 * stride_dkn + row * stride_dks
        b_dk0 = tl.where(b_key[:, None], b_dk0 * scale, 0.0)
        store_rows(p_dk, o_u, o_e0, stride_dks, stride_dke, b_dk0, b_inside, E, E >= BLOCK_E0)
        if BLOCK_E1 > 0:
            b_dk1 = tl.where(b_key[:, None], b_dk1 * scale, 0.0)
            store_rows(p_dk, o_u, o_e1, stride_dks, stride_dke, b_dk1, b_inside, E, E == BLOCK_E0 + BLOCK_E1)
    if NEED_DV:
        p_dv += i_b64 * stride_dvb + i_kn64 * stride_dvn + row * stride_dvs
        b_dv0 = tl.where(b_key[:, None], b_dv0 * rescale, 0.0)
        store_rows(p_dv, o_u, o_ev0, stride_dvs, stride_dve, b_dv0, b_inside, EV, EV >= BLOCK_EV0)
        if BLOCK_EV1 > 0:
            b_dv1 = tl.where(b_key[:, None], b_dv1 * rescale, 0.0)
            store_rows(
                p_dv, o_u, o_ev1, stride_dvs, stride_dve, b_dv1, b_inside, EV, EV == BLOCK_EV0 + BLOCK_EV1
            )


# ---- dq ----------------------------------------------------------------------------------------------------


@triton.jit
def _walk_keys(
    b_dq0, b_dq1, b_q0, b_q1, b_dout0, b_dout1, b_lse, b_delta, b_query, o_l, o_bl, i_b, i_bn, offset, p_k,
    p_v, p_bias, p_key, p_tiles, p_seed, p_dw, stride_ks, stride_vs, stride_bl, stride_bs, stride_dwl,
    stride_dws, n, n_left, n_part, first_full, first_left, first_part, first_right, S, length, scale2, left,
    right, threshold, rescale, share, E: tl.constexpr, EV: tl.constexpr, BLOCK_E0: tl.constexpr,
    BLOCK_E1: tl.constexpr, BLOCK_EV0: tl.constexpr, BLOCK_EV1: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr, KEYS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, DW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds n tiles of keys to b_dq (without scale)."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    o_u = tl.arange(0, BLOCK_S)
    o_e0 = tl.arange(0, BLOCK_E0)
    o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1 if BLOCK_E1 > 0 else 16)
    o_ev0 = tl.arange(0, BLOCK_EV0)
    o_ev1 = BLOCK_EV0 + tl.arange(0, BLOCK_EV1 if BLOCK_EV1 > 0 else 16)
    for i in range(trips(n)):
        s_0 = BLOCK_S * pick_tile(
            p_tiles, i, n_left, n_part, first_full, first_left, first_part, first_right, KEYS, EDGE
        )
        o_s = s_0 + o_u
        b_key = o_s < length
        o_bs = o_s
        if EDGE:
            b_key = valid_rows(p_key, i_b, o_s, S, length, KEYS)
            o_bs = tl.minimum(o_s, S - 1)
        p_k_tile = p_k + s_0.to(tl.int64) * stride_ks
        p_v_tile = p_v + s_0.to(tl.int64) * stride_vs

        b_k0 = load_rows(p_k_tile, o_u, o_e0, stride_ks, b_key, E, E >= BLOCK_E0, EDGE)
        b_s = dot(b_q0, tl.trans(b_k0), tl.zeros([BLOCK_L, BLOCK_S], ACC), DTYPE, PRECISION, INTERPRET)
        b_k1 = b_k0
        if BLOCK_E1 > 0:
            b_k1 = load_rows(p_k_tile, o_u, o_e1, stride_ks, b_key, E, E == BLOCK_E0 + BLOCK_E1, EDGE)
            b_s = dot(b_q1, tl.trans(b_k1), b_s, DTYPE, PRECISION, INTERPRET)
        b_allowed = b_key[None, :]
        if EDGE and (LEFT or RIGHT):
            b_allowed = b_allowed & in_window(o_l[:, None], o_s[None, :], offset, left, right, LEFT, RIGHT)
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
        b_p = tl.exp2(b_s - b_lse[:, None])

        b_v = load_rows(p_v_tile, o_u, o_ev0, stride_vs, b_key, EV, EV >= BLOCK_EV0, EDGE)
        b_dp = dot(b_dout0, tl.trans(b_v), tl.zeros([BLOCK_L, BLOCK_S], ACC), DTYPE, PRECISION, INTERPRET)
        if BLOCK_EV1 > 0:
            b_v = load_rows(p_v_tile, o_u, o_ev1, stride_vs, b_key, EV, EV == BLOCK_EV0 + BLOCK_EV1, EDGE)
            b_dp = dot(b_dout1, tl.trans(b_v), b_dp, DTYPE, PRECISION, INTERPRET)
        if DW:
            b_inside = b_query[:, None] & b_allowed
            b_dp += _load_dw(p_dw, o_l[:, None], o_s[None, :], stride_dwl, stride_dws, b_inside, share, ACC)
        if DROPOUT:
            b_keep = dropout_keep(p_seed, o_l, i_bn, s_0, threshold, BLOCK_L, BLOCK_S)
            b_dp = tl.where(b_keep, b_dp * rescale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if DW and BIAS != NO_BIAS:
            b_ds = tl.where(b_p > 0, b_ds, 0.0)  # dW may be NaN where nobody attends
        b_dq0 = dot(b_ds, b_k0, b_dq0, DTYPE, PRECISION, INTERPRET)
        if BLOCK_E1 > 0:
            b_dq1 = dot(b_ds, b_k1, b_dq1, DTYPE, PRECISION, INTERPRET)
    return b_dq0, b_dq1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dq_kernel(
    p_q, p_k, p_v, p_bias, p_query, p_key, p_tiles, p_seed, p_lse, p_delta, p_dout, p_dw, p_dq, stride_qb,
    stride_qn, stride_ql, stride_kb, stride_kn, stride_ks, stride_vb, stride_vn, stride_vs, stride_bb,
    stride_bn, stride_bl, stride_bs, stride_lb, stride_ln, stride_dob, stride_don, stride_dol, stride_dwb,
    stride_dwn, stride_dwl, stride_dws, stride_dqb, stride_dqn, stride_dql, stride_dqe, B, N, GROUP, L, S,
    total_q, total_k, T, scale, left, right, bottom_right, threshold, rescale, share, section,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr,
    BLOCK_EV0: tl.constexpr, BLOCK_EV1: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, DW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dq: overwritten. Grid: (B * N * ceil(L / BLOCK_L),). p_tiles: of the keys, in tiles of BLOCK_S."""
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
    b_query = valid_rows(p_query, i_b, o_l, L, length_q, QUERIES)
    row = first_q + l_0
    p_q += i_b64 * stride_qb + i_n64 * stride_qn + row * stride_ql
    p_dout += i_b64 * stride_dob + i_n64 * stride_don + row * stride_dol
    p_k += i_b64 * stride_kb + i_kn64 * stride_kn + first_k * stride_ks
    p_v += i_b64 * stride_vb + i_kn64 * stride_vn + first_k * stride_vs
    if BIAS != NO_BIAS:
        p_bias += i_b64 * stride_bb + i_n64 * stride_bn
    if DW:
        p_dw += i_b64 * stride_dwb + i_n64 * stride_dwn
    if p_tiles is not None:
        p_tiles += i_b64 * 5 * (T + 1)

    o_e0 = tl.arange(0, BLOCK_E0)
    o_ev0 = tl.arange(0, BLOCK_EV0)
    b_q0 = load_rows(p_q, o_t, o_e0, stride_ql, b_query, E, E >= BLOCK_E0, True)
    b_dout0 = load_rows(p_dout, o_t, o_ev0, stride_dol, b_query, EV, EV >= BLOCK_EV0, True)
    b_q1 = b_q0
    b_dout1 = b_dout0
    b_dq0 = tl.zeros([BLOCK_L, BLOCK_E0], ACC)
    b_dq1 = tl.zeros([BLOCK_L], ACC)
    if BLOCK_E1 > 0:
        o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1)
        b_q1 = load_rows(p_q, o_t, o_e1, stride_ql, b_query, E, E == BLOCK_E0 + BLOCK_E1, True)
        b_dq1 = tl.zeros([BLOCK_L, BLOCK_E1], ACC)
    if BLOCK_EV1 > 0:
        o_ev1 = BLOCK_EV0 + tl.arange(0, BLOCK_EV1)
        b_dout1 = load_rows(p_dout, o_t, o_ev1, stride_dol, b_query, EV, EV == BLOCK_EV0 + BLOCK_EV1, True)
    lse_row = i_b64 * stride_lb + i_n64 * stride_ln + row
    b_lse = _load_lse2(p_lse + lse_row, o_t, b_query, True)
    b_delta = tl.load(p_delta + lse_row + o_t, mask=b_query, other=0.0)

    lo, full_lo, full_hi, hi = window_range(
        l_0, tl.minimum(l_0 + BLOCK_L, length_q), offset, left, right, length_k, BLOCK_S, LEFT, RIGHT
    )
    n_full, n_edge, n_left, n_part, first_full, first_left, first_part, first_right = count_tiles(
        p_tiles, T, lo, full_lo, full_hi, hi, KEYS
    )
    some = tl.max(b_query.to(tl.int32), 0)
    scale2 = tl.cast(scale, ACC) * LOG2E  # scalars come as float32
    b_dq0, b_dq1 = _walk_keys(
        b_dq0, b_dq1, b_q0, b_q1, b_dout0, b_dout1, b_lse, b_delta, b_query, o_l, o_bl, i_b, i_bn, offset,
        p_k, p_v, p_bias, p_key, p_tiles, p_seed, p_dw, stride_ks, stride_vs, stride_bl, stride_bs,
        stride_dwl, stride_dws, n_full * some, n_left, n_part, first_full, first_left, first_part,
        first_right, S, length_k, scale2, left, right, threshold, rescale, share, E, EV, BLOCK_E0, BLOCK_E1,
        BLOCK_EV0, BLOCK_EV1, BLOCK_L, BLOCK_S, KEYS, LEFT, RIGHT, BIAS, DROPOUT, DW, ACC, PRECISION,
        INTERPRET, False,
    )  # fmt: skip
    b_dq0, b_dq1 = _walk_keys(
        b_dq0, b_dq1, b_q0, b_q1, b_dout0, b_dout1, b_lse, b_delta, b_query, o_l, o_bl, i_b, i_bn, offset,
        p_k, p_v, p_bias, p_key, p_tiles, p_seed, p_dw, stride_ks, stride_vs, stride_bl, stride_bs,
        stride_dwl, stride_dws, n_edge * some, n_left, n_part, first_full, first_left, first_part,
        first_right, S, length_k, scale2, left, right, threshold, rescale, share, E, EV, BLOCK_E0, BLOCK_E1,
        BLOCK_EV0, BLOCK_EV1, BLOCK_L, BLOCK_S, KEYS, LEFT, RIGHT, BIAS, DROPOUT, DW, ACC, PRECISION,
        INTERPRET, True,
    )  # fmt: skip

    b_inside = o_l < L
    if QUERIES == PACKED:
        b_inside = o_l < length_q
    p_dq += i_b64 * stride_dqb + i_n64 * stride_dqn + row * stride_dql
    b_dq0 = tl.where(b_query[:, None], b_dq0 * scale, 0.0)
    store_rows(p_dq, o_t, o_e0, stride_dql, stride_dqe, b_dq0, b_inside, E, E >= BLOCK_E0)
    if BLOCK_E1 > 0:
        b_dq1 = tl.where(b_query[:, None], b_dq1 * scale, 0.0)
        store_rows(p_dq, o_t, o_e1, stride_dql, stride_dqe, b_dq1, b_inside, E, E == BLOCK_E0 + BLOCK_E1)


# ---- dbias -------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["N", "L", "S", "left", "right", "bottom_right", "threshold", "over_b", "over_n"]
)
def attention_dbias_kernel(
    p_q, p_k, p_v, p_bias, p_query, p_key, p_seed, p_lse, p_delta, p_dout, p_dw, p_dbias, stride_qb,
    stride_qn, stride_ql, stride_kb, stride_kn, stride_ks, stride_vb, stride_vn, stride_vs, stride_bb,
    stride_bn, stride_bl, stride_bs, stride_lb, stride_ln, stride_dob, stride_don, stride_dol, stride_dwb,
    stride_dwn, stride_dwl, stride_dws, stride_dbb, stride_dbn, stride_dbl, stride_dbs, N, GROUP, L, S, scale,
    left, right, bottom_right, threshold, rescale, share, over_b, over_n, E: tl.constexpr, EV: tl.constexpr,
    BLOCK_E0: tl.constexpr, BLOCK_E1: tl.constexpr, BLOCK_EV0: tl.constexpr, BLOCK_EV1: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DW: tl.constexpr,
    OVER_L: tl.constexpr, OVER_S: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dbias: overwritten. Grid: (tiles of dbias,), its tiles of keys fastest, then those of queries, n, b.

    over_b, over_n: how many b and n share a row of bias, B or 1 and N or 1; OVER_L, OVER_S: all queries
    (keys) share it.
    """
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    n_l = (L + BLOCK_L - 1) // BLOCK_L
    n_s = (S + BLOCK_S - 1) // BLOCK_S
    over_l = n_l * 0 + 1
    over_s = n_s * 0 + 1
    if OVER_L:
        over_l = n_l
    if OVER_S:
        over_s = n_s
    pid = tl.program_id(0)
    grid_s = n_s // over_s
    grid_l = n_l // over_l
    grid_n = N // over_n
    j_s = pid % grid_s
    j_l = pid // grid_s % grid_l
    j_n = pid // grid_s // grid_l % grid_n
    j_b = pid // grid_s // grid_l // grid_n

    o_t = tl.arange(0, BLOCK_L)
    o_u = tl.arange(0, BLOCK_S)
    o_e0 = tl.arange(0, BLOCK_E0)
    o_ev0 = tl.arange(0, BLOCK_EV0)
    b_sum = tl.zeros([BLOCK_L, BLOCK_S], ACC)
    for i in range(trips(over_b.to(tl.int64) * over_n * over_l * over_s)):
        i_s = j_s + tl.cast(i % over_s, tl.int32)
        i_l = j_l + tl.cast(i // over_s % over_l, tl.int32)
        i_n = j_n + tl.cast(i // over_s // over_l % over_n, tl.int32)
        i_b = j_b + tl.cast(i // over_s // over_l // over_n, tl.int32)
        _, length_q = extent(p_query, i_b, L, 0, QUERIES)
        _, length_k = extent(p_key, i_b, S, 0, KEYS)
        offset = bottom_right * (length_k - length_q)
        l_0 = i_l * BLOCK_L
        s_0 = i_s * BLOCK_S
        lo, _, _, hi = window_range(
            l_0, tl.minimum(l_0 + BLOCK_L, length_q), offset, left, right, length_k, BLOCK_S, LEFT, RIGHT
        )
        if (i_s >= lo) & (i_s < hi) & (l_0 < length_q):
            o_l = l_0 + o_t
            o_s = s_0 + o_u
            i_b64 = i_b.to(tl.int64)
            i_n64 = i_n.to(tl.int64)
            i_kn64 = (i_n // GROUP).to(tl.int64)
            p_q_tile = p_q + i_b64 * stride_qb + i_n64 * stride_qn + l_0.to(tl.int64) * stride_ql
            p_dout_tile = p_dout + i_b64 * stride_dob + i_n64 * stride_don + l_0.to(tl.int64) * stride_dol
            p_k_tile = p_k + i_b64 * stride_kb + i_kn64 * stride_kn + s_0.to(tl.int64) * stride_ks
            p_v_tile = p_v + i_b64 * stride_vb + i_kn64 * stride_vn + s_0.to(tl.int64) * stride_vs
            lse_row = i_b64 * stride_lb + i_n64 * stride_ln + l_0
            b_query = valid_rows(p_query, i_b, o_l, L, length_q, QUERIES)
            b_key = valid_rows(p_key, i_b, o_s, S, length_k, KEYS)
            b_allowed = b_query[:, None] & b_key[None, :]
            if LEFT or RIGHT:
                b_allowed = b_allowed & in_window(
                    o_l[:, None], o_s[None, :], offset, left, right, LEFT, RIGHT
                )

            b_q = load_rows(p_q_tile, o_t, o_e0, stride_ql, b_query, E, E >= BLOCK_E0, True)
            b_k = load_rows(p_k_tile, o_u, o_e0, stride_ks, b_key, E, E >= BLOCK_E0, True)
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_L, BLOCK_S], ACC), DTYPE, PRECISION, INTERPRET)
            if BLOCK_E1 > 0:
                o_e1 = BLOCK_E0 + tl.arange(0, BLOCK_E1)
                b_q = load_rows(p_q_tile, o_t, o_e1, stride_ql, b_query, E, E == BLOCK_E0 + BLOCK_E1, True)
                b_k = load_rows(p_k_tile, o_u, o_e1, stride_ks, b_key, E, E == BLOCK_E0 + BLOCK_E1, True)
                b_s = dot(b_q, tl.trans(b_k), b_s, DTYPE, PRECISION, INTERPRET)
            b_s = scores(
                b_s, tl.cast(scale, ACC) * LOG2E, p_bias + i_b64 * stride_bb + i_n64 * stride_bn,
                tl.minimum(o_l, L - 1)[:, None], tl.minimum(o_s, S - 1)[None, :], stride_bl, stride_bs,
                b_allowed, ACC, BIAS, True,
            )  # fmt: skip
            b_p = tl.exp2(b_s - _load_lse2(p_lse + lse_row, o_t, b_query, True)[:, None])

            b_dout = load_rows(p_dout_tile, o_t, o_ev0, stride_dol, b_query, EV, EV >= BLOCK_EV0, True)
            b_v = load_rows(p_v_tile, o_u, o_ev0, stride_vs, b_key, EV, EV >= BLOCK_EV0, True)
            b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_L, BLOCK_S], ACC), DTYPE, PRECISION, INTERPRET)
            if BLOCK_EV1 > 0:
                o_ev1 = BLOCK_EV0 + tl.arange(0, BLOCK_EV1)
                b_dout = load_rows(
                    p_dout_tile, o_t, o_ev1, stride_dol, b_query, EV, EV == BLOCK_EV0 + BLOCK_EV1, True
                )
                b_v = load_rows(p_v_tile, o_u, o_ev1, stride_vs, b_key, EV, EV == BLOCK_EV0 + BLOCK_EV1, True)
                b_dp = dot(b_dout, tl.trans(b_v), b_dp, DTYPE, PRECISION, INTERPRET)
            if DW:
                p_dw_head = p_dw + i_b64 * stride_dwb + i_n64 * stride_dwn
                b_dp += _load_dw(
                    p_dw_head, o_l[:, None], o_s[None, :], stride_dwl, stride_dws, b_allowed, share, ACC
                )
            if DROPOUT:
                b_keep = dropout_keep(p_seed, o_l, i_b * N + i_n, s_0, threshold, BLOCK_L, BLOCK_S)
                b_dp = tl.where(b_keep, b_dp * rescale, 0.0)
            b_delta = tl.load(p_delta + lse_row + o_t, mask=b_query, other=0.0)
            b_sum += tl.where(b_p > 0, b_p * (b_dp - b_delta[:, None]), 0.0)

    p_dbias += j_b.to(tl.int64) * stride_dbb + j_n.to(tl.int64) * stride_dbn
    o_l = j_l * BLOCK_L + o_t
    o_s = j_s * BLOCK_S + o_u
    if OVER_L and OVER_S:
        tl.store(p_dbias, tl.sum(tl.sum(b_sum, 1), 0).to(p_dbias.dtype.element_ty))
    elif OVER_L:
        p_row = p_dbias + o_s.to(tl.int64) * stride_dbs
        tl.store(p_row, tl.sum(b_sum, 0).to(p_dbias.dtype.element_ty), mask=o_s < S)
    elif OVER_S:
        p_row = p_dbias + o_l.to(tl.int64) * stride_dbl
        tl.store(p_row, tl.sum(b_sum, 1).to(p_dbias.dtype.element_ty), mask=o_l < L)
    else:
        p_tile = p_dbias + o_l[:, None].to(tl.int64) * stride_dbl + o_s[None, :].to(tl.int64) * stride_dbs
        b_inside = (o_l < L)[:, None] & (o_s < S)[None, :]
        tl.store(p_tile, b_sum.to(p_dbias.dtype.element_ty), mask=b_inside)
