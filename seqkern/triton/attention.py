"""Launchers of the attention kernels: from tensors to strides, tiles, launches. ops/ checks the meaning.

Letters: B batch, N query heads, Nk key and value heads, L queries, S keys, E head dim of q and k, Ev of v.
The common arguments, in the operators' order, are those of `Problem`.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqkern.triton import backward, config, forward, tiles, weights
from seqkern.triton.tiles import INTERPRET

MAX_HEAD_DIM = 256
NO_LIMIT = 2**30  # beyond every distance between positions
L2_BYTES = 24 * 2**20  # of keys and values that heads walked side by side may occupy

ALL, LENGTHS, MASK, PACKED = 0, 1, 2, 3  # tiles.py's
NO_BIAS, BOOL_BIAS, ADDED_BIAS = 0, 1, 2


@dataclass
class Problem:
    """What attention is computed of.

    q: [B, N, L, E], k: [B, Nk, S, E], v: [B, Nk, S, Ev], any strides, one dtype
    packed: [Tq, N, E], [Tk, Nk, E], [Tk, Nk, Ev]
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    bias: Tensor | None  # 4-D, each size 1 or full of [B, N, L, S]; bool: True attends
    key_valid: Tensor | None  # [B, S] bool
    key_lengths: Tensor | None  # [B] int64
    query_valid: Tensor | None  # [B, L] bool
    query_lengths: Tensor | None  # [B] int64
    cu_q: Tensor | None  # [B + 1] int32 or int64: packed
    cu_k: Tensor | None
    max_q: int
    max_k: int
    seed: Tensor | None  # [1] int64
    scale: float
    left: int
    right: int
    bottom_right: bool
    dropout_p: float

    _tiles: dict[tuple[bool, int], tuple[Tensor, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.q, self.k = rows_contiguous(self.q), rows_contiguous(self.k)
        self.v = None if self.v is None else rows_contiguous(self.v)
        self.packed = self.cu_q is not None
        if self.packed:
            assert self.cu_q is not None
            self.B, self.L, self.S = self.cu_q.numel() - 1, self.max_q, self.max_k
            self.total_q, self.N, self.E = self.q.shape
            self.total_k, self.Nk, _ = self.k.shape
        else:
            self.B, self.N, self.L, self.E = self.q.shape
            _, self.Nk, self.S, _ = self.k.shape
            self.total_q, self.total_k = self.L, self.S
        self.Ev = self.E if self.v is None else self.v.shape[-1]
        if max(self.E, self.Ev) > MAX_HEAD_DIM:
            raise ValueError(f"triton needs head_dim <= {MAX_HEAD_DIM}, got {max(self.E, self.Ev)}")
        self.group = self.N // max(self.Nk, 1)
        self.queries, self.query_rows = bounds(self.cu_q, self.query_lengths, self.query_valid)
        self.keys, self.key_rows = bounds(self.cu_k, self.key_lengths, self.key_valid)
        self.bias_kind = NO_BIAS
        if self.bias is not None:
            self.bias_kind = BOOL_BIAS if self.bias.dtype is torch.bool else ADDED_BIAS
        self.dropout = self.dropout_p > 0
        self.rescale = 1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0

    @property
    def empty(self) -> bool:
        """No query or no key: nothing to launch for."""
        return 0 in (self.B, self.N, self.L, self.S, self.total_q, self.total_k)

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.q.dtype is torch.float64 else torch.float32

    def config(self, kernel: str, with_dw: bool = False) -> config.Config:
        scores = self.bias_kind != NO_BIAS or self.dropout or with_dw
        kind = "scores" if scores else "padding" if MASK in (self.keys, self.queries) else "plain"
        return config.lookup(kernel, self.q.device, max(self.E, self.Ev), self.q.dtype, kind)

    def tiles_of(self, keys: bool, block: int) -> dict[str, Any]:
        """p_tiles and T: which tiles of `block` keys (or queries) hold valid rows, if a mask says which rows
        are."""
        rows = self.key_rows if keys else self.query_rows
        if rows is None or (self.keys if keys else self.queries) != MASK:
            return dict(p_tiles=None, T=0)
        if (keys, block) not in self._tiles:
            B, size = rows.shape
            T = triton.cdiv(size, block)
            made = torch.empty((B, 5, T + 1), dtype=torch.int32, device=rows.device)
            tiles.key_tiles_kernel[(B,)](rows, made, size, T, BLOCK=block, CHUNK=max(1, 1024 // block))
            self._tiles[keys, block] = made, T
        made, T = self._tiles[keys, block]
        return dict(p_tiles=made, T=T)

    def section(self) -> int:
        """How many heads' tiles are interleaved, heavy ones first. Without a window all tiles weigh the
        same."""
        if self.left < 0 and self.right < 0:
            return 1
        per_head = self.S * (self.E + self.Ev) * self.q.element_size() / self.group
        return max(1, min(self.B * self.N, int(L2_BYTES / max(per_head, 1))))

    def scores(self) -> dict[str, Any]:
        """The arguments and constants about q, k and bias that every kernel takes."""
        bias = self.bias
        if bias is not None and self.bias_kind == BOOL_BIAS:
            bias = bias.view(torch.uint8)
        windowed = dict(LEFT=self.left >= 0, RIGHT=self.right >= 0)
        E0, E1 = split(self.E)
        return dict(
            p_q=self.q, p_k=self.k, p_bias=bias, p_query=self.query_rows, p_key=self.key_rows,
            p_seed=self.seed, **strides("q", self.q, "bnl", self.packed),
            **strides("k", self.k, "bns", self.packed),
            **bias_strides(bias),
            N=self.N, GROUP=self.group, L=self.L, S=self.S, scale=float(self.scale),
            left=min(self.left, NO_LIMIT), right=min(self.right, NO_LIMIT),
            bottom_right=int(self.bottom_right),
            threshold=round(self.dropout_p * 65536), E=self.E, BLOCK_E0=E0, BLOCK_E1=E1, QUERIES=self.queries,
            KEYS=self.keys, **windowed, BIAS=self.bias_kind, DROPOUT=self.dropout,
            ACC=tl.float64 if self.accumulator is torch.float64 else tl.float32, PRECISION=precision(self.q),
            INTERPRET=INTERPRET,
        )  # fmt: skip

    def values(self) -> dict[str, Any]:
        """The same about v and dropout's factor."""
        EV0, EV1 = split(self.Ev)
        return dict(
            p_v=self.v, **strides("v", self.v, "bns", self.packed), EV=self.Ev, BLOCK_EV0=EV0, BLOCK_EV1=EV1,
            rescale=self.rescale,
        )  # fmt: skip

    def whole(self) -> dict[str, Any]:
        return dict(B=self.B, total_q=self.total_q, total_k=self.total_k, section=self.section())


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_valid: Tensor | None,
    key_lengths: Tensor | None, query_valid: Tensor | None, query_lengths: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, max_q: int, max_k: int, seed: Tensor | None, scale: float, left: int, right: int,
    bottom_right: bool, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention and the logarithm of its denominators.

    Args:     as `Problem`
    Returns:  out: [B, N, L, Ev] (memory [B, L, N, Ev]) or packed [Tq, N, Ev];
              lse: [B, N, L] or packed [N, Tq], float32 (float64 for float64)
    """
    problem = Problem(q, k, v, bias, key_valid, key_lengths, query_valid, query_lengths, cu_q, cu_k, max_q,
                      max_k, seed, scale, left, right, bottom_right, dropout_p)  # fmt: skip
    B, N, L, Ev = problem.B, problem.N, problem.L, problem.Ev
    if problem.packed:  # rows beyond the last sequence are nobody's: zeros
        out = q.new_zeros((problem.total_q, N, Ev))
        lse = q.new_full((N, problem.total_q), -torch.inf, dtype=problem.accumulator)
    else:
        out = q.new_empty((B, L, N, Ev)).transpose(1, 2)
        lse = q.new_empty((B, N, L), dtype=problem.accumulator)
    if problem.empty:
        return out.zero_(), lse.fill_(-torch.inf)
    chosen = problem.config("forward")
    with on_device(q):
        forward.attention_forward_kernel[(B * N * triton.cdiv(L, chosen.BLOCK_L),)](
            **(problem.scores() | dict(scale=abs(float(scale)))), NEGATIVE=scale < 0, **problem.values(),
            **problem.whole(), **problem.tiles_of(True, chosen.BLOCK_S), p_out=out, p_lse=lse,
            **strides("o", out, "bnl", problem.packed), **lse_strides(lse), **chosen.options(),
        )  # fmt: skip
    return out, lse


def attention_weights(
    q: Tensor, k: Tensor, bias: Tensor | None, key_valid: Tensor | None, key_lengths: Tensor | None,
    query_valid: Tensor | None, query_lengths: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int, max_k: int, seed: Tensor | None, scale: float, left: int, right: int, bottom_right: bool,
    dropout_p: float, lse: Tensor, average: bool,
) -> Tensor:  # fmt: skip
    """Attention weights after dropout.

    Args:     as `Problem`, not packed;  lse: [B, N, L] from attention_forward
    Returns:  [B, L, S], the mean over the heads, if average; else [B, N, L, S]; dtype of q
    """
    problem = Problem(q, k, None, bias, key_valid, key_lengths, query_valid, query_lengths, cu_q, cu_k, max_q,
                      max_k, seed, scale, left, right, bottom_right, dropout_p)  # fmt: skip
    if problem.packed:
        raise ValueError("attention weights: packed input has none")
    B, N, L, S = problem.B, problem.N, problem.L, problem.S
    w = q.new_empty((B, L, S) if average else (B, N, L, S))
    if problem.empty:
        return w.zero_()
    chosen = problem.config("weights")
    lse = rows_contiguous(lse)
    grid = triton.cdiv(S, chosen.BLOCK_S) * triton.cdiv(L, chosen.BLOCK_L) * B * (1 if average else N)
    with on_device(q):
        weights.attention_weights_kernel[(grid,)](
            **problem.scores(), B=B, rescale=problem.rescale, p_lse=lse, p_w=w, **lse_strides(lse),
            stride_wb=w.stride(0), stride_wn=0 if average else w.stride(1), stride_wl=w.stride(-2),
            AVERAGE=average, **chosen.options(),
        )  # fmt: skip
    return w


def attention_backward(
    dout: Tensor | None, dlse: Tensor | None, dw: Tensor | None, average: bool, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_valid: Tensor | None,
    key_lengths: Tensor | None, query_valid: Tensor | None, query_lengths: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, max_q: int, max_k: int, seed: Tensor | None, scale: float, left: int, right: int,
    bottom_right: bool, dropout_p: float, need_dq: bool, need_dk: bool, need_dv: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of attention; the same bits each time.

    Args:     dout, dlse: as out and lse, None for zeros;  dw: as attention_weights' result, None for zeros;
              out, lse: attention_forward's;  the others as `Problem`
    Returns:  dq, dk, dv, dbias: as q, k, v, bias; of size [0] where not needed
    """
    problem = Problem(q, k, v, bias, key_valid, key_lengths, query_valid, query_lengths, cu_q, cu_k, max_q,
                      max_k, seed, scale, left, right, bottom_right, dropout_p)  # fmt: skip
    B, N, L, S = problem.B, problem.N, problem.L, problem.S
    make = torch.zeros_like if problem.packed or problem.empty else torch.empty_like
    dq, dk, dv = (
        make(x) if need else x.new_empty(0) for x, need in ((q, need_dq), (k, need_dk), (v, need_dv))
    )
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if need_dbias else q.new_empty(0)
    if problem.empty:
        return dq, dk, dv, dbias.zero_()
    dout = torch.zeros_like(out) if dout is None else rows_contiguous(dout)
    out, lse = rows_contiguous(out), rows_contiguous(lse)
    share = 1 / N if average else 1.0
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    common = problem.scores()
    values = problem.values()
    cotangents = dict(
        p_dw=dw,
        DW=dw is not None,
        **dw_strides(dw, average),
        **strides("do", dout, "bnl", problem.packed),
        p_dout=dout,
    )
    lse = lse.contiguous()
    inside = dict(p_lse=lse, p_delta=delta, **lse_strides(lse))

    with on_device(q):
        chosen = problem.config("delta", dw is not None)
        walked = problem.tiles_of(True, chosen.BLOCK_S) if dw is not None else dict(p_tiles=None, T=0)
        backward.attention_delta_kernel[(B * N * triton.cdiv(L, chosen.BLOCK_L),)](
            **common, **walked, **problem.whole(), **inside, **cotangents, p_out=out, p_dlse=dlse,
            DLSE=dlse is not None, **strides("o", out, "bnl", problem.packed), **dlse_strides(dlse),
            EV=problem.Ev, BLOCK_EV=max(16, triton.next_power_of_2(problem.Ev)),
            share=share * problem.rescale, **chosen.options(),
        )  # fmt: skip
        if need_dk or need_dv:
            chosen = problem.config("dkdv", dw is not None)
            backward.attention_dkdv_kernel[(B * problem.Nk * triton.cdiv(S, chosen.BLOCK_S),)](
                **common, **values, **problem.whole(), **inside, **cotangents,
                **problem.tiles_of(False, chosen.BLOCK_L), p_dk=dk, p_dv=dv,
                **strides("dk", dk if need_dk else k, "bnse", problem.packed),
                **strides("dv", dv if need_dv else v, "bnse", problem.packed), share=share, NEED_DK=need_dk,
                NEED_DV=need_dv, **chosen.options(),
            )  # fmt: skip
        if need_dq:
            chosen = problem.config("dq", dw is not None)
            backward.attention_dq_kernel[(B * N * triton.cdiv(L, chosen.BLOCK_L),)](
                **common, **values, **problem.whole(), **inside, **cotangents,
                **problem.tiles_of(True, chosen.BLOCK_S), p_dq=dq,
                **strides("dq", dq, "bnle", problem.packed), share=share, **chosen.options(),
            )  # fmt: skip
        if need_dbias and bias is not None:
            chosen = problem.config("dbias", dw is not None)
            over_b, over_n, over_l, over_s = (size == 1 for size in bias.shape)
            grid = (1 if over_b else B) * (1 if over_n else N)
            grid *= (1 if over_l else triton.cdiv(L, chosen.BLOCK_L)) * (
                1 if over_s else triton.cdiv(S, chosen.BLOCK_S)
            )
            backward.attention_dbias_kernel[(grid,)](
                **common, **values, **inside, **cotangents, p_dbias=dbias,
                **strides("db", dbias, "bnls", False), share=share, over_b=B if over_b else 1,
                over_n=N if over_n else 1, OVER_L=over_l, OVER_S=over_s, **chosen.options(),
            )  # fmt: skip
    return dq, dk, dv, dbias


# ---- small things ------------------------------------------------------------------------------------------


def rows_contiguous(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied if it was not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def bounds(cu: Tensor | None, lengths: Tensor | None, valid: Tensor | None) -> tuple[int, Tensor | None]:
    """(mode, p_rows) of tiles.py: what says which rows are real."""
    if cu is not None:
        return PACKED, cu.contiguous()
    if lengths is not None:
        return LENGTHS, lengths.contiguous()
    if valid is not None:
        return MASK, valid.contiguous().view(torch.uint8)
    return ALL, None


def split(E: int) -> tuple[int, int]:
    """Columns as one block, or as two powers of two where that holds less padding: 96 = 64 + 32, 72 in 64 +
    16."""
    whole = max(16, triton.next_power_of_2(E))
    rest = max(16, triton.next_power_of_2(max(E - whole // 2, 1)))
    return (whole // 2, rest) if whole >= 64 and rest < whole // 2 else (whole, 0)


def strides(name: str, x: Tensor, dims: str, packed: bool) -> dict[str, int]:
    """stride_<name><d> for d in dims, of x [B, N, rows, columns], or packed [rows, N, columns]."""
    rows = x.stride()
    if packed:
        rows = (0, rows[1], rows[0], rows[2])
    return {f"stride_{name}{d}": stride for d, stride in zip(dims, rows, strict=False)}


def bias_strides(bias: Tensor | None) -> dict[str, int]:
    """stride_b<d> of a bias [B, N, L, S], 0 where its size is 1."""
    if bias is None:
        return dict.fromkeys(("stride_bb", "stride_bn", "stride_bl", "stride_bs"), 0)
    sizes = zip("bnls", bias.shape, bias.stride(), strict=True)
    return {f"stride_b{d}": 0 if size == 1 else stride for d, size, stride in sizes}


def lse_strides(lse: Tensor) -> dict[str, int]:
    """Of lse [B, N, L] or packed [N, Tq]."""
    return dict(stride_lb=lse.stride(0) if lse.dim() == 3 else 0, stride_ln=lse.stride(-2))


def dlse_strides(dlse: Tensor | None) -> dict[str, int]:
    if dlse is None:
        return dict(stride_dlb=0, stride_dln=0, stride_dll=0)
    rest = dict(stride_dln=dlse.stride(-2), stride_dll=dlse.stride(-1))
    return dict(stride_dlb=dlse.stride(0) if dlse.dim() == 3 else 0, **rest)


def dw_strides(dw: Tensor | None, average: bool) -> dict[str, int]:
    """Of dW [B, L, S] if average, else [B, N, L, S]."""
    if dw is None:
        return dict(stride_dwb=0, stride_dwn=0, stride_dwl=0, stride_dws=0)
    per_head = 0 if average else dw.stride(1)
    return dict(
        stride_dwb=dw.stride(0), stride_dwn=per_head, stride_dwl=dw.stride(-2), stride_dws=dw.stride(-1)
    )


def precision(q: Tensor) -> str:
    """How float32 is multiplied: as torch.backends.cuda.matmul.fp32_precision says."""
    if q.dtype is torch.float32 and q.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
