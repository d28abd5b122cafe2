"""Kernels and launchers of the linear-chain conditional random field. ops/ checks the meaning.

    forward    a_t[j] = log(sum over i of exp(a_{t-1}[i] + trans[i, j])) + s_t[j]
               log Z = log(sum(exp(a_last + end)))
    backward   q_last = softmax(a_last + end)       p(i | j) = exp(a_{t-1}[i] + trans[i, j]) / sum over i
               q_{t-1}[i] = sum over j of p(i | j) q_t[j]       dtrans[i, j] = sum over t of p(i | j) q_t[j]
    best       v_t[j] = max over i of (v_{t-1}[i] + trans[i, j]) + s_t[j], the sums in this order

Layout: emissions [T, B, K] by strides, the last dimension contiguous; alphas [B, T, Kp], each step's a less
its maximum, which is added up in float64. A step that does not count repeats the one before.

Ownership: one program per sequence (backward: per so many of them), which holds the matrix of transitions,
padded to BLOCK_K by BLOCK_K, in registers, and walks through the steps. In backward it also holds the sum
dtrans, which it writes to a slice of its own; torch adds the slices up, in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqkern.triton.attention import on_device, rows_contiguous
from seqkern.triton.tiles import ALL, LENGTHS, MASK, trips

MAX_TAGS = 128
PROGRAMS = 256  # of backward, at most: each writes gradients of K * K transitions
PAD = 16  # rows of alphas are padded to a multiple of it

SIZES = ["T", "B", "K"]  # no kernel is compiled for their values


@triton.jit
def extent(p_steps, i_b, T, STEPS: tl.constexpr):
    """The number of steps to walk through."""
    n = T
    if STEPS == LENGTHS:
        n = tl.minimum(tl.maximum(tl.load(p_steps + i_b), 1), T).to(tl.int32)
    return n


@triton.jit
def counts(p_steps, i_b, t, stride_mt, stride_mb, STEPS: tl.constexpr):
    """Does step t > 0, within the extent, count?"""
    on = t >= 0
    if STEPS == MASK:
        on = tl.load(p_steps + t.to(tl.int64) * stride_mt + i_b * stride_mb) != 0
    return on


@triton.jit
def read_tag(p_tags, i_b, t, stride_tt, stride_tb):
    return tl.load(p_tags + t.to(tl.int64) * stride_tt + i_b * stride_tb)


@triton.jit
def highest(x, axis: tl.constexpr):
    """Maximum to subtract within an exponential: 0 where all is -inf."""
    m = tl.max(x, axis)
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def whole(b_q):
    """Probabilities that add up to 1, or zeros."""
    total = tl.sum(b_q, 0)
    return b_q / tl.where(total == 0, 1.0, total)


@triton.jit
def load_transitions(p_trans, o_i, o_j, K, b_in):
    """[BLOCK_K, BLOCK_K], -inf in the padding."""
    p_ij = p_trans + o_i[:, None] * K + o_j[None, :]
    return tl.load(p_ij, mask=b_in[:, None] & b_in[None, :], other=float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def crf_forward_kernel(
    p_s, p_start, p_end, p_trans, p_tags, p_steps, p_value, p_alphas, stride_st, stride_sb, stride_tt,
    stride_tb, stride_mt, stride_mb, stride_ab, stride_at, T, B, K, TAGS: tl.constexpr, STEPS: tl.constexpr,
    SAVE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """value [B]: the tags' log-likelihood, or log Z; alphas, if SAVE: both overwritten. Grid: (B,)."""
    i_b = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    b_in = o_k < K
    p_s += i_b * stride_sb
    p_alphas += i_b * stride_ab
    b_trans = load_transitions(p_trans, o_k, o_k, K, b_in)
    b_a = tl.load(p_start + o_k, mask=b_in, other=float("-inf")) + tl.load(p_s + o_k, mask=b_in, other=0.0)
    m = highest(b_a, 0)
    b_a = b_a - m
    offset = m.to(tl.float64)
    score = offset * 0
    tag = i_b * 0
    last = i_b * 0  # place of the last tag: steps that count, less one
    if SAVE:
        tl.store(p_alphas + o_k, b_a, mask=b_in)
    if TAGS:
        tag = read_tag(p_tags, i_b, tl.program_id(0) * 0, stride_tt, stride_tb)
        known = (tag >= 0) & (tag < K)
        score = (
            tl.load(p_start + tag, mask=known, other=float("nan")).to(tl.float64)
            + tl.load(p_s + tag, mask=known, other=float("nan")).to(tl.float64)
        )  # fmt: skip
    for step in range(1, trips(extent(p_steps, i_b, T, STEPS))):
        t = tl.program_id(0) * 0 + step
        on = counts(p_steps, i_b, t, stride_mt, stride_mb, STEPS)
        p_s += stride_st
        b_s = tl.load(p_s + o_k, mask=o_k < tl.where(on, K, 0), other=0.0)
        b_terms = b_a[:, None] + b_trans
        b_m = highest(b_terms, 0)
        b_next = tl.log(tl.sum(tl.exp(b_terms - b_m[None, :]), 0)) + b_m + b_s
        m = highest(b_next, 0)
        b_a = tl.where(on, b_next - m, b_a)
        offset += tl.where(on, m, 0.0).to(tl.float64)
        if SAVE:
            p_alphas += stride_at
            tl.store(p_alphas + o_k, b_a, mask=b_in)
        last += on.to(tl.int64)
        if TAGS:
            after = read_tag(p_tags, i_b, t, stride_tt, stride_tb)
            known = (tag >= 0) & (tag < K) & (after >= 0) & (after < K)
            gain = (
                tl.load(p_trans + tag * K + after, mask=on & known, other=float("nan")).to(tl.float64)
                + tl.load(p_s + after, mask=on & known, other=float("nan")).to(tl.float64)
            )  # fmt: skip
            score += tl.where(on, gain, 0.0)
            tag = after
    b_a = b_a + tl.load(p_end + o_k, mask=b_in, other=float("-inf"))
    m = highest(b_a, 0)
    value = offset + m.to(tl.float64) + tl.log(tl.sum(tl.exp(b_a - m), 0)).to(tl.float64)
    if TAGS:
        tag = read_tag(p_tags, i_b, last, stride_tt, stride_tb)
        known = (tag >= 0) & (tag < K)
        score += tl.load(p_end + tag, mask=known, other=float("nan")).to(tl.float64)
        value = score - tl.where(value == float("-inf"), 0.0, value)
    tl.store(p_value + i_b, value.to(p_value.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def crf_backward_kernel(
    p_dvalue, p_end, p_trans, p_tags, p_steps, p_alphas, p_ds, p_dstart, p_dend, p_dtrans, stride_tt,
    stride_tb, stride_mt, stride_mb, stride_ab, stride_at, stride_dt, stride_db, T, B, K, TAGS: tl.constexpr,
    STEPS: tl.constexpr, NEED_DPARAMS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ds [T, B, K] is overwritten; dstart, dend [P, K], dtrans [P, K, K], if NEED_DPARAMS, at this program's
    slice. Grid: (P,): program p has the sequences p, p + P, …"""
    pid = tl.program_id(0)
    o_k = tl.arange(0, BLOCK_K)
    b_in = o_k < K
    b_trans = load_transitions(p_trans, o_k, o_k, K, b_in)
    b_end = tl.load(p_end + o_k, mask=b_in, other=float("-inf"))
    b_dtrans = tl.zeros([BLOCK_K, BLOCK_K], p_dvalue.dtype.element_ty)
    b_dstart = tl.zeros([BLOCK_K], p_dvalue.dtype.element_ty)
    b_dend = tl.zeros([BLOCK_K], p_dvalue.dtype.element_ty)
    for row in range(trips(pid), trips(B), trips(tl.num_programs(0))):
        i_b = (pid * 0 + row).to(tl.int64)
        n = extent(p_steps, i_b, T, STEPS)
        dvalue = tl.load(p_dvalue + i_b)
        weight = dvalue  # of log Z
        if TAGS:
            weight = -dvalue
        p_a = p_alphas + i_b * stride_ab
        p_d = p_ds + i_b * stride_db
        for step in range(trips(n), trips(T)):  # behind the end
            tl.store(p_d + (pid * 0 + step).to(tl.int64) * stride_dt + o_k, b_dend * 0, mask=b_in)
        b_a = tl.load(p_a + (n - 1).to(tl.int64) * stride_at + o_k, mask=b_in, other=float("-inf"))
        b_q = b_a + b_end
        b_q = whole(tl.exp(b_q - highest(b_q, 0)))
        b_dend += weight * b_q
        last = i_b * 0
        tag = i_b * 0
        if TAGS:
            tag = read_tag(p_tags, i_b, n - 1, stride_tt, stride_tb)
        for back in range(1, trips(n)):
            t = n - back
            on = counts(p_steps, i_b, t, stride_mt, stride_mb, STEPS)
            last += on.to(tl.int64)
            b_d = weight * b_q
            if TAGS:
                before = read_tag(p_tags, i_b, t - 1, stride_tt, stride_tb)
                b_d = tl.where(o_k == tag, weight * (b_q - 1), b_d)
                if NEED_DPARAMS:
                    b_here = (o_k[:, None] == before) & (o_k[None, :] == tag) & on
                    b_dtrans += tl.where(b_here, dvalue, 0.0)
                tag = before
            tl.store(p_d + t.to(tl.int64) * stride_dt + o_k, tl.where(on, b_d, 0.0), mask=b_in)
            b_a = tl.load(p_a + (t - 1).to(tl.int64) * stride_at + o_k, mask=b_in, other=float("-inf"))
            b_terms = b_a[:, None] + b_trans
            b_terms = tl.exp(b_terms - highest(b_terms, 0)[None, :])
            b_total = tl.sum(b_terms, 0)
            b_share = tl.where(on, b_q, 0.0) / tl.where(b_total == 0, 1.0, b_total)
            b_moved = b_terms * b_share[None, :]
            if NEED_DPARAMS:
                b_dtrans += weight * b_moved
            b_q = tl.where(on, tl.sum(b_moved, 1), b_q)
            if t % 32 == 0:  # roundings would add up over the steps
                b_q = whole(b_q)
        b_d = weight * b_q
        if TAGS:
            b_d = tl.where(o_k == tag, weight * (b_q - 1), b_d)
            b_dend += tl.where(o_k == read_tag(p_tags, i_b, last, stride_tt, stride_tb), dvalue, 0.0)
        tl.store(p_d + o_k, b_d, mask=b_in)
        b_dstart += b_d
    if NEED_DPARAMS:
        p_dtrans += pid.to(tl.int64) * K * K
        b_pairs = b_in[:, None] & b_in[None, :]
        tl.store(p_dtrans + o_k[:, None] * K + o_k[None, :], b_dtrans, mask=b_pairs)
        tl.store(p_dstart + pid.to(tl.int64) * K + o_k, b_dstart, mask=b_in)
        tl.store(p_dend + pid.to(tl.int64) * K + o_k, b_dend, mask=b_in)


@triton.jit(do_not_specialize=SIZES)
def crf_decode_kernel(
    p_s, p_start, p_end, p_trans, p_steps, p_history, p_best, p_scores, stride_st, stride_sb, stride_mt,
    stride_mb, T, B, K, STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """best [B, T] and scores [B] are overwritten; history [B, T, BLOCK_K]: scratch. Grid: (B,).

    The trace back finds each maximum's tag again by K sums a step, so the first pass need not keep it.
    """
    i_b = tl.program_id(0).to(tl.int64)
    zero = tl.program_id(0) * 0
    o_k = tl.arange(0, BLOCK_K)
    b_in = o_k < K
    p_s += i_b * stride_sb
    p_history += i_b * T * BLOCK_K
    p_best += i_b * T
    b_trans = load_transitions(p_trans, o_k, o_k, K, b_in)
    b_v = tl.load(p_start + o_k, mask=b_in, other=float("-inf")) + tl.load(p_s + o_k, mask=b_in, other=0.0)
    tl.store(p_history + o_k, b_v)
    last = zero
    n = extent(p_steps, i_b, T, STEPS)
    for step in range(1, trips(n)):
        t = zero + step
        on = counts(p_steps, i_b, t, stride_mt, stride_mb, STEPS)
        b_s = tl.load(p_s + t.to(tl.int64) * stride_st + o_k, mask=o_k < tl.where(on, K, 0), other=0.0)
        b_best = tl.max((b_v[:, None] + b_trans) + b_s[None, :], 0)
        b_v = tl.where(on, b_best, b_v)
        tl.store(p_history + t.to(tl.int64) * BLOCK_K + o_k, b_v)
        last += on.to(tl.int32)
    b_v = b_v + tl.load(p_end + o_k, mask=b_in, other=float("-inf"))
    tl.store(p_scores + i_b, tl.max(b_v, 0))
    tag = tl.argmax(b_v, 0, tie_break_left=True)
    for step in range(trips(last) + 1, trips(T)):
        tl.store(p_best + step, -1)
    tl.store(p_best + last, tag.to(tl.int64))
    tl.debug_barrier()  # history was written by other threads
    for back in range(trips(last)):
        t = last - back
        on = t >= 0
        if STEPS == MASK:
            on = counts(p_steps, i_b, t, stride_mt, stride_mb, STEPS)
        s = tl.load(p_s + t.to(tl.int64) * stride_st + tag, mask=on, other=0.0)
        b_column = tl.load(p_trans + o_k * K + tag, mask=b_in, other=float("-inf"))
        b_before = tl.load(p_history + (t - 1).to(tl.int64) * BLOCK_K + o_k)
        tag = tl.argmax((b_before + b_column) + s, 0, tie_break_left=True)
        tl.store(p_best + t - 1, tag.to(tl.int64))


# ---- launchers ---------------------------------------------------------------------------------------------


def crf_forward(
    emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, tags: Tensor | None,
    mask: Tensor | None, lengths: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(value [B]: log-likelihood of the tags, or log Z;  alphas [B, T, padded K], [0] unless save)"""
    T, B, K = emissions.shape
    emissions = rows_contiguous(emissions)
    value = emissions.new_empty((B,))
    alphas = emissions.new_empty((B, T, triton.cdiv(K, PAD) * PAD) if save else (0,))
    if B > 0:
        with on_device(emissions):
            crf_forward_kernel[(B,)](
                p_s=emissions, p_start=start.contiguous(), p_end=end.contiguous(),
                p_trans=transitions.contiguous(), p_value=value,
                p_alphas=alphas, stride_st=emissions.stride(0), stride_sb=emissions.stride(1),
                **given_tags(tags), **given_steps(mask, lengths), stride_ab=alphas.stride(0) if save else 0,
                stride_at=alphas.stride(1) if save else 0, SAVE=save, T=T, B=B, K=K, **block(K),
            )  # fmt: skip
    return value, alphas


def crf_backward(
    dvalue: Tensor, emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, tags: Tensor | None,
    mask: Tensor | None, lengths: Tensor | None, alphas: Tensor, need_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(demissions, dstart, dend, dtransitions), the last three [0] unless need_dparams; the same bits each
    time."""
    T, B, K = emissions.shape
    emissions = rows_contiguous(emissions)
    if emissions.stride(0) < emissions.stride(1):  # in memory as emissions are
        demissions = emissions.new_empty((B, T, K)).transpose(0, 1)
    else:
        demissions = emissions.new_empty((T, B, K))
    P = min(B, PROGRAMS)
    shapes = ((P, K), (P, K), (P, K, K)) if need_dparams else ((0,), (0,), (0,))
    dstart, dend, dtransitions = (emissions.new_empty(shape) for shape in shapes)
    if B > 0:
        with on_device(emissions):
            crf_backward_kernel[(P,)](
                p_dvalue=dvalue.contiguous(), p_end=end.contiguous(), p_trans=transitions.contiguous(),
                p_alphas=alphas, p_ds=demissions, p_dstart=dstart, p_dend=dend, p_dtrans=dtransitions,
                **given_tags(tags), **given_steps(mask, lengths), stride_ab=alphas.stride(0),
                stride_at=alphas.stride(1), stride_dt=demissions.stride(0), stride_db=demissions.stride(1),
                NEED_DPARAMS=need_dparams, T=T, B=B, K=K, **block(K, 16),
            )  # fmt: skip
    if need_dparams:
        return demissions, dstart.sum(0), dend.sum(0), dtransitions.sum(0)
    return demissions, dstart, dend, dtransitions


def crf_decode(
    emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, mask: Tensor | None,
    lengths: Tensor | None, n: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the best tags [1, B, T] int64, -1 behind the last step that counts;  scores [1, B])"""
    if n != 1:
        raise ValueError(f"n: triton has a kernel for the best sequence only, got {n}")
    T, B, K = emissions.shape
    emissions = rows_contiguous(emissions)
    best = emissions.new_empty((1, B, T), dtype=torch.int64)
    found = emissions.new_empty((1, B))
    if B > 0:
        chosen = block(K)
        history = emissions.new_empty((B, T, chosen["BLOCK_K"]))
        with on_device(emissions):
            crf_decode_kernel[(B,)](
                p_s=emissions, p_start=start.contiguous(), p_end=end.contiguous(),
                p_trans=transitions.contiguous(),
                p_history=history, p_best=best, p_scores=found, stride_st=emissions.stride(0),
                stride_sb=emissions.stride(1), **given_steps(mask, lengths), T=T, B=B, K=K, **chosen,
            )  # fmt: skip
    return best, found


def given_tags(tags: Tensor | None) -> dict[str, object]:
    if tags is None:
        return dict(p_tags=None, stride_tt=0, stride_tb=0, TAGS=False)
    return dict(p_tags=tags, stride_tt=tags.stride(0), stride_tb=tags.stride(1), TAGS=True)


def given_steps(mask: Tensor | None, lengths: Tensor | None) -> dict[str, object]:
    if mask is not None:
        return dict(
            p_steps=mask.view(torch.uint8), stride_mt=mask.stride(0), stride_mb=mask.stride(1), STEPS=MASK
        )
    if lengths is not None:
        return dict(p_steps=lengths.contiguous(), stride_mt=0, stride_mb=0, STEPS=LENGTHS)
    return dict(p_steps=None, stride_mt=0, stride_mb=0, STEPS=ALL)


def block(K: int, pairs: int = 32) -> dict[str, int]:
    """BLOCK_K, and warps for `pairs` pairs of tags a thread; up to 32 tags one warp, without barriers."""
    if K > MAX_TAGS:
        raise ValueError(f"triton needs num_tags <= {MAX_TAGS}, got {K}")
    size = max(16, triton.next_power_of_2(K))
    warps = 1 if size <= 32 else size * size // (32 * pairs)
    return dict(BLOCK_K=size, num_warps=warps)
