"""The additive attention operation, of projected queries and keys."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _additive, _attention, _backend, _layers
from seqkern.ops.attention import autocast_dtype, checked_lengths, valid_mask

OP = "additive_attention"


def additive_attention(
    query: Tensor,
    key: Tensor,
    v: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention scored by v · tanh(query + key), without ever making [B, L, S, H].

    Padded keys cost nothing, and what they hold, NaN too, reaches nothing. A row without a valid key gives
    zeros and no gradient.

    Args:
        query: [B, L, H] projected, float32, bfloat16, float16 or float64, any strides
        key: [B, S, H] projected;  v: [H];  value: [B, S, D]
        key_padding_mask: [B, S] bool, True is padding
        lengths: [B] integers in 0..S on query's device: row b has lengths[b] keys. Not with key_padding_mask
        backend: "eager", "cpu" or "triton"; None: the fastest that is correct. See seqkern.use_backend
    Returns:
        context: [B, L, D];  weights: [B, L, S]; dtype of query
    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; a named backend cannot serve the request
        ValueError: a wrong padding mask or lengths; no such backend
    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
        2015
    """
    if _layers.autocast_active(query):
        dtype = autocast_dtype(query)
        query, key, v, value = query.to(dtype), key.to(dtype), v.to(dtype), value.to(dtype)
    _check(query, key, v, value)
    B, S, _ = key.shape
    device = query.device
    padding = (
        valid_mask("key_padding_mask", key_padding_mask, B, S, device),
        checked_lengths("lengths", lengths, "key_padding_mask", key_padding_mask, B, S, device),
    )
    tensors = (query, key, v, value)
    chosen = choose_backend(tensors, backend)
    if chosen == "eager":
        with torch.autocast(device.type, enabled=False):
            return _additive.eager(*tensors, *padding)
    if _layers.wants_grad(tensors):
        return AdditiveAttentionFunction.apply(*_layers.distinct(*tensors, *padding), chosen)
    context, weights = _forward(chosen, query)(*tensors, *padding)
    return context, weights.to(query.dtype)


def choose_backend(tensors: tuple[Tensor, ...], backend: str | None) -> str:
    """The backend for these inputs, `backend` being the caller's wish."""
    query = tensors[0]
    wish = _backend.current_wish() if backend is None else backend
    device = _layers.device_type(query)
    compiled = device == "cpu" and wish != "triton"
    return _backend.choose(
        OP,
        device,
        query.dtype,
        transformed=_layers.transformed(tensors),
        wish=wish,
        missing=_backend.WHY_NO_KERNELS if compiled else _backend.WHY_NO_TRITON,
        interpreted=wish == "triton" and _backend.triton_interprets(),
    )


def _check(query: Tensor, key: Tensor, v: Tensor, value: Tensor) -> None:
    if not query.dtype.is_floating_point:
        raise RuntimeError(f"query: expected a floating dtype, got {query.dtype}")
    for name, x, letters in (
        ("query", query, "[B, L, H]"),
        ("key", key, "[B, S, H]"),
        ("value", value, "[B, S, D]"),
    ):
        if x.dim() != 3:
            raise RuntimeError(f"{name}: expected {letters}, got {tuple(x.shape)}")
    B, _, H = query.shape
    S = key.shape[1]
    expected = (("key", key, (B, S, H)), ("v", v, (H,)), ("value", value, (B, S, value.shape[-1])))
    for name, x, shape in expected:
        if x.dtype is not query.dtype:
            raise RuntimeError(f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise RuntimeError(f"{name}: expected the device of query, {query.device}, got {x.device}")
        if tuple(x.shape) != shape:
            letters = {"key": "[B, S, H]", "v": "[H]", "value": "[B, S, D]"}[name]
            raise RuntimeError(f"{name}: expected {letters} = {shape}, got {tuple(x.shape)}")


def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from seqkern import triton

    return triton.additive_forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from seqkern import triton

    return triton.additive_backward(*arguments)


_attention.LIBRARY.impl("additive_attention_forward", _triton_forward, "CUDA")
_attention.LIBRARY.impl("additive_attention_backward", _triton_backward, "CUDA")


def _forward(backend: str, query: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator; where Triton interprets on CPU tensors, its launcher itself."""
    interpreted = backend == "triton" and query.is_cpu
    return _triton_forward if interpreted else torch.ops.seqkern.additive_attention_forward.default


def _backward(backend: str, query: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    interpreted = backend == "triton" and query.is_cpu
    return _triton_backward if interpreted else torch.ops.seqkern.additive_attention_backward.default


class AdditiveAttentionFunction(torch.autograd.Function):
    """Additive attention on the operators. Kept for backward: the inputs and the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        v: Tensor,
        value: Tensor,
        key_valid: Tensor | None,
        lengths: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        context, weights = _forward(backend, query)(query, key, v, value, key_valid, lengths)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        rounded = weights.to(query.dtype)
        if rounded is weights:  # the caller may change what he gets
            weights = _layers.save_output(ctx, weights)
        else:
            ctx.output_counter = None
        ctx.save_for_backward(query, key, v, value, key_valid, lengths, weights)
        return context, rounded

    @staticmethod
    def backward(ctx: Any, dcontext: Tensor | None, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph=True
            padding = inputs[4:]
            grads = _layers.differentiate_eager(
                lambda *tensors: _additive.eager(*tensors, *padding),
                inputs[:4],
                needed,
                (dcontext, dweights),
            )
            return (*grads, None, None, None)
        if _layers.output_changed(ctx):
            _, weights = _forward(ctx.backend, inputs[0])(*inputs)
        if dweights is not None:
            dweights = dweights.to(weights.dtype)
        found = _backward(ctx.backend, inputs[0])(dcontext, dweights, *inputs, weights, *needed)
        return (*_layers.wanted(found, needed), None, None, None)
