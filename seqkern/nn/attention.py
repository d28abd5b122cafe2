"""MultiHeadAttention: torch.nn's module on seqkern.ops.multi_head_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from seqkern.nn import _base
from seqkern.nn.cache import KeyValueCache
from seqkern.ops._attention import AVERAGED, NO_WEIGHTS, PER_HEAD
from seqkern.ops.attention import check_cu
from seqkern.ops.multi_head_attention import Weights, multi_head_attention, packed_multi_head_attention


class MultiHeadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on seqkern's kernels: same constructor, parameters, results and gradients.

    Construct:  MultiHeadAttention(embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False,
                add_zero_attn=False, kdim=None, vdim=None, batch_first=False, device=None, dtype=None,
                num_kv_heads=None)
    Call:       output, weights = attention(query, key, value, key_padding_mask=mask)

    num_kv_heads: fewer heads of keys and values than of queries, a divisor of num_heads (grouped-query
    attention; 1: multi-query). The projections of key and value are then [num_kv_heads * head_dim, .].

    It differs from torch.nn's module where that gives NaN (a query that may attend to nothing gets zero
    attention, so out_proj's bias), in that padding costs no time, and in that eval mode takes no other path.
    TorchScript is not supported; tracing and ONNX export run torch.nn's own forward.

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    num_kv_heads: int | None = None  # of a module that torch.nn's constructor made

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
    ) -> None:
        if num_kv_heads is not None and (num_kv_heads <= 0 or num_heads % num_kv_heads):
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        super().__init__(
            *(
                embed_dim,
                num_heads,
                dropout,
                bias,
                add_bias_kv,
                add_zero_attn,
                kdim,
                vdim,
                batch_first,
                device,
            ),
            dtype,
        )
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads != num_heads:
            self._shrink_keys_and_values(self.num_kv_heads, device, dtype)
            self._reset_parameters()

    def _shrink_keys_and_values(
        self, num_kv_heads: int, device: _base.Device, dtype: torch.dtype | None
    ) -> None:
        """Parameters with num_kv_heads heads of keys and values in place of num_heads."""
        width = num_kv_heads * self.head_dim

        def new(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        if self._qkv_same_embed_dim:
            self.in_proj_weight = new(self.embed_dim + 2 * width, self.embed_dim)
        else:
            self.k_proj_weight, self.v_proj_weight = new(width, self.kdim), new(width, self.vdim)
        if self._parameters["in_proj_bias"] is not None:
            self.in_proj_bias = new(self.embed_dim + 2 * width)
        if self._parameters.get("bias_k") is not None:
            self.bias_k, self.bias_v = new(1, 1, width), new(1, 1, width)

    def extra_repr(self) -> str:
        few = self.num_kv_heads not in (None, self.num_heads)
        return f"num_kv_heads={self.num_kv_heads}" if few else ""

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        lengths: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        query_lengths: Tensor | None = None,
        cache: None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        lengths: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        query_lengths: Tensor | None = None,
        cache: KeyValueCache,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, Tensor | None, KeyValueCache]: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        lengths: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        query_lengths: Tensor | None = None,
        cache: KeyValueCache | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, KeyValueCache]:
        """Attend to key and value.

        Args:
            query: [L, B, E], with batch_first [B, L, E], unbatched [L, E]
            key: [S, B, kdim], [B, S, kdim] or [S, kdim];  value: the same with vdim. All three may be nested
                tensors [B, *, E] in the jagged layout, without masks and with need_weights=False
            key_padding_mask: [B, S] or [S]; bool: True is padding; floating: added to the scores
            need_weights: return attention's weights, after dropout
            attn_mask: [L, S] or [B*num_heads, L, S]; bool: True blocks; floating: added to the scores
            average_attn_weights: weights averaged over the heads, else of each
            is_causal: query l attends to keys s <= l. An attn_mask beside it is taken to say the same and is
                not read
            lengths: [B] integers in 0..S: row b has lengths[b] keys. Not with key_padding_mask
            query_padding_mask: [B, L] bool, True is padding: such a query costs nothing, its output is zero
            query_lengths: [B] integers in 0..L. Not with query_padding_mask
            cache: key and value are appended to it, and all that it holds is attended to; with is_causal
                query l sees what came before this call, and l more. Masks and lengths are over all its keys
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: packed sequences, query [Tq, E], key
                [Tk, kdim], value [Tk, vdim]; see seqkern.varlen_attention. Without masks, need_weights=False
        Returns:
            output: like query;  weights: [B, L, S] ([L, S]), of each head [B, num_heads, L, S], or None;
            with a cache also the cache
        Raises:
            AssertionError, RuntimeError: as torch.nn.MultiheadAttention, for what does not fit
            ValueError: wrong lengths, query_padding_mask or query_lengths
        """
        if cache is None and (key is None or value is None):
            name = "key" if key is None else "value"
            raise ValueError(f"{name}: expected a tensor where there is no cache, got None")
        extras = (lengths, query_padding_mask, query_lengths, cache)
        packed = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if _all_none(*extras, *packed) and _base.exporting_to_torchscript_or_onnx():
            if is_causal and attn_mask is None:
                assert key is not None
                steps = 1 if self.batch_first and query.dim() == 3 else 0
                attn_mask = torch.ones(
                    query.shape[steps], key.shape[steps], dtype=torch.bool, device=query.device
                )
                attn_mask = attn_mask.triu(1)
            return super().forward(
                *(
                    query,
                    key,
                    value,
                    key_padding_mask,
                    need_weights,
                    attn_mask,
                    average_attn_weights,
                    is_causal,
                )
            )
        if query.is_nested or cu_seqlens_q is not None:
            if need_weights or not _all_none(*extras, key_padding_mask, attn_mask):
                raise ValueError(
                    "packed and nested input: expected no masks, lengths or cache, and need_weights=False"
                )
            if query.is_nested:
                return self._forward_nested(query, key, value, is_causal), None
            return self._forward_packed(query, key, value, is_causal, *packed), None
        batched = _batched(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if not batched:
            if not _all_none(*extras):
                raise ValueError("unbatched input: expected no lengths, query_padding_mask or cache")
            dim = 0 if self.batch_first else 1
            query, key, value = _map_distinct(lambda x: x.unsqueeze(dim), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        wanted = NO_WEIGHTS if not need_weights else AVERAGED if average_attn_weights else PER_HEAD
        output, weights = multi_head_attention(
            *(query, key, value, self._weights()),
            batch_first=self.batch_first,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            lengths=lengths,
            query_padding_mask=query_padding_mask,
            query_lengths=query_lengths,
            attn_mask=attn_mask,
            is_causal=is_causal,
            need_weights=wanted,
            cache=cache,
        )
        if not batched:
            output = output.squeeze(dim)
            weights = None if weights is None else weights.squeeze(0)
        return (output, weights) if cache is None else (output, weights, cache)

    if TYPE_CHECKING:
        __call__ = forward

    def _weights(self) -> Weights:
        return Weights(
            *(self.num_heads, self.num_kv_heads or self.num_heads),
            *(self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight),
            *(self.in_proj_bias, self.bias_k, self.bias_v, self.out_proj.weight, self.out_proj.bias),
        )

    def _forward_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        cu_q: Tensor,
        cu_k: Tensor | None = None,
        max_q: int | None = None,
        max_k: int | None = None,
    ) -> Tensor:
        """query [Tq, E], key [Tk, kdim], value [Tk, vdim] -> [Tq, E]."""
        widths = zip(
            ("query", "key", "value"),
            (query, key, value),
            (self.embed_dim, self.kdim, self.vdim),
            strict=True,
        )
        for name, x, width in widths:
            if x.dim() != 2 or x.shape[1] != width:
                raise RuntimeError(f"{name}: expected [T, E] with E = {width}, got {tuple(x.shape)}")
        if key.shape[0] != value.shape[0]:
            raise RuntimeError(f"value: expected the {key.shape[0]} rows of key, got {tuple(value.shape)}")
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("packed and nested input: expected no add_bias_kv and no add_zero_attn")
        max_q = check_cu("cu_seqlens_q", cu_q, query, max_q, "max_seqlen_q")
        if cu_k is None:
            cu_k, max_k = cu_q, max_q if max_k is None else max_k
        max_k = check_cu("cu_seqlens_k", cu_k, key, max_k, "max_seqlen_k")
        if cu_q.shape != cu_k.shape:
            raise ValueError(f"cu_seqlens_k: expected {tuple(cu_q.shape)}, got {tuple(cu_k.shape)}")
        return packed_multi_head_attention(
            *(query, key, value, self._weights(), cu_q, cu_k, max_q, max_k),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
        )[0]

    def _forward_nested(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        """Jagged [B, *, E] -> the same."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not x.is_nested or x.layout is not torch.jagged or x.dim() != 3 or x._ragged_idx != 1:
                raise ValueError(
                    f"{name}: expected a nested tensor [B, *, E] in the jagged layout, as the others"
                )
        q, k, v = _map_distinct(lambda x: x.values(), query, key, value)
        out = self._forward_packed(
            q,
            k,
            v,
            is_causal,
            cu_q=query.offsets(),
            cu_k=key.offsets(),
            max_q=query._get_max_seqlen(),
            max_k=key._get_max_seqlen(),
        )
        return torch.nested.nested_tensor_from_jagged(out, query.offsets())


