"""Two translation models to train: a GRU with additive attention, and a pre-norm Transformer.

Both take padded sources and targets and leave the padding out, score a whole target in one call, and decode
through seqkern.models.decoding.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.models._attention import gru_attention_decoder, run_decoder, run_encoder
from seqkern.models._layers import run
from seqkern.models.decoding import DecodingModule
from seqkern.models.positional import PositionalEncoding
from seqkern.nn import DecoderState, ProjectedKeys, TransformerCache
from seqkern.ops._attention import valid_from_lengths


class TranslationModel(DecodingModule):
    """What the two share. A model has `features`, what `out` makes logits of, and a step to decode with."""

    out: nn.Linear

    def __init__(self, pad_index: int, sos_index: int, eos_index: int) -> None:
        super().__init__()
        self.pad_index, self.sos_index, self.eos_index = pad_index, sos_index, eos_index

    def features(
        self, src: Tensor, tgt: Tensor, src_lengths: Tensor | None = None, tgt_lengths: Tensor | None = None
    ) -> Tensor:
        """[B, T, F]: what the logits are a linear function of. Arguments: as for forward."""
        raise NotImplementedError

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_lengths: Tensor | None = None,
        tgt_lengths: Tensor | None = None,
        *,
        valid_only: bool = False,
    ) -> Tensor:
        """Score a target: teacher forcing, all steps in one call.

        Args:     src: [B, S] int64, padded at the end;  tgt: [B, T] int64, <sos> first, T > 0
                  src_lengths, tgt_lengths: [B], None: up to the padding, pad_index, at each row's end
                  valid_only: the logits of the targets' valid steps alone, so that the vocabulary's product
                  leaves the padding out
        Returns:  logits: [B, T, V], step t scores the token after tgt[:, : t + 1];  valid_only: [n, V], row
                  after row, as targets[valid], of n = sum of tgt_lengths
        """
        if tgt_lengths is None:
            tgt_lengths = self.lengths_of(tgt)
        features = self.features(src, tgt, src_lengths, tgt_lengths)
        if valid_only:
            features = features[valid_from_lengths(tgt_lengths, tgt.shape[1])]
        return self.out(features)

    def lengths_of(self, ids: Tensor) -> Tensor:
        """ids [B, T], padded at the end -> lengths [B]."""
        return (ids != self.pad_index).sum(1)


def _embedding(vocab_size: int, size: int, pad_index: int) -> nn.Embedding:
    """Of deviation size^-1/2, which suits the tied output layer."""
    embedding = nn.Embedding(vocab_size, size, padding_idx=pad_index)
    nn.init.normal_(embedding.weight, std=size**-0.5)
    with torch.no_grad():
        embedding.weight[pad_index] = 0
    return embedding


def _shared(name: str, src_vocab_size: int, tgt_vocab_size: int) -> None:
    if src_vocab_size != tgt_vocab_size:
        raise ValueError(
            f"{name}: expected one vocabulary, so src_vocab_size = tgt_vocab_size, got {src_vocab_size} and "
            f"{tgt_vocab_size}"
        )


# ---- GRU with attention ------------------------------------------------------------------------------------


class _GRUState(NamedTuple):
    """Of R rows: the decoder's state, and the encoder's outputs ready to be attended to."""

    decoder: DecoderState
    keys: ProjectedKeys


class TranslationGRU(TranslationModel):
    """A bidirectional GRU, attention and a GRU that is fed what it attends to; by default RNNsearch.

        keys = encoder(dropout(E_s x));  h_0 = tanh(bridge [final h→; final h←])
        h_t, c_t = decoder(dropout(E_t y_{t-1}), keys)
        logits   = out(dropout(tanh(readout [h_t; c_t; E_t y_{t-1}])))

    Construct:  TranslationGRU(src_vocab_size, tgt_vocab_size, embed_dim=256, hidden_size=512, *,
                encoder_size=None, attention="additive", attention_dim=None, dropout=0.3, tie_weights=True,
                share_embeddings=False, pad_index=1, sos_index=2, eos_index=3, layers=seqkern.nn)
                encoder_size: of each direction, None: hidden_size // 2
                attention: "additive", Bahdanau's decoder; "dot", "general", "concat", Luong's, whose output
                h~ stands for h_t;  attention_dim: of "additive" and "concat", None: hidden_size
                tie_weights: out's weight is the target embedding's;  share_embeddings: of one vocabulary
    Call:       logits = model(src, tgt, src_lengths, tgt_lengths)
    Decode:     model.decode(src, src_lengths, beam_width=5)
    Plot:       model.attention_weights(src, tgt)
    Parameters: src_embedding, tgt_embedding, encoder, bridge, decoder.*, readout, out

    Forward runs all steps of the decoder in seqkern.AttentionDecoder, with additive attention on a CPU one
    operator. Padded sources are neither encoded nor attended to.

    Source:     Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and
                Translate", 2015; its deep output with tanh for maxout;  Luong, Pham and Manning, 2015;
                Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017
    """

    def __init__(
        self,
        src_vocab_size: int,
        tgt_vocab_size: int,
        embed_dim: int = 256,
        hidden_size: int = 512,
        *,
        encoder_size: int | None = None,
        attention: str = "additive",
        attention_dim: int | None = None,
        dropout: float = 0.3,
        tie_weights: bool = True,
        share_embeddings: bool = False,
        pad_index: int = 1,
        sos_index: int = 2,
        eos_index: int = 3,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__(pad_index, sos_index, eos_index)
        encoder_size = hidden_size // 2 if encoder_size is None else encoder_size
        self.src_embedding = _embedding(src_vocab_size, embed_dim, pad_index)
        if share_embeddings:
            _shared("share_embeddings", src_vocab_size, tgt_vocab_size)
            self.tgt_embedding = self.src_embedding
        else:
            self.tgt_embedding = _embedding(tgt_vocab_size, embed_dim, pad_index)
        self.encoder = layers.GRU(embed_dim, encoder_size, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * encoder_size, hidden_size)
        self.decoder = gru_attention_decoder(
            *(layers, embed_dim, hidden_size, 2 * encoder_size),
            feeding="bahdanau" if attention == "additive" else "luong",
            attention=attention,
            attention_dim=attention_dim,
            batch_first=True,
        )
        self.readout = nn.Linear(hidden_size + 2 * encoder_size + embed_dim, embed_dim)
        self.out = nn.Linear(embed_dim, tgt_vocab_size)
        if tie_weights:
            self.out.weight = self.tgt_embedding.weight
        self.dropout = nn.Dropout(dropout)

    def features(
        self, src: Tensor, tgt: Tensor, src_lengths: Tensor | None = None, tgt_lengths: Tensor | None = None
    ) -> Tensor:
        return self._decode_all(src, tgt, src_lengths)[0]

    def attention_weights(self, src: Tensor, tgt: Tensor, src_lengths: Tensor | None = None) -> Tensor:
        """What each step attends to: [B, T, S]. Arguments: as for forward."""
        return self._decode_all(src, tgt, src_lengths)[1]

    def _decode_all(self, src: Tensor, tgt: Tensor, src_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        state, keys = self.encode_source(src, src_lengths)
        embedded = self.dropout(self.tgt_embedding(tgt))
        y, _, context, weights = self.decoder(embedded, keys, state)
        return self._read_out(y, context, embedded), weights

    def _read_out(self, y: Tensor, context: Tensor, embedded: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.readout(torch.cat([y, context, embedded], -1))))

    def encode_source(self, src: Tensor, src_lengths: Tensor | None = None) -> _GRUState:
        lengths = self.lengths_of(src) if src_lengths is None else src_lengths
        y, h = run(self.encoder, self.dropout(self.src_embedding(src)), lengths)
        hidden = torch.tanh(self.bridge(torch.cat([h[0], h[1]], 1)))
        fed = torch.zeros_like(hidden) if self.decoder.feeding == "luong" else None
        return _GRUState(DecoderState(hidden, None, fed), self.decoder.project_keys(y, lengths=lengths))

    def step(self, ids: Tensor, state: _GRUState) -> tuple[Tensor, _GRUState]:
        embedded = self.dropout(self.tgt_embedding(ids))
        y, decoder, context, _ = self.decoder.step(embedded, state.keys, state.decoder)
        logits = self.out(self._read_out(y, context, embedded))
        return torch.log_softmax(logits, -1), state._replace(decoder=decoder)


# ---- Transformer -------------------------------------------------------------------------------------------


class _TransformerState(NamedTuple):
    """Of R rows: the encoder's output [R, S, E] and lengths [R]; then of seqkern's layers a cache, which
    holds the projected memory from the first step on, of torch.nn's the ids so far [R, t]."""

    memory: Tensor | None
    memory_lengths: Tensor
    cache: TransformerCache | None = None
    ids: Tensor | None = None


