"""One layer of an Elman RNN, step by step."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference._steps import join_directions, time_order, valid_steps, zero_padding


def rnn_layer(
    x: Tensor, h0: Tensor, params: Sequence[Tensor], lengths: Tensor | None = None, nonlinearity: str = "tanh"
) -> tuple[Tensor, Tensor]:
    """One layer of an Elman RNN.  h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu in tanh's place.

    Args:
        x: [T, B, I] any floating dtype, any strides
        h0: [D, B, H], D = 1 or 2 directions
        params: per direction w_ih [H, I], w_hh [H, H] and, with biases, b_ih [H], b_hh [H]
        lengths: [B] integers in 0..T; None: every row has T steps
        nonlinearity: "tanh" or "relu"
    Returns:
        y: [T, B, D*H], zero beyond a row's length;  h_n: [D, B, H], the state after each row's last valid
            step
    Source:
        Elman, "Finding Structure in Time", 1990;
        https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """
    valid = None if lengths is None else valid_steps(lengths, x.shape[0])
    x = zero_padding(x, valid)
    per_direction = len(params) // h0.shape[0]
    outputs, final_states = [], []
    for d, h in enumerate(h0.unbind(0)):
        weights = params[d * per_direction : (d + 1) * per_direction]
        y, h_n = _direction(x, h, weights, valid, nonlinearity, reverse=d == 1)
        outputs.append(y)
        final_states.append((h_n,))
    return join_directions(outputs, final_states)


def _direction(
    x: Tensor, h: Tensor, params: Sequence[Tensor], valid: Tensor | None, nonlinearity: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh = params if len(params) == 4 else (*params, None, None)
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu
    projected = F.linear(x, w_ih, b_ih).unbind(0)  # T times [B, H]
    outputs: list[Tensor] = [h] * len(projected)
    for t in time_order(len(projected), reverse):
        h_new = activation(projected[t] + F.linear(h, w_hh, b_hh))
        h = h_new if valid is None else torch.where(valid[t], h_new, h)
        outputs[t] = h if valid is None else torch.where(valid[t], h, 0)
    return torch.stack(outputs), h
