"""The eager oracle: each layer's formula, literally, in PyTorch; a recurrence one time step after
the other.

Every dtype, differentiable any number of times, right under torch.func; slow. The kernels are checked against
these functions in float64, and double backward differentiates them.
"""

from seqkern.reference.additive_attention import additive_attention
from seqkern.reference.attention import attention
from seqkern.reference.attention_decoder import attention_decoder
from seqkern.reference.gru import gru_layer
from seqkern.reference.lstm import lstm_layer
from seqkern.reference.recurrent import recurrent_layer
from seqkern.reference.rnn import rnn_layer

__all__ = [
    "additive_attention",
    "attention",
    "attention_decoder",
    "gru_layer",
    "lstm_layer",
    "recurrent_layer",
    "rnn_layer",
]
