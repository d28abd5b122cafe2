"""The attention operation: scaled dot-product attention on padded, packed or nested batches."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from seqkern.ops import _attention, _backend, _layers, attention_cpu
from seqkern.ops._attention import AVERAGED, NO_WEIGHTS, Problem

CAUSAL_ALIGNMENTS = ("top_left", "bottom_right")
Window = tuple[int, int]  # (left, right), -1: no limit


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    window: Window | None = None,
    causal_alignment: str = "top_left",
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    window: Window | None = None,
    causal_alignment: str = "top_left",
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    window: Window | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.nn.functional.scaled_dot_product_attention, and padding that costs nothing.

    softmax(scale * query @ key.T + mask) @ value, over the keys that a query may attend to. A query that may
    attend to none gives zeros and no gradient.

    Args:
        query: [..., N, L, E] float32, bfloat16, float16 or float64, any strides; [L, E] at the least
        key: [..., N or Nk, S, E];  value: [..., N or Nk, S, Ev]
        attn_mask: broadcastable to [..., N, L, S]; bool: True attends; floating: added to the scores. Not
            with is_causal
        dropout_p: probability of dropping a weight; applied always, as torch's function does
        is_causal: query l attends to keys s <= l; see causal_alignment
        scale: factor of the scores, None for 1 / sqrt(E); 1 gives plain dot products
        enable_gqa: N may be a multiple of Nk; head n reads key head n // (N // Nk)
        key_padding_mask: [B, S], bool: True is padding, never read; floating: added to the scores. B is the
            product of all dims before N (of a 3-D query its first, of a 2-D query 1)
        lengths: [B] integers in 0..S on query's device: row b has lengths[b] keys. Not with key_padding_mask
        query_padding_mask: [B, L] bool, True is padding: such a query costs nothing and gives zeros
        query_lengths: [B] integers in 0..L. Not with query_padding_mask
        window: (left, right): query l attends to keys l - left … l + right, -1 for no limit
        causal_alignment: where query l stands among the keys, for is_causal and window: "top_left": at key l;
            "bottom_right": the last query at the last key, at l + S - L (S and L being lengths and
            query_lengths where they are given)
        return_lse: return also the logarithm of the sum of exponentials of each query's scores
        backend: "eager", "cpu" or "triton"; None: the fastest that is correct. See seqkern.use_backend
    Returns:
        [..., N, L, Ev], dtype of query;  with return_lse also lse [..., N, L] float32 (float64 for float64),
        -inf where there is no key
    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; attn_mask with is_causal; dropout_p outside
            0..1; a named backend cannot serve the request
        ValueError: a wrong padding mask, lengths, window or causal_alignment; no such backend
    Source:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    if query.is_nested or key.is_nested or value.is_nested:
        if not all(
            x is None for x in (attn_mask, key_padding_mask, lengths, query_padding_mask, query_lengths)
        ):
            raise ValueError("nested tensors carry their own lengths: expected no masks and no lengths")
        return _nested(
            query,
            key,
            value,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            causal_alignment=causal_alignment,
            return_lse=return_lse,
            backend=backend,
        )
    if _layers.autocast_active(query):
        dtype = autocast_dtype(query)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v, lead = _as_4d(query, key, value, enable_gqa)
    B, _, L, _ = q.shape
    S = k.shape[2]
    if attn_mask is not None and is_causal:
        raise RuntimeError("attn_mask: expected None with is_causal=True; combine the two in attn_mask")
    bias = None if attn_mask is None else _as_bias(attn_mask, q, S, lead)
    key_valid, bias = key_padding(key_padding_mask, bias, B, S, q)
    problem = Problem(
        q,
        k,
        v,
        bias,
        key_valid,
        checked_lengths("lengths", lengths, "key_padding_mask", key_padding_mask, B, S, q.device),
        valid_mask("query_padding_mask", query_padding_mask, B, L, q.device),
        checked_lengths(
            "query_lengths", query_lengths, "query_padding_mask", query_padding_mask, B, L, q.device
        ),
        **_options(q, dropout_p, scale, is_causal, window, causal_alignment),
    )
    out, lse, _ = attention(problem, NO_WEIGHTS, return_lse, backend)
    out = out.reshape(*lead, *out.shape[-2:]) if query.dim() != 4 else out
    if not return_lse:
        return out
    return out, lse.reshape(*lead, lse.shape[-1]) if query.dim() != 4 else lse


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    causal_alignment: str = "top_left",
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    causal_alignment: str = "top_left",
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention within packed sequences, which lie one after the other without padding.

    Args:
        query: [Tq, N, E], any strides;  key: [Tk, N or Nk, E];  value: [Tk, N or Nk, Ev]
        cu_seqlens_q: [B + 1] int32 or int64 on query's device, not decreasing: sequence b is rows
            cu_seqlens_q[b] … cu_seqlens_q[b + 1] - 1
        cu_seqlens_k: the same of key and value; None: cu_seqlens_q
        max_seqlen_q, max_seqlen_k: no sequence is longer; None: looked up, which on a GPU waits for it
        the rest: as for scaled_dot_product_attention
    Returns:
        [Tq, N, Ev];  with return_lse also lse [N, Tq] float32 (float64 for float64)
    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; dropout_p outside 0..1; a named backend
            cannot serve the request
        ValueError: wrong cu_seqlens, window or causal_alignment; no such backend
    """
    if _layers.autocast_active(query):
        dtype = autocast_dtype(query)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        raise RuntimeError(
            f"query, key, value: expected [Tq, N, E], [Tk, Nk, E], [Tk, Nk, Ev], got {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_alike(query, key, value)
    _check_sizes(query, key, value, heads=1, keys=0, enable_gqa=enable_gqa)
    shared = cu_seqlens_k is None
    if cu_seqlens_k is None:
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"cu_seqlens_k: expected, as key has {key.shape[0]} rows and query {query.shape[0]}; got None"
            )
        cu_seqlens_k = cu_seqlens_q
    max_q = check_cu("cu_seqlens_q", cu_seqlens_q, query, max_seqlen_q, "max_seqlen_q")
    if shared and max_seqlen_k is None:
        max_k = max_q
    else:
        max_k = check_cu("cu_seqlens_k", cu_seqlens_k, key, max_seqlen_k, "max_seqlen_k")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}, got "
            f"{tuple(cu_seqlens_k.shape)}"
        )
    problem = Problem(
        query,
        key,
        value,
        cu_q=cu_seqlens_q,
        cu_k=cu_seqlens_k,
        max_q=max_q,
        max_k=max_k,
        **_options(query, dropout_p, scale, is_causal, window, causal_alignment),
    )
    out, lse, _ = attention(problem, NO_WEIGHTS, return_lse, backend)
    return (out, lse) if return_lse else out


