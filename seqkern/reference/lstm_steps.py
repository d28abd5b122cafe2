"""One step of the cells with a cell state. Arguments and results: rnn_steps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference._steps import StepOptions, layer_norm


def lstm(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor, ...]:
    """Hochreiter and Schmidhuber 1997, with an optional projection (Sak et al. 2014).

    i, f, o = sigmoid(W x + b_ih + U h_prev + b_hh), g = tanh(the same)
    c = f * c_prev + i * g,  h = o * tanh(c),  with a projection h = W_hr (o * tanh(c))
    """
    _, w_hh, _, b_hh, w_hr = params
    _, c_prev = state
    i, f, g, o = (projected + F.linear(h_in, w_hh, b_hh)).chunk(4, dim=-1)
    g = options.drop(torch.tanh(g))
    c = options.clip(torch.sigmoid(f) * c_prev + torch.sigmoid(i) * g)
    h = torch.sigmoid(o) * torch.tanh(c)
    if w_hr is not None:
        h = options.clip_projection(F.linear(h, w_hr))
    return h, c


def peephole_lstm(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor, ...]:
    """Gers and Schmidhuber, "Recurrent Nets that Time and Count", 2000: the gates see the cell state.

    i = sigmoid(W_i x + b_ii + U_i h_prev + b_hi + p_i * c_prev)        c = f * c_prev + i * g
    f = sigmoid(W_f x + b_if + U_f h_prev + b_hf + p_f * c_prev)        h = o * tanh(c)
    g = tanh   (W_g x + b_ig + U_g h_prev + b_hg)
    o = sigmoid(W_o x + b_io + U_o h_prev + b_ho + p_o * c)
    """
    _, w_hh, _, b_hh, _, w_peep = params
    assert w_peep is not None
    _, c_prev = state
    p_i, p_f, p_o = w_peep.chunk(3)
    i, f, g, o = (projected + F.linear(h_in, w_hh, b_hh)).chunk(4, dim=-1)
    i = torch.sigmoid(i + p_i * c_prev)
    f = torch.sigmoid(f + p_f * c_prev)
    g = options.drop(torch.tanh(g))
    c = options.clip(f * c_prev + i * g)
    o = torch.sigmoid(o + p_o * c)
    return o * torch.tanh(c), c


def cifg_lstm(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor, ...]:
    """Coupled input and forget gate (Greff et al., "LSTM: A Search Space Odyssey", 2015): f = 1 - i.

    i, o = sigmoid(W x + b_ih + U h_prev + b_hh), g = tanh(the same)
    c = (1 - i) * c_prev + i * g,  h = o * tanh(c)
    """
    _, w_hh, _, b_hh, _ = params
    _, c_prev = state
    i, g, o = (projected + F.linear(h_in, w_hh, b_hh)).chunk(3, dim=-1)
    i = torch.sigmoid(i)
    g = options.drop(torch.tanh(g))
    c = options.clip(c_prev + i * (g - c_prev))
    return torch.sigmoid(o) * torch.tanh(c), c


def nested_lstm(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor, ...]:
    """Moniz and Krueger, "Nested LSTMs", 2017: the sum that makes c is itself an LSTM, with memory d.

    i, f, g, o as the LSTM's;  x~ = i * g,  h~ = f * c_prev
    i~, f~, o~ = sigmoid(u_ih x~ + ub_ih + u_hh h~ + ub_hh), g~ = tanh(the same)
    d = f~ * d_prev + i~ * g~,  c = o~ * tanh(d),  h = o * tanh(c)

    Recurrent dropout drops g alone.
    """
    _, w_hh, _, b_hh, _, u_ih, u_hh, ub_ih, ub_hh = params
    _, c_prev, d_prev = state
    i, f, g, o = (projected + F.linear(h_in, w_hh, b_hh)).chunk(4, dim=-1)
    x_inner = torch.sigmoid(i) * options.drop(torch.tanh(g))
    h_inner = torch.sigmoid(f) * c_prev

    inner = F.linear(x_inner, u_ih, ub_ih) + F.linear(h_inner, u_hh, ub_hh)
    i_, f_, g_, o_ = inner.chunk(4, dim=-1)
    d = options.clip(torch.sigmoid(f_) * d_prev + torch.sigmoid(i_) * torch.tanh(g_))
    c = options.clip(torch.sigmoid(o_) * torch.tanh(d))
    return torch.sigmoid(o) * torch.tanh(c), c, d


def slstm(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor, ...]:
    """The sLSTM of Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024, equations 8 to 18: an
    exponential input gate, a sigmoid forget gate in log space, a stabiliser m; block-diagonal W_hh.

    i~, f~, z~, o~ = W x + b_ih + U h_prev + b_hh
    m  = max(log sigmoid(f~) + m_prev, i~)            c = f' * c_prev + i' * tanh(z~)
    i' = exp(i~ - m)                                  n = f' * n_prev + i'
    f' = exp(log sigmoid(f~) + m_prev - m)            h = sigmoid(o~) * c / n

    Where n_prev = 0 nothing has been stored yet: m = i~, f' = 0, whatever m_prev is.
    params: w_hh [heads, 4*H/heads, H/heads], in each head gate after gate
    """
    _, w_hh, _, b_hh, _ = params
    assert w_hh is not None
    h_prev, c_prev, n_prev, m_prev = state
    B, H = h_prev.shape
    heads = w_hh.shape[0]
    by_head = torch.einsum("hgk,bhk->bhg", w_hh, h_in.view(B, heads, H // heads))  # [B, heads, 4*H/heads]
    recurrent = by_head.unflatten(-1, (4, H // heads)).transpose(1, 2).reshape(B, 4 * H)
    if b_hh is not None:
        recurrent = recurrent + b_hh
    i, f, z, o = (projected + recurrent).chunk(4, dim=-1)
    started = n_prev != 0
    kept = torch.where(started, F.logsigmoid(f) + m_prev, -torch.inf)
    m = torch.maximum(kept, i)
    i = torch.exp(i - m)
    f = torch.exp(kept - m)
    z = options.drop(torch.tanh(z))
    c = f * c_prev + i * z
    n = f * n_prev + i
    return torch.sigmoid(o) * (c / n), c, n, m


def layer_norm_lstm(
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor, ...]:
    """Ba, Kiros and Hinton, "Layer Normalization", 2016, equations 20 to 22: one normalisation over all four
    gates. projected: LN_i(W x) + b. c is carried as it is, normalised on its way to h alone.

    i, f, o = sigmoid(LN_i(W x) + b + LN_h(U h_prev)), g = tanh(the same)
    c = f * c_prev + i * g,  h = o * tanh(LN_c(c))
    """
    w_hh, (gamma_h, beta_h, gamma_c, beta_c) = params[1], params[7:11]
    _, c_prev = state
    normed = layer_norm(F.linear(h_in, w_hh), gamma_h, beta_h, options.eps)
    i, f, g, o = (projected + normed).chunk(4, dim=-1)
    g = options.drop(torch.tanh(g))
    c = options.clip(torch.sigmoid(f) * c_prev + torch.sigmoid(i) * g)
    h = torch.sigmoid(o) * torch.tanh(layer_norm(c, gamma_c, beta_c, options.eps))
    return h, c


STEPS = {
    "lstm": lstm,
    "peephole_lstm": peephole_lstm,
    "cifg_lstm": cifg_lstm,
    "nested_lstm": nested_lstm,
    "slstm": slstm,
    "layer_norm_lstm": layer_norm_lstm,
}
