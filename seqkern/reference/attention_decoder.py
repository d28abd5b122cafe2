"""A decoder with additive attention, step by step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference.additive_attention import additive_attention


def attention_decoder(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_context: Tensor,
    w_query: Tensor,
    key: Tensor,
    v: Tensor,
    value: Tensor,
    key_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """An LSTM (with c0) or a GRU that is fed the context of each step beside its input.

        context_t = attention(W_query h_{t-1}, key, value)        (additive_attention.py)
        h_t       = cell(gates_t + W_context context_t, h_{t-1})

    Args:
        gates: [T, B, G*H] the inputs' share of the gates, W_x x_t + b_ih, any floating dtype; gates in the
            order i, f, g, o or r, z, n
        h0, c0: [B, H]
        w_hh: [G*H, H];  b_hh: [G*H];  w_context: [G*H, D];  w_query: [A, H]
        key: [B, S, A];  v: [A];  value: [B, S, D];  key_valid: [B, S] bool, False is padding
    Returns:
        y: [T, B, H];  c_n: [B, H] or None;  context: [T, B, D];  weights: [B, T, S]
    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
        2015, section 3.1; the cells: lstm.py, gru.py
    """
    h, c = h0, c0
    outputs, contexts, all_weights = [], [], []
    for gates_t in gates.unbind(0):
        query = F.linear(h, w_query).unsqueeze(1)
        context, weights = additive_attention(query, key, v, value, key_valid)
        context = context.squeeze(1)
        of_input, of_hidden = gates_t + F.linear(context, w_context), F.linear(h, w_hh, b_hh)
        if c is not None:
            i, f, g, o = (of_input + of_hidden).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            ir, iz, i_n = of_input.chunk(3, dim=-1)
            hr, hz, hn = of_hidden.chunk(3, dim=-1)
            z = torch.sigmoid(iz + hz)
            n = torch.tanh(i_n + torch.sigmoid(ir + hr) * hn)
            h = n + z * (h - n)
        outputs.append(h)
        contexts.append(context)
        all_weights.append(weights)
    return torch.stack(outputs), c, torch.stack(contexts), torch.cat(all_weights, 1)
