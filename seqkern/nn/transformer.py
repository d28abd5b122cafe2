"""The Transformer's layers and stacks: torch.nn's modules on seqkern's MultiHeadAttention.

Norm, feed-forward and residuals are torch's. What is here: which rows run (none of the padding, where looking
at lengths is free), which geometry attention is told (causal, lengths, a cache), and no other path in eval
mode: torch.nn's fast path cuts outputs short and changes results.

Letters: B batch, L queries, S keys, E d_model, N heads, T rows of packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.nn import _base
from seqkern.nn.attention import MultiHeadAttention
from seqkern.nn.cache import KeyValueCache
from seqkern.ops import _layers
from seqkern.ops._attention import valid_from_lengths
from seqkern.ops.attention import checked_lengths
from seqkern.ops.multi_head_attention import GatherRows

# ---- caches ------------------------------------------------------------------------------------------------


class DecoderLayerCache:
    """What a TransformerDecoderLayer has attended to.

    self_attn:       KeyValueCache(), grows with every call
    multihead_attn:  KeyValueCache(fixed=True): memory is projected by the first call; later ones do not look
                     at it, so that it may be None
    """

    def __init__(self) -> None:
        self.self_attn = KeyValueCache()
        self.multihead_attn = KeyValueCache(fixed=True)

    @property
    def length(self) -> int:
        """Steps of tgt so far."""
        return self.self_attn.length

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, for beam search; index: [B'] int64."""
        self.self_attn.reorder(index)
        self.multihead_attn.reorder(index)

    def __repr__(self) -> str:
        return f"DecoderLayerCache(self_attn={self.self_attn}, multihead_attn={self.multihead_attn})"


class TransformerCache(list[Any]):  # KeyValueCache or DecoderLayerCache
    """The caches of a stack's layers, first to last; a stack's new_cache() makes an empty one."""

    @property
    def length(self) -> int:
        """Steps so far."""
        return int(self[0].length) if self else 0

    def reorder(self, index: Tensor) -> None:
        """Row b of every layer becomes what row index[b] was, for beam search; index: [B'] int64."""
        for cache in self:
            cache.reorder(index)