def attention(
    problem: Problem, weights: int, need_lse: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights) of a checked problem; weights is [0] if none are asked for, and lse may be."""
    p = problem
    chosen = choose_backend(backend, *p[:4])
    if chosen == "eager":
        if not _layers.autocast_active(p.q):
            return _attention.eager(p, weights)
        with torch.autocast(p.q.device.type, enabled=False):
            return _attention.eager(p, weights)
    if _layers.wants_grad(_tensors(*p[:4])):
        return AttentionFunction.apply(*_layers.distinct(*p[:11]), *p[11:], weights, chosen)
    return _forward(chosen, p.q)(*p, weights, need_lse)


def choose_backend(backend: str | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str:
    """The backend for these inputs, `backend` being the caller's wish."""
    wish = _backend.current_wish() if backend is None else backend
    return _backend.choose(
        "attention",
        _layers.device_type(q),
        q.dtype,
        transformed=_layers.transformed(_tensors(q, k, v, bias)),
        wish=wish,
        missing=_backend.WHY_NO_TRITON,
        head_dim=max(q.shape[-1], v.shape[-1]),
        interpreted=wish == "triton" and _backend.triton_interprets(),
    )


def _tensors(*arguments: Tensor | None) -> list[Tensor]:
    return [t for t in arguments if t is not None]


def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from seqkern import triton

    *problem, weights, need_lse = arguments
    p = Problem(*problem)
    out, lse = triton.attention_forward(*p)
    w = p.q.new_empty((0,))
    if weights != NO_WEIGHTS:
        without_v: tuple[Any, ...] = (p.q, p.k, *p[3:], lse, weights == AVERAGED)
        w = triton.attention_weights(*without_v)
    return out, lse if need_lse else lse.new_empty((0,)), w


def _triton_backward(
    dout: Tensor | None, dlse: Tensor | None, dweights: Tensor | None, weights: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from seqkern import triton

    return triton.attention_backward(dout, dlse, dweights, weights == AVERAGED, *rest)


_attention.LIBRARY.impl("attention_forward", attention_cpu.forward, "CPU")
_attention.LIBRARY.impl("attention_backward", attention_cpu.backward, "CPU")
_attention.LIBRARY.impl("attention_forward", _triton_forward, "CUDA")
_attention.LIBRARY.impl("attention_backward", _triton_backward, "CUDA")


# An operator on its own, as in an exported program, has its gradient too. AttentionFunction is what a call of
# seqkern's functions takes: it costs less, and differentiates twice.


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
    *problem, ctx.weights, _ = inputs
    ctx.layout = [None if isinstance(t, Tensor) else (t,) for t in problem]
    ctx.save_for_backward(*output[:2], *[t for t in problem if isinstance(t, Tensor)])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dw: Tensor | None
) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    p = _restored(ctx, tensors)
    needed = ctx.needs_input_grad[:4]
    if ctx.weights == NO_WEIGHTS:
        dw = None
    found = torch.ops.seqkern.attention_backward(dout, dlse, dw, ctx.weights, out, lse, *p, *needed)
    return (*_layers.wanted(found, needed), *(None,) * (len(p) - 4 + 2))