MultiheadAttention = MultiHeadAttention  # torch.nn's spelling


def _all_none(*arguments: object) -> bool:
    return all(x is None for x in arguments)


def _map_distinct(
    function: Callable[[Any], Any], query: Tensor, key: Tensor | None, value: Tensor | None
) -> list[Any]:
    """The function of each tensor; what was one tensor stays one."""
    done: dict[int, Tensor] = {}
    for x in (query, key, value):
        if x is not None and id(x) not in done:
            done[id(x)] = function(x)
    return [None if x is None else done[id(x)] for x in (query, key, value)]


def _batched(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
) -> bool:
    """Is query a batch? Raises torch.nn's AssertionErrors for numbers of dims that do not fit it."""
    if query.dim() not in (2, 3):
        raise AssertionError(f"query: expected a batch, 3-D, or unbatched, 2-D, got {tuple(query.shape)}")
    batched = query.dim() == 3
    kind = "batched (3-D)" if batched else "unbatched (2-D)"
    for name, x in (("key", key), ("value", value)):
        if x is not None and x.dim() != query.dim():
            raise AssertionError(f"{name}: expected {query.dim()}-D with {kind} query, got {tuple(x.shape)}")
    if key_padding_mask is not None and key_padding_mask.dim() != query.dim() - 1:
        raise AssertionError(
            f"key_padding_mask: expected {query.dim() - 1}-D with {kind} query, got "
            f"{tuple(key_padding_mask.shape)}"
        )
    if attn_mask is not None and attn_mask.dim() not in (2, 3):
        raise AssertionError(f"attn_mask: expected 2-D or 3-D, got {tuple(attn_mask.shape)}")
    if not batched and attn_mask is not None and attn_mask.dim() == 3 and key is not None:
        expected = (num_heads, query.shape[0], key.shape[0])
        if attn_mask.shape != expected:
            raise AssertionError(
                f"attn_mask: expected [num_heads, L, S] = {expected}, got {tuple(attn_mask.shape)}"
            )
    return batched
