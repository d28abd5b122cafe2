"""Attention's operators on a CPU: the compiled kernels where they serve, else torch's own, without padding.

A problem falls into pieces, each a part of the batch whose rows have the same keys and queries, so that
padding is neither read nor computed. The pieces go

- all together to the compiled kernels (csrc/cpu/attention.h), where those are there: float32, bfloat16 and
  float16, but for gradients of a mask, gradients into weights or lse, and a step of one or two queries;
- else each to torch's fused kernel: no dropout, no weights, at most a causal mask;
- else block by block: the scores of a few heads and queries, as many as stay in cache, in one scratch buffer;
  masks are made for a block at a time, and a block has no keys that its window excludes.

    S = scale q kᵀ + bias              P = softmax(S)                         out = (P ∘ D) v
    dP = D ∘ (dout vᵀ + dW)            dS = P ∘ (dP - rowsum(P ∘ dP) + dlse)
    dq = scale dS k                    dk = scale dSᵀ q                       dv = (P ∘ D)ᵀ dout

None has [B, N, L, S] in memory. In blocks, float16 and bfloat16 are computed in float32 and rounded once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _backend
from seqkern.ops._attention import AVERAGED, NO_WEIGHTS, PER_HEAD, Problem, accumulator
from seqkern.reference.attention import dropout_keep

BLOCK = 1 << 18  # scores in a block: 1 MiB of float32, what an L2 cache holds

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


# ---- pieces ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Sequences of one geometry; `queries`, `keys` and `pairs` cut a tensor of the problem to it.

    b0, b1: its part of the batch;  l0, l1 and s0, s1: its queries and keys, counted in the sequence
    q0, k0: where in memory query l0 and key s0 lie: the same, or the packed row
    offset: the diagonal, s - l - offset = 0
    key_valid, query_valid: [b1 - b0, s1 - s0 or l1 - l0] bool where there are holes
    """

    b0: int
    b1: int
    l0: int
    l1: int
    s0: int
    s1: int
    q0: int
    k0: int
    offset: int
    packed: bool
    key_valid: Tensor | None = None
    query_valid: Tensor | None = None

    @property
    def L(self) -> int:
        return self.l1 - self.l0

    @property
    def S(self) -> int:
        return self.s1 - self.s0

    def queries(self, x: Tensor) -> Tensor:
        """[b1 - b0, N, L, .] of a tensor like q."""
        return self._cut(x, self.q0, self.L)

    def keys(self, x: Tensor) -> Tensor:
        return self._cut(x, self.k0, self.S)

    def _cut(self, x: Tensor, start: int, size: int) -> Tensor:
        if self.packed:
            return x[start : start + size].transpose(0, 1).unsqueeze(0)
        return x[self.b0 : self.b1, :, start : start + size]

    def pairs(self, x: Tensor | None) -> Tensor | None:
        """The part of a tensor broadcastable to [B, N, L, S]."""
        if x is None:
            return None
        x = x if x.shape[0] == 1 else x[self.b0 : self.b1]
        x = x if x.shape[2] == 1 else x[:, :, self.l0 : self.l1]
        return x if x.shape[3] == 1 else x[:, :, :, self.s0 : self.s1]


