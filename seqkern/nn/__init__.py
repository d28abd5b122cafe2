"""The modules: torch.nn's constructors, parameters and forwards on seqkern's operations."""

from seqkern.nn.attention import MultiHeadAttention, MultiheadAttention
from seqkern.nn.cache import KeyValueCache
from seqkern.nn.crf import CRF, Constraints, bio_constraints
from seqkern.nn.gru import GRU, GRUCell
from seqkern.nn.lstm import LSTM, LSTMCell
from seqkern.nn.rnn import RNN, RNNCell
from seqkern.nn.transformer import (
    DecoderLayerCache,
    Transformer,
    TransformerCache,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "CRF",
    "GRU",
    "LSTM",
    "RNN",
    "Constraints",
    "DecoderLayerCache",
    "GRUCell",
    "KeyValueCache",
    "LSTMCell",
    "MultiHeadAttention",
    "MultiheadAttention",
    "RNNCell",
    "Transformer",
    "TransformerCache",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "bio_constraints",
]
