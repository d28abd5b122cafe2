"""The recurrent variants, each as a layer with torch.nn.LSTM's options and as a cell.

U is W_hh, and where b stands, b_ih and b_hh both do. The equations in full: seqkern.reference (rnn_steps,
gru_steps, lstm_steps). Constructors and calls: RecurrentLayer and RecurrentCell.
"""

from typing import Any

import torch
from torch import Tensor, nn

from seqkern.nn._recurrent import RecurrentCell, RecurrentLayer


class PeepholeLSTM(RecurrentLayer):
    """LSTM whose gates see the cell state: i and f the one before, o the new one.

    i = sigmoid(W_i x + U_i h + b_i + p_i * c)        c = f * c + i * g
    f = sigmoid(W_f x + U_f h + b_f + p_f * c)        o = sigmoid(W_o x + U_o h + b_o + p_o * c)
    g = tanh(W_g x + U_g h + b_g)                     h = o * tanh(c)

    State: (h, c). Own parameter: weight_peep_l0 [3H], p_i, p_f, p_o.
    Source: Gers and Schmidhuber, "Recurrent Nets that Time and Count", 2000
    """

    _cell = "peephole_lstm"


class PeepholeLSTMCell(RecurrentCell):
    """One step of PeepholeLSTM."""

    _cell = "peephole_lstm"


class CIFGLSTM(RecurrentLayer):
    """LSTM with coupled input and forget gates, f = 1 - i: three quarters of an LSTM's weights.

    c = (1 - i) * c + i * tanh(W_g x + U_g h + b_g),  h = o * tanh(c);  gates in the order i, g, o

    State: (h, c).
    Source: Greff et al., "LSTM: A Search Space Odyssey", 2015
    """

    _cell = "cifg_lstm"


class CIFGLSTMCell(RecurrentCell):
    """One step of CIFGLSTM."""

    _cell = "cifg_lstm"


CIFG = CIFGLSTM


class MGU(RecurrentLayer):
    """Minimal gated unit: one gate resets and updates.

    f = sigmoid(W_f x + U_f h + b_f),  n = tanh(W_n x + U_n (f * h) + b_n),  h = (1 - f) * h + f * n

    State: h.
    Source: Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks", 2016
    """

    _cell = "mgu"


class MGUCell(RecurrentCell):
    """One step of MGU."""

    _cell = "mgu"


class _IndRNN:
    """What IndRNN and its cell share."""

    nonlinearity: str = "relu"

    def __init__(self, *args: Any, nonlinearity: str = "relu", **kwargs: Any) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(*args, **kwargs)

    @property
    def _cell(self) -> str:  # its name in seqkern.ops.CELLS
        return f"indrnn_{self.nonlinearity}"

    def reset_parameters(self) -> None:
        """As every layer's; the recurrent weights uniform in 0..1, to which the paper's bound for sequences
        of T steps, 2^(1/T), tends."""
        super().reset_parameters()  # type: ignore[misc]
        for name, weight in self._parameters.items():  # type: ignore[attr-defined]
            if name.startswith("weight_hh"):
                nn.init.uniform_(weight, 0.0, 1.0)

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        return text if self.nonlinearity == "relu" else f"{text}, nonlinearity={self.nonlinearity}"


class IndRNN(_IndRNN, RecurrentLayer):  # type: ignore[override]
    """Independently recurrent network: a unit sees its own past alone, through one weight.

    h = relu(W x + b_ih + u * h + b_hh), or with nonlinearity="tanh" tanh in relu's place

    State: h. weight_hh_l0 is u, [H].
    Source: Li et al., "Independently Recurrent Neural Network (IndRNN)", 2018
    """


class IndRNNCell(_IndRNN, RecurrentCell):  # type: ignore[override]
    """One step of IndRNN."""


class NestedLSTM(RecurrentLayer):
    """LSTM whose cell state is the output of an inner LSTM with a memory d of its own.

    x~ = i * g,  h~ = f * c,  (c, d) = LSTM(x~, (h~, d)) with the inner weights,  h = o * tanh(c)

    State: (h, c, d). Own parameters: inner_weight_ih_l0, inner_weight_hh_l0 [4H, H], inner_bias_ih_l0,
    inner_bias_hh_l0 [4H].
    Source: Moniz and Krueger, "Nested LSTMs", 2017
    """

    _cell = "nested_lstm"


