"""Attention of encoder-decoder models: additive, Luong's, dot-product, and pooling over time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from seqkern import ops
from seqkern.nn import _base
from seqkern.ops.attention import without_padding


@dataclass(frozen=True)
class ProjectedKeys:
    """An encoder's output, ready to be attended to: what `project_keys` returns.

    The keys' projection is computed once, and reused in every decoding step that is given this in the place
    of keys. Nothing is detached: gradients of all steps meet in the keys and in the projection.

    key: [B, S, H] projected;  value: [B, S, D];  key_padding_mask: [B, S] bool or None;
    lengths: [B] or None;  batched: False where the keys came as [S, K], B is 1 then
    """

    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    lengths: Tensor | None = None
    batched: bool = True

    def reorder(self, index: Tensor) -> ProjectedKeys:
        """Row b of the result is row index[b] of this, for beam search; index: [B'] int64."""
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"index: expected [B] int64, got {tuple(index.shape)} {index.dtype}")
        key = self.key.index_select(0, index)
        value = key if self.value is self.key else self.value.index_select(0, index)
        mask, lengths = self.key_padding_mask, self.lengths
        return replace(
            self,
            key=key,
            value=value,
            key_padding_mask=None if mask is None else mask.index_select(0, index),
            lengths=None if lengths is None else lengths.index_select(0, index),
        )


class _Padding(TypedDict):
    """What ops/ is told of the keys' padding."""

    key_padding_mask: Tensor | None
    lengths: Tensor | None


