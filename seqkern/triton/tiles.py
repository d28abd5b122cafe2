"""What all attention kernels share: extents of sequences, tiles worth visiting, rows, scores, dropout.

    score2(l, s) = log2(e) * (scale * q_l · k_s + bias(l, s))      in base 2, so that exp2 serves
    visited tiles = those in the window's range that hold a valid row; of them
        full: every pair of the tile may attend: visited by a loop without any masking
        edge: all others, visited by a second loop that masks

Layout: q, out, dq [B, N, L, E], k, dk [B, Nk, S, E], v, dv [B, Nk, S, Ev] by strides, the last dimension
contiguous; packed [Tq, N, E] with batch stride 0 and each sequence's start added. Positions l, s count within
a sequence. `tiles` [B, 5, T + 1] int32, made by `key_tiles_kernel` of a padding mask cut into T tiles of
BLOCK rows, holds per b
    COUNT_ANY[t], COUNT_FULL[t]: how many of the tiles before t hold a valid row, hold valid rows only
    LIST_ANY, LIST_FULL, LIST_PART: those tiles' numbers, ascending (LIST_PART: some valid, some not)

Ownership: all here runs inside one program on tiles of its own; key_tiles_kernel has one program per b.
"""

import triton
import triton.language as tl

INTERPRET: bool = triton.knobs.runtime.interpret  # kernels, once made, run in the interpreter or never do

# Arguments whose value no kernel is compiled for: another batch or length compiles nothing anew.
UNSPECIALIZED = [
    "B",
    "N",
    "L",
    "S",
    "total_q",
    "total_k",
    "T",
    "left",
    "right",
    "bottom_right",
    "threshold",
    "section",
]

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# What bounds the rows (queries or keys) of a sequence, and what their pointer `p_rows` points to:
ALL: tl.constexpr = tl.constexpr(0)  # nothing
LENGTHS: tl.constexpr = tl.constexpr(1)  # [B] int64
MASK: tl.constexpr = tl.constexpr(2)  # [B, rows] uint8, 1 is valid
PACKED: tl.constexpr = tl.constexpr(3)  # [B + 1] int32 or int64, cumulative

# Kinds of bias:
NO_BIAS: tl.constexpr = tl.constexpr(0)
BOOL_BIAS: tl.constexpr = tl.constexpr(1)  # uint8, 1 attends
ADDED_BIAS: tl.constexpr = tl.constexpr(2)

COUNT_ANY: tl.constexpr = tl.constexpr(0)
COUNT_FULL: tl.constexpr = tl.constexpr(1)
LIST_ANY: tl.constexpr = tl.constexpr(2)
LIST_FULL: tl.constexpr = tl.constexpr(3)
LIST_PART: tl.constexpr = tl.constexpr(4)


if INTERPRET:

    def trips(n):
        """n for `range`. The interpreter keeps a scalar in an array of one element, which NumPy 2.4 takes for
        no index."""
        return n.handle.data.item() if isinstance(n, tl.tensor) else n

else:

    @triton.jit
    def trips(n):
        """n for `range`: see the interpreter's twin."""
        return n