def pieces(p: Problem) -> list[Piece]:
    """Everything that has queries and keys; what no piece covers has zero results."""
    if p.q.shape[1] == 0:
        return []
    if p.cu_q is not None:
        assert p.cu_k is not None
        cu_q, cu_k = p.cu_q.tolist(), p.cu_k.tolist()
        found = []
        for b, (q0, q1, k0, k1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)):
            offset = (k1 - k0) - (q1 - q0) if p.bottom_right else 0
            if q1 > q0 and k1 > k0:
                found.append(Piece(b, b + 1, 0, q1 - q0, 0, k1 - k0, q0, k0, offset, True))
        return found
    B, _, L, _ = p.q.shape
    S = p.k.shape[2]
    key_ranges, key_holes = _ranges(p.key_valid, p.key_lengths, B, S)
    query_ranges, query_holes = _ranges(p.query_valid, p.query_lengths, B, L)
    rows = list(zip(key_ranges, query_ranges, strict=True))
    found = []
    for (keys, queries), group in groupby(range(B), lambda b: rows[b]):
        members = list(group)
        b0, b1 = members[0], members[-1] + 1
        (s0, s1), (l0, l1) = keys, queries
        if s0 == s1 or l0 == l1:
            continue
        offset = 0
        if p.bottom_right:
            offset = (s1 if p.key_lengths is not None else S) - (l1 if p.query_lengths is not None else L)
        key_valid, query_valid = p.key_valid, p.query_valid
        if key_valid is not None:
            key_valid = key_valid[b0:b1, s0:s1] if any(key_holes[b] for b in members) else None
        if query_valid is not None:
            query_valid = query_valid[b0:b1, l0:l1] if any(query_holes[b] for b in members) else None
        found.append(Piece(b0, b1, l0, l1, s0, s1, l0, s0, offset, False, key_valid, query_valid))
    return found


def _ranges(
    valid: Tensor | None, lengths: Tensor | None, B: int, size: int
) -> tuple[list[tuple[int, int]], list[bool]]:
    """Per row the range from the first valid place to behind the last, and whether it has holes."""
    if lengths is not None:
        return [(0, min(max(length, 0), size)) for length in lengths.tolist()], [False] * B
    if valid is None or size == 0:
        return [(0, size)] * B, [False] * B
    marks = valid.to(torch.uint8)
    first, last = marks.argmax(1), size - marks.flip(1).argmax(1)
    count = marks.sum(1)
    found = []
    for a, z, n in zip(first.tolist(), last.tolist(), count.tolist(), strict=True):
        found.append((a, z) if n else (0, 0))
    return found, [z - a != n for (a, z), n in zip(found, count.tolist(), strict=True)]


def covers(found: list[Piece], p: Problem) -> bool:
    """Do the pieces cover every query and every key?"""
    if p.cu_q is not None:
        queries, keys = sum(piece.L for piece in found), sum(piece.S for piece in found)
        return queries == p.q.shape[0] and keys == p.k.shape[0]
    B, _, L, _ = p.q.shape
    whole = [piece.b1 - piece.b0 for piece in found if piece.L == L and p.k.shape[2] == piece.S]
    return sum(whole) == B