# ---- layers ------------------------------------------------------------------------------------------------


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on seqkern's attention: same constructor, parameters and results.

    Construct:  TransformerEncoderLayer(d_model, nhead, dim_feedforward=2048, dropout=0.1, activation=F.relu,
                layer_norm_eps=1e-5, batch_first=False, norm_first=False, bias=True, device=None, dtype=None)
    Call:       output = layer(src, is_causal=True, lengths=lengths)
                output, cache = layer(step, is_causal=True, cache=cache)

    post-norm:  x = norm1(src + self_attn(src));  output = norm2(x + feed_forward(x))
    norm_first: x = src + self_attn(norm1(src));  output = x + feed_forward(norm2(x))

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first),
            *(bias, device, dtype),
        )
        _adopt(self.self_attn)

    def new_cache(self) -> KeyValueCache:
        """An empty cache for forward."""
        return KeyValueCache()

    @overload
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        lengths: Tensor | None = None,
        cache: None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        lengths: Tensor | None = None,
        cache: KeyValueCache,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, KeyValueCache]: ...

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        lengths: Tensor | None = None,
        cache: KeyValueCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor | tuple[Tensor, KeyValueCache]:
        """Self-attention and feed-forward.

        Args:
            src: [L, B, E], with batch_first [B, L, E], unbatched [L, E]; or a nested tensor [B, *, E] in the
                jagged layout, without masks
            src_mask: [L, L] or [B*N, L, L]; bool: True blocks; floating: added to the scores
            src_key_padding_mask: [B, L] or [L]; bool: True is padding; floating: added to the scores. NaN and
                infinities in padding count as zero
            is_causal: position l attends to positions up to l; src_mask, if given, is not read
            lengths: [B] integers in 0..L: row b has lengths[b] steps. Output beyond is zero. On a CPU,
                outside torch.compile and without src_mask, padding is left out of all that is computed. Not
                with src_key_padding_mask
            cache: of this layer as part of a decoder-only model: src is appended to what it holds, masks and
                lengths are over all of that
            cu_seqlens, max_seqlen: src is [T, E], packed sequences: sequence b is rows cu_seqlens[b] …
                cu_seqlens[b + 1] - 1, none longer than max_seqlen. Without masks
        Returns:
            output: like src;  with a cache (output, cache)
        Raises:
            AssertionError, RuntimeError: as torch.nn.TransformerEncoderLayer, for what does not fit
            ValueError: wrong lengths; masks with nested or packed input
        """
        masks = dict(src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        if src.is_nested:
            _expect_none("nested", **masks, lengths=lengths, cache=cache, cu_seqlens=cu_seqlens)
            jagged = _Jagged.of("src", src)
            return jagged.rebuild(self.forward(jagged.rows, is_causal=is_causal, **jagged.options()))
        attention = self.self_attn
        if cu_seqlens is not None:
            _expect_none("packed", **masks, lengths=lengths, cache=cache)
            return self._layer(src, is_causal=is_causal, **_packed(cu_seqlens, max_seqlen))
        padded = _Padded.of("src", src, "lengths", lengths, src_key_padding_mask, attention, cache)
        unmasked = is_causal or src_mask is None
        if padded.lengths is not None and unmasked and cache is None and _can_pack((attention,), padded):
            rows = padded.rows()
            return rows.scatter(self.forward(rows.gather(src), is_causal=is_causal, **rows.options()))
        x = padded.zeroed(src)
        options = padded.options()
        if src_key_padding_mask is not None:
            x = _finite(x, src_key_padding_mask, attention.batch_first)
        if cache is not None:
            options["cache"] = cache
        x = padded.zeroed(self._layer(x, src_mask, src_key_padding_mask, is_causal, **options))
        return x if cache is None else (x, cache)

    if TYPE_CHECKING:
        __call__ = forward

    def _layer(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, key_padding_mask, is_causal=is_causal, **options)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, key_padding_mask, is_causal=is_causal, **options))
        return self.norm2(x + self._ff_block(x))

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """torch.nn's, with MultiHeadAttention's own options."""
        return self.dropout1(_attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal, **options))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on seqkern's attention: same constructor, parameters and results.

    Construct:  TransformerDecoderLayer(d_model, nhead, dim_feedforward=2048, dropout=0.1, activation=F.relu,
                layer_norm_eps=1e-5, batch_first=False, norm_first=False, bias=True, device=None, dtype=None)
    Call:       output = layer(tgt, memory, tgt_is_causal=True, memory_lengths=lengths)
                output, cache = layer(step, memory, tgt_is_causal=True, cache=cache)

    post-norm:  x = norm1(tgt + self_attn(tgt));  y = norm2(x + multihead_attn(x, memory));
                output = norm3(y + feed_forward(y))
    norm_first: each block's norm stands before it instead

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerDecoderLayer.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first),
            *(bias, device, dtype),
        )
        _adopt(self.self_attn)
        _adopt(self.multihead_attn)

    def new_cache(self) -> DecoderLayerCache:
        """An empty cache for forward."""
        return DecoderLayerCache()

    @overload
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_cu_seqlens: Tensor | None = None,
        memory_max_seqlen: int | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: DecoderLayerCache,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_cu_seqlens: Tensor | None = None,
        memory_max_seqlen: int | None = None,
    ) -> tuple[Tensor, DecoderLayerCache]: ...

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: DecoderLayerCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_cu_seqlens: Tensor | None = None,
        memory_max_seqlen: int | None = None,
    ) -> Tensor | tuple[Tensor, DecoderLayerCache]:
        """Self-attention, attention to memory, and feed-forward.

        Args:
            tgt: [L, B, E], with batch_first [B, L, E], unbatched [L, E];  memory: the same with S steps. Both
                may be nested tensors [B, *, E] in the jagged layout, without masks
            tgt_mask: [L, L] or [B*N, L, L];  memory_mask: [L, S] or [B*N, L, S]; bool: True blocks; floating:
                added to the scores
            tgt_key_padding_mask: [B, L] or [L];  memory_key_padding_mask: [B, S] or [S]; bool: True is
                padding; floating: added to the scores
            tgt_is_causal: step l attends to steps up to l;  memory_is_causal: to memory's up to l; a mask
                beside it is not read
            tgt_lengths: [B] integers in 0..L: row b has tgt_lengths[b] steps. Output beyond is zero. Not with
                tgt_key_padding_mask
            memory_lengths: [B] integers in 0..S. Not with memory_key_padding_mask. On a CPU, outside
                torch.compile, with either lengths and no mask, padding is left out of all that is computed
            cache: tgt is appended to what it holds, and masks and lengths of tgt are over all of that;
                memory is projected by its first call only, and may be None afterwards. memory's padding is
                said by every call
            cu_seqlens, max_seqlen, memory_cu_seqlens, memory_max_seqlen: tgt is [T, E] and memory [Tm, E],
                packed sequences; as for TransformerEncoderLayer
        Returns:
            output: like tgt;  with a cache (output, cache)
        Raises:
            AssertionError, RuntimeError: as torch.nn.TransformerDecoderLayer, for what does not fit
            ValueError: wrong lengths; masks with nested or packed input
        """
        masks = dict(
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )
        others = dict(tgt_lengths=tgt_lengths, memory_lengths=memory_lengths, cache=cache)
        causal: dict[str, Any] = dict(tgt_is_causal=tgt_is_causal, memory_is_causal=memory_is_causal)
        if memory is None and cache is None:
            raise ValueError("memory: expected a tensor where there is no cache, got None")
        if tgt.is_nested or (memory is not None and memory.is_nested):
            _expect_none("nested", **masks, **others, cu_seqlens=cu_seqlens)
            return _decode_nested(self, tgt, memory, causal)
        if cu_seqlens is not None:
            _expect_none("packed", **masks, **others)
            if memory_cu_seqlens is None:
                raise ValueError("memory_cu_seqlens: expected a tensor with cu_seqlens, got None")
            return self._layer(
                tgt,
                memory,
                **causal,
                tgt_options=_packed(cu_seqlens, max_seqlen),
                memory_options=_packed(cu_seqlens, max_seqlen, memory_cu_seqlens, memory_max_seqlen),
            )
        attention = self.self_attn
        queries = _Padded.of("tgt", tgt, "tgt_lengths", tgt_lengths, tgt_key_padding_mask, attention, cache)
        keys = _Padded.of(
            "memory", memory, "memory_lengths", memory_lengths, memory_key_padding_mask, attention
        )
        if cache is None and _decodes_packed((attention, self.multihead_attn), queries, keys, masks, causal):
            return _decode_packed(self, queries, keys, causal)
        x = queries.zeroed(tgt)
        tgt_options, memory_options = queries.options(), {}
        if queries.lengths is not None:
            memory_options["query_lengths"] = queries.own
        if keys.lengths is not None:
            memory_options["lengths"] = keys.lengths
        if tgt_key_padding_mask is not None:
            x = _finite(x, tgt_key_padding_mask, attention.batch_first)
        if cache is not None:
            tgt_options["cache"], memory_options["cache"] = cache.self_attn, cache.multihead_attn
            if memory_is_causal and cache.length:
                memory_mask, memory_is_causal = self._later_memory(tgt, memory, cache), False
        x = self._layer(
            *(x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask),
            *(tgt_is_causal, memory_is_causal, tgt_options, memory_options),
        )
        x = queries.zeroed(x)
        return x if cache is None else (x, cache)

    if TYPE_CHECKING:
        __call__ = forward

    def _later_memory(self, tgt: Tensor, memory: Tensor | None, cache: DecoderLayerCache) -> Tensor:
        """[L, S] bool, True where a step, counted from the cache's first, comes before memory's."""
        steps = 1 if self.self_attn.batch_first else 0
        held = cache.multihead_attn
        S = held.length if memory is None or held.complete else memory.shape[steps]
        mask = torch.ones((tgt.shape[steps], S), dtype=torch.bool, device=tgt.device)
        return mask.triu(cache.length + 1)

    def _layer(
        self,
        x: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        tgt_options: dict[str, Any] | None = None,
        memory_options: dict[str, Any] | None = None,
    ) -> Tensor:
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        own_options, cross_options = tgt_options or {}, memory_options or {}
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *own, **own_options)
            x = x + self._mha_block(self.norm2(x), *cross, **cross_options)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *own, **own_options))
        x = self.norm2(x + self._mha_block(x, *cross, **cross_options))
        return self.norm3(x + self._ff_block(x))

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """torch.nn's, with MultiHeadAttention's own options."""
        return self.dropout1(_attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal, **options))

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor | None,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """torch.nn's, with MultiHeadAttention's own options."""
        found = _attend(self.multihead_attn, x, mem, attn_mask, key_padding_mask, is_causal, **options)
        return self.dropout2(found)


