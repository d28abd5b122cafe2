"""The GRU operation: any number of layers and directions, on padded, ragged or packed batches."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _backend, _layers
from seqkern.reference import gru_layer

_forward = _backend.operator("gru_forward")
_backward = _backend.operator("gru_backward")


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a GRU over a batch of sequences.

    n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn)),  h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    Args:
        input: [T, B, I], time first, any strides; with batch_sizes the data [N, I] of a PackedSequence
        hx: h_0 [L*D, B, H]; None for zeros
        params: per layer and direction w_ih [3H, I or D*H], w_hh [3H, H] and, with biases, b_ih [3H], b_hh
            [3H]: torch.nn's order; gates in the order r, z, n
        lengths: [B] integers in 0..T on input's device: row b has lengths[b] steps. Later outputs are zero,
            the reverse direction starts at the last valid step, and h_n is the state after it (h_0 where the
            length is 0). On a GPU, where nobody looks, others are clamped to 0..T
        batch_sizes: [T] int64 on the CPU, non-increasing, as in a PackedSequence; not with lengths
        dropout: probability with which, in training, outputs of all layers but the last are dropped
        backend: "eager", "cpu" or "cuda"; None: the fastest that is correct. See seqkern.use_backend
    Returns:
        output: [T, B, D*H] or [N, D*H];  h_n: [L*D, B, H]; dtype of input (under torch.autocast torch.nn's)
    Raises:
        ValueError: input's dtype is not the weights', lengths or batch_sizes are wrong, no such backend
        RuntimeError: a wrong shape, device or dtype of anything else; T = 0; a named backend cannot serve the
            request
    Source:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """
    D = 2 if bidirectional else 1
    if hx is None:
        (hx,) = _layers.zero_states(input, num_layers * D, batch_sizes, params[0].shape[0] // 3)
    if _layers.autocast_active(input):
        dtype, _ = _layers.autocast_dtypes(input, (hx,), params, lower=False)
        with torch.autocast(input.device.type, enabled=False):
            return gru(
                input.to(dtype),
                hx.to(dtype),
                [p.to(dtype) for p in params],
                lengths=lengths,
                batch_sizes=batch_sizes,
                num_layers=num_layers,
                bidirectional=bidirectional,
                dropout=dropout,
                training=training,
                backend=backend,
            )

    states = (hx,)
    lengths = _layers.check("gru", 3, input, states, params, num_layers, D, lengths, batch_sizes)
    layer = choose_layer(input, states, params, backend)
    output, h_n = _layers.run_layers(
        [layer] * num_layers, input, states, params, D, dropout, training, lengths, batch_sizes
    )
    return output, h_n


def gru_cell(
    input: Tensor, hx: Tensor | None, params: Sequence[Tensor], *, backend: str | None = None
) -> Tensor:
    """One step: `gru` with T = 1.

    Args:     input: [B, I];  hx: h_0 [B, H], None for zeros;  params: w_ih, w_hh[, b_ih, b_hh];  the rest as
              for `gru`
    Returns:  h_1: [B, H]
    """
    if hx is None:
        hx = input.new_zeros((input.shape[0], params[1].shape[-1]))
    if _layers.autocast_active(input):
        dtype, _ = _layers.autocast_dtypes(input, (hx,), params, lower=False)
        with torch.autocast(input.device.type, enabled=False):
            return gru_cell(input.to(dtype), hx.to(dtype), [p.to(dtype) for p in params], backend=backend)
    states = (hx,)
    _layers.check("gru", 3, input, states, params, 1, 1, None, None, cell=True)
    layer = choose_layer(input, states, params, backend)
    _, h_1 = layer(input.unsqueeze(0), (hx.unsqueeze(0),), params, None, None)
    return h_1.squeeze(0)


def choose_layer(
    input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], backend: str | None
) -> _layers.Layer:
    chosen = _layers.choose_backend("gru", input, states, params, backend)
    return _eager_layer if chosen == "eager" else _operator_layer


_eager_layer = partial(_layers.eager_layer, gru_layer)


def _operator_layer(
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    (h0,) = states
    if _layers.wants_grad((x, h0), params):
        return GRUFunction.apply(*_layers.distinct(x, h0, lengths, batch_sizes, *params))
    return _forward(x, h0, params, lengths, batch_sizes, False)[:2]


class GRUFunction(torch.autograd.Function):
    """One layer on the operators. Kept for backward: the inputs, the output and the reserve (activated gates
    and W_hn h + b_hn)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, h_n, reserve = _forward(x, h0, params, lengths, batch_sizes, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, lengths, batch_sizes, _layers.save_output(ctx, y), reserve, *params)
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, lengths, batch_sizes, y, reserve, *params = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            grads = _layers.differentiate_eager(
                lambda x, h0, lengths, batch_sizes, *params: _eager_layer(
                    x, (h0,), params, lengths, batch_sizes
                ),
                (x, h0, lengths, batch_sizes, *params),
                needed,
                (dy, dh_n),
            )
            return tuple(grads)
        if _layers.output_changed(ctx):
            y = _forward(x, h0, params, lengths, batch_sizes, False)[0]
        dx, dh0, dparams = _backward(
            dy, dh_n, x, h0, params, lengths, batch_sizes, y, reserve, needed[0], any(needed[4:])
        )
        return _layers.wanted((dx, dh0, None, None, *dparams), needed)