# ---- the operators -----------------------------------------------------------------------------------------


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The products below have the dtypes that they are given."""

    def run(*arguments: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return operator(*arguments)
        with torch.autocast("cpu", enabled=False):
            return operator(*arguments)

    return run


@_without_autocast
def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """attention_forward: (out, lse, weights), lse [0] unless asked for, weights [0] if none are.

    out lies in memory as [B, L, N, Ev], so that the heads of a query are side by side.
    """
    *problem, weights, need_lse = arguments
    p = Problem(*problem)
    found = pieces(p)
    new = torch.empty if covers(found, p) else torch.zeros
    dtype = p.q.dtype
    N, Ev = p.q.shape[1], p.v.shape[-1]
    lse = p.q.new_empty((0,), dtype=accumulator(dtype))
    w = p.q.new_empty((0,))
    if p.cu_q is not None:
        out = new((p.q.shape[0], N, Ev), dtype=dtype)
        B, L, S = p.cu_q.numel() - 1, p.max_q, p.max_k
        if need_lse:
            lse = lse.new_full((N, p.q.shape[0]), -torch.inf)
    else:
        B, _, L, _ = p.q.shape
        S = p.k.shape[2]
        out = new((B, L, N, Ev), dtype=dtype).transpose(1, 2)
        if need_lse:
            lse = lse.new_full((B, N, L), -torch.inf)
    if weights != NO_WEIGHTS:
        w = p.q.new_zeros((B, L, S) if weights == AVERAGED else (B, N, L, S), dtype=accumulator(dtype))
    step = len(found) == 1 and found[0].L <= FEW_QUERIES and weights == NO_WEIGHTS
    if _compiled_serves(p) and not (step and _fused_serves(_part(p, found[0]))):
        _compiled_forward(p, found, out, lse if need_lse else None, w, weights)
        return out, lse, w.to(dtype)
    for piece in found:
        part = _part(p, piece)
        out_part = piece.queries(out)
        lse_part = _lse_part(lse, piece).squeeze(-1) if need_lse else None
        if weights == NO_WEIGHTS and _fused_serves(part):
            found_out, found_lse = _flash_forward(
                part.q, part.k, part.v, 0.0, part.right >= 0, attn_mask=None, scale=part.scale
            )
            out_part.copy_(found_out)
            if lse_part is not None:
                lse_part.copy_(found_lse)
        else:
            _blocked_forward(part, out_part, lse_part, _weights_part(w, piece, weights), weights)
    return out, lse, w.to(dtype)


@_without_autocast
def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    weights: int,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """attention_backward: (dq, dk, dv, dbias), each [0] unless asked for."""
    *problem, need_dq, need_dk, need_dv, need_dbias = rest
    p = Problem(*problem)
    found = pieces(p)
    new = torch.empty_like if covers(found, p) and not need_dbias else torch.zeros_like
    dq, dk, dv = (
        new(t) if need else p.q.new_empty((0,))
        for t, need in ((p.q, need_dq), (p.k, need_dk), (p.v, need_dv))
    )
    dbias = p.q.new_empty((0,))
    if need_dbias:
        assert p.bias is not None
        dbias = torch.zeros(p.bias.shape, dtype=accumulator(p.bias.dtype))
    direct = dout is not None and dlse is None and dweights is None and lse.numel() > 0 and not need_dbias
    if direct and _compiled_serves(p):
        _compiled_backward(p, found, dout, out, lse, dq, dk, dv)
        return dq, dk, dv, dbias
    for piece in found:
        part = _part(p, piece)
        dout_part = None if dout is None else piece.queries(dout)
        grads = [piece.queries(dq) if need_dq else None]
        grads += [piece.keys(t) if need else None for t, need in ((dk, need_dk), (dv, need_dv))]
        if direct and _fused_serves(part):
            lse_part = _lse_part(lse, piece).squeeze(-1)
            results = _flash_backward(
                *(dout_part, part.q, part.k, part.v, piece.queries(out), lse_part, 0.0, part.right >= 0),
                attn_mask=None,
                scale=part.scale,
            )
            for target, result in zip(grads, results, strict=True):
                if target is not None:
                    target.copy_(result)
            continue
        dlse_part = None if dlse is None else _lse_part(dlse, piece)
        dw_part = None if dweights is None else _weights_part(dweights, piece, weights)
        _blocked_backward(
            part, dout_part, dlse_part, dw_part, weights, grads, piece.pairs(dbias) if need_dbias else None
        )
    return dq, dk, dv, dbias if p.bias is None or not need_dbias else dbias.to(p.bias.dtype)


def _lse_part(lse: Tensor, piece: Piece) -> Tensor:
    """[b, N, L, 1] of lse or its gradient."""
    return piece.queries((lse.transpose(0, 1) if piece.packed else lse).unsqueeze(-1))


def _weights_part(w: Tensor, piece: Piece, weights: int) -> Tensor | None:
    """[b, 1 or N, L, S] of the weights or their gradient."""
    if weights == NO_WEIGHTS:
        return None
    return piece.pairs(w.unsqueeze(1) if weights == AVERAGED else w)


# ---- the compiled kernels ----------------------------------------------------------------------------------

_pieces_forward = _backend.operator("attention_pieces_forward")
_pieces_backward = _backend.operator("attention_pieces_backward")
FEW_QUERIES = 2  # of one step of decoding: packing the keys would cost more than the products
COMPILED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _compiled_serves(p: Problem) -> bool:
    return (
        _pieces_forward is not None
        and p.q.dtype in COMPILED_DTYPES
        and p.dropout_p < 1
        and p.q.shape[1] > 0
        and p.q.shape[-1] > 0
        and p.v.shape[-1] > 0
    )


def _compiled_arguments(p: Problem, found: list[Piece]) -> list[Any]:
    """q, k, v, pieces, …, dropout_p of the compiled operators."""
    q, k, v = (_four_dims(t, p) for t in (p.q, p.k, p.v))
    key_holes = any(piece.key_valid is not None for piece in found)
    key_valid = p.key_valid if key_holes else None
    query_valid = p.query_valid if any(piece.query_valid is not None for piece in found) else None
    if key_valid is not None:
        k, v = (torch.where(key_valid[:, None, :, None], t, 0) for t in (k, v))
    mask = None
    if p.bias is not None:
        mask = p.bias if p.bias.dtype is torch.bool else p.bias.to(torch.float32)
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    table = [
        (0 if piece.packed else b, b, piece.l0, piece.L, piece.q0, piece.s0, piece.S, piece.k0, piece.offset)
        for piece in found
        for b in range(piece.b0, piece.b1)
    ]
    return [
        *(q, k, v, torch.tensor(table, dtype=torch.int64).view(-1, 9), mask),
        None if key_valid is None else key_valid.contiguous(),
        None if query_valid is None else query_valid.contiguous(),
        *(p.seed, p.scale, p.left, p.right, p.dropout_p),
    ]


def _four_dims(t: Tensor, p: Problem) -> Tensor:
    """[B, heads, rows, E] with contiguous rows; B is 1 of what is packed."""
    if p.cu_q is not None:
        t = t.transpose(0, 1).unsqueeze(0)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _four_dims_of_lse(lse: Tensor, p: Problem) -> Tensor:
    """[B, N, L, 1] of lse, [B, N, L] or packed [N, Tq]."""
    return (lse.unsqueeze(0) if p.cu_q is not None else lse).unsqueeze(-1)


def _compiled_forward(
    p: Problem, found: list[Piece], out: Tensor, lse: Tensor | None, w: Tensor, weights: int
) -> None:
    """Overwrites out and lse where there are pieces; w is zero."""
    lse_ = None if lse is None else _four_dims_of_lse(lse, p)
    w_ = None if weights == NO_WEIGHTS else w.unsqueeze(1) if weights == AVERAGED else w
    _pieces_forward(*_compiled_arguments(p, found), _four_dims(out, p), lse_, w_)


def _compiled_backward(
    p: Problem,
    found: list[Piece],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Overwrites dq, dk and dv, [0] where not wanted, where there are pieces."""
    lse_ = _four_dims_of_lse(lse, p)
    grads = [t if p.cu_q is None else t.transpose(0, 1).unsqueeze(0) for t in (dq, dk, dv) if t.numel()]
    rows = [_four_dims(t, p) if t.numel() else None for t in (dq, dk, dv)]
    _pieces_backward(_four_dims(dout, p), _four_dims(out, p), lse_, *_compiled_arguments(p, found), *rows)
    for target, found_rows in zip(grads, [t for t in rows if t is not None], strict=True):
        if found_rows.data_ptr() != target.data_ptr():  # laid out like an input without contiguous rows
            target.copy_(found_rows)


