"""The modules: torch.nn's constructors, parameters and forwards on seqkern's operations."""

from seqkern.nn.attention import MultiHeadAttention, MultiheadAttention
from seqkern.nn.attention_decoder import AttentionDecoder, DecoderState
from seqkern.nn.cache import KeyValueCache
from seqkern.nn.encoder_decoder import (
    AdditiveAttention,
    AttentionPooling,
    DotProductAttention,
    LuongAttention,
    ProjectedKeys,
)
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
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionDecoder",
    "AttentionPooling",
    "DecoderLayerCache",
    "DecoderState",
    "DotProductAttention",
    "GRUCell",
    "KeyValueCache",
    "LSTMCell",
    "LuongAttention",
    "MultiHeadAttention",
    "MultiheadAttention",
    "ProjectedKeys",
    "RNNCell",
    "Transformer",
    "TransformerCache",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