# ---- stacks ------------------------------------------------------------------------------------------------


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder without its eval-mode fast path: same constructor, parameters and results.

    Construct:  TransformerEncoder(encoder_layer, num_layers, norm=None, enable_nested_tensor=True,
                mask_check=True); the last two have no effect: `lengths` does what they are for
    Call:       output = encoder(src, is_causal=True, lengths=lengths)
                output, cache = encoder(step, cache=cache), with cache = encoder.new_cache() at first

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoder.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor  # use_nested_tensor stays False

    def new_cache(self) -> TransformerCache:
        """An empty cache for forward."""
        return TransformerCache(layer.new_cache() for layer in self.layers)

    @overload
    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        lengths: Tensor | None = None,
        cache: None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        lengths: Tensor | None = None,
        cache: TransformerCache,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, TransformerCache]: ...

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        lengths: Tensor | None = None,
        cache: TransformerCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor | tuple[Tensor, TransformerCache]:
        """Run the layers in turn, then norm.

        Args:
            src, mask, src_key_padding_mask, cu_seqlens, max_seqlen: as TransformerEncoderLayer takes them
            is_causal: position l attends to positions up to l; mask, if given, is not read. None: if mask
                says just that, or if there is a cache and no mask
            lengths: [B] integers in 0..L: row b has lengths[b] steps. Output beyond is zero. On a CPU,
                outside torch.compile and without mask, the valid rows are gathered once, and all layers see
                no padding. Not with src_key_padding_mask
            cache: from new_cache() or an earlier call: of a decoder-only model, which src continues
        Returns:
            output: like src;  with a cache (output, cache)
        Raises:
            AssertionError, RuntimeError: as torch.nn.TransformerEncoder, for what does not fit
            ValueError: wrong lengths; masks with nested or packed input
        """
        attention = self.layers[0].self_attn
        if src.is_nested:
            _expect_none("nested", mask=mask, src_key_padding_mask=src_key_padding_mask)
            _expect_none("nested", lengths=lengths, cache=cache, cu_seqlens=cu_seqlens)
            jagged = _Jagged.of("src", src)
            return jagged.rebuild(self.forward(jagged.rows, is_causal=is_causal, **jagged.options()))
        if cu_seqlens is not None:
            _expect_none("packed", lengths=lengths)
            options = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            padded, is_causal = _Padded(src), bool(is_causal)
        else:
            is_causal = _is_causal(mask, is_causal, src, attention.batch_first, cache)
            padded = _Padded.of("src", src, "lengths", lengths, src_key_padding_mask, attention, cache)
            options = {} if padded.lengths is None else dict(lengths=padded.lengths)
        unmasked = is_causal or mask is None
        attentions = _attentions(self.layers, TransformerEncoderLayer, "self_attn")
        if padded.lengths is not None and unmasked and cache is None and _can_pack(attentions, padded):
            rows = padded.rows()
            return rows.scatter(self.forward(rows.gather(src), is_causal=is_causal, **rows.options()))
        output = src
        for i, layer in enumerate(self.layers):
            if cache is not None:
                options["cache"] = cache[i]
            output = layer(
                output,
                src_mask=mask,
                is_causal=is_causal,
                src_key_padding_mask=src_key_padding_mask,
                **options,
            )
            if cache is not None:
                output, cache[i] = output
        if self.norm is not None:
            output = padded.zeroed(self.norm(output))
        return output if cache is None else (output, cache)

    if TYPE_CHECKING:
        __call__ = forward