# ---- one piece ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A piece's own tensors and numbers: positions count from its first query and key."""

    q: Tensor  # [b, N, L, E]
    k: Tensor  # [b, Nk, S, E]
    v: Tensor  # [b, Nk, S, Ev]
    bias: Tensor | None  # [b or 1, N or 1, L or 1, S or 1]
    key_valid: Tensor | None  # [b, S]; k and v are zero where it is False
    query_valid: Tensor | None  # [b, L]; q likewise
    left: int
    right: int  # -1 also where the limit excludes nothing
    offset: int
    scale: float
    dropout_p: float
    seed: Tensor | None
    b0: int  # of the whole problem, for dropout
    l0: int
    s0: int


def _part(p: Problem, piece: Piece) -> Part:
    q, k, v = piece.queries(p.q), piece.keys(p.k), piece.keys(p.v)
    if piece.key_valid is not None:
        k = torch.where(piece.key_valid[:, None, :, None], k, 0)
        v = torch.where(piece.key_valid[:, None, :, None], v, 0)
    if piece.query_valid is not None:
        q = torch.where(piece.query_valid[:, None, :, None], q, 0)
    offset = piece.offset + piece.l0 - piece.s0
    left, right = p.left, p.right
    if right >= 0 and piece.S - 1 - offset <= right:  # query 0 may see the last key
        right = -1
    if left >= 0 and -(piece.L - 1) - offset >= -left:  # the last query may see key 0
        left = -1
    return Part(
        *(q, k, v, piece.pairs(p.bias), piece.key_valid, piece.query_valid, left, right, offset),
        *(p.scale, p.dropout_p, p.seed, piece.b0, piece.l0, piece.s0),
    )


