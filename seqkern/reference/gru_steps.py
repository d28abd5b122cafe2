"""One step of the cells that have h alone and gates. Arguments and results: rnn_steps.

h = (1 - z) n + z h_prev is written n + z (h_prev - n): one rounding less, and dz = dh (h_prev - n) does not
cancel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference._steps import StepOptions, layer_norm


def gru(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor]:
    """torch.nn.GRU's: the reset gate after the product, the update gate keeps.

    r = sigmoid(W_r x + b_ir + U_r h_prev + b_hr)         n = tanh(W_n x + b_in + r * (U_n h_prev + b_hn))
    z = sigmoid(W_z x + b_iz + U_z h_prev + b_hz)         h = (1 - z) * n + z * h_prev
    """
    _, w_hh, _, b_hh, _ = params
    (h_prev,) = state
    ir, iz, i_n = projected.chunk(3, dim=-1)
    hr, hz, hn = F.linear(h_in, w_hh, b_hh).chunk(3, dim=-1)
    r = torch.sigmoid(ir + hr)
    z = torch.sigmoid(iz + hz)
    n = options.drop(torch.tanh(i_n + r * hn))
    return (n + z * (h_prev - n),)


def gru_reset_before(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor]:
    """Cho et al. 2014: the reset gate before the product.

    r, z as torch's;  n = tanh(W_n x + b_in + U_n (r * h_prev) + b_hn),  h = (1 - z) * n + z * h_prev
    """
    _, w_hh, _, b_hh, _ = params
    assert w_hh is not None
    (h_prev,) = state
    H = h_prev.shape[-1]
    ir, iz, i_n = projected.chunk(3, dim=-1)
    hr, hz = F.linear(h_in, w_hh[: 2 * H], None if b_hh is None else b_hh[: 2 * H]).chunk(2, dim=-1)
    r = torch.sigmoid(ir + hr)
    z = torch.sigmoid(iz + hz)
    n = torch.tanh(i_n + F.linear(r * h_in, w_hh[2 * H :], None if b_hh is None else b_hh[2 * H :]))
    n = options.drop(n)
    return (n + z * (h_prev - n),)


def mgu(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor]:
    """Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks", 2016: one gate resets and updates.

    f = sigmoid(W_f x + b_if + U_f h_prev + b_hf)
    n = tanh(W_n x + b_in + U_n (f * h_prev) + b_hn),  h = (1 - f) * h_prev + f * n
    """
    _, w_hh, _, b_hh, _ = params
    assert w_hh is not None
    (h_prev,) = state
    H = h_prev.shape[-1]
    i_f, i_n = projected.chunk(2, dim=-1)
    f = torch.sigmoid(i_f + F.linear(h_in, w_hh[:H], None if b_hh is None else b_hh[:H]))
    n = torch.tanh(i_n + F.linear(f * h_in, w_hh[H:], None if b_hh is None else b_hh[H:]))
    n = options.drop(n)
    return (h_prev + f * (n - h_prev),)


def nested_gru(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor]:
    """A GRU whose update is itself a GRU, after the manner of the nested LSTM; seqkern's own.

    r, z, n as torch's GRU;  x~ = (1 - z) * n,  h~ = z * h_prev,  h = GRU(x~, h~) with the inner weights
    """
    _, w_hh, _, b_hh, _, *inner = params
    (h_prev,) = state
    ir, iz, i_n = projected.chunk(3, dim=-1)
    hr, hz, hn = F.linear(h_in, w_hh, b_hh).chunk(3, dim=-1)
    r = torch.sigmoid(ir + hr)
    z = torch.sigmoid(iz + hz)
    n = options.drop(torch.tanh(i_n + r * hn))
    x_inner = (1 - z) * n
    h_inner = z * h_prev

    u_ih, u_hh, ub_ih, ub_hh = inner
    ir, iz, i_n = F.linear(x_inner, u_ih, ub_ih).chunk(3, dim=-1)
    hr, hz, hn = F.linear(h_inner, u_hh, ub_hh).chunk(3, dim=-1)
    r = torch.sigmoid(ir + hr)
    z = torch.sigmoid(iz + hz)
    n = torch.tanh(i_n + r * hn)
    return (n + z * (h_inner - n),)


def layer_norm_gru(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor]:
    """Ba, Kiros and Hinton, "Layer Normalization", 2016, with one normalisation over all three gates, as
    haste has it. projected: LN_i(W x) + b.

    r, z = sigmoid(LN_i(W x) + b + LN_h(U h_prev)),  n = tanh((LN_i(W x) + b)_n + r * LN_h(U h_prev)_n)
    h = (1 - z) * n + z * h_prev
    """
    w_hh, (gamma_h, beta_h) = params[1], params[7:9]
    (h_prev,) = state
    normed = layer_norm(F.linear(h_in, w_hh), gamma_h, beta_h, options.eps)
    ir, iz, i_n = projected.chunk(3, dim=-1)
    hr, hz, hn = normed.chunk(3, dim=-1)
    r = torch.sigmoid(ir + hr)
    z = torch.sigmoid(iz + hz)
    n = options.drop(torch.tanh(i_n + r * hn))
    return (n + z * (h_prev - n),)


STEPS = {
    "gru": gru,
    "gru_reset_before": gru_reset_before,
    "mgu": mgu,
    "nested_gru": nested_gru,
    "layer_norm_gru": layer_norm_gru,
}