class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder: same constructor, parameters and results; decodes step by step too.

    Construct:  TransformerDecoder(decoder_layer, num_layers, norm=None)
    Call:       output = decoder(tgt, memory, tgt_is_causal=True, memory_lengths=lengths)
                output, cache = decoder(step, memory, cache=cache), with cache = decoder.new_cache() at first;
                cache.reorder(index) between steps of a beam search

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerDecoder.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def new_cache(self) -> TransformerCache:
        """An empty cache for forward."""
        return TransformerCache(layer.new_cache() for layer in self.layers)

    @overload
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_cu_seqlens: Tensor | None = None,
        memory_max_seqlen: int | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: TransformerCache,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_cu_seqlens: Tensor | None = None,
        memory_max_seqlen: int | None = None,
    ) -> tuple[Tensor, TransformerCache]: ...

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: TransformerCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_cu_seqlens: Tensor | None = None,
        memory_max_seqlen: int | None = None,
    ) -> Tensor | tuple[Tensor, TransformerCache]:
        """Run the layers in turn, then norm.

        Args:
            tgt, memory, their masks, memory_is_causal, cu_seqlens …: as TransformerDecoderLayer takes them
            tgt_is_causal: step l attends to steps up to l; tgt_mask, if given, is not read. None: if tgt_mask
                says just that, or if there is a cache and no tgt_mask
            tgt_lengths, memory_lengths: as TransformerDecoderLayer takes them; the valid rows of both are
                gathered once for all layers
            cache: from new_cache() or an earlier call, which tgt continues; memory may be None after the
                first
        Returns:
            output: like tgt;  with a cache (output, cache)
        Raises:
            AssertionError, RuntimeError: as torch.nn.TransformerDecoder, for what does not fit
            ValueError: wrong lengths; masks with nested or packed input
        """
        attention = self.layers[0].self_attn
        masks = dict(
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )
        others = dict(tgt_lengths=tgt_lengths, memory_lengths=memory_lengths)
        causal: dict[str, Any] = dict(tgt_is_causal=tgt_is_causal, memory_is_causal=memory_is_causal)
        if memory is None and cache is None:
            raise ValueError("memory: expected a tensor where there is no cache, got None")
        if tgt.is_nested or (memory is not None and memory.is_nested):
            _expect_none("nested", **masks, **others, cache=cache, cu_seqlens=cu_seqlens)
            return _decode_nested(self, tgt, memory, causal)
        options: dict[str, Any] = {}
        if cu_seqlens is not None:
            _expect_none("packed", **others)
            options = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            options |= dict(memory_cu_seqlens=memory_cu_seqlens, memory_max_seqlen=memory_max_seqlen)
            queries = _Padded(tgt)
            causal["tgt_is_causal"] = bool(tgt_is_causal)
        else:
            causal["tgt_is_causal"] = _is_causal(tgt_mask, tgt_is_causal, tgt, attention.batch_first, cache)
            queries = _Padded.of(
                "tgt", tgt, "tgt_lengths", tgt_lengths, tgt_key_padding_mask, attention, cache
            )
            keys = _Padded.of(
                "memory", memory, "memory_lengths", memory_lengths, memory_key_padding_mask, attention
            )
            attentions = _attentions(self.layers, TransformerDecoderLayer, "self_attn", "multihead_attn")
            if cache is None and _decodes_packed(attentions, queries, keys, masks, causal):
                return _decode_packed(self, queries, keys, causal)
            if queries.lengths is not None:
                options["tgt_lengths"] = queries.lengths
            if keys.lengths is not None:
                options["memory_lengths"] = keys.lengths
        output = tgt
        for i, layer in enumerate(self.layers):
            if cache is not None:
                options["cache"] = cache[i]
            output = layer(output, memory, **masks, **causal, **options)
            if cache is not None:
                output, cache[i] = output
        if self.norm is not None:
            output = queries.zeroed(self.norm(output))
        return output if cache is None else (output, cache)

    if TYPE_CHECKING:
        __call__ = forward


