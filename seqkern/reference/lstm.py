"""One layer of an LSTM, step by step."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference._steps import join_directions, time_order, valid_steps, zero_padding


def lstm_layer(
    x: Tensor, h0: Tensor, c0: Tensor, params: Sequence[Tensor], lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of a long short-term memory, with an optional projection of the hidden state.

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)        c_t = f_t * c_{t-1} + i_t * g_t
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)        h_t = o_t * tanh(c_t)
        g_t = tanh   (W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)        h_t = W_hr h_t   with a projection
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)

    Args:
        x: [T, B, I] any floating dtype, any strides
        h0: [D, B, P], D = 1 or 2 directions, P = H without a projection
        c0: [D, B, H]
        params: per direction w_ih [4H, I], w_hh [4H, P], with biases b_ih [4H], b_hh [4H], with a projection
            w_hr [P, H]; gates in the order i, f, g, o
        lengths: [B] integers in 0..T; None: every row has T steps
    Returns:
        y: [T, B, D*P], zero beyond a row's length;  h_n: [D, B, P];  c_n: [D, B, H], after each row's last
            valid step
    Source:
        Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; projection: Sak et al.,
        https://arxiv.org/abs/1402.1128; https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """
    valid = None if lengths is None else valid_steps(lengths, x.shape[0])
    x = zero_padding(x, valid)
    per_direction = len(params) // h0.shape[0]
    outputs, final_states = [], []
    for d, (h, c) in enumerate(zip(h0.unbind(0), c0.unbind(0), strict=True)):
        weights = params[d * per_direction : (d + 1) * per_direction]
        y, h_n, c_n = _direction(x, h, c, weights, valid, reverse=d == 1)
        outputs.append(y)
        final_states.append((h_n, c_n))
    return join_directions(outputs, final_states)


def _direction(
    x: Tensor, h: Tensor, c: Tensor, params: Sequence[Tensor], valid: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    w_ih, w_hh = params[:2]
    b_ih, b_hh = params[2:4] if len(params) >= 4 else (None, None)
    w_hr = params[-1] if len(params) % 2 == 1 else None
    projected = F.linear(x, w_ih, b_ih).unbind(0)  # T times [B, 4H]
    outputs: list[Tensor] = [h] * len(projected)
    for t in time_order(len(projected), reverse):
        i, f, g, o = (projected[t] + F.linear(h, w_hh, b_hh)).chunk(4, dim=-1)
        c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h_new = torch.sigmoid(o) * torch.tanh(c_new)
        if w_hr is not None:
            h_new = F.linear(h_new, w_hr)
        h = h_new if valid is None else torch.where(valid[t], h_new, h)
        c = c_new if valid is None else torch.where(valid[t], c_new, c)
        outputs[t] = h if valid is None else torch.where(valid[t], h, 0)
    return torch.stack(outputs), h, c
