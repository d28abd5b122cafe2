"""Transformer encoders over tokens: T's from its own parts, S's and D's from torch.nn's layers."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkern.nn
from seqkern import ops
from seqkern.models._attention import backend_of, run_encoder
from seqkern.models._layers import max_over_time
from seqkern.models.decoding import ancestral_sampling
from seqkern.models.positional import PositionalEncoding, sinusoids

# ---- T -----------------------------------------------------------------------------------------------------


class MultiHeadAttentionHA(nn.Module):
    """Multi-head attention that returns its output H and every head's weights A (T's MultiHeadAttention).

    Construct:  MultiHeadAttentionHA(d_model, num_heads, dropout, d_input=None, *, layers=seqkern.nn)
                dropout: of the weights;  d_input: sizes of (X_q, X_k, X_v), None: d_model each
    Call:       H, A = attention(X_q, X_k, X_v)
    Parameters: W_q, W_k, W_v lin(→d_model) without bias, W_h lin(d_model→d_model)
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float,
        d_input: tuple[int, int, int] | None = None,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads: expected a divisor of d_model = {d_model}, got {num_heads}")
        self.d_model, self.num_heads, self.d_k = d_model, num_heads, d_model // num_heads
        d_xq, d_xk, d_xv = (d_model, d_model, d_model) if d_input is None else d_input
        self.dropout = nn.Dropout(dropout)
        self.W_q = nn.Linear(d_xq, d_model, bias=False)
        self.W_k = nn.Linear(d_xk, d_model, bias=False)
        self.W_v = nn.Linear(d_xv, d_model, bias=False)
        self.W_h = nn.Linear(d_model, d_model)
        self._backend = backend_of(layers)

    def scaled_dot_product_attention(
        self, Q: Tensor, K: Tensor, V: Tensor, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """softmax(Q K^T / √d_k) V, with d_k of this module, whatever Q's last dim.

        Args:     Q: [B, heads, L, E];  K: [B, heads, S, E];  V: [B, heads, S, D];  lengths: [B] of the keys
        Returns:  H: [B, heads, L, D];  A: [B, heads, L, S], after dropout
        """
        B, heads = Q.shape[:2]
        lengths = None if lengths is None else lengths.repeat_interleave(heads)
        q, k, v = (x.flatten(0, 1) for x in (Q, K, V))
        H, A = ops.dot_attention(q, k, v, scale=self.d_k**-0.5, lengths=lengths, backend=self._backend)
        if self.training and self.dropout.p:
            A = self.dropout(A)
            H = A @ v
        return H.unflatten(0, (B, heads)), A.unflatten(0, (B, heads))

    def forward(
        self,
        X_q: Tensor,
        X_k: Tensor,
        X_v: Tensor,
        *,
        lengths: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:     X_q: [B, L, d_xq];  X_k: [B, S, d_xk];  X_v: [B, S, d_xv]
                  lengths: [B] integers in 0..S: row b has lengths[b] keys, and the rest costs nothing
                  need_weights: False: A is None, and never made
        Returns:  H: [B, L, d_model];  A: [B, heads, L, S], after dropout
        """
        Q, K, V = (
            projection(x).unflatten(2, (self.num_heads, self.d_k)).transpose(1, 2)
            for projection, x in ((self.W_q, X_q), (self.W_k, X_k), (self.W_v, X_v))
        )
        A = None
        if need_weights:
            H, A = self.scaled_dot_product_attention(Q, K, V, lengths=lengths)
        else:
            H = ops.scaled_dot_product_attention(
                *(Q, K, V),
                dropout_p=self.dropout.p if self.training else 0.0,
                lengths=lengths,
                backend=self._backend,
            )
        return self.W_h(H.transpose(1, 2).flatten(2)), A


class CNN(nn.Module):
    """The feed-forward network of an EncoderLayer, T's "convolutions" of kernel size 1.

    Construct:  CNN(d_model, hidden_dim)
    Parameters: k1convL1 lin(d_model→hidden_dim), k1convL2 lin(hidden_dim→d_model)
    """

    def __init__(self, d_model: int, hidden_dim: int) -> None:
        super().__init__()
        self.k1convL1 = nn.Linear(d_model, hidden_dim)
        self.k1convL2 = nn.Linear(hidden_dim, d_model)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.k1convL2(self.activation(self.k1convL1(x)))


class EncoderLayer(nn.Module):
    """Self-attention and CNN, each with its residual and norm, post-norm (T).

    Construct:  EncoderLayer(d_model, num_heads, conv_hidden_dim, dropout=0.1, *, layers=seqkern.nn)
                dropout: of attention's weights
    Parameters: mha, cnn, layernorm1, layernorm2 (eps 1e-6)
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        conv_hidden_dim: int,
        dropout: float = 0.1,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.mha = MultiHeadAttentionHA(d_model, num_heads, dropout, layers=layers)
        self.cnn = CNN(d_model, conv_hidden_dim)
        self.layernorm1 = nn.LayerNorm(d_model, eps=1e-6)
        self.layernorm2 = nn.LayerNorm(d_model, eps=1e-6)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: [B, T, d_model];  lengths: [B], None: all T -> [B, T, d_model], arbitrary in the padding."""
        x = self.layernorm1(x + self.mha(x, x, x, lengths=lengths, need_weights=False)[0])
        return self.layernorm2(x + self.cnn(x))


class Embeddings(nn.Module):
    """Embeddings of tokens and of positions, then norm and dropout (T).

    Construct:  Embeddings(d_model, vocab_size, max_position_embeddings, dropout=0)
    Parameters: word_embeddings (padding_idx 1), position_embeddings (learned, sinusoids at first), LayerNorm
                (eps 1e-12)
    """

    def __init__(
        self, d_model: int, vocab_size: int, max_position_embeddings: int, dropout: float = 0
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, d_model, padding_idx=1)
        self.position_embeddings = nn.Embedding.from_pretrained(
            sinusoids(max_position_embeddings, d_model), freeze=False
        )
        self.LayerNorm = nn.LayerNorm(d_model, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """
        Args:     input_ids: [B, T] int64
        Returns:  [B, T, d_model]
        Raises:   ValueError: more steps than max_position_embeddings
        """
        T, table = input_ids.shape[1], self.position_embeddings.weight
        if len(table) < T:
            raise ValueError(
                f"input_ids: expected at most max_position_embeddings = {len(table)} steps, got {T}"
            )
        embedded = self.word_embeddings(input_ids) + table[:T]
        return self.dropout(self.LayerNorm(embedded))


class TransformerEncoder(nn.Module):
    """Embeddings and EncoderLayers (T).

    Construct:  TransformerEncoder(num_layers, d_model, num_heads, ff_hidden_dim, input_vocab_size,
                maximum_position_encoding, dropout=0.1, *, layers=seqkern.nn)
    Parameters: embedding.*, enc_layers.i.*
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        ff_hidden_dim: int,
        input_vocab_size: int,
        maximum_position_encoding: int,
        dropout: float = 0.1,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.embedding = Embeddings(d_model, input_vocab_size, maximum_position_encoding, dropout)
        self.enc_layers = nn.ModuleList(
            EncoderLayer(d_model, num_heads, ff_hidden_dim, dropout, layers=layers) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: [B, T] int64;  lengths: [B], None: all T -> [B, T, d_model], arbitrary in the padding."""
        y = self.embedding(x)
        for layer in self.enc_layers:
            y = layer(y, lengths)
        return y


class TransformerClassifier(nn.Module):
    """TransformerEncoder, the maximum over time, a linear layer (T).

    Construct:  TransformerClassifier(num_layers, d_model, num_heads, conv_hidden_dim, input_vocab_size,
                num_answers, *, maximum_position_encoding=10000, dropout=0.1, layers=seqkern.nn)
    Parameters: encoder.*, dense

    Corrected:  in T padding is attended to and takes part in the maximum. With lengths it does neither;
                without them T's values hold.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        conv_hidden_dim: int,
        input_vocab_size: int,
        num_answers: int,
        *,
        maximum_position_encoding: int = 10000,
        dropout: float = 0.1,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(
            *(num_layers, d_model, num_heads, conv_hidden_dim, input_vocab_size, maximum_position_encoding),
            dropout,
            layers=layers,
        )
        self.dense = nn.Linear(d_model, num_answers)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: [B, T] int64;  lengths: [B], None: all T -> logits [B, num_answers]."""
        y = self.encoder(x, lengths)
        return self.dense(y.amax(1) if lengths is None else max_over_time(y, lengths))


# ---- S and D -----------------------------------------------------------------------------------------------


class SimpleTransformer(nn.Module):
    """A classifier: √d · embedding plus sinusoids, torch.nn's encoder layers, the mean over time (S).

    Construct:  SimpleTransformer(vocab_size, d_model, nhead, num_layers, dim_feedforward, output_dim,
                dropout=0.1, *, max_len=5000, layers=seqkern.nn)
    Parameters: embedding, transformer_encoder.*, fc;  buffer pos_encoder.pe

    S ignores padding, and so it is without lengths. With them padding costs nothing and takes no part.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int,
        output_dim: int,
        dropout: float = 0.1,
        *,
        max_len: int = 5000,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.pos_encoder = PositionalEncoding(d_model, max_len)
        layer = layers.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, batch_first=True)
        self.transformer_encoder = layers.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.fc = nn.Linear(d_model, output_dim)

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> Tensor:
        """
        Args:     src: [B, T] int64;  src_mask: as torch.nn.TransformerEncoder takes it, [T, T]
                  lengths: [B], None: all T
        Returns:  logits: [B, output_dim]; an empty row gives fc's bias
        """
        x = self.pos_encoder(self.embedding(src) * math.sqrt(self.d_model))
        y = run_encoder(self.transformer_encoder, x, lengths, src_mask)
        return self.fc(y.mean(1) if lengths is None else y.sum(1) / lengths.clamp(min=1).unsqueeze(1))


class _State(NamedTuple):
    """What a language model has read: of torch.nn's layers the ids [t, R], of seqkern's their cache."""

    ids: Tensor | None
    cache: Any | None


class TransformerModel(nn.Module):
    """A language model: √d · embedding plus sinusoids, torch.nn's encoder layers, time first (D).

    Construct:  TransformerModel(vocab_size, d_model=512, nhead=8, num_layers=6, *, causal=True,
                dim_feedforward=2048, dropout=0.1, max_len=5000, layers=seqkern.nn)
                causal: a step sees no later one, which a language model wants; False: D's values
    Call:       logits = model(src)
    Decode:     model.generate(prompt), or the searches: greedy_search(model.step, model.initial_state(), …)
    Parameters: embedding, transformer_encoder.*, fc;  buffer pos_encoder.pe [max_len, d_model]

    Corrected:  D has no causal mask, does not keep d_model, and adds the positions along the batch.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        nhead: int = 8,
        num_layers: int = 6,
        *,
        causal: bool = True,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        max_len: int = 5000,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.d_model, self.causal = d_model, causal
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.pos_encoder = PositionalEncoding(d_model, max_len, batch_first=False)
        layer = layers.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout)
        self.transformer_encoder = layers.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.fc = nn.Linear(d_model, vocab_size)

    def forward(self, src: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     src: [T, B] int64;  lengths: [B], None: all T
        Returns:  logits: [T, B, V]; causal: step t scores the token after src[: t + 1]
        """
        return self.fc(run_encoder(self.transformer_encoder, self._embed(src), lengths, None, self.causal))

    def _embed(self, src: Tensor, offset: int = 0) -> Tensor:
        return self.pos_encoder(self.embedding(src) * math.sqrt(self.d_model), offset)

    def initial_state(self) -> _State:
        """What `step` starts from. A cache, where the layers have one, is changed by the steps.

        Raises:   ValueError: a model with causal=False, whose earlier outputs change with each token
        """
        if not self.causal:
            raise ValueError("causal: expected True, to decode step by step, got False")
        new_cache = getattr(self.transformer_encoder, "new_cache", None)
        return _State(None, None if new_cache is None else new_cache())

    def step(self, ids: Tensor, state: _State) -> tuple[Tensor, _State]:
        """ids: [R] int64 -> (log-probabilities of the next token [R, V], state)."""
        if state.cache is None:
            so_far = ids.unsqueeze(0) if state.ids is None else torch.cat([state.ids, ids.unsqueeze(0)])
            return torch.log_softmax(self(so_far)[-1], -1), _State(so_far, None)
        x = self._embed(ids.unsqueeze(0), state.cache.length)
        y, cache = self.transformer_encoder(x, is_causal=True, cache=state.cache)
        return torch.log_softmax(self.fc(y[0]), -1), _State(None, cache)

    def reorder(self, state: _State, index: Tensor) -> _State:
        """Row r of the result is row index[r] of this: for beam_search."""
        if state.cache is not None:
            state.cache.reorder(index)
            return state
        return _State(None if state.ids is None else state.ids.index_select(1, index), None)

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor,
        max_len: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        *,
        eos_idx: int | None = None,
    ) -> Tensor:
        """The prompt and max_len tokens drawn after it, one by one, in evaluation mode.

        Args:     start_tokens: [B, P] ids, batch first, P at least 1
                  temperature, top_k, top_p, generator: as seqkern.models.sample takes them
                  eos_idx: a row that has drawn it goes on with it to its end
        Returns:  [B, P + max_len]
        Raises:   ValueError: an empty or wrongly shaped prompt, max_len below 1, a model with causal=False,
                  and as sample
        """
        if start_tokens.dim() != 2 or not start_tokens.shape[1]:
            raise ValueError(
                f"start_tokens: expected [B, P] with P of at least 1, got {tuple(start_tokens.shape)}"
            )
        was_training = self.training
        self.eval()
        try:
            state = self._read(start_tokens[:, :-1].T, self.initial_state())
            drawn = ancestral_sampling(
                *(self.step, state, start_tokens[:, -1]),
                eos_index=eos_idx,
                max_len=max_len,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generator,
                pad_index=0 if eos_idx is None else eos_idx,
            ).ids
        finally:
            self.train(was_training)
        drawn = F.pad(drawn, (0, max_len - drawn.shape[1]), value=0 if eos_idx is None else eos_idx)
        return torch.cat([start_tokens, drawn], 1)

    def _read(self, ids: Tensor, state: _State) -> _State:
        """The state after the first ids [P, R], P >= 0, all at once."""
        if state.cache is None:
            return _State(ids, None)
        if not len(ids):
            return state
        _, cache = self.transformer_encoder(self._embed(ids), is_causal=True, cache=state.cache)
        return _State(None, cache)