@triton.jit(do_not_specialize=["S", "T"])
def key_tiles_kernel(p_valid, p_tiles, S, T, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Overwrites tiles [B, 5, T + 1] from valid [B, S] uint8 (contiguous). One program per b; CHUNK tiles at
    a time."""
    i_b = tl.program_id(0).to(tl.int64)
    p_valid += i_b * S
    p_tiles += i_b * 5 * (T + 1)
    o_t = tl.arange(0, CHUNK)
    o_s = tl.arange(0, BLOCK)
    n_any = tl.program_id(0) * 0
    n_full = n_any
    for i in range(trips((T + CHUNK - 1) // CHUNK)):
        t = i * CHUNK
        b_t = t + o_t
        b_s = b_t[:, None] * BLOCK + o_s[None, :]
        b_valid = tl.load(p_valid + b_s, mask=b_s < S, other=0)
        b_number = tl.sum((b_valid != 0).to(tl.int32), 1)
        b_any = (b_number > 0).to(tl.int32)
        b_full = (b_number == BLOCK).to(tl.int32)
        b_place_any = n_any + tl.cumsum(b_any, 0) - b_any
        b_place_full = n_full + tl.cumsum(b_full, 0) - b_full
        tl.store(p_tiles + COUNT_ANY * (T + 1) + b_t, b_place_any, mask=b_t < T)
        tl.store(p_tiles + COUNT_FULL * (T + 1) + b_t, b_place_full, mask=b_t < T)
        tl.store(p_tiles + LIST_ANY * (T + 1) + b_place_any, b_t, mask=b_any != 0)
        tl.store(p_tiles + LIST_FULL * (T + 1) + b_place_full, b_t, mask=b_full != 0)
        b_part = (b_any != 0) & (b_full == 0)
        tl.store(p_tiles + LIST_PART * (T + 1) + b_place_any - b_place_full, b_t, mask=b_part)
        n_any += tl.sum(b_any, 0)
        n_full += tl.sum(b_full, 0)
    tl.store(p_tiles + COUNT_ANY * (T + 1) + T, n_any)
    tl.store(p_tiles + COUNT_FULL * (T + 1) + T, n_full)


@triton.jit
def row_of_program(pid, n_tiles, n_rows, section, HEAVY_LAST: tl.constexpr):
    """(tile, row) of a 1-D grid of n_tiles * n_rows programs: `section` rows at a time, so that their keys
    stay in cache, tile by tile within them, the heaviest tile first (the last one, if HEAVY_LAST)."""
    i_section = pid // (section * n_tiles)
    i_rest = pid % (section * n_tiles)
    n_here = tl.minimum(section, n_rows - i_section * section)
    i_tile = i_rest // n_here
    if HEAVY_LAST:
        i_tile = n_tiles - 1 - i_tile
    return i_tile, i_section * section + i_rest % n_here


@triton.jit
def extent(p_rows, i_b, size, total, MODE: tl.constexpr):
    """Sequence i_b: (its first row in memory, int64; its number of rows). Never beyond the tensor."""
    if MODE == PACKED:
        first = tl.load(p_rows + i_b).to(tl.int64)
        last = tl.load(p_rows + i_b + 1).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), total)
        length = tl.maximum(tl.minimum(last, total) - first, 0).to(tl.int32)
    elif MODE == LENGTHS:
        first = tl.cast(i_b * 0, tl.int64)
        length = tl.minimum(tl.maximum(tl.load(p_rows + i_b), 0), size).to(tl.int32)
    else:
        first = tl.cast(i_b * 0, tl.int64)
        length = tl.cast(size, tl.int32)
    return first, length


@triton.jit
def valid_rows(p_rows, i_b, o_r, size, length, MODE: tl.constexpr):
    """Which of the rows o_r of sequence i_b are real: [BLOCK] int1."""
    b_valid = o_r < length
    if MODE == MASK:
        b_valid = b_valid & (
            tl.load(p_rows + tl.cast(i_b, tl.int64) * size + o_r, mask=b_valid, other=0) != 0
        )
    return b_valid


@triton.jit
def window_range(
    i_0, i_1, offset, before, after, length, BLOCK: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr
):
    """Tiles of positions j < length that positions i_0…i_1 - 1 see: -before <= j - i - offset <= after.

    Returns (lo, full_lo, full_hi, hi), lo <= full_lo <= full_hi <= hi: [lo, hi) are seen by someone, and
    [full_lo, full_hi) wholly by everyone. Without BEFORE (AFTER) there is no limit on that side.
    """
    lo = tl.cast(0, tl.int32)
    full_lo = lo
    hi = length
    full_hi = length
    if BEFORE:
        lo = tl.minimum(tl.maximum(i_0 + offset - before, 0), length)
        full_lo = tl.minimum(tl.maximum(i_1 - 1 + offset - before, 0), length)
    if AFTER:
        hi = tl.minimum(tl.maximum(i_1 + offset + after, 0), length)
        full_hi = tl.minimum(tl.maximum(i_0 + offset + after + 1, 0), length)
    lo = lo // BLOCK
    hi = tl.maximum((hi + BLOCK - 1) // BLOCK, lo)
    full_lo = tl.minimum(tl.maximum((full_lo + BLOCK - 1) // BLOCK, lo), hi)
    full_hi = tl.minimum(tl.maximum(full_hi // BLOCK, full_lo), hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def count_tiles(p_tiles, T, lo, full_lo, full_hi, hi, MODE: tl.constexpr):
    """Sizes of the two loops over the tiles of `window_range` that hold a valid row, p_tiles being sequence
    b's record.

    Returns (n_full, n_edge, n_left, n_part, first_full, first_left, first_part, first_right); the edge loop
    walks n_left tiles before the window's inside, then n_part partial ones inside, then those after it.
    """
    if MODE == MASK:
        any_lo = tl.load(p_tiles + COUNT_ANY * (T + 1) + lo)
        any_full_lo = tl.load(p_tiles + COUNT_ANY * (T + 1) + full_lo)
        any_full_hi = tl.load(p_tiles + COUNT_ANY * (T + 1) + full_hi)
        any_hi = tl.load(p_tiles + COUNT_ANY * (T + 1) + hi)
        first_full = tl.load(p_tiles + COUNT_FULL * (T + 1) + full_lo)
        n_full = tl.load(p_tiles + COUNT_FULL * (T + 1) + full_hi) - first_full
        n_left = any_full_lo - any_lo
        n_part = any_full_hi - any_full_lo - n_full
        n_edge = n_left + n_part + any_hi - any_full_hi
        first_full += LIST_FULL * (T + 1)
        first_left = LIST_ANY * (T + 1) + any_lo
        first_part = LIST_PART * (T + 1) + any_full_lo - (first_full - LIST_FULL * (T + 1))
        first_right = LIST_ANY * (T + 1) + any_full_hi
    else:
        n_full = full_hi - full_lo
        n_left = full_lo - lo
        n_part = n_left * 0
        n_edge = n_left + hi - full_hi
        first_full = full_lo
        first_left = lo
        first_part = n_part
        first_right = full_hi
    return n_full, n_edge, n_left, n_part, first_full, first_left, first_part, first_right


@triton.jit
def pick_tile(
    p_tiles,
    i,
    n_left,
    n_part,
    first_full,
    first_left,
    first_part,
    first_right,
    MODE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The i-th tile of the loop over full tiles, or over EDGE tiles."""
    if EDGE:
        place = tl.where(i < n_left, first_left + i, first_right + i - n_left - n_part)
        if MODE == MASK:
            inside = (i >= n_left) & (i < n_left + n_part)
            place = tl.where(inside, first_part + i - n_left, place)
    else:
        place = first_full + i
    if MODE == MASK:
        place = tl.load(p_tiles + place)
    return place


@triton.jit
def in_window(o_l, o_s, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """-left <= s - l - offset <= right, for o_l, o_s that broadcast; at least one of LEFT and RIGHT."""
    d = o_s - o_l - offset
    if LEFT and RIGHT:
        return (d >= -left) & (d <= right)
    elif LEFT:
        return d >= -left
    else:
        return d <= right


@triton.jit
def load_rows(p_base, o_r, o_e, stride, b_valid, SIZE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    """Rows o_r, columns o_e of p_base: [BLOCK, BLOCK_E]. Zeros in columns beyond SIZE (none if WHOLE), and,
    if ROWS, in rows that are not valid."""
    p_rows = p_base + o_r[:, None].to(tl.int64) * stride + o_e[None, :]
    if ROWS:
        if WHOLE:
            return tl.load(p_rows, mask=b_valid[:, None], other=0.0)
        else:
            return tl.load(p_rows, mask=b_valid[:, None] & (o_e < SIZE)[None, :], other=0.0)
    else:
        if WHOLE:
            return tl.load(p_rows)
        else:
            return tl.load(p_rows, mask=(o_e < SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(p_base, o_r, o_e, stride, stride_e, b_x, b_inside, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Overwrites rows o_r where b_inside, columns o_e below SIZE."""
    p_rows = p_base + o_r[:, None].to(tl.int64) * stride + o_e[None, :].to(tl.int64) * stride_e
    b_x = b_x.to(p_base.dtype.element_ty)
    if WHOLE:
        tl.store(p_rows, b_x, mask=b_inside[:, None])
    else:
        tl.store(p_rows, b_x, mask=b_inside[:, None] & (o_e < SIZE)[None, :])


@triton.jit
def dot(b_x, b_y, b_acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """b_acc + b_x @ b_y with operands rounded to DTYPE. The interpreter cannot multiply bfloat16: float32
    there."""
    if INTERPRET and DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.dot(
            b_x.to(tl.float32), b_y.to(tl.float32), b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype
        )
    else:
        return tl.dot(b_x.to(DTYPE), b_y.to(DTYPE), b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)


@triton.jit
def scores(
    b_qk,
    scale2,
    p_bias,
    o_bl,
    o_bs,
    stride_bl,
    stride_bs,
    b_allowed,
    ACC: tl.constexpr,
    BIAS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """score2 of a tile [BLOCK_L, BLOCK_S] or its transpose (o_bl, o_bs broadcast to it and lie within bias);
    -inf where a bool bias, or EDGE's b_allowed, forbids."""
    b_s = b_qk * scale2
    if BIAS != NO_BIAS:
        b_bias = tl.load(p_bias + o_bl.to(tl.int64) * stride_bl + o_bs.to(tl.int64) * stride_bs)
        if BIAS == BOOL_BIAS:
            b_s = tl.where(b_bias != 0, b_s, float("-inf"))
        else:
            b_s += b_bias.to(ACC) * LOG2E
    if EDGE:
        b_s = tl.where(b_allowed, b_s, float("-inf"))
    return b_s


@triton.jit
def dropout_keep(p_seed, o_l, i_bn, s_0, threshold, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr):
    """The weights kept: [BLOCK_L, BLOCK_S] int1, for positions o_l and s_0 + arange(BLOCK_S), s_0 a multiple
    of 8.

    Philox4x32-10, key: the seed; counter (s >> 3, l, b * N + n, 0): one call per 8 weights. Word w's low half
    serves s & 7 == 2 * w, its high half 2 * w + 1; kept if >= threshold.
    """
    zero = tl.zeros([BLOCK_L, BLOCK_S // 8], tl.int32)
    c_0 = zero + (s_0 // 8 + tl.arange(0, BLOCK_S // 8))[None, :]
    w_0, w_1, w_2, w_3 = tl.philox(tl.load(p_seed), c_0, zero + o_l[:, None], zero + i_bn, zero)
    words = tl.join(tl.join(w_0, w_2), tl.join(w_1, w_3))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK_L, BLOCK_S])
    return halves.to(tl.int32) >= threshold