class QueriedAttention(nn.Module):
    """What the attentions with a query share: shapes, masks and the keys' projection.

    A subclass says how keys and queries are projected (by default they are not) and what is computed of them.
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def forward(
        self,
        query: Tensor,
        keys: Tensor | ProjectedKeys,
        values: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to keys.

        Args:
            query: [B, L, Q], one step [B, Q]; of unbatched keys [L, Q], one step [Q]
            keys: [B, S, K], unbatched [S, K], or what project_keys returned, which carries its values and
                padding
            values: [B, S, D] or [S, D]; None: keys
            key_padding_mask: [B, S] or [S] bool, True is padding: it costs nothing, and what it holds reaches
                nothing
            lengths: [B] integers in 0..S: row b has lengths[b] keys. Not with key_padding_mask
        Returns:
            context: [B, L, D], [B, D], [L, D] or [D], as query;  weights: the same with S in the place of D.
            Both are zero where there is no valid key
        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit
            ValueError: a wrong padding mask or lengths, or either beside projected keys
        """
        if isinstance(keys, ProjectedKeys):
            if values is not None or key_padding_mask is not None or lengths is not None:
                raise ValueError(
                    "keys: what project_keys returned carries values, key_padding_mask and lengths; "
                    "expected None for them"
                )
            projected = keys
        else:
            projected = self.project_keys(keys, values, key_padding_mask, lengths=lengths)
        batched = projected.batched
        one = query.dim() == (2 if batched else 1)
        if not one and query.dim() != (3 if batched else 2):
            expected = "[B, L, Q] or [B, Q] of batched" if batched else "[L, Q] or [Q] of unbatched"
            raise RuntimeError(f"query: expected {expected} keys, got {tuple(query.shape)}")
        query = query.unsqueeze(-2) if one else query
        query = query if batched else query.unsqueeze(0)
        context, weights = self._attend(self._project_query(query), projected)
        context = context if batched else context.squeeze(0)
        weights = weights if batched else weights.squeeze(0)
        return (context.squeeze(-2), weights.squeeze(-2)) if one else (context, weights)

    if TYPE_CHECKING:
        __call__ = forward

    def project_keys(
        self,
        keys: Tensor,
        values: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> ProjectedKeys:
        """Project keys once, for all decoding steps that will attend to them. Arguments: as for forward."""
        batched = _are_batched(keys, values, lengths)
        if not batched:
            keys = keys.unsqueeze(0)
            values = None if values is None else values.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        values = keys if values is None else values
        key = self._project_key(keys, key_padding_mask, lengths)
        return ProjectedKeys(key, values, key_padding_mask, lengths, batched)

    def _project_query(self, query: Tensor) -> Tensor:
        return query

    def _project_key(self, keys: Tensor, key_padding_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        return keys

    def _attend(self, query: Tensor, keys: ProjectedKeys) -> tuple[Tensor, Tensor]:
        """query [B, L, H] -> (context [B, L, D], weights [B, L, S])."""
        raise NotImplementedError


def _are_batched(keys: Tensor, values: Tensor | None, lengths: Tensor | None) -> bool:
    if keys.dim() not in (2, 3):
        raise RuntimeError(f"keys: expected [B, S, K] or [S, K], got {tuple(keys.shape)}")
    if values is not None and values.dim() != keys.dim():
        raise RuntimeError(f"values: expected as many dims as keys, {keys.dim()}, got {tuple(values.shape)}")
    if keys.dim() == 2:
        _base.refuse_lengths(lengths, "unbatched keys")
    return keys.dim() == 3


def _scorer(size: int, device: _base.Device, dtype: torch.dtype | None) -> Parameter:
    return Parameter(torch.empty(size, device=device, dtype=dtype))


class AdditiveAttention(QueriedAttention):
    """Bahdanau's attention: the score of a query and a key is v · tanh(W query + U key).

    Construct:  AdditiveAttention(query_dim, key_dim=None, attention_dim=None, bias=False, device=None,
                dtype=None)
                key_dim: size of a key, None: query_dim;  attention_dim: size of the tanh layer, None:
                query_dim;  bias: of the tanh layer
    Call:       context, weights = attention(query, keys, lengths=lengths)
    Decode:     projected = attention.project_keys(keys, lengths=lengths), once a sequence, then for each step
                context, weights = attention(query, projected)
    Parameters: query_projection.weight [A, Q] (W), key_projection.weight [A, K] (U) and .bias [A], v [A]

    [B, L, S, A] is never made, neither forward nor backward: memory is O(B L (S + A)).

    Source:     Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and
                Translate", 2015
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int | None = None,
        attention_dim: int | None = None,
        bias: bool = False,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        attention_dim = query_dim if attention_dim is None else attention_dim
        self.query_projection = nn.Linear(query_dim, attention_dim, False, device, dtype)
        self.key_projection = nn.Linear(key_dim, attention_dim, bias, device, dtype)
        self.v = _scorer(attention_dim, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.query_projection.reset_parameters()
        self.key_projection.reset_parameters()
        _reset_scorer(self.v)

    def _project_query(self, query: Tensor) -> Tensor:
        return self.query_projection(query)

    def _project_key(self, keys: Tensor, key_padding_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        return self.key_projection(without_padding(keys, key_padding_mask, lengths))

    def _attend(self, query: Tensor, keys: ProjectedKeys) -> tuple[Tensor, Tensor]:
        return ops.additive_attention(
            *(query, keys.key, self.v, keys.value),
            key_padding_mask=keys.key_padding_mask,
            lengths=keys.lengths,
        )


class LuongAttention(QueriedAttention):
    """Luong's attention: the score of a query q and a key k is

        q · k ("dot"),   q · W k ("general")   or   v · tanh(W [q; k]) ("concat").

    Construct:  LuongAttention(query_dim, key_dim=None, method="general", attention_dim=None, device=None,
                dtype=None)
                key_dim: None: query_dim, which "dot" wants;  attention_dim: of "concat", None: query_dim
    Call:       context, weights = attention(query, keys, lengths=lengths)
    Parameters: "general": projection.weight [Q, K];  "concat": projection.weight [A, Q + K], v [A]; no biases

    Source:     Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation",
                2015, section 3.1
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int | None = None,
        method: str = "general",
        attention_dim: int | None = None,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if method not in ("dot", "general", "concat"):
            raise ValueError(f"method: expected 'dot', 'general' or 'concat', got {method!r}")
        key_dim = query_dim if key_dim is None else key_dim
        if method == "dot" and key_dim != query_dim:
            raise ValueError(f"key_dim: expected query_dim = {query_dim} for method 'dot', got {key_dim}")
        if method != "concat" and attention_dim is not None:
            raise ValueError(f"attention_dim: expected None for method {method!r}, got {attention_dim}")
        self.method = method
        self.query_dim = query_dim
        if method == "general":
            self.projection = nn.Linear(key_dim, query_dim, False, device, dtype)
        elif method == "concat":
            attention_dim = query_dim if attention_dim is None else attention_dim
            self.projection = nn.Linear(query_dim + key_dim, attention_dim, False, device, dtype)
            self.v = _scorer(attention_dim, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.method != "dot":
            self.projection.reset_parameters()
        if self.method == "concat":
            _reset_scorer(self.v)

    def extra_repr(self) -> str:
        return f"query_dim={self.query_dim}, method={self.method!r}"

    def _project_query(self, query: Tensor) -> Tensor:
        if self.method == "general":  # q · W k = q W · k: the keys stay as they are
            return query @ self.projection.weight
        if self.method == "concat":
            return nn.functional.linear(query, self.projection.weight[:, : self.query_dim])
        return query

    def _project_key(self, keys: Tensor, key_padding_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        if self.method == "concat":
            keys = without_padding(keys, key_padding_mask, lengths)
            return nn.functional.linear(keys, self.projection.weight[:, self.query_dim :])
        return keys

    def _attend(self, query: Tensor, keys: ProjectedKeys) -> tuple[Tensor, Tensor]:
        padding: _Padding = dict(key_padding_mask=keys.key_padding_mask, lengths=keys.lengths)
        if self.method == "concat":
            return ops.additive_attention(query, keys.key, self.v, keys.value, **padding)
        return ops.dot_attention(query, keys.key, keys.value, **padding)


class DotProductAttention(QueriedAttention):
    """The score of a query and a key is their dot product, over the square root of their size if scaled.

    Construct:  DotProductAttention(scaled=True, hard=False)
                hard: all weight on the key with the largest score; gradients are the soft weights' (straight
                through)
    Call:       context, weights = attention(query, keys, values, lengths=lengths)
    Parameters: none

    Source:     Luong, Pham and Manning, 2015; Vaswani et al., "Attention Is All You Need", 2017
    """

    def __init__(self, scaled: bool = True, hard: bool = False) -> None:
        super().__init__()
        self.scaled = scaled
        self.hard = hard

    def extra_repr(self) -> str:
        return f"scaled={self.scaled}, hard={self.hard}"

    def _attend(self, query: Tensor, keys: ProjectedKeys) -> tuple[Tensor, Tensor]:
        scale = 1 / math.sqrt(query.shape[-1]) if self.scaled and query.shape[-1] else 1.0
        return ops.dot_attention(
            *(query, keys.key, keys.value),
            scale=scale,
            hard=self.hard,
            key_padding_mask=keys.key_padding_mask,
            lengths=keys.lengths,
        )


class AttentionPooling(nn.Module):
    """One learned query over time: the score of a step x is v · x, or v · tanh(W x + b).

    Construct:  AttentionPooling(input_dim, attention_dim=None, bias=True, device=None, dtype=None)
                attention_dim: size of the tanh layer, None: there is none;  bias: of the tanh layer
    Call:       context, weights = pooling(x, lengths=lengths)
    Parameters: v [input_dim], or v [A], projection.weight [A, input_dim] and .bias [A]

    Source:     Yang et al., "Hierarchical Attention Networks for Document Classification", 2016 (whose word
                attention has the tanh layer)
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def __init__(
        self,
        input_dim: int,
        attention_dim: int | None = None,
        bias: bool = True,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.projection = (
            None if attention_dim is None else nn.Linear(input_dim, attention_dim, bias, device, dtype)
        )
        self.v = _scorer(input_dim if attention_dim is None else attention_dim, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.projection is not None:
            self.projection.reset_parameters()
        _reset_scorer(self.v)

    def forward(
        self,
        keys: Tensor,
        values: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pool over time.

        Args:     keys: [B, S, K], unbatched [S, K];  the others: as for AdditiveAttention
        Returns:  context: [B, D] or [D];  weights: [B, S] or [S]
        """
        batched = _are_batched(keys, values, lengths)
        if not batched:
            keys = keys.unsqueeze(0)
            values = None if values is None else values.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        values = keys if values is None else values
        padding: _Padding = dict(key_padding_mask=key_padding_mask, lengths=lengths)
        if self.projection is None:
            query = self.v.expand(keys.shape[0], 1, -1)
            context, weights = ops.dot_attention(query, keys, values, **padding)
        else:
            key = self.projection(without_padding(keys, key_padding_mask, lengths))
            query = key.new_zeros((key.shape[0], 1, key.shape[2]))
            context, weights = ops.additive_attention(query, key, self.v, values, **padding)
        context, weights = context.squeeze(1), weights.squeeze(1)
        return (context, weights) if batched else (context.squeeze(0), weights.squeeze(0))

    if TYPE_CHECKING:
        __call__ = forward


def _reset_scorer(v: Parameter) -> None:
    """As the Linear layer of one output that it is."""
    bound = 1 / math.sqrt(len(v)) if len(v) else 0.0
    nn.init.uniform_(v, -bound, bound)
