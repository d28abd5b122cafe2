"""One layer of a GRU, step by step."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference._steps import join_directions, time_order, valid_steps, zero_padding


def gru_layer(
    x: Tensor, h0: Tensor, params: Sequence[Tensor], lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One layer of a gated recurrent unit.

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = tanh   (W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    Args:
        x: [T, B, I] any floating dtype, any strides
        h0: [D, B, H], D = 1 or 2 directions
        params: per direction w_ih [3H, I], w_hh [3H, H] and, with biases, b_ih [3H], b_hh [3H]; gates in the
            order r, z, n
        lengths: [B] integers in 0..T; None: every row has T steps
    Returns:
        y: [T, B, D*H], zero beyond a row's length;  h_n: [D, B, H], the state after each row's last valid
            step
    Source:
        Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, with the reset gate
        applied after the product, as in https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """
    valid = None if lengths is None else valid_steps(lengths, x.shape[0])
    x = zero_padding(x, valid)
    per_direction = len(params) // h0.shape[0]
    outputs, final_states = [], []
    for d, h in enumerate(h0.unbind(0)):
        weights = params[d * per_direction : (d + 1) * per_direction]
        y, h_n = _direction(x, h, weights, valid, reverse=d == 1)
        outputs.append(y)
        final_states.append((h_n,))
    return join_directions(outputs, final_states)


def _direction(
    x: Tensor, h: Tensor, params: Sequence[Tensor], valid: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh = params if len(params) == 4 else (*params, None, None)
    projected = F.linear(x, w_ih, b_ih).unbind(0)  # T times [B, 3H]
    outputs: list[Tensor] = [h] * len(projected)
    for t in time_order(len(projected), reverse):
        ir, iz, i_n = projected[t].chunk(3, dim=-1)
        hr, hz, hn = F.linear(h, w_hh, b_hh).chunk(3, dim=-1)
        r = torch.sigmoid(ir + hr)
        z = torch.sigmoid(iz + hz)
        n = torch.tanh(i_n + r * hn)
        h_new = n + z * (h - n)  # (1 - z) n + z h: one rounding less, and dz = dh (h - n) does not cancel
        h = h_new if valid is None else torch.where(valid[t], h_new, h)
        outputs[t] = h if valid is None else torch.where(valid[t], h, 0)
    return torch.stack(outputs), h
