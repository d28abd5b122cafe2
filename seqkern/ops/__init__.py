"""The operations: functions of tensors that say what is computed, check its meaning and pick a backend."""

from seqkern.ops import _fake  # noqa: F401  (registers the operators' fake kernels)
from seqkern.ops._backend import use_backend
from seqkern.ops._cells import CELLS
from seqkern.ops.additive_attention import additive_attention
from seqkern.ops.attention import scaled_dot_product_attention, varlen_attention
from seqkern.ops.attention_decoder import attention_decoder
from seqkern.ops.dot_attention import dot_attention
from seqkern.ops.gru import gru, gru_cell
from seqkern.ops.lstm import lstm, lstm_cell
from seqkern.ops.recurrent import recurrent, recurrent_cell
from seqkern.ops.rnn import rnn, rnn_cell

__all__ = [
    "CELLS",
    "additive_attention",
    "attention_decoder",
    "dot_attention",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "recurrent",
    "recurrent_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
    "use_backend",
    "varlen_attention",
]