class NestedLSTMCell(RecurrentCell):
    """One step of NestedLSTM."""

    _cell = "nested_lstm"


class NestedGRU(RecurrentLayer):
    """GRU whose update is an inner GRU, after the manner of NestedLSTM; seqkern's own.

    x~ = (1 - z) * n,  h~ = z * h,  h = GRU(x~, h~) with the inner weights

    State: h. Own parameters: inner_weight_ih_l0, inner_weight_hh_l0 [3H, H], inner_bias_ih_l0,
    inner_bias_hh_l0 [3H].
    """

    _cell = "nested_gru"


class NestedGRUCell(RecurrentCell):
    """One step of NestedGRU."""

    _cell = "nested_gru"


class _SLSTM:
    """What SLSTM and its cell share."""

    _cell = "slstm"
    hidden_size: int

    def __init__(self, *args: Any, num_heads: int = 1, **kwargs: Any) -> None:
        if not isinstance(num_heads, int) or num_heads <= 0:
            raise ValueError(f"num_heads: expected a number above 0, got {num_heads}")
        self.num_heads = num_heads
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Weights as every layer's; biases zero, but the forget gate's of W_ih, which rise evenly from 3 to 6
        in each head: short and long memories, as the authors have it."""
        super().reset_parameters()  # type: ignore[misc]
        H = self.hidden_size
        for name, bias in self._parameters.items():  # type: ignore[attr-defined]
            if name.startswith("bias") and bias is not None:
                nn.init.zeros_(bias)
            if name.startswith("bias_ih") and bias is not None:
                with torch.no_grad():
                    bias[H : 2 * H] = self._forget_bias().to(bias)

    def _forget_bias(self) -> Tensor:
        return torch.linspace(3, 6, self.hidden_size // self.num_heads).repeat(self.num_heads)


class SLSTM(_SLSTM, RecurrentLayer):
    """The xLSTM's scalar memory: exponential input gate, normaliser n, stabiliser m, heads that do not mix.

    m' = max(log sigmoid(f~) + m, i~),  i = exp(i~ - m'),  f = exp(log sigmoid(f~) + m - m')
    c' = f * c + i * tanh(z~),  n' = f * n + i,  h = sigmoid(o~) * c' / n';  gates in the order i, f, z, o

    State: (h, c, n, m). weight_hh_l0: [num_heads, 4*H/num_heads, H/num_heads], in each head gate after gate.
    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024, section 2.2
    """


class SLSTMCell(_SLSTM, RecurrentCell):
    """One step of SLSTM."""


class _LayerNorm:
    """What the layers and cells with layer norms share."""

    def __init__(self, *args: Any, layer_norm_eps: float = 1e-5, **kwargs: Any) -> None:
        self.layer_norm_eps = layer_norm_eps
        super().__init__(*args, **kwargs)


class LayerNormLSTM(_LayerNorm, RecurrentLayer):
    """LSTM with layer norms on both projections and on the cell state's way to h.

    i, f, g, o from LN_i(W x) + LN_h(U h) + b,  c = f * c + i * g,  h = o * tanh(LN_c(c))

    One normalisation over all four gates, its statistics in float32 at least. State: (h, c). Parameters:
    weight_ih_l0, weight_hh_l0, bias_l0, and the torch.nn.LayerNorm modules ln_i_l0, ln_h_l0 (4H), ln_c_l0
    (H); bias=False leaves out their biases, too.
    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, equations 20 to 22
    """

    _cell = "layer_norm_lstm"


class LayerNormLSTMCell(_LayerNorm, RecurrentCell):
    """One step of LayerNormLSTM. Parameters: weight_ih, weight_hh, bias, ln_i, ln_h, ln_c."""

    _cell = "layer_norm_lstm"


class LayerNormGRU(_LayerNorm, RecurrentLayer):
    """GRU with layer norms on both projections; the reset gate after them.

    r, z = sigmoid(LN_i(W x) + b + LN_h(U h)),  n = tanh((LN_i(W x) + b)_n + r * LN_h(U h)_n)
    h = (1 - z) * n + z * h

    One normalisation over all three gates. State: h. Parameters as LayerNormLSTM's, without ln_c.
    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016
    """

    _cell = "layer_norm_gru"


class LayerNormGRUCell(_LayerNorm, RecurrentCell):
    """One step of LayerNormGRU. Parameters: weight_ih, weight_hh, bias, ln_i, ln_h."""

    _cell = "layer_norm_gru"
