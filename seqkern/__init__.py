"""The layers of the classic sequence models as drop-ins for torch.nn, each on a kernel written for it.

seqkern.LSTM, GRU, RNN, their cells, MultiHeadAttention and the Transformer's layers: torch.nn's
constructors, parameters, results and gradients.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from seqkern import _extension, nn, ops, reference
from seqkern.adoption import compile, patch, replace, restore
from seqkern.info import info
from seqkern.nn import (
    CIFG,
    CIFGLSTM,
    CRF,
    GRU,
    LSTM,
    MGU,
    RNN,
    SLSTM,
    AdditiveAttention,
    AttentionDecoder,
    AttentionPooling,
    CIFGLSTMCell,
    DecoderLayerCache,
    DecoderState,
    DotProductAttention,
    GRUCell,
    IndRNN,
    IndRNNCell,
    KeyValueCache,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LSTMCell,
    LuongAttention,
    MGUCell,
    MultiHeadAttention,
    MultiheadAttention,
    NestedGRU,
    NestedGRUCell,
    NestedLSTM,
    NestedLSTMCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    ProjectedKeys,
    RNNCell,
    SLSTMCell,
    Transformer,
    TransformerCache,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    bio_constraints,
)
from seqkern.ops import scaled_dot_product_attention, use_backend, varlen_attention
from seqkern.plan import plan

if TYPE_CHECKING:
    from seqkern.triton import Config

__version__ = "0.1.0"

__all__ = [
    "CIFG",
    "CIFGLSTM",
    "CRF",
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
    "SLSTMCell",
    "Transformer",
    "TransformerCache",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "__version__",
    "bio_constraints",
    "compile",
    "info",
    "nn",
    "ops",
    "patch",
    "plan",
    "reference",
    "replace",
    "restore",
    "scaled_dot_product_attention",
    "tune",
    "use_backend",
    "varlen_attention",
]


def tune(*problem: Any, **options: Any) -> dict[str, Config]:
    """Search the fastest tiles of attention's Triton kernels for a problem on the current GPU; store them.

    Arguments, result and errors: seqkern.triton.tune, which loads Triton.
    """
    from seqkern import triton

    return triton.tune(*problem, **options)


if not _extension.AVAILABLE:
    warnings.warn(f"seqkern runs on its eager backend only: {_extension.WHY_NOT}", stacklevel=2)
