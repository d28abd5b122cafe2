"""The multi-head attention operation: projections around scaled dot-product attention.

On a CPU, where looking at lengths costs nothing, padded keys are left out of the projections too, and padded
queries where the caller names them: the valid rows are gathered and attention runs on packed sequences.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops import _attention
from seqkern.ops._attention import Problem
from seqkern.ops.attention import (
    attention,
    check_float_mask,
    checked_lengths,
    choose_backend,
    key_padding,
    new_seed,
    valid_mask,
)

WORTH_PACKING = 0.9  # the valid rows are gathered if they are at most this part of all


class Cache(Protocol):
    """What attention asks of a key-value cache; seqkern.nn.KeyValueCache is one."""

    length: int  # keys that it holds

    @property
    def complete(self) -> bool: ...  # does it hold all that there is to attend to, and take no more keys?

    def update(self, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor]: ...


class Weights(NamedTuple):
    """The parameters as torch.nn.MultiheadAttention has them. Eh: head dim, N heads, Nk of key and value."""

    num_heads: int
    num_kv_heads: int
    w_in: Tensor | None  # [(N + 2 Nk) Eh, E] of query, key, value; None: the three below
    w_q: Tensor | None  # [N Eh, E]
    w_k: Tensor | None  # [Nk Eh, Ek]
    w_v: Tensor | None  # [Nk Eh, Ev]
    b_in: Tensor | None  # [(N + 2 Nk) Eh]
    bias_k: Tensor | None  # [1, 1, Nk Eh], a key after the last one
    bias_v: Tensor | None
    w_out: Tensor  # [E, N Eh]
    b_out: Tensor | None  # [E]


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    *,
    batch_first: bool = False,
    add_zero_attn: bool = False,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    need_weights: int = _attention.NO_WEIGHTS,
    cache: Cache | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Project, attend with every head, project back.

    Args:
        query: [L, B, E], with batch_first [B, L, E];  key: [S, B, Ek];  value: [S, B, Ev]
        attn_mask: [L, S] or [B*N, L, S]; bool: True blocks; floating: added to the scores
        is_causal: query l attends to keys s <= l, with a cache also to all that came before; attn_mask, if
            given, is taken to say the same and not read
        key_padding_mask, lengths, query_padding_mask, query_lengths: as for scaled_dot_product_attention;
            the output of a padded query is zero
        need_weights: NO_WEIGHTS, AVERAGED or PER_HEAD
        cache: key and value are appended to it, and all that it holds is attended to
    Returns:
        output: like query, its last dim that of w_out;  weights [B, L, S] or [B, N, L, S] after dropout, or
        None
    Raises:
        AssertionError, RuntimeError: as torch.nn.MultiheadAttention, for what does not fit
        ValueError: wrong lengths, query_padding_mask or query_lengths; no such backend
    """
    _check(query, key, value, weights, batch_first, cache)
    B, L = _batch_and_steps(query, batch_first)
    N, Nk = weights.num_heads, weights.num_kv_heads
    if need_weights and not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout: expected a probability, 0..1, got {dropout_p}")
    complete = cache is not None and cache.complete
    past = 0 if cache is None else cache.length
    S = past if complete else past + _batch_and_steps(key, batch_first)[1]
    if is_causal:
        attn_mask = None
    masks = _masks(query, S, B, L, N, attn_mask, key_padding_mask, lengths, query_padding_mask, query_lengths)
    if cache is None:
        plan = _plan(
            *(masks, query, key, value, B, L, S, weights),
            *(is_causal, add_zero_attn, dropout_p, need_weights, backend),
        )
        if plan is not None:
            return _packed(
                *(query, key, value, weights, plan, B, L, S),
                *(batch_first, dropout_p, is_causal, need_weights, backend),
            )
    query, key, value = _without_nan(query, key, value, masks, L, past, S, batch_first, complete)
    q, k, v = _project(query, key, value, weights, complete)
    q = _heads(q, N, batch_first)
    if k is not None:
        k, v = _heads(k, Nk, batch_first), _heads(v, Nk, batch_first)
    if cache is not None:
        k, v = cache.update(k, v)
        complete = cache.complete  # a fixed one is, as of now
        if (k.shape[:2], k.shape[3]) != ((B, Nk), q.shape[3]):
            raise ValueError(
                f"cache: expected keys [B, num_kv_heads, S, head_dim] = {(B, Nk, 'S', q.shape[3])}, got "
                f"{tuple(k.shape)}"
            )
    bias, key_valid, key_lengths, query_valid, q_lengths = masks
    extra = (weights.bias_k is not None) + add_zero_attn
    right = 0 if is_causal else -1
    if extra:
        k, v = _append(k, v, weights, add_zero_attn)
        if is_causal:  # the appended keys stand before all queries
            right = -1
            diagonal = S - L if cache is not None and not complete else 0
            causal = torch.ones((L, S), dtype=torch.bool, device=q.device).tril_(diagonal)
            bias = causal[None, None] if bias is None else torch.where(causal, bias, -torch.inf)
        bias, key_valid = _append_masks(bias, key_valid, key_lengths, S, extra)
        key_lengths = None
    problem = Problem(
        *(q, k, v, bias, key_valid, key_lengths, query_valid, q_lengths),
        seed=new_seed(dropout_p, q),
        scale=q.shape[-1] ** -0.5,
        right=right,
        bottom_right=cache is not None and not complete,
        dropout_p=dropout_p,
    )
    out, _, found = attention(problem, need_weights, False, backend)
    out = out.permute(0, 2, 1, 3) if batch_first else out.permute(2, 0, 1, 3)
    out = F.linear(out.flatten(2), weights.w_out, weights.b_out)
    if q_lengths is not None:
        query_valid = _attention.valid_from_lengths(q_lengths, L)
    if query_valid is not None:
        out = torch.where((query_valid if batch_first else query_valid.T).unsqueeze(-1), out, 0)
    return out, None if need_weights == _attention.NO_WEIGHTS else found


