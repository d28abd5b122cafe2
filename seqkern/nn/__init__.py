"""The modules: torch.nn's constructors, parameters and forwards on seqkern's operations."""

from seqkern.nn._recurrent import Regularised
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
from seqkern.nn.variants import (
    CIFG,
    CIFGLSTM,
    MGU,
    SLSTM,
    CIFGLSTMCell,
    IndRNN,
    IndRNNCell,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    MGUCell,
    NestedGRU,
    NestedGRUCell,
    NestedLSTM,
    NestedLSTMCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    SLSTMCell,
)

__all__ = [
    "CIFG",
    "CIFGLSTM",
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "AdditiveAttention",
    "AttentionDecoder",
    "AttentionPooling",
    "CIFGLSTMCell",
    "DecoderLayerCache",
    "DecoderState",
    "DotProductAttention",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "KeyValueCache",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LuongAttention",
    "MGUCell",
    "MultiHeadAttention",
    "MultiheadAttention",
    "NestedGRU",
    "NestedGRUCell",
    "NestedLSTM",
    "NestedLSTMCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "ProjectedKeys",
    "RNNCell",
    "Regularised",
    "SLSTMCell",
    "Transformer",
    "TransformerCache",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