class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer on seqkern's layers: same constructor, parameters and results.

    Construct:  Transformer(d_model=512, nhead=8, num_encoder_layers=6, num_decoder_layers=6,
                dim_feedforward=2048, dropout=0.1, activation=F.relu, custom_encoder=None,
                custom_decoder=None, layer_norm_eps=1e-5, batch_first=False, norm_first=False, bias=True,
                device=None, dtype=None)
    Call:       output = transformer(src, tgt, tgt_is_causal=True, src_lengths=lengths)

    To decode step by step: memory = transformer.encoder(src), then transformer.decoder with a cache.

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.Transformer.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any = None,
        custom_decoder: Any = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)

        def norm() -> torch.nn.LayerNorm:
            return torch.nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)

        # Random numbers are drawn as torch.nn draws them: encoder, decoder, then _reset_parameters.
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(d_model, nhead, *options, **factory)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(d_model, nhead, *options, **factory)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        super().__init__(
            *(d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation),
            *(custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype),
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        src_lengths: Tensor | None = None,
        tgt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Encode src, decode tgt beside it.

        Args:
            src: [S, B, E], with batch_first [B, S, E], unbatched [S, E];  tgt: the same with L steps. Both
                may be nested tensors [B, *, E] in the jagged layout, without masks
            src_mask, src_key_padding_mask, src_is_causal: as TransformerEncoder takes them
            tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal: as TransformerDecoder takes them
            src_lengths: [B] integers in 0..S: row b has src_lengths[b] steps, of memory too, unless
                memory_key_padding_mask is given;  tgt_lengths: [B] in 0..L. Output beyond is zero
        Returns:
            output: like tgt
        Raises:
            AssertionError, RuntimeError: as torch.nn.Transformer, for what does not fit
            ValueError: wrong lengths; masks with nested input
        """
        if not src.is_nested:
            batch = 0 if self.batch_first else 1
            if src.dim() == 3 and src.size(batch) != tgt.size(batch):
                raise RuntimeError(
                    f"tgt: the batch number of src and tgt must be equal, got {tuple(src.shape)} and "
                    f"{tuple(tgt.shape)}"
                )
        if src.size(-1) != self.d_model or tgt.size(-1) != self.d_model:
            raise RuntimeError(
                "src, tgt: the feature number of src and tgt must be equal to d_model = "
                f"{self.d_model}, got {src.size(-1)} and {tgt.size(-1)}"
            )
        encoder_options, decoder_options = {}, {}
        if src_lengths is not None:
            encoder_options["lengths"] = src_lengths
            if memory_key_padding_mask is None:
                decoder_options["memory_lengths"] = src_lengths
        if tgt_lengths is not None:
            decoder_options["tgt_lengths"] = tgt_lengths
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
            **encoder_options,
        )
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
            **decoder_options,
        )

    if TYPE_CHECKING:
        __call__ = forward


# ---- attention ---------------------------------------------------------------------------------------------


def _adopt(attention: torch.nn.MultiheadAttention) -> None:
    """Make torch.nn's attention ours, its parameters as they are: a new one would draw random numbers."""
    attention.__class__ = MultiHeadAttention
    attention.num_kv_heads = attention.num_heads


def _attend(
    attention: MultiHeadAttention,
    query: Tensor,
    key: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    **options: Any,
) -> Tensor:
    return attention(
        *(query, key, key),
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        need_weights=False,
        **options,
    )[0]


def _is_causal(
    mask: Tensor | None,
    is_causal: bool | None,
    x: Tensor,
    batch_first: bool,
    cache: TransformerCache | None,
) -> bool:
    """is_causal, or where that is None whether the mask is the causal one of x, behind what the cache holds.

    Not looked at while a graph is traced; nor is a mask that wants a gradient taken for a constant. On a GPU
    this waits for the mask, as torch.nn's containers do: is_causal=True or False does not.
    """
    if is_causal is not None:
        return bool(is_causal)
    if mask is None:
        return cache is not None
    if mask.requires_grad or torch.compiler.is_compiling() or _base.exporting_to_torchscript_or_onnx():
        return False
    if not _layers.has_values(mask):
        return False
    past = 0 if cache is None else cache.length
    L = x.shape[1 if batch_first and x.dim() == 3 else 0]
    if mask.shape != (L, past + L):
        return False
    later = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu_(past + 1)
    if mask.dtype is torch.bool:
        return torch.equal(mask, later)
    if not mask.dtype.is_floating_point:
        return False
    return torch.equal(mask, torch.zeros_like(mask).masked_fill_(later, -torch.inf))


# ---- padding -----------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The valid rows of a padded batch, sequence after sequence."""

    places: Tensor  # [T] int64, of the flattened batch
    cu: Tensor  # [B + 1] int64, where the sequences begin among the rows
    longest: int
    shape: tuple[int, int]  # (B, L) or (L, B), as the batch

    def gather(self, x: Tensor) -> Tensor:
        return GatherRows.apply(x.flatten(0, 1), self.places)

    def scatter(self, rows: Tensor) -> Tensor:
        """The batch, zero in the padding."""
        x = rows.new_zeros((self.shape[0] * self.shape[1], rows.shape[1]))
        return x.index_copy(0, self.places, rows).unflatten(0, self.shape)

    def options(self, prefix: str = "") -> dict[str, Any]:
        return {f"{prefix}cu_seqlens": self.cu, f"{prefix}max_seqlen": self.longest}


class _Padded(NamedTuple):
    """A batch and the lengths of its rows."""

    x: Tensor | None  # [B, L, E] or [L, B, E]; without lengths of any shape; None: only its cache is there
    lengths: Tensor | None = None  # [B] int64, with a cache over all it holds and x; None: no padding
    own: Tensor | None = None  # [B] int64, the part that is in x
    batch_first: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        x: Tensor | None,
        lengths_name: str,
        lengths: Tensor | None,
        key_padding_mask: Tensor | None,
        attention: MultiHeadAttention,
        cache: KeyValueCache | DecoderLayerCache | TransformerCache | None = None,
    ) -> _Padded:
        """Checks the lengths, and drops them where they can be seen to say nothing."""
        batch_first = attention.batch_first
        if lengths is None or x is None:
            return cls(x, lengths, lengths, batch_first)
        if x.dim() != 3:
            raise ValueError(f"{lengths_name}: expected {name} to be 3-D with it, got {tuple(x.shape)}")
        B, L = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        past = 0 if cache is None else cache.length
        mask_name = f"{name}_key_padding_mask"
        lengths = checked_lengths(lengths_name, lengths, mask_name, key_padding_mask, B, past + L, x.device)
        assert lengths is not None  # as it was given
        if _may_look(lengths) and bool((lengths == past + L).all()):
            return cls(x, None, None, batch_first)
        return cls(x, lengths, (lengths - past).clamp(min=0) if past else lengths, batch_first)

    @property
    def L(self) -> int:
        assert self.x is not None
        return self.x.shape[1 if self.batch_first else 0]

    def options(self) -> dict[str, Tensor]:
        """What self-attention is told."""
        return {} if self.lengths is None else {"lengths": self.lengths, "query_lengths": self.own}

    def zeroed(self, x: Tensor) -> Tensor:
        """x, like self.x, with zeros in the padding: what stands there would else reach the weights'
        gradients, as 0 * NaN is NaN."""
        if self.lengths is None:
            return x
        valid = valid_from_lengths(self.own, self.L)
        return torch.where((valid if self.batch_first else valid.T).unsqueeze(-1), x, 0)

    def rows(self) -> _Rows:
        assert self.x is not None
        L, shape = self.L, (self.x.shape[0], self.x.shape[1])
        if self.lengths is None:
            lengths = torch.full((shape[0 if self.batch_first else 1],), L)
            numbers = torch.arange(shape[0] * shape[1])
        else:
            lengths = self.lengths
            numbers = valid_from_lengths(lengths, L).flatten().nonzero().squeeze(1)  # b * L + l
        places = numbers if self.batch_first else numbers % L * shape[1] + numbers // L
        return _Rows(places, F.pad(lengths.cumsum(0), (1, 0)), int(lengths.max()), shape)