# ---- meaning -----------------------------------------------------------------------------------------------


class Masks(NamedTuple):
    """As in Problem."""

    bias: Tensor | None
    key_valid: Tensor | None
    key_lengths: Tensor | None
    query_valid: Tensor | None
    query_lengths: Tensor | None


def _check(
    query: Tensor, key: Tensor, value: Tensor, weights: Weights, batch_first: bool, cache: Cache | None
) -> None:
    names = ("query", "key", "value")
    dim, layout = 3, "[B, L, E]" if batch_first else "[L, B, E]"
    E = weights.w_out.shape[0]
    widths = [E, E, E]
    if weights.w_in is None:
        assert weights.w_k is not None and weights.w_v is not None
        widths = [E, weights.w_k.shape[1], weights.w_v.shape[1]]
    for name, x, width in zip(names, (query, key, value), widths, strict=True):
        if x is None and name != "query" and cache is not None:
            if not cache.complete:
                raise ValueError(f"{name}: expected a tensor, as the cache is not complete; got None")
            continue
        if x.dim() != dim:
            raise AssertionError(f"{name}: expected {dim} dimensions {layout}, got {tuple(x.shape)}")
        if x.shape[-1] != width:
            # As torch.nn: where key and value have one width, only the product finds it wrong.
            late = name != "query" and weights.w_in is not None and key.shape == value.shape
            raise (RuntimeError if late else AssertionError)(
                f"{name}: expected {layout} with E = {width}, got {tuple(x.shape)}"
            )
    if cache is not None and cache.complete:
        return
    if key.shape[:2] != value.shape[:2]:
        raise AssertionError(
            f"value: expected the sequence and batch of key, {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    batch = 0 if batch_first else 1
    if key.shape[batch] != query.shape[batch]:
        raise RuntimeError(f"key: expected the batch of query, {query.shape[batch]}, got {tuple(key.shape)}")


def _batch_and_steps(x: Tensor, batch_first: bool) -> tuple[int, int]:
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def _masks(
    query: Tensor,
    S: int,
    B: int,
    L: int,
    N: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    query_padding_mask: Tensor | None,
    query_lengths: Tensor | None,
) -> Masks:
    bias = None
    if attn_mask is not None:
        if attn_mask.dtype is not torch.bool and not attn_mask.dtype.is_floating_point:
            raise AssertionError(f"attn_mask: expected bool or a floating dtype, got {attn_mask.dtype}")
        check_float_mask("attn_mask", attn_mask, query)
        expected = (L, S) if attn_mask.dim() == 2 else (B * N, L, S)
        if attn_mask.shape != expected:
            letters = "[L, S]" if attn_mask.dim() == 2 else "[B*num_heads, L, S]"
            raise RuntimeError(f"attn_mask: expected {letters} = {expected}, got {tuple(attn_mask.shape)}")
        bias = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(B, N, L, S)
        bias = ~bias if bias.dtype is torch.bool else bias
    if key_padding_mask is not None:
        if key_padding_mask.dtype is not torch.bool and not key_padding_mask.dtype.is_floating_point:
            raise AssertionError(
                f"key_padding_mask: expected bool or a floating dtype, got {key_padding_mask.dtype}"
            )
        if key_padding_mask.shape != (B, S):
            raise AssertionError(
                f"key_padding_mask: expected [B, S] = {(B, S)}, got {tuple(key_padding_mask.shape)}"
            )
    key_valid, bias = key_padding(key_padding_mask, bias, B, S, query)
    return Masks(
        bias,
        key_valid,
        checked_lengths("lengths", lengths, "key_padding_mask", key_padding_mask, B, S, query.device),
        valid_mask("query_padding_mask", query_padding_mask, B, L, query.device),
        checked_lengths(
            "query_lengths", query_lengths, "query_padding_mask", query_padding_mask, B, L, query.device
        ),
    )


# ---- projections -------------------------------------------------------------------------------------------


def _project(
    query: Tensor, key: Tensor | None, value: Tensor | None, weights: Weights, complete: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q, k, v [..., heads * Eh], q alone if the cache is complete; one product where the inputs are one
    tensor."""
    Nk = weights.num_kv_heads
    Eh = weights.w_out.shape[1] // weights.num_heads
    sizes = [weights.num_heads * Eh, Nk * Eh, Nk * Eh]
    if complete:
        w_q = weights.w_q if weights.w_in is None else weights.w_in[: sizes[0]]
        return F.linear(query, w_q, None if weights.b_in is None else weights.b_in[: sizes[0]]), None, None
    if weights.w_in is not None and query is key and key is value:
        return F.linear(query, weights.w_in, weights.b_in).split(sizes, -1)
    if weights.w_in is None:
        w_q, w_k, w_v = weights.w_q, weights.w_k, weights.w_v
    elif key is value:
        w_q, w_kv = weights.w_in.split([sizes[0], sizes[1] + sizes[2]])
    else:
        w_q, w_k, w_v = weights.w_in.split(sizes)
    if weights.w_in is not None and key is value:
        b_q, b_kv = (
            (None, None) if weights.b_in is None else weights.b_in.split([sizes[0], sizes[1] + sizes[2]])
        )
        q = F.linear(query, w_q, b_q)
        return q, *F.linear(key, w_kv, b_kv).split(sizes[1:], -1)
    b_q, b_k, b_v = (None, None, None) if weights.b_in is None else weights.b_in.split(sizes)
    q = F.linear(query, w_q, b_q)
    return q, F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)


def _heads(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    """[L, B, heads * Eh] -> [B, heads, L, Eh], a view."""
    x = x.unflatten(-1, (heads, x.shape[-1] // heads))
    return x.permute(0, 2, 1, 3) if batch_first else x.permute(1, 2, 0, 3)


def _append(k: Tensor, v: Tensor, weights: Weights, add_zero_attn: bool) -> tuple[Tensor, Tensor]:
    """The learned key and value, and the zero ones, after the last: [B, Nk, S + 1 or 2, Eh]."""
    B, Nk, _, Eh = k.shape
    if weights.bias_k is not None:
        if weights.bias_v is None:
            raise AssertionError("bias_v: expected a tensor as for bias_k, got None")
        k = torch.cat([k, weights.bias_k.to(k.dtype).view(1, Nk, 1, Eh).expand(B, -1, -1, -1)], 2)
        v = torch.cat([v, weights.bias_v.to(v.dtype).view(1, Nk, 1, Eh).expand(B, -1, -1, -1)], 2)
    if add_zero_attn:
        zeros = k.new_zeros((B, Nk, 1, Eh))
        k, v = torch.cat([k, zeros], 2), torch.cat([v, zeros], 2)
    return k, v


def _append_masks(
    bias: Tensor | None, key_valid: Tensor | None, key_lengths: Tensor | None, S: int, extra: int
) -> tuple[Tensor | None, Tensor | None]:
    """bias and key_valid for `extra` more keys, which all queries may attend to."""
    if key_lengths is not None:
        key_valid = _attention.valid_from_lengths(key_lengths, S)
    if key_valid is not None:
        key_valid = F.pad(key_valid, (0, extra), value=True)
    if bias is not None:
        bias = F.pad(bias.expand(*bias.shape[:-1], S), (0, extra), value=bias.dtype is torch.bool)
    return bias, key_valid


def _without_nan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    L: int,
    past: int,
    S: int,
    batch_first: bool,
    complete: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs without what padding must not hand on: 0 * NaN is NaN in the products of backward.

    A padded key becomes zero. In self-attention it is a query too, whose output is asked for: there only NaN
    and infinities go. Where looking is free, finite inputs are left alone. The masks are over all S keys, of
    which the first `past` are in a cache.
    """

    def cleaned(x: Tensor, valid: Tensor, zero: bool) -> Tensor:
        if _attention.can_look(x) and bool(torch.isfinite(x.detach().sum())):
            return x
        valid = (valid if batch_first else valid.T).unsqueeze(-1)
        return torch.where(valid, x, 0 if zero else torch.nan_to_num(x, 0.0, 0.0, 0.0))

    key_valid, query_valid = masks.key_valid, masks.query_valid
    if masks.key_lengths is not None:
        key_valid = _attention.valid_from_lengths(masks.key_lengths, S)
    if masks.query_lengths is not None:
        query_valid = _attention.valid_from_lengths(masks.query_lengths, L)
    if key_valid is not None:
        key_valid = None if complete else key_valid[:, past:]
    same_kv, same_qv = key is value, query is value
    if query is key:  # one tensor stays one; a row that is padding to the queries alone is a key
        if key_valid is not None:
            query = key = cleaned(query, key_valid, False)
    elif query_valid is not None:
        query = cleaned(query, query_valid, True)
    elif key_valid is not None and same_qv:
        query = cleaned(query, key_valid, False)
    if key_valid is not None:
        if key is not query:
            key = cleaned(key, key_valid, True)
        if same_kv:
            value = key
        else:
            value = query if same_qv and query_valid is None else cleaned(value, key_valid, True)
    return query, key, value


# ---- without padding ---------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Which rows of a [B, S] batch are gathered, in the order of its sequences, and where each begins."""

    cu_k: Tensor  # [B + 1]
    key_rows: Tensor  # [Tk] of the flattened [B, S]: b * S + s
    cu_q: Tensor | None  # None: every query, cu_q is 0, L, 2 L, …
    query_rows: Tensor | None


def _plan(
    masks: Masks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    B: int,
    L: int,
    S: int,
    weights: Weights,
    is_causal: bool,
    add_zero_attn: bool,
    dropout_p: float,
    need_weights: int,
    backend: str | None,
) -> Plan | None:
    """How to leave the padding out; None where that does not pay or would change the geometry."""
    if masks.key_valid is None and masks.key_lengths is None:
        return None
    if masks.bias is not None or weights.bias_k is not None or add_zero_attn or B * S == 0 or B * L == 0:
        return None
    if not _attention.can_look(query):
        return None
    if choose_backend(backend, query, key, value, None) != "cpu":
        return None
    keys = masks.key_valid
    if keys is None:
        keys = _attention.valid_from_lengths(masks.key_lengths, S)
    queries = masks.query_valid
    if masks.query_lengths is not None:
        queries = _attention.valid_from_lengths(masks.query_lengths, L)
    same = queries is not None and L == S and bool((queries == keys).all())
    counts = keys.sum(1)
    if int(counts.sum()) > WORTH_PACKING * B * S:
        return None
    # Packing moves keys together: that changes nothing if they are so already. Dropout and the weights go by
    # a key's place, the causal mask by its place relative to the query's.
    prefix = bool((keys == _attention.valid_from_lengths(counts, S)).all())
    if not prefix and (need_weights or dropout_p > 0 or (is_causal and not same)):
        return None
    if queries is not None and not same:
        query_counts = queries.sum(1)
        moved = not bool((queries == _attention.valid_from_lengths(query_counts, L)).all())
        if moved and (need_weights or dropout_p > 0 or is_causal):
            return None
    cu_k = F.pad(counts.cumsum(0), (1, 0))
    key_rows = keys.flatten().nonzero().squeeze(1)
    if same:
        return Plan(cu_k, key_rows, cu_k, key_rows)
    if queries is None:
        return Plan(cu_k, key_rows, None, None)
    return Plan(cu_k, key_rows, F.pad(query_counts.cumsum(0), (1, 0)), queries.flatten().nonzero().squeeze(1))


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    plan: Plan,
    B: int,
    L: int,
    S: int,
    batch_first: bool,
    dropout_p: float,
    is_causal: bool,
    need_weights: int,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """multi_head_attention on the rows of a plan."""

    def places(rows: Tensor, steps: int) -> Tensor:
        """Where rows b * steps + s lie in memory."""
        return rows if batch_first else rows % steps * B + rows // steps

    def gathered(x: Tensor, rows: Tensor) -> Tensor:
        return GatherRows.apply(x.flatten(0, 1), rows)

    key_places = places(plan.key_rows, S)
    key_ = gathered(key, key_places)
    value_ = key_ if key is value else gathered(value, key_places)
    if plan.query_rows is not None:
        query_places = places(plan.query_rows, L)
        same = query is key and plan.query_rows is plan.key_rows
        query_, cu_q = key_ if same else gathered(query, query_places), plan.cu_q
    else:
        query_ = query if batch_first else query.transpose(0, 1)
        query_ = query_.flatten(0, 1)
        if (query is key or query is value) and not bool(torch.isfinite(query_.detach().sum())):
            # Padded keys are queries too, whose NaN must not reach a gradient.
            valid = torch.zeros(B * S, dtype=torch.bool).index_fill_(0, plan.key_rows, True)
            query_ = torch.where(valid[:, None], query_, torch.nan_to_num(query_, 0.0, 0.0, 0.0))
        cu_q = torch.arange(0, B * L + 1, L)
    out, found = packed_multi_head_attention(
        *(query_, key_, value_, weights, cu_q, plan.cu_k, L, S),
        dropout_p=dropout_p,
        is_causal=is_causal,
        need_weights=need_weights,
        backend=backend,
    )
    if plan.query_rows is not None:
        out = out.new_zeros((B * L, out.shape[1])).index_copy_(0, query_places, out)
        out = out.unflatten(0, (B, L) if batch_first else (L, B))
    else:
        out = out.unflatten(0, (B, L))
        out = out if batch_first else out.transpose(0, 1)
    return out, found


def packed_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    need_weights: int = _attention.NO_WEIGHTS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """multi_head_attention within packed sequences, all checked.

    query is [Tq, E], key [Tk, Ek], value [Tk, Ev]; the rest as for varlen_attention. Weights, which only a
    CPU computes here, are [B, max_q, max_k] or [B, N, max_q, max_k].
    """
    q, k, v = _project(query, key, value, weights)
    assert k is not None and v is not None  # as there is no cache
    N, Nk, Eh = weights.num_heads, weights.num_kv_heads, q.shape[-1] // weights.num_heads
    problem = Problem(
        q.unflatten(-1, (N, Eh)),
        k.unflatten(-1, (Nk, Eh)),
        v.unflatten(-1, (Nk, Eh)),
        cu_q=cu_q,
        cu_k=cu_k,
        max_q=max_q,
        max_k=max_k,
        seed=new_seed(dropout_p, q),
        scale=Eh**-0.5,
        right=0 if is_causal else -1,
        dropout_p=dropout_p,
    )
    out, _, found = attention(problem, need_weights, False, backend)
    out = F.linear(out.flatten(1), weights.w_out, weights.b_out)
    return out, None if need_weights == _attention.NO_WEIGHTS else found


class GatherRows(torch.autograd.Function):
    """x[rows] for distinct rows: backward writes each gradient to its place instead of adding it there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return dy.new_zeros((ctx.count, *dy.shape[1:])).index_copy_(0, rows, dy), None