class TranslationTransformer(TranslationModel):
    """A pre-norm Transformer with sinusoids, √d · embeddings and a tied output layer.

    Construct:  TranslationTransformer(src_vocab_size, tgt_vocab_size, d_model=256, nhead=8,
                num_encoder_layers=3, num_decoder_layers=3, dim_feedforward=1024, dropout=0.1, *,
                max_len=1024, tie_weights=True, share_embeddings=False, pad_index=1, sos_index=2, eos_index=3,
                layers=seqkern.nn)
                tie_weights: out's weight is the target embedding's;  share_embeddings: of one vocabulary
    Call:       logits = model(src, tgt, src_lengths, tgt_lengths)
    Decode:     model.decode(src, src_lengths, beam_width=5), with a key-value cache
    Parameters: src_embedding, tgt_embedding, encoder.*, decoder.*, out;  buffer positions.pe

    Padding, of sources and of targets, is left out of the stacks.

    Source:     Vaswani et al., "Attention Is All You Need", 2017; Xiong et al., "On Layer Normalization in
                the Transformer Architecture", 2020 (pre-norm); Press and Wolf, 2017 (tying)
    """

    def __init__(
        self,
        src_vocab_size: int,
        tgt_vocab_size: int,
        d_model: int = 256,
        nhead: int = 8,
        num_encoder_layers: int = 3,
        num_decoder_layers: int = 3,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        *,
        max_len: int = 1024,
        tie_weights: bool = True,
        share_embeddings: bool = False,
        pad_index: int = 1,
        sos_index: int = 2,
        eos_index: int = 3,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__(pad_index, sos_index, eos_index)
        self.d_model = d_model
        options: dict[str, Any] = dict(batch_first=True, norm_first=True)
        sizes = (d_model, nhead, dim_feedforward, dropout)
        self.encoder = layers.TransformerEncoder(
            *(layers.TransformerEncoderLayer(*sizes, **options), num_encoder_layers, nn.LayerNorm(d_model)),
            enable_nested_tensor=False,
        )
        self.decoder = layers.TransformerDecoder(
            layers.TransformerDecoderLayer(*sizes, **options), num_decoder_layers, nn.LayerNorm(d_model)
        )
        for parameter in self.parameters():  # the copies of one layer begin apart, as in torch.nn.Transformer
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.src_embedding = _embedding(src_vocab_size, d_model, pad_index)
        if share_embeddings:
            _shared("share_embeddings", src_vocab_size, tgt_vocab_size)
            self.tgt_embedding = self.src_embedding
        else:
            self.tgt_embedding = _embedding(tgt_vocab_size, d_model, pad_index)
        self.positions = PositionalEncoding(d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, tgt_vocab_size)
        if tie_weights:
            self.out.weight = self.tgt_embedding.weight

    def _embed(self, embedding: nn.Embedding, ids: Tensor, offset: int = 0) -> Tensor:
        return self.dropout(self.positions(embedding(ids) * math.sqrt(self.d_model), offset))

    def features(
        self, src: Tensor, tgt: Tensor, src_lengths: Tensor | None = None, tgt_lengths: Tensor | None = None
    ) -> Tensor:
        memory, src_lengths, *_ = self.encode_source(src, src_lengths)
        tgt_lengths = self.lengths_of(tgt) if tgt_lengths is None else tgt_lengths
        x = self._embed(self.tgt_embedding, tgt)
        return run_decoder(self.decoder, x, memory, tgt_lengths, src_lengths)

    def encode_source(self, src: Tensor, src_lengths: Tensor | None = None) -> _TransformerState:
        lengths = self.lengths_of(src) if src_lengths is None else src_lengths
        memory = run_encoder(self.encoder, self._embed(self.src_embedding, src), lengths)
        new_cache = getattr(self.decoder, "new_cache", None)
        return _TransformerState(memory, lengths, None if new_cache is None else new_cache())

    def step(self, ids: Tensor, state: _TransformerState) -> tuple[Tensor, _TransformerState]:
        if state.cache is None:
            so_far = ids.unsqueeze(1) if state.ids is None else torch.cat([state.ids, ids.unsqueeze(1)], 1)
            x = self._embed(self.tgt_embedding, so_far)
            y = run_decoder(self.decoder, x, state.memory, None, state.memory_lengths)
            return torch.log_softmax(self.out(y[:, -1]), -1), state._replace(ids=so_far)
        x = self._embed(self.tgt_embedding, ids.unsqueeze(1), state.cache.length)
        y, cache = self.decoder(
            x, state.memory, tgt_is_causal=True, memory_lengths=state.memory_lengths, cache=state.cache
        )
        return torch.log_softmax(self.out(y[:, 0]), -1), state._replace(memory=None, cache=cache)