def _fused_serves(part: Part) -> bool:
    """Can torch's fused kernel compute this? Its one mask is the causal one from the top left."""
    return (
        part.dropout_p == 0
        and part.bias is None
        and part.key_valid is None
        and part.query_valid is None
        and part.left < 0
        and (part.right < 0 or part.right + part.offset == 0)
        and part.q.shape[-1] == part.v.shape[-1] > 0
        and part.q.shape[1] == part.k.shape[1]
        and part.q.stride(-1) == part.k.stride(-1) == part.v.stride(-1) == 1
    )


@dataclass(frozen=True)
class Block:
    """Scores of heads n0 … n1 of batch row b, queries l0 … l1, keys s0 … s1, in the scratch buffer."""

    b: int
    n0: int
    n1: int
    l0: int
    l1: int
    s0: int
    s1: int

    def pairs(self, x: Tensor) -> Tensor:
        """The part of [b or 1, N or 1, L or 1, S or 1], without the batch dim."""
        x = x[0 if x.shape[0] == 1 else self.b]
        x = x if x.shape[0] == 1 else x[self.n0 : self.n1]
        x = x if x.shape[1] == 1 else x[:, self.l0 : self.l1]
        return x if x.shape[2] == 1 else x[:, :, self.s0 : self.s1]