torch.library.register_autograd("seqkern::attention_forward", _differentiate, setup_context=_keep)


def _restored(ctx: Any, tensors: Sequence[Tensor]) -> Problem:
    """The problem of ctx.layout, where None stands for the next of the saved tensors."""
    remaining = iter(tensors)
    return Problem._make(next(remaining) if constant is None else constant[0] for constant in ctx.layout)


def _forward(backend: str, q: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The operator; where Triton interprets on CPU tensors, its launcher itself."""
    interpreted = backend == "triton" and q.is_cpu
    return _triton_forward if interpreted else torch.ops.seqkern.attention_forward.default


def _backward(backend: str, q: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    interpreted = backend == "triton" and q.is_cpu
    return _triton_backward if interpreted else torch.ops.seqkern.attention_backward.default


class AttentionFunction(torch.autograd.Function):
    """Attention on the operators. Kept for backward: the inputs, out and lse."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *problem, weights, backend = arguments
        p = Problem(*problem)
        out, lse, w = _forward(backend, p.q)(*p, weights, True)
        ctx.set_materialize_grads(False)
        tensors = [t for t in p if isinstance(t, Tensor)]
        ctx.layout = [None if isinstance(t, Tensor) else (t,) for t in p]
        ctx.weights, ctx.backend = weights, backend
        ctx.save_for_backward(out, lse, *tensors)
        return out, lse, w

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, dw: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        p = _restored(ctx, tensors)
        needed = ctx.needs_input_grad[:4]
        rest = (None,) * (len(p) - 4 + 2)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _layers.differentiate_eager(
                lambda *inputs: _attention.eager(Problem._make((*inputs, *p[4:])), ctx.weights),
                p[:4],
                needed,
                (dout, dlse, dw),
            )
            return (*grads, *rest)
        if ctx.weights == NO_WEIGHTS:
            dw = None
        found = _backward(ctx.backend, p.q)(dout, dlse, dw, ctx.weights, out, lse, *p, *needed)
        return (*_layers.wanted(found, needed), *rest)


# ---- checks ------------------------------------------------------------------------------------------------


def _as_4d(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """q [B, N, L, E], k, v, and the dims before L of the result."""
    check_alike(query, key, value)
    dims = (query.dim(), key.dim(), value.dim())
    if min(dims) < 2 or len(set(dims)) > 1:
        raise RuntimeError(
            "query, key, value: expected [..., N, L, E], [..., Nk, S, E], [..., Nk, S, Ev] of as many dims, "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.dim() < 4:
        while query.dim() < 3:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    lead = query.shape[:-3]
    if key.shape[:-3] != lead or value.shape[:-3] != lead:
        try:
            lead = torch.broadcast_shapes(lead, key.shape[:-3], value.shape[:-3])
        except RuntimeError as error:
            raise RuntimeError(
                "query, key, value: expected dims before [N, L, E] that broadcast, got "
                f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            ) from error
        query, key, value = (x.expand(*lead, *x.shape[-3:]) for x in (query, key, value))
    # Heads that are 1 broadcast, as everywhere in torch.
    if not enable_gqa and query.shape[-3] != key.shape[-3] and 1 in (query.shape[-3], key.shape[-3]):
        N = max(query.shape[-3], key.shape[-3])
        query = query.expand(*lead, N, *query.shape[-2:])
    if key.shape[-3] != value.shape[-3] and 1 in (key.shape[-3], value.shape[-3]):
        N = max(key.shape[-3], value.shape[-3])
        key, value = (x.expand(*lead, N, *x.shape[-2:]) for x in (key, value))
    _check_sizes(query, key, value, heads=-3, keys=-2, enable_gqa=enable_gqa or key.shape[-3] == 1)
    out_lead = (*lead, query.shape[-3])
    if dims[0] < 4:
        out_lead = out_lead[: dims[0] - 2]
    if len(lead) != 1:
        query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    return query, key, value, out_lead


def check_alike(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("key", key), ("value", value)):
        if x.dtype is not query.dtype:
            raise RuntimeError(f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise RuntimeError(f"{name}: expected the device of query, {query.device}, got {x.device}")
    if not query.dtype.is_floating_point:
        raise RuntimeError(f"query: expected a floating dtype, got {query.dtype}")


def _check_sizes(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, keys: int, enable_gqa: bool
) -> None:
    N, Nk = query.shape[heads], key.shape[heads]
    if query.shape[-1] != key.shape[-1] or key.shape[keys] != value.shape[keys] or value.shape[heads] != Nk:
        raise RuntimeError(
            "query, key, value: expected one head dim of query and key, one number of keys and of heads of "
            f"key and value, got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if Nk != N and not (enable_gqa and Nk > 0 and N % Nk == 0):
        raise RuntimeError(
            f"key: expected as many heads as query, {N}, or with enable_gqa a divisor of that, got {Nk}"
        )


def _as_bias(attn_mask: Tensor, q: Tensor, S: int, lead: tuple[int, ...]) -> Tensor:
    """attn_mask as 4-D, each size 1 or that of [B, N, L, S]; lead: the result's dims before L."""
    if attn_mask.dtype is not torch.bool and not attn_mask.dtype.is_floating_point:
        raise RuntimeError(f"attn_mask: expected bool or a floating dtype, got {attn_mask.dtype}")
    check_float_mask("attn_mask", attn_mask, q)
    if attn_mask.device != q.device:
        raise RuntimeError(f"attn_mask: expected the device of query, {q.device}, got {attn_mask.device}")
    B, _, L, _ = q.shape
    full = (*lead, L, S)
    shape = (1,) * (len(full) - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != len(full) or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise RuntimeError(
            f"attn_mask: expected a shape that broadcasts to [..., L, S] = {full}, got "
            f"{tuple(attn_mask.shape)}"
        )
    mask = attn_mask.view(shape) if attn_mask.dim() == len(full) else attn_mask.expand(shape)
    if len(lead) == 1:  # of a 3-D query, whose first dim is B here
        return mask.unsqueeze(1)
    if len(lead) == 0:
        return mask[None, None]
    if len(lead) == 2:
        return mask
    if all(size == 1 for size in shape[:-3]):
        return mask.reshape(1, *shape[-3:])
    return mask.expand(*lead[:-1], *shape[-3:]).reshape(B, *shape[-3:])


def check_float_mask(name: str, mask: Tensor, query: Tensor) -> None:
    """A mask that is added has the query's dtype, or float32 beside 16 bits.

    Raises:   RuntimeError, as torch
    """
    if mask.dtype is torch.bool or mask.dtype in (query.dtype, torch.float32):
        return
    raise RuntimeError(
        f"{name}: expected bool, float32 or the dtype of query, {query.dtype}, got {mask.dtype}"
    )


def key_padding(
    mask: Tensor | None, bias: Tensor | None, B: int, S: int, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(key_valid, bias) with a key padding mask taken in."""
    if mask is None:
        return None, bias
    if mask.dtype is torch.bool:
        return valid_mask("key_padding_mask", mask, B, S, q.device), bias
    _check_mask("key_padding_mask", mask, B, S, q.device, floating=True)
    check_float_mask("key_padding_mask", mask, q)
    added = mask[:, None, None, :]
    if q.is_cpu and not mask.requires_grad and not torch.compiler.is_compiling() and _layers.has_values(mask):
        blocked = mask == -torch.inf
        if bool((blocked | (mask == 0)).all()):  # torch's own containers turn bool masks into this
            return ~blocked, bias
    if bias is None:
        return None, added
    if bias.dtype is torch.bool:
        return None, torch.where(bias, added, -torch.inf)
    return None, bias + added


def valid_mask(name: str, mask: Tensor | None, B: int, size: int, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    _check_mask(name, mask, B, size, device, floating=False)
    return ~mask


def _check_mask(name: str, mask: Tensor, B: int, size: int, device: torch.device, floating: bool) -> None:
    if mask.dtype is not torch.bool and not (floating and mask.dtype.is_floating_point):
        raise ValueError(
            f"{name}: expected bool{' or a floating dtype' if floating else ''}, got {mask.dtype}"
        )
    if mask.shape != (B, size):
        letter = "L" if name.startswith("query") else "S"
        raise ValueError(f"{name}: expected [B, {letter}] = {(B, size)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name}: expected the device of query, {device}, got {mask.device}")


def checked_lengths(
    name: str,
    lengths: Tensor | None,
    other: str,
    mask: Tensor | None,
    B: int,
    size: int,
    device: torch.device,
) -> Tensor | None:
    if lengths is None:
        return None
    if mask is not None:
        raise ValueError(f"{name}: expected None with {other}")
    return _layers.check_lengths(lengths, size, B, device, name)


def without_padding(x: Tensor, key_padding_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """x [B, S, K] with zeros in its padded rows, if they hold NaN or infinities: they are to be multiplied
    with weights, whose gradient would become NaN. On a CPU finite rows are left alone.

    Raises:   ValueError: a wrong padding mask or lengths
    """
    B, S, _ = x.shape
    valid = valid_mask("key_padding_mask", key_padding_mask, B, S, x.device)
    lengths = checked_lengths("lengths", lengths, "key_padding_mask", key_padding_mask, B, S, x.device)
    if lengths is not None:
        valid = _attention.valid_from_lengths(lengths, S)
    if valid is None or (_attention.can_look(x) and bool(torch.isfinite(x.detach().sum()))):
        return x
    return torch.where(valid.unsqueeze(-1), x, 0)


def check_cu(name: str, cu: Tensor, x: Tensor, longest: int | None, longest_name: str) -> int:
    """The longest sequence's length, of x: [T, ...]."""
    if cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"{name}: expected [B + 1] int32 or int64, got {tuple(cu.shape)} {cu.dtype}")
    if cu.device != x.device:
        raise ValueError(f"{name}: expected the device of query, {x.device}, got {cu.device}")
    if longest is not None and longest < 0:
        raise ValueError(f"{longest_name}: expected a length, got {longest}")
    if cu.device.type != "cpu" and longest is not None:
        return longest
    if torch.compiler.is_compiling() or not _layers.has_values(cu):
        if longest is None:
            raise ValueError(f"{longest_name}: expected a number where values cannot be looked up, got None")
        return longest
    values = cu.tolist()
    sizes = [b - a for a, b in pairwise(values)]
    if values[0] < 0 or values[-1] > x.shape[0] or any(size < 0 for size in sizes):
        raise ValueError(f"{name}: expected non-decreasing values in 0..T = 0..{x.shape[0]}, got {values}")
    found = max(sizes, default=0)
    if longest is not None and longest < found:
        raise ValueError(f"{longest_name}: expected at least {found}, the longest sequence, got {longest}")
    return found


def _options(
    q: Tensor,
    dropout_p: float,
    scale: float | None,
    is_causal: bool,
    window: Window | None,
    causal_alignment: str,
) -> dict[str, Any]:
    """Problem's fields that are no masks."""
    if causal_alignment not in CAUSAL_ALIGNMENTS:
        raise ValueError(
            f"causal_alignment: expected one of {', '.join(CAUSAL_ALIGNMENTS)}, got {causal_alignment!r}"
        )
    left, right = -1, -1
    if window is not None:
        if not (
            isinstance(window, Sequence) and len(window) == 2 and all(isinstance(w, int) for w in window)
        ):
            raise ValueError(f"window: expected (left, right), -1 for no limit, got {window!r}")
        left, right = (max(-1, w) for w in window)
    if is_causal:
        right = 0
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    return {
        "seed": new_seed(dropout_p, q),
        "scale": float(scale),
        "left": left,
        "right": right,
        "bottom_right": causal_alignment == "bottom_right",
        "dropout_p": float(dropout_p),
    }


def new_seed(dropout_p: float, q: Tensor) -> Tensor | None:
    """The seed of a call's dropout."""
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout_p: expected a probability, 0..1, got {dropout_p}")
    if dropout_p == 0:
        return None
    return _layers.new_seed(q.device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(x.device.type)


# ---- nested tensors ----------------------------------------------------------------------------------------


def _nested(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Jagged [B, N, L, E], as torch's own attention takes them: nested [B, L, N, E] with dims 1 and 2
    exchanged."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_nested or x.layout is not torch.jagged or x.dim() != 4 or x._ragged_idx != 2:
            raise ValueError(
                f"{name}: expected a nested tensor [B, N, L, E] in the jagged layout, a nested [B, L, N, E] "
                "after transpose(1, 2), as the other two"
            )
        if x.lengths() is not None:
            raise ValueError(f"{name}: expected a nested tensor without gaps; call its contiguous() first")
    if options["return_lse"]:
        raise ValueError("return_lse: not with nested tensors; use varlen_attention")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out: Tensor = varlen_attention(
        *(q.values(), k.values(), v.values(), q.offsets(), k.offsets()),
        *(q._get_max_seqlen(), k._get_max_seqlen()),
        **options,
    )
    return torch.nested.nested_tensor_from_jagged(out, q.offsets()).transpose(1, 2)