def _attentions(layers: Iterable[torch.nn.Module], ours: type, *names: str) -> list[torch.nn.Module | None]:
    """What attends in a stack; None for each layer that is not ours."""
    return [getattr(layer, name) if isinstance(layer, ours) else None for layer in layers for name in names]


def _may_look(x: Tensor) -> bool:
    """May values be looked at here, at no cost to what comes after?"""
    if torch.compiler.is_compiling() or _base.exporting_to_torchscript_or_onnx():
        return False
    return x.is_cpu and _layers.has_values(x)


def _can_pack(attentions: Iterable[torch.nn.Module | None], *batches: _Padded) -> bool:
    """Can every layer run on packed rows, and may lengths be looked at?"""
    for padded in batches:
        if (
            padded.x is None
            or not _may_look(padded.x)
            or padded.x.numel() == 0
            or _layers.transformed([padded.x])
        ):
            return False
        if padded.lengths is not None and not _may_look(padded.lengths):
            return False
    return all(
        isinstance(attention, MultiHeadAttention) and attention.bias_k is None and not attention.add_zero_attn
        for attention in attentions
    )


def _finite(x: Tensor, key_padding_mask: Tensor, batch_first: bool) -> Tensor:
    """x, zero in place of NaN and infinities in its padding, which else reach the weights' gradients.

    key_padding_mask: [B, S] or [S], S >= L: x is the end of what it is over. Where looking is free, a finite
    x is left alone; a mask that does not fit is attention's to refuse.
    """
    steps = 1 if batch_first and x.dim() == 3 else 0
    L = x.shape[steps]
    padding = key_padding_mask if key_padding_mask.dtype is torch.bool else key_padding_mask == -torch.inf
    padding = padding[..., max(padding.shape[-1] - L, 0) :] if padding.dim() else padding
    padding = padding if batch_first or padding.dim() != 2 else padding.T
    if padding.shape != x.shape[:-1]:
        return x
    if _may_look(x) and bool(torch.isfinite(x.detach().sum())):
        return x
    return torch.where(padding.unsqueeze(-1), torch.nan_to_num(x, 0.0, 0.0, 0.0), x)


