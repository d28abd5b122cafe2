"""The decoder operation: an LSTM or a GRU with additive attention, all steps in one call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops import _attention, _backend, _layers
from seqkern.ops.attention import autocast_dtype, checked_lengths, valid_mask
from seqkern.reference import attention_decoder as reference

OP = "attention_decoder"
_INPUTS = (
    "Tensor gates, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, Tensor w_context, Tensor w_query, "
    "Tensor key, Tensor v, Tensor value, Tensor? key_valid, Tensor? lengths"
)
_attention.LIBRARY.define(
    f"attention_decoder_forward({_INPUTS}) -> (Tensor y, Tensor cells, Tensor context, Tensor weights, "
    "Tensor products, Tensor saved)"
)
_attention.LIBRARY.define(
    f"attention_decoder_backward(Tensor? dy, Tensor? dc_n, Tensor? dcontext, Tensor? dweights, {_INPUTS}, "
    "Tensor y, Tensor cells, Tensor context, Tensor weights, Tensor products, Tensor saved) -> "
    "(Tensor dgates, Tensor dh0, Tensor dc0, Tensor dw_hh, Tensor db_hh, Tensor dw_context, Tensor dw_query, "
    "Tensor dkey, Tensor dv, Tensor dvalue)"
)


def attention_decoder(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | Tensor,
    params: Sequence[Tensor],
    w_query: Tensor,
    key: Tensor,
    v: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | Tensor, Tensor, Tensor]:
    """Run an LSTM or a GRU whose input at each step is [x_t; context_t], teacher-forced.

    context_t = additive attention of W_query h_{t-1} to key and value

    Args:
        input: [T, B, I] float32, float64, or 16 bits (computed in float32), T > 0
        hx: (h_0, c_0) for an LSTM, h_0 for a GRU, [B, H] each
        params: w_ih [G*H, I + D], w_hh [G*H, H] and, with biases, b_ih, b_hh [G*H]: torch.nn's order
        w_query: [A, H];  key: [B, S, A] projected;  v: [A];  value: [B, S, D]
        key_padding_mask: [B, S] bool, True is padding, never read
        lengths: [B] integers in 0..S: row b has lengths[b] keys. Not with key_padding_mask
        backend: "eager" or "cpu"; None: the faster that is correct. See seqkern.use_backend
    Returns:
        output: [T, B, H];  the last state, as hx;  context: [T, B, D];  weights: [B, T, S]; dtype of input
    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; a named backend cannot serve the request
        ValueError: a wrong padding mask or lengths; no such backend
    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
        2015
    """
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if _layers.autocast_active(input):
        dtype = autocast_dtype(input)
        input, w_query, key, v, value = (t.to(dtype) for t in (input, w_query, key, v, value))
        states, params = tuple(s.to(dtype) for s in states), [p.to(dtype) for p in params]
    _check(input, states, params, w_query, key, v, value)
    B, S, _ = key.shape
    padding = (
        valid_mask("key_padding_mask", key_padding_mask, B, S, input.device),
        checked_lengths("lengths", lengths, "key_padding_mask", key_padding_mask, B, S, input.device),
    )
    dtype = input.dtype
    chosen = _backend.choose(
        OP,
        _layers.device_type(input),
        dtype,
        transformed=_layers.transformed((input, w_query, key, v, value), states, params),
        wish=_backend.current_wish() if backend is None else backend,
        missing=_backend.WHY_NO_KERNELS,
    )
    if dtype in _layers.SIXTEEN_BITS:
        input, w_query, key, v, value = (t.float() for t in (input, w_query, key, v, value))
        states, params = tuple(s.float() for s in states), [p.float() for p in params]
    with torch.autocast(input.device.type, enabled=False):
        w_ih, w_hh, b_ih, b_hh = (*params, None, None)[:4]
        I = input.shape[-1]  # noqa: E741
        gates = F.linear(input, w_ih[:, :I], b_ih)
        h0, c0 = (*states, None)[:2]
        tensors = (gates, h0, c0, w_hh, b_hh, w_ih[:, I:], w_query, key, v, value)
        if chosen == "eager":
            y, c_n, context, weights = _eager(*tensors, *padding)
        elif _layers.wants_grad([t for t in tensors if t is not None]):
            y, c_n, context, weights = AttentionDecoderFunction.apply(*_layers.distinct(*tensors, *padding))
        else:
            y, cells, context, weights, _, _ = torch.ops.seqkern.attention_decoder_forward(*tensors, *padding)
            c_n = None if c0 is None else cells[-1]
    y, context, weights = y.to(dtype), context.to(dtype), weights.to(dtype)
    return y, y[-1] if c0 is None else (y[-1], c_n.to(dtype)), context, weights


def _check(
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    w_query: Tensor,
    key: Tensor,
    v: Tensor,
    value: Tensor,
) -> None:
    if input.dim() != 3 or input.shape[0] == 0:
        raise RuntimeError(f"input: expected [T, B, I] with T > 0, got {tuple(input.shape)}")
    if not input.dtype.is_floating_point:
        raise RuntimeError(f"input: expected a floating dtype, got {input.dtype}")
    if len(states) not in (1, 2) or len(params) not in (2, 4):
        raise ValueError(
            "hx, params: expected h_0 or (h_0, c_0), and w_ih, w_hh[, b_ih, b_hh], got "
            f"{len(states)} and {len(params)} tensors"
        )
    for name, t, letters, dim in (
        ("hx", states[0], "[B, H]", 2),
        ("key", key, "[B, S, A]", 3),
        ("value", value, "[B, S, D]", 3),
    ):
        if t.dim() != dim:
            raise RuntimeError(f"{name}: expected {letters}, got {tuple(t.shape)}")
    _, B, I = input.shape  # noqa: E741
    H, (_, S, A), D = states[0].shape[1], key.shape, value.shape[2]
    GH = (4 if len(states) == 2 else 3) * H
    expected: list[tuple[str, Tensor, tuple[int, ...], str]] = [
        (f"hx[{k}]" if len(states) == 2 else "hx", t, (B, H), "[B, H]") for k, t in enumerate(states)
    ]
    weights = (
        ("w_ih", (GH, I + D), "[G*H, I + D]"),
        ("w_hh", (GH, H), "[G*H, H]"),
        ("b_ih", (GH,), "[G*H]"),
        ("b_hh", (GH,), "[G*H]"),
    )
    expected += [
        (name, t, shape, letters) for (name, shape, letters), t in zip(weights, params, strict=False)
    ]
    expected += [
        ("w_query", w_query, (A, H), "[A, H]"),
        ("key", key, (B, S, A), "[B, S, A]"),
        ("v", v, (A,), "[A]"),
        ("value", value, (B, S, D), "[B, S, D]"),
    ]
    for name, t, shape, letters in expected:
        if t.dtype is not input.dtype:
            raise RuntimeError(f"{name}: expected the dtype of input, {input.dtype}, got {t.dtype}")
        if t.device != input.device:
            raise RuntimeError(f"{name}: expected the device of input, {input.device}, got {t.device}")
        if tuple(t.shape) != shape:
            raise RuntimeError(f"{name}: expected {letters} = {shape}, got {tuple(t.shape)}")


def _eager(*arguments: Any) -> tuple[Any, ...]:
    """The reference; arguments as the operator's."""
    *tensors, lengths = arguments
    if lengths is not None:
        tensors[10] = _attention.valid_from_lengths(lengths, tensors[7].shape[1])
    return reference(*tensors)


class AttentionDecoderFunction(torch.autograd.Function):
    """The decoder on the operators. Kept for backward: the inputs and all that forward returns."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        y, cells, context, weights, products, saved = torch.ops.seqkern.attention_decoder_forward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, y, cells, context, weights, products, saved)
        c_n = cells[-1].clone() if inputs[2] is not None else None
        return y, c_n, context, weights

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dc_n: Tensor | None, dcontext: Tensor | None, dweights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs, kept = ctx.saved_tensors[:12], ctx.saved_tensors[12:]
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            return tuple(
                _layers.differentiate_eager(_given(_eager), inputs, needed, (dy, dc_n, dcontext, dweights))
            )
        grads = torch.ops.seqkern.attention_decoder_backward(dy, dc_n, dcontext, dweights, *inputs, *kept)
        return _layers.wanted((*grads, None, None), needed)


def _given(eager: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """eager without the outputs that are None."""

    def outputs(*arguments: Any) -> tuple[Any, ...]:
        y, c_n, context, weights = eager(*arguments)
        return y, c_n if c_n is not None else y.detach(), context, weights

    return outputs
