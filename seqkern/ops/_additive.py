"""Additive attention as the backends see it: its operators' schemas and the eager backend.

Letters: B batch, L queries, S keys, H size of the projected queries and keys, D of the values.
"""

from torch import Tensor

from seqkern.ops import _layers
from seqkern.ops._attention import LIBRARY, accumulator, valid_from_lengths
from seqkern.reference import additive_attention

# The kernels: csrc/cpu/additive_attention.cpp and seqkern.triton. The operators' weights are float32 (float64
# for float64), for backward's sake.
LIBRARY.define(
    "additive_attention_forward(Tensor query, Tensor key, Tensor v, Tensor value, Tensor? key_valid, "
    "Tensor? lengths) -> (Tensor context, Tensor weights)"
)
LIBRARY.define(
    "additive_attention_backward(Tensor? dcontext, Tensor? dweights, Tensor query, Tensor key, Tensor v, "
    "Tensor value, Tensor? key_valid, Tensor? lengths, Tensor weights, bool need_dquery, bool need_dkey, "
    "bool need_dv, bool need_dvalue) -> (Tensor dquery, Tensor dkey, Tensor dv, Tensor dvalue)"
)


def eager(
    query: Tensor, key: Tensor, v: Tensor, value: Tensor, key_valid: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The eager backend: (context, weights). 16-bit inputs are computed in float32 and rounded once."""
    dtype = query.dtype
    if dtype in _layers.SIXTEEN_BITS:
        wide = accumulator(dtype)
        query, key, v, value = query.to(wide), key.to(wide), v.to(wide), value.to(wide)
    if lengths is not None:
        key_valid = valid_from_lengths(lengths, key.shape[1])
    context, weights = additive_attention(query, key, v, value, key_valid)
    return context.to(dtype), weights.to(dtype)
