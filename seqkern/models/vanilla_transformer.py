"""The Transformer of M, post-norm, with one set of projections for all heads.

Attention here is softmax(q · k / √embed_size), where head_dim would be usual.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern import ops
from seqkern.models._attention import backend_of
from seqkern.models.decoding import DecodingModule
from seqkern.models.positional import PositionalEncoding


class SelfAttention(nn.Module):
    """Multi-head attention whose projections are shared by the heads (M; MultiHeadAttention in its
    Transformer).

    Construct:  SelfAttention(embed_size, heads, *, layers=seqkern.nn)
    Parameters: values, keys, queries lin(E/heads→E/heads) without bias, fc_out lin(E→E)

    A mask is 0 where a key may not be attended to, whose score is then −1e20: weight zero. A query that may
    attend to nothing gets zero attention here, so fc_out's bias; M's gets the mean of all values, padding
    included.
    """

    def __init__(self, embed_size: int, heads: int, *, layers: ModuleType = seqkern.nn) -> None:
        super().__init__()
        if heads < 1 or embed_size % heads:
            raise ValueError(f"heads: expected a divisor of embed_size = {embed_size}, got {heads}")
        self.embed_size, self.heads, self.head_dim = embed_size, heads, embed_size // heads
        self.values = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.keys = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.queries = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.fc_out = nn.Linear(embed_size, embed_size)
        self._backend = backend_of(layers)

    def forward(
        self,
        values: Tensor,
        keys: Tensor,
        queries: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """
        Args:     values, keys: [B, S, E];  queries: [B, L, E]
                  mask: 0 or False blocks; [B, 1, 1, S], padding, which costs nothing, or what broadcasts to
                  [B, heads, L, S]
                  is_causal: query l attends to keys s <= l, beside the mask, and without one being made
        Returns:  [B, L, E]
        """
        q, k, v = (
            projection(x.unflatten(2, (self.heads, self.head_dim))).transpose(1, 2)
            for projection, x in ((self.queries, queries), (self.keys, keys), (self.values, values))
        )
        y: Any = ops.scaled_dot_product_attention(
            *(q, k, v),
            **_masks(mask, q.shape[0], q.shape[2], k.shape[2], is_causal),
            scale=self.embed_size**-0.5,
            backend=self._backend,
        )
        return self.fc_out(y.transpose(1, 2).flatten(2))


def _masks(mask: Tensor | None, B: int, L: int, S: int, is_causal: bool) -> dict[str, Any]:
    """M's mask as scaled_dot_product_attention's."""
    if mask is None:
        return dict(is_causal=is_causal)
    attends = mask != 0
    if attends.dim() == 4 and attends.shape[1:3] == (1, 1):
        padding = ~attends.expand(B, 1, 1, S)[:, 0, 0]
        return dict(key_padding_mask=padding, is_causal=is_causal)
    if is_causal:
        attends = attends & torch.ones((L, S), dtype=torch.bool, device=mask.device).tril()
    return dict(attn_mask=attends)


def _feed_forward(embed_size: int, hidden_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(embed_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, embed_size))


class AttentionBlock(nn.Module):
    """Attention and feed-forward, each with its residual, dropout and the one norm, post-norm (M's
    MultiHeadAttention in block form).

    Construct:  AttentionBlock(embed_size, heads, *, dropout=0.1, layers=seqkern.nn)
    Parameters: attention, norm (used twice), feed_forward Sequential(lin(E→4E), ReLU, lin(4E→E))
    """

    def __init__(
        self, embed_size: int, heads: int, *, dropout: float = 0.1, layers: ModuleType = seqkern.nn
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(embed_size, heads, layers=layers)
        self.norm = nn.LayerNorm(embed_size)
        self.feed_forward = _feed_forward(embed_size, 4 * embed_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        value: Tensor,
        key: Tensor,
        query: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """As SelfAttention: value, key [B, S, E], query [B, L, E] -> [B, L, E]."""
        attention = self.attention(value, key, query, mask, is_causal=is_causal)
        x = self.dropout(self.norm(attention + query))
        return self.dropout(self.norm(self.feed_forward(x) + x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each with its residual, norm and dropout, post-norm (M).

    Construct:  TransformerBlock(embed_size, heads, dropout, forward_expansion, *, layers=seqkern.nn)
    Parameters: attention, norm1, norm2, feed_forward Sequential(lin(E→fE), ReLU, lin(fE→E))
    """

    def __init__(
        self,
        embed_size: int,
        heads: int,
        dropout: float,
        forward_expansion: int,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(embed_size, heads, layers=layers)
        self.norm1 = nn.LayerNorm(embed_size)
        self.norm2 = nn.LayerNorm(embed_size)
        self.feed_forward = _feed_forward(embed_size, forward_expansion * embed_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, value: Tensor, key: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
        """As SelfAttention: value, key [B, S, E], query [B, L, E] -> [B, L, E]."""
        x = self.dropout(self.norm1(self.attention(value, key, query, mask) + query))
        return self.dropout(self.norm2(self.feed_forward(x) + x))


class VanillaEncoder(nn.Module):
    """Embeddings, sinusoids and TransformerBlocks (M's Encoder).

    Construct:  VanillaEncoder(src_vocab_size, embed_size, num_layers, heads, device, forward_expansion,
                dropout, max_length, *, layers=seqkern.nn);  device: of the parameters
    Parameters: word_embedding, layers.i.*;  buffer position_embedding.pe

    Corrected:  M applies the position module to the positions' numbers; here their sinusoids are added.
    """

    def __init__(
        self,
        src_vocab_size: int,
        embed_size: int,
        num_layers: int,
        heads: int,
        device: torch.device | str | None,
        forward_expansion: int,
        dropout: float,
        max_length: int,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(src_vocab_size, embed_size)
        self.position_embedding = PositionalEncoding(embed_size, max_length)
        self.layers = nn.ModuleList(
            TransformerBlock(embed_size, heads, dropout, forward_expansion, layers=layers)
            for _ in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.to(device)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [B, S] int64;  mask: as SelfAttention takes it, e.g. [B, 1, 1, S] -> [B, S, E]."""
        y = self.dropout(self.position_embedding(self.word_embedding(x)))
        for layer in self.layers:
            y = layer(y, y, y, mask)
        return y


class DecoderBlock(nn.Module):
    """Causal self-attention, then a TransformerBlock over the encoder's output (M).

    Construct:  DecoderBlock(embed_size, heads, forward_expansion, dropout, device, *, layers=seqkern.nn)
    Parameters: norm, attention, transformer_block
    """

    def __init__(
        self,
        embed_size: int,
        heads: int,
        forward_expansion: int,
        dropout: float,
        device: torch.device | str | None,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_size)
        self.attention = SelfAttention(embed_size, heads, layers=layers)
        self.transformer_block = TransformerBlock(
            embed_size, heads, dropout, forward_expansion, layers=layers
        )
        self.dropout = nn.Dropout(dropout)
        self.to(device)

    def forward(
        self,
        x: Tensor,
        value: Tensor,
        key: Tensor,
        src_mask: Tensor | None,
        trg_mask: Tensor | None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """
        Args:     x: [B, T, E];  value, key: [B, S, E];  src_mask: about the keys;  trg_mask, is_causal: of
                  x's own attention; all as SelfAttention takes them
        Returns:  [B, T, E]
        """
        attention = self.attention(x, x, x, trg_mask, is_causal=is_causal)
        return self.transformer_block(value, key, self.dropout(self.norm(attention + x)), src_mask)


class VanillaDecoder(nn.Module):
    """Embeddings, sinusoids, DecoderBlocks and a linear layer to the vocabulary (M's Decoder).

    Construct:  VanillaDecoder(trg_vocab_size, embed_size, num_layers, heads, forward_expansion, dropout,
                device, max_length, *, layers=seqkern.nn);  device: of the parameters
    Parameters: word_embedding, layers.i.*, fc_out;  buffer position_embedding.pe

    Corrected:  as VanillaEncoder.
    """

    def __init__(
        self,
        trg_vocab_size: int,
        embed_size: int,
        num_layers: int,
        heads: int,
        forward_expansion: int,
        dropout: float,
        device: torch.device | str | None,
        max_length: int,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(trg_vocab_size, embed_size)
        self.position_embedding = PositionalEncoding(embed_size, max_length)
        self.layers = nn.ModuleList(
            DecoderBlock(embed_size, heads, forward_expansion, dropout, device, layers=layers)
            for _ in range(num_layers)
        )
        self.fc_out = nn.Linear(embed_size, trg_vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.to(device)

    def forward(
        self,
        x: Tensor,
        enc_out: Tensor,
        src_mask: Tensor | None,
        trg_mask: Tensor | None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """x: [B, T] int64;  enc_out: [B, S, E];  masks, is_causal: as DecoderBlock -> logits [B, T, V]."""
        y = self.dropout(self.position_embedding(self.word_embedding(x)))
        for layer in self.layers:
            y = layer(y, enc_out, enc_out, src_mask, trg_mask, is_causal=is_causal)
        return self.fc_out(y)


class _State(NamedTuple):
    """Of R rows: the encoder's output [R, S, E], the sources' mask [R, 1, 1, S], the ids so far [R, t]."""

    enc_out: Tensor
    src_mask: Tensor
    ids: Tensor | None = None


class VanillaTransformer(DecodingModule):
    """VanillaEncoder and VanillaDecoder (M's Transformer).

    Construct:  VanillaTransformer(src_vocab_size, trg_vocab_size, src_pad_idx, trg_pad_idx, embed_size=512,
                num_layers=6, forward_expansion=4, heads=8, dropout=0, device="cpu", max_length=100, *,
                mask_target_padding=False, layers=seqkern.nn)
                mask_target_padding: no step attends to trg_pad_idx in the target; M's may
    Call:       logits = model(src, trg);  logits[:, t] scores the token after trg[:, : t + 1]
    Decode:     model.decode(src, beam_width=5): every step runs the decoder over all tokens so far; see
                TranslationTransformer for a cache

    Source:     Vaswani et al., "Attention Is All You Need", 2017
    """

    def __init__(
        self,
        src_vocab_size: int,
        trg_vocab_size: int,
        src_pad_idx: int,
        trg_pad_idx: int,
        embed_size: int = 512,
        num_layers: int = 6,
        forward_expansion: int = 4,
        heads: int = 8,
        dropout: float = 0,
        device: torch.device | str | None = "cpu",
        max_length: int = 100,
        *,
        mask_target_padding: bool = False,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.encoder = VanillaEncoder(
            *(src_vocab_size, embed_size, num_layers, heads, device, forward_expansion, dropout, max_length),
            layers=layers,
        )
        self.decoder = VanillaDecoder(
            *(trg_vocab_size, embed_size, num_layers, heads, forward_expansion, dropout, device, max_length),
            layers=layers,
        )
        self.src_pad_idx, self.trg_pad_idx = src_pad_idx, trg_pad_idx
        self.mask_target_padding = mask_target_padding
        self.pad_index = trg_pad_idx

    def make_src_mask(self, src: Tensor) -> Tensor:
        """src: [B, S] -> [B, 1, 1, S] bool, False at padding."""
        return (src != self.src_pad_idx)[:, None, None]

    def make_trg_mask(self, trg: Tensor) -> Tensor:
        """trg: [B, T] -> [B, 1, T, T] bool, the lower triangle, with mask_target_padding without padding."""
        B, T = trg.shape
        lower = torch.ones((T, T), dtype=torch.bool, device=trg.device).tril().expand(B, 1, T, T)
        return lower & self._trg_padding_mask(trg) if self.mask_target_padding else lower

    def _trg_padding_mask(self, trg: Tensor) -> Tensor:
        return (trg != self.trg_pad_idx)[:, None, None]

    def forward(self, src: Tensor, trg: Tensor) -> Tensor:
        """src: [B, S] int64;  trg: [B, T] int64 -> logits [B, T, V]."""
        return self._decode(trg, self.encode_source(src))

    def _decode(self, trg: Tensor, state: _State) -> Tensor:
        """make_trg_mask's mask, told rather than made: causal, and where the padding is."""
        trg_mask = self._trg_padding_mask(trg) if self.mask_target_padding else None
        return self.decoder(trg, state.enc_out, state.src_mask, trg_mask, is_causal=True)

    def encode_source(self, src: Tensor, src_lengths: Tensor | None = None) -> _State:
        """src: [B, S] int64;  src_lengths: [B], None: as src_pad_idx says."""
        if src_lengths is not None:
            beyond = torch.arange(src.shape[1], device=src.device) >= src_lengths.unsqueeze(1)
            src = src.masked_fill(beyond, self.src_pad_idx)
        src_mask = self.make_src_mask(src)
        return _State(self.encoder(src, src_mask), src_mask)

    def step(self, ids: Tensor, state: _State) -> tuple[Tensor, _State]:
        so_far = ids.unsqueeze(1) if state.ids is None else torch.cat([state.ids, ids.unsqueeze(1)], 1)
        state = state._replace(ids=so_far)
        return torch.log_softmax(self._decode(so_far, state)[:, -1], -1), state
