"""The LSTM operation: any number of layers and directions, on padded, ragged or packed batches."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _backend, _layers
from seqkern.reference import lstm_layer

_forward = _backend.operator("lstm_forward")
_backward = _backend.operator("lstm_backward")


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run an LSTM over a batch of sequences.

    c_t = f_t * c_{t-1} + i_t * g_t,  h_t = o_t * tanh(c_t)

    Args:
        input: [T, B, I], time first, any strides; with batch_sizes the data [N, I] of a PackedSequence
        hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), P = proj_size or H; None for zeros
        params: per layer and direction w_ih [4H, I or D*P], w_hh [4H, P], with biases b_ih [4H], b_hh [4H],
            with a projection w_hr [P, H]: torch.nn's order; gates in the order i, f, g, o
        lengths: [B] integers in 0..T on input's device: row b has lengths[b] steps. Later outputs are zero,
            the reverse direction starts at the last valid step, and h_n, c_n are those after it (h_0, c_0
            where the length is 0). On a GPU, where nobody looks, others are clamped to 0..T
        batch_sizes: [T] int64 on the CPU, non-increasing, as in a PackedSequence; not with lengths
        dropout: probability with which, in training, outputs of all layers but the last are dropped
        backend: "eager", "cpu" or "cuda"; None: the fastest that is correct. See seqkern.use_backend
    Returns:
        output: [T, B, D*P] or [N, D*P];  (h_n [L*D, B, P], c_n [L*D, B, H]); dtype of input (under
            torch.autocast torch.nn's)
    Raises:
        ValueError: input's dtype is not the weights', lengths or batch_sizes are wrong, no such backend
        RuntimeError: a wrong shape, device or dtype of anything else; T = 0; a named backend cannot serve the
            request
    Source:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """
    D = 2 if bidirectional else 1
    projects = (len(params) // (num_layers * D)) % 2 == 1
    if hx is None:
        w_hh = params[1]
        states = _layers.zero_states(input, num_layers * D, batch_sizes, w_hh.shape[-1], w_hh.shape[0] // 4)
    else:
        states = hx
    if _layers.autocast_active(input):
        lower = batch_sizes is None and not projects and input.dtype is not torch.float16
        dtype, y_dtype = _layers.autocast_dtypes(input, states, params, lower=lower, projects=projects)
        with torch.autocast(input.device.type, enabled=False):
            output, (h_n, c_n) = lstm(
                input.to(dtype),
                tuple(s.to(dtype) for s in states),
                [p.to(dtype) for p in params],
                lengths=lengths,
                batch_sizes=batch_sizes,
                num_layers=num_layers,
                bidirectional=bidirectional,
                dropout=dropout,
                training=training,
                backend=backend,
            )
            return output.to(y_dtype), (h_n.to(y_dtype), c_n)

    lengths = _layers.check("lstm", 4, input, states, params, num_layers, D, lengths, batch_sizes)
    layer = choose_layer(input, states, params, backend)
    output, h_n, c_n = _layers.run_layers(
        [layer] * num_layers, input, states, params, D, dropout, training, lengths, batch_sizes
    )
    return output, (h_n, c_n)


def lstm_cell(
    input: Tensor, hx: tuple[Tensor, Tensor] | None, params: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One step: `lstm` with T = 1.

    Args:     input: [B, I];  hx: (h_0, c_0), [B, H] each, None for zeros;  params: w_ih, w_hh[, b_ih, b_hh];
              the rest as for `lstm`
    Returns:  (h_1, c_1): [B, H] each
    """
    if hx is None:
        zeros = input.new_zeros((input.shape[0], params[1].shape[-1]))
        hx = (zeros, zeros)
    if _layers.autocast_active(input):
        # Unlike torch's LSTM its LSTMCell lets only the products run in autocast's dtype.
        dtype, _ = _layers.autocast_dtypes(input, hx, params, lower=False)
        with torch.autocast(input.device.type, enabled=False):
            hx = (hx[0].to(dtype), hx[1].to(dtype))
            return lstm_cell(input.to(dtype), hx, [p.to(dtype) for p in params], backend=backend)
    _layers.check("lstm", 4, input, hx, params, 1, 1, None, None, cell=True)
    layer = choose_layer(input, hx, params, backend)
    h_0, c_0 = hx
    _, h_1, c_1 = layer(input.unsqueeze(0), (h_0.unsqueeze(0), c_0.unsqueeze(0)), params, None, None)
    return h_1.squeeze(0), c_1.squeeze(0)


def choose_layer(
    input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], backend: str | None
) -> _layers.Layer:
    chosen = _layers.choose_backend("lstm", input, states, params, backend)
    return _eager_layer if chosen == "eager" else _operator_layer


_eager_layer = partial(_layers.eager_layer, lstm_layer)


def _operator_layer(
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    h0, c0 = states
    if _layers.wants_grad((x, h0, c0), params):
        return LSTMFunction.apply(*_layers.distinct(x, h0, c0, lengths, batch_sizes, *params))
    return _forward(x, h0, c0, params, lengths, batch_sizes, False)[:3]


class LSTMFunction(torch.autograd.Function):
    """One layer on the operators. Kept for backward: the inputs, the output and the reserve (activated gates
    and cell states)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n, c_n, reserve = _forward(x, h0, c0, params, lengths, batch_sizes, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, lengths, batch_sizes, _layers.save_output(ctx, y), reserve, *params)
        return y, h_n, c_n

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, h0, c0, lengths, batch_sizes, y, reserve, *params = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            grads = _layers.differentiate_eager(
                lambda x, h0, c0, lengths, batch_sizes, *params: _eager_layer(
                    x, (h0, c0), params, lengths, batch_sizes
                ),
                (x, h0, c0, lengths, batch_sizes, *params),
                needed,
                (dy, dh_n, dc_n),
            )
            return tuple(grads)
        if _layers.output_changed(ctx):
            y = _forward(x, h0, c0, params, lengths, batch_sizes, False)[0]
        dx, dh0, dc0, dparams = _backward(
            dy, dh_n, dc_n, x, h0, c0, params, lengths, batch_sizes, y, reserve, needed[0], any(needed[5:])
        )
        return _layers.wanted((dx, dh0, dc0, None, None, *dparams), needed)