def _blocks(part: Part) -> Iterator[Block]:
    """Blocks in an order that is the same in each pass: by row, heads, queries."""
    B, N, L, _ = part.q.shape
    Nk, S = part.k.shape[1], part.k.shape[2]
    windowed = part.left >= 0 or part.right >= 0
    queries = min(L, max(32, BLOCK // S), 256 if windowed else L)
    group = N // Nk
    heads = max(1, min(N, BLOCK // (queries * S)))
    heads = min(heads, group) if group > 1 else heads  # one key head a block
    heads = next(n for n in range(heads, 0, -1) if group == 1 or group % n == 0)
    for b in range(B):
        for n0 in range(0, N, heads):
            for l0 in range(0, L, queries):
                l1 = min(l0 + queries, L)
                s0 = 0 if part.left < 0 else min(S, max(0, l0 + part.offset - part.left))
                s1 = S if part.right < 0 else max(s0, min(S, l1 - 1 + part.offset + part.right + 1))
                yield Block(b, n0, min(n0 + heads, N), l0, l1, s0, s1)


class _Scores:
    """Makes a block's P in scratch memory, and what masks and drops it."""

    def __init__(self, part: Part) -> None:
        self.part, self.wide = part, accumulator(part.q.dtype)
        self.group = part.q.shape[1] // part.k.shape[1]
        self.buffers: dict[str, Tensor] = {}

    def scratch(self, name: str, block: Block) -> Tensor:
        """[heads, queries, keys] of memory that is kept from block to block."""
        shape = (block.n1 - block.n0, block.l1 - block.l0, block.s1 - block.s0)
        size = shape[0] * shape[1] * shape[2]
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=self.wide)
        return self.buffers[name][:size].view(shape)

    def queries(self, x: Tensor, block: Block) -> Tensor:
        """[heads, queries, .] of q, dout, …, in the dtype of sums."""
        return x[block.b, block.n0 : block.n1, block.l0 : block.l1].to(self.wide)

    def keys(self, x: Tensor, block: Block) -> Tensor:
        """[heads, keys, .] of k or v; the heads of a group share theirs."""
        if self.group == 1:
            return x[block.b, block.n0 : block.n1, block.s0 : block.s1].to(self.wide)
        head = block.n0 // self.group
        x = x[block.b, head : head + 1, block.s0 : block.s1].to(self.wide)
        return x.expand(block.n1 - block.n0, -1, -1)

    def probabilities(self, block: Block, need_lse: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """P [heads, queries, keys] before dropout, lse [heads, queries], and, if there are any, which queries
        have no key, [1 or heads, queries or 1, 1]."""
        part = self.part
        score = self.scratch("score", block)
        q, k = self.queries(part.q, block), self.keys(part.k, block)
        torch.baddbmm(score, q, k.transpose(1, 2), beta=0, alpha=part.scale, out=score)
        blocked = self.blocked(block)
        if part.bias is not None and part.bias.dtype is not torch.bool:
            score += block.pairs(part.bias)
            blocked = _either(blocked, block.pairs(part.bias) == -torch.inf)
        highest = None
        if blocked is not None:
            score.masked_fill_(blocked, -torch.inf)
        if need_lse:
            highest = score.amax(-1)
        torch.softmax(score, -1, out=score)
        lse = None
        if need_lse:  # the largest probability is exp(highest - lse)
            lse = highest - score.amax(-1).log()
        empty = None if blocked is None else blocked.all(-1, keepdim=True)
        if empty is None or not bool(empty.any()):
            return score, lse, None
        score.masked_fill_(empty, 0)
        if lse is not None:
            lse.masked_fill_(empty.squeeze(-1).expand_as(lse), -torch.inf)
        return score, lse, empty if empty.dim() == 3 else empty[None]

    def blocked(self, block: Block) -> Tensor | None:
        """The block's pairs that padding, window and a bool mask exclude, broadcastable to its scores."""
        part, found = self.part, None
        if part.right >= 0 or part.left >= 0:
            shape = (block.l1 - block.l0, block.s1 - block.s0)
            shift = block.l0 - block.s0 + part.offset  # key s is on the diagonal of query l at s - l = shift
            if part.right >= 0 and shape[1] - 1 - shift > part.right:
                found = torch.ones(shape, dtype=torch.bool).triu_(shift + part.right + 1)
            if part.left >= 0 and -(shape[0] - 1) - shift < -part.left:
                found = _either(found, torch.ones(shape, dtype=torch.bool).tril_(shift - part.left - 1))
        if part.key_valid is not None:
            found = _either(found, ~part.key_valid[block.b, None, block.s0 : block.s1])
        if part.query_valid is not None:
            found = _either(found, ~part.query_valid[block.b, block.l0 : block.l1, None])
        if part.bias is not None and part.bias.dtype is torch.bool:
            found = _either(found, ~block.pairs(part.bias))
        return found

    def factors(self, block: Block) -> Tensor | None:
        """D: 0 where dropout drops, else 1 / (1 - dropout_p); None without dropout."""
        part = self.part
        if part.dropout_p == 0:
            return None
        heads, queries, keys = block.n1 - block.n0, block.l1 - block.l0, block.s1 - block.s0
        if part.dropout_p == 1:
            return torch.zeros((1, 1, 1), dtype=self.wide)
        row = (part.b0 + block.b) * part.q.shape[1] + block.n0
        start = part.s0 + block.s0
        first = start // 8 * 8
        shape = (1, heads, queries, start - first + keys)
        keep = dropout_keep(part.seed, part.dropout_p, shape, (row, part.l0 + block.l0, first))
        return keep[0, :, :, start - first :].to(self.wide).div_(1 - part.dropout_p)


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a | b


def _blocked_forward(part: Part, out: Tensor, lse: Tensor | None, w: Tensor | None, weights: int) -> None:
    """Overwrites out [b, N, L, Ev] and lse [b, N, L]; adds to w [b, 1 or N, L, S], which is zero."""
    scores = _Scores(part)
    for block in _blocks(part):
        target = out[block.b, block.n0 : block.n1, block.l0 : block.l1]
        if block.s0 == block.s1:
            target.zero_()
            continue  # lse is -inf already
        p, found_lse, _ = scores.probabilities(block, lse is not None)
        if lse is not None:
            lse[block.b, block.n0 : block.n1, block.l0 : block.l1] = found_lse
        factors = scores.factors(block)
        if factors is not None:
            p.mul_(factors)
        v = scores.keys(part.v, block)
        if target.dtype is p.dtype:
            torch.bmm(p, v, out=target)
        else:
            target.copy_(torch.bmm(p, v))
        if weights == PER_HEAD:
            block.pairs(w).copy_(p)
        elif weights == AVERAGED:
            block.pairs(w).add_(p.sum(0, keepdim=True) if p.shape[0] > 1 else p, alpha=1 / part.q.shape[1])


def _blocked_backward(
    part: Part,
    dout: Tensor | None,
    dlse: Tensor | None,
    dw: Tensor | None,
    weights: int,
    grads: list[Tensor | None],
    dbias: Tensor | None,
) -> None:
    """Overwrites grads, dq [b, N, L, E], dk [b, Nk, S, E], dv [b, Nk, S, Ev]; adds to dbias, like
    part.bias."""
    scores = _Scores(part)
    # Sums over blocks, in the dtype of sums.
    sums = [
        None
        if t is None
        else (t.zero_() if t.dtype is scores.wide else t.new_zeros(t.shape, dtype=scores.wide))
        for t in grads
    ]
    dq, dk, dv = sums
    for block in _blocks(part):
        if block.s0 == block.s1:
            continue
        p, _, empty = scores.probabilities(block, need_lse=False)
        factors = scores.factors(block)
        ds = scores.scratch("ds", block)
        if dout is None:
            ds.zero_()
        else:
            dy = scores.queries(dout, block)
            if empty is not None:  # P is 0 there, but what comes in may be NaN
                dy = dy.masked_fill(empty, 0)
            torch.bmm(dy, scores.keys(part.v, block).transpose(1, 2), out=ds)
            if dv is not None:
                _add_product(
                    _keys_of(dv, block, scores.group), p if factors is None else p * factors, dy, 1.0
                )
        if dw is not None:
            ds.add_(block.pairs(dw), alpha=1 / part.q.shape[1] if weights == AVERAGED else 1.0)
            if empty is not None:
                ds.masked_fill_(empty, 0)
        if factors is not None:
            ds.mul_(factors)
        torch._softmax_backward_data(ds, p, -1, scores.wide, grad_input=ds)
        if dlse is not None:
            change = scores.queries(dlse, block)
            ds.addcmul_(p, change if empty is None else change.masked_fill(empty, 0))
        if dbias is not None:
            _add_sum(dbias, ds, block)
        if dq is not None:
            k = scores.keys(part.k, block)
            target = dq[block.b, block.n0 : block.n1, block.l0 : block.l1]
            torch.baddbmm(target, ds, k, beta=0, alpha=part.scale, out=target)
        if dk is not None:
            _add_product(_keys_of(dk, block, scores.group), ds, scores.queries(part.q, block), part.scale)
    for target, total in zip(grads, sums, strict=True):
        if target is not None and target is not total:
            target.copy_(total)


def _keys_of(x: Tensor, block: Block, group: int) -> Tensor:
    """[key heads, keys, .] of dk or dv."""
    n1 = max(block.n0 // group + 1, block.n1 // group)
    return x[block.b, block.n0 // group : n1, block.s0 : block.s1]


def _add_product(target: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """target [heads, keys, E] += factor * aᵀ b; one key head takes the sum over its group's query heads."""
    if target.shape[0] == a.shape[0]:
        target.baddbmm_(a.transpose(1, 2), b, alpha=factor)
    else:
        target.add_(torch.bmm(a.transpose(1, 2), b).sum(0, keepdim=True), alpha=factor)


def _add_sum(dbias: Tensor, ds: Tensor, block: Block) -> None:
    """Adds ds [heads, queries, keys], summed over the dims in which the bias is broadcast."""
    target = block.pairs(dbias)
    dims = [dim for dim in range(3) if target.shape[dim] == 1 and ds.shape[dim] > 1]
    target.add_(ds.sum(dims, keepdim=True) if dims else ds)