# ---- packed and nested input -------------------------------------------------------------------------------


def _packed(
    cu: Tensor, longest: int | None, cu_k: Tensor | None = None, longest_k: int | None = None
) -> dict[str, Any]:
    """MultiHeadAttention's options for packed sequences."""
    if cu_k is None:
        return dict(cu_seqlens_q=cu, max_seqlen_q=longest)
    return dict(cu_seqlens_q=cu, max_seqlen_q=longest, cu_seqlens_k=cu_k, max_seqlen_k=longest_k)


def _expect_none(what: str, **arguments: object) -> None:
    for name, given in arguments.items():
        if given is not None:
            raise ValueError(f"{name}: expected None with {what} input, got {type(given).__name__}")


class _Jagged(NamedTuple):
    """A nested tensor [B, *, E] as packed rows."""

    rows: Tensor  # [T, E]
    offsets: Tensor  # [B + 1]
    longest: int

    @classmethod
    def of(cls, name: str, x: Tensor) -> _Jagged:
        if not x.is_nested or x.layout is not torch.jagged or x.dim() != 3 or x._ragged_idx != 1:
            raise ValueError(f"{name}: expected a nested tensor [B, *, E] in the jagged layout")
        if x.lengths() is not None:  # with gaps between its sequences
            x = x.contiguous()
        return cls(x.values(), x.offsets(), x._get_max_seqlen())

    def options(self, prefix: str = "") -> dict[str, Any]:
        return {f"{prefix}cu_seqlens": self.offsets, f"{prefix}max_seqlen": self.longest}

    def rebuild(self, rows: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(rows, self.offsets)


Decodes = TransformerDecoderLayer | TransformerDecoder


def _decode_nested(module: Decodes, tgt: Tensor, memory: Tensor, causal: dict[str, Any]) -> Tensor:
    queries, keys = _Jagged.of("tgt", tgt), _Jagged.of("memory", memory)
    options = queries.options() | keys.options("memory_")
    return queries.rebuild(module.forward(queries.rows, keys.rows, **causal, **options))


def _decodes_packed(
    attentions: Iterable[torch.nn.Module | None],
    queries: _Padded,
    keys: _Padded,
    masks: dict[str, Tensor | None],
    causal: dict[str, Any],
) -> bool:
    """Is there padding that can be left out of a decoder's layers?"""
    if queries.lengths is None and keys.lengths is None:
        return False
    for name, mask in masks.items():  # tgt_is_causal replaces tgt_mask; nothing replaces a padding mask
        if mask is not None and not causal.get(name.replace("mask", "is_causal")):
            return False
    return _can_pack(attentions, queries, keys)


def _decode_packed(module: Decodes, queries: _Padded, keys: _Padded, causal: dict[str, Any]) -> Tensor:
    query_rows, key_rows = queries.rows(), keys.rows()
    options = query_rows.options() | key_rows.options("memory_")
    tgt, memory = query_rows.gather(queries.x), key_rows.gather(keys.x)
    return query_rows.scatter(module.forward(tgt, memory, **causal, **options))
