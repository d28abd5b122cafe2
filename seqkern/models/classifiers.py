"""Classifiers of token sequences: ids [B, T] to logits [B, classes].

All take `lengths` [B], integers in 0..T, on the ids' device; None: every step counts, as in the tutorials.
With lengths a row's result does not depend on its padding, and an empty row is like one of zeros.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.models import _layers
from seqkern.ops._attention import valid_from_lengths


class RNNClassifier(nn.Module):
    """fc of the last layer's final hidden state.

    Construct:  RNNClassifier(vocab_size, embed_dim, hidden_size, num_classes, *, cell="rnn", num_layers=1,
                bidirectional=False, dropout=0.0, pooling="last", padding_idx=None, layers=seqkern.nn)
                cell: "rnn", "lstm", "gru" or any other recurrent layer of `layers`
                dropout: before fc and between layers
                pooling: what fc sees: the final hidden state ("last"), or the "mean" or "max" of all outputs
    Call:       logits = model(x, lengths)
    Parameters: embedding;  rnn, batch first;  fc: Linear
    Source:     M's RNNClassifier
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        num_classes: int,
        *,
        cell: str = "rnn",
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        pooling: str = "last",
        padding_idx: int | None = None,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.pooling = _layers.check_pooling(pooling)
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.rnn = _layers.make(
            *(layers, cell, embed_dim, hidden_size),
            num_layers=num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden_size * (2 if bidirectional else 1), num_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     x: [B, T] ids;  lengths: [B] or None
        Returns:  logits [B, classes]
        """
        y, state = _layers.run(self.rnn, self.embedding(x), lengths)
        return self.fc(self.dropout(_layers.pool(self.pooling, y, state, lengths, self.rnn.bidirectional)))


class _FinalStatesClassifier(nn.Module):
    """What LSTMClassifier and GRUClassifier share: all but the layer's name and the dropout within it."""

    _layer: str
    _layer_dropout: float

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_dim: int,
        num_classes: int,
        num_layers: int = 2,
        bidirectional: bool = True,
        *,
        dropout: float = 0.5,
        layer_dropout: float | None = None,
        embedding_dropout: float = 0.0,
        pooling: str = "last",
        padding_idx: int | None = None,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.pooling = _layers.check_pooling(pooling)
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        layer_dropout = self._layer_dropout if layer_dropout is None else layer_dropout
        layer = _layers.make(
            *(layers, self._layer, embed_dim, hidden_dim),
            num_layers=num_layers,
            batch_first=True,
            dropout=layer_dropout if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        setattr(self, self._layer, layer)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden_dim * (2 if bidirectional else 1), num_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     x: [B, T] ids;  lengths: [B] or None
        Returns:  logits [B, classes]
        """
        layer = getattr(self, self._layer)
        y, state = _layers.run(layer, self.embedding_dropout(self.embedding(x)), lengths)
        return self.fc(self.dropout(_layers.pool(self.pooling, y, state, lengths, layer.bidirectional)))


class LSTMClassifier(_FinalStatesClassifier):
    """fc of the last layer's final hidden states of both directions, [hidden[-2]; hidden[-1]].

    Construct:  LSTMClassifier(vocab_size, embed_dim, hidden_dim, num_classes, num_layers=2,
                bidirectional=True, *, dropout=0.5, layer_dropout=0.0, embedding_dropout=0.0, pooling="last",
                padding_idx=None, layers=seqkern.nn)
                dropout: before fc;  layer_dropout: between layers;  embedding_dropout: of embedded tokens
                pooling: what fc sees: the final hidden states ("last"), or the "mean" or "max" of all outputs
    Call:       logits = model(x, lengths)
    Parameters: embedding;  lstm, batch first;  fc: Linear
    Source:     M's LSTMClassifier
    """

    _layer = "lstm"
    _layer_dropout = 0.0


class GRUClassifier(_FinalStatesClassifier):
    """LSTMClassifier with a GRU, and dropout between its layers.

    Construct:  GRUClassifier(vocab_size, embed_dim, hidden_dim, num_classes, num_layers=2,
                bidirectional=True, *, dropout=0.5, layer_dropout=0.2, embedding_dropout=0.0, pooling="last",
                padding_idx=None, layers=seqkern.nn): as LSTMClassifier
    Call:       logits = model(x, lengths)
    Parameters: embedding;  gru, batch first;  fc: Linear
    Source:     M's GRUClassifier
    """

    _layer = "gru"
    _layer_dropout = 0.2


class GRUWithAttention(nn.Module):
    """fc of the outputs' weighted sum, with weights softmax(attention(output)) over time.

    Construct:  GRUWithAttention(vocab_size, embed_dim, hidden_dim, num_classes, *, padding_idx=None,
                layers=seqkern.nn)
    Call:       logits = model(x, lengths);  logits, weights = model(x, lengths, need_weights=True)
    Parameters: embedding;  gru, batch first;  attention: Linear H → 1;  fc: Linear
    Corrected:  in M padded steps take part in the softmax; here they do not where lengths are given
    Source:     M's GRUWithAttention
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_dim: int,
        num_classes: int,
        *,
        padding_idx: int | None = None,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.gru = layers.GRU(embed_dim, hidden_dim, batch_first=True)
        self.attention = nn.Linear(hidden_dim, 1)
        self.fc = nn.Linear(hidden_dim, num_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None, *, need_weights: bool = False) -> Any:
        """
        Args:     x: [B, T] ids;  lengths: [B] or None
        Returns:  logits [B, classes];  with need_weights also the weights [B, T]
        """
        y, _ = _layers.run(self.gru, self.embedding(x), lengths)
        context, weights = _layers.attend(self.attention(y).squeeze(2), y, lengths)
        logits = self.fc(context)
        return (logits, weights) if need_weights else logits


class SentimentLSTM(nn.Module):
    """A bidirectional LSTM's final hidden states through two linear layers: fc2(relu(fc1([h; h']))).

    Construct:  SentimentLSTM(vocab_size, embed_dim, hidden_dim, num_layers, num_classes, dropout=0.5, *,
                embedding_dropout=0.0, pooling="last", padding_idx=1, layers=seqkern.nn)
                dropout: between layers, and before fc1 and fc2;  embedding_dropout: of embedded tokens
                pooling: what fc1 sees: the final hidden states ("last"), or the "mean" or "max" of all
                outputs
                padding_idx: M's vocabulary for this model has <UNK> 0, <PAD> 1
    Call:       logits = model(text, lengths)
    Parameters: embedding;  lstm, batch first;  fc1: Linear 2H → H;  fc2: Linear H → classes
    Corrected:  a review that cleaning empties has length 0, which M's packing refuses; here it is like zeros
    Source:     M's SentimentLSTM
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_dim: int,
        num_layers: int,
        num_classes: int,
        dropout: float = 0.5,
        *,
        embedding_dropout: float = 0.0,
        pooling: str = "last",
        padding_idx: int | None = 1,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.pooling = _layers.check_pooling(pooling)
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.lstm = layers.LSTM(
            *(embed_dim, hidden_dim, num_layers),
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=True,
        )
        self.fc1 = nn.Linear(2 * hidden_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, num_classes)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.dropout = nn.Dropout(dropout)
        self.relu = nn.ReLU()

    def forward(self, text: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     text: [B, T] ids;  lengths: [B] or None
        Returns:  logits [B, classes]
        """
        y, state = self._encode(text, lengths)
        return self._head(self.dropout(_layers.pool(self.pooling, y, state, lengths, True)))

    def _encode(self, text: Tensor, lengths: Tensor | None) -> tuple[Tensor, _layers.State]:
        return _layers.run(self.lstm, self.embedding_dropout(self.embedding(text)), lengths)

    def _head(self, features: Tensor) -> Tensor:
        """features [B, 2H] → logits [B, classes]"""
        return self.fc2(self.dropout(self.relu(self.fc1(features))))


class OutputAttention(nn.Module):
    """The weighted sum of a bidirectional layer's outputs, with weights softmax(attn(outputs)) over time.

    Construct:  OutputAttention(hidden_dim, *, layers=seqkern.nn)
                hidden_dim: H of each direction;  layers: taken as by every model; this one has none of them
    Call:       context, weights = attention(outputs, lengths)
    Parameters: attn: Linear 2H → 1
    Corrected:  in M padded steps take part in the softmax; here they do not where lengths are given
    Source:     M's Attention(hidden_dim)
    """

    def __init__(self, hidden_dim: int, *, layers: ModuleType = seqkern.nn) -> None:
        super().__init__()
        self.attn = nn.Linear(2 * hidden_dim, 1)

    def forward(self, outputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:     outputs: [B, T, 2H];  lengths: [B] or None
        Returns:  context [B, 2H];  weights [B, T]
        """
        return _layers.attend(self.attn(outputs).squeeze(2), outputs, lengths)


class SentimentLSTMWithAttention(SentimentLSTM):
    """SentimentLSTM with attention over the outputs in the place of the final hidden states.

    Construct:  SentimentLSTMWithAttention(vocab_size, embed_dim, hidden_dim, num_layers, num_classes,
                dropout=0.5, *, embedding_dropout=0.0, padding_idx=1, layers=seqkern.nn): as SentimentLSTM
    Call:       logits = model(text, lengths);  logits, weights = model(text, lengths, need_weights=True)
    Parameters: those of SentimentLSTM;  attention: OutputAttention. The context enters fc1 without dropout
    Corrected:  M builds the attention with hidden_dim * 2, which does not fit the outputs: with hidden_dim
                here. Padding takes no part where lengths are given
    Source:     M's SentimentLSTMWithAttention
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_dim: int,
        num_layers: int,
        num_classes: int,
        dropout: float = 0.5,
        *,
        embedding_dropout: float = 0.0,
        padding_idx: int | None = 1,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__(
            *(vocab_size, embed_dim, hidden_dim, num_layers, num_classes, dropout),
            embedding_dropout=embedding_dropout,
            padding_idx=padding_idx,
            layers=layers,
        )
        self.attention = OutputAttention(hidden_dim, layers=layers)

    def forward(self, text: Tensor, lengths: Tensor | None = None, *, need_weights: bool = False) -> Any:
        """
        Args:     text: [B, T] ids;  lengths: [B] or None
        Returns:  logits [B, classes];  with need_weights also the weights [B, T]
        """
        y, _ = self._encode(text, lengths)
        context, weights = self.attention(y, lengths)
        logits = self._head(context)
        return (logits, weights) if need_weights else logits


class BinarySentimentLSTM(nn.Module):
    """The probability sigmoid(fc(final hidden state)).

    Construct:  BinarySentimentLSTM(vocab_size, embed_dim, hidden_dim, *, logits=False, padding_idx=None,
                layers=seqkern.nn)
                logits: return fc's values, for BCEWithLogitsLoss
    Call:       score = model(text, lengths)
    Parameters: embedding;  lstm, batch first;  fc: Linear H → 1
    Source:     D's SentimentLSTM
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_dim: int,
        *,
        logits: bool = False,
        padding_idx: int | None = None,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.logits = logits
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.lstm = layers.LSTM(embed_dim, hidden_dim, batch_first=True)
        self.fc = nn.Linear(hidden_dim, 1)

    def forward(self, text: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     text: [B, T] ids;  lengths: [B] or None
        Returns:  [B, 1] probabilities, or logits
        """
        _, state = _layers.run(self.lstm, self.embedding(text), lengths)
        score = self.fc(_layers.last_hidden(state))
        return score if self.logits else torch.sigmoid(score)


class LSTMModel(nn.Module):
    """fc of the last layer's final hidden state.

    Construct:  LSTMModel(vocab_size, embedding_dim, hidden_dim, output_dim, n_layers=1, dropout=0.5, *,
                padding_idx=None, layers=seqkern.nn)
                dropout: before fc and between layers
    Call:       logits = model(text, lengths)
    Parameters: embedding;  lstm, batch first;  fc: Linear
    Source:     S's LSTMModel
    """

    _bidirectional = False

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        output_dim: int,
        n_layers: int = 1,
        dropout: float = 0.5,
        *,
        padding_idx: int | None = None,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=padding_idx)
        self.lstm = layers.LSTM(
            *(embedding_dim, hidden_dim, n_layers),
            batch_first=True,
            dropout=dropout if n_layers > 1 else 0.0,
            bidirectional=self._bidirectional,
        )
        self.fc = nn.Linear(hidden_dim * (2 if self._bidirectional else 1), output_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     text: [B, T] ids;  lengths: [B] or None
        Returns:  logits [B, O]
        """
        _, state = _layers.run(self.lstm, self.embedding(text), lengths)
        return self.fc(self.dropout(_layers.last_hidden(state, self._bidirectional)))


class BiLSTMModel(LSTMModel):
    """LSTMModel in both directions: fc over [hidden[-2]; hidden[-1]], 2H.

    Construct, Call, Parameters: as LSTMModel
    Source:     S's BiLSTMModel
    """

    _bidirectional = True


class TweetClassifier(nn.Module):
    """sigmoid(fc2(relu(fc1(last step)))), the LSTM starting from random states in training.

    Construct:  TweetClassifier(args, *, layers=seqkern.nn)
                args: has hidden_dim (H), lstm_layers and max_words, as an argparse.Namespace or any other
                object; batch_size, which T's has too, is not read: the batch's own size counts
    Call:       score = model(x, lengths, generator=generator)
    Parameters: embedding [max_words, H], padding_idx 0;  lstm H → H, batch first;  fc1: Linear H → 257;  fc2:
                Linear 257 → 1
    Corrected:  T draws h_0 and c_0 at random in evaluation too, so that a text's score differs from call to
                call: here they are zero in evaluation, and `generator` seeds them in training
    Source:     T's TweetClassifier
    """

    def __init__(self, args: Any, *, layers: ModuleType = seqkern.nn) -> None:
        super().__init__()
        self.hidden_dim, self.lstm_layers = args.hidden_dim, args.lstm_layers
        self.dropout = nn.Dropout(0.5)
        self.embedding = nn.Embedding(args.max_words, args.hidden_dim, padding_idx=0)
        self.lstm = layers.LSTM(args.hidden_dim, args.hidden_dim, args.lstm_layers, batch_first=True)
        self.fc1 = nn.Linear(args.hidden_dim, 257)
        self.fc2 = nn.Linear(257, 1)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """
        Args:     x: [B, T] ids;  lengths: [B] or None;  generator: on x's device
        Returns:  probabilities [B, 1]
        """
        state = self._random_state(len(x), generator) if self.training else None
        _, state = _layers.run(self.lstm, self.embedding(x), lengths, state)
        features = torch.relu(self.fc1(self.dropout(_layers.last_hidden(state))))
        return torch.sigmoid(self.fc2(self.dropout(features)))

    def _random_state(self, B: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        h_0, c_0 = (self.fc1.weight.new_empty(self.lstm_layers, B, self.hidden_dim) for _ in range(2))
        nn.init.xavier_normal_(h_0, generator=generator)
        nn.init.xavier_normal_(c_0, generator=generator)
        return h_0, c_0


class EmbeddingModel(nn.Module):
    """The next word of the mean of some words' vectors: CBOW; of one word's: skip-gram.

    Construct:  EmbeddingModel(vocab_size, embed_dim, *, padding_idx=None, layers=seqkern.nn)
                layers: taken as by every model; this one has none of them
    Call:       logits = model(context, lengths)
    Parameters: embedding;  fc: Linear E → V
    Source:     M's EmbeddingModel; Mikolov et al., "Efficient Estimation of Word Representations in Vector
                Space", 2013, and "Distributed Representations of Words and Phrases", 2013, whose negative
                sampling is `sampled_loss`
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        *,
        padding_idx: int | None = None,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.fc = nn.Linear(embed_dim, vocab_size)

    def forward(self, context: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     context: [B, T] ids, or one word each [B];  lengths: [B] or None
        Returns:  logits [B, V] of the word to be predicted
        """
        return self.fc(self._mean(context, lengths))

    def sampled_loss(
        self, context: Tensor, target: Tensor, negatives: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Negative sampling: -log sigmoid(score of the target) - sum of log sigmoid(-score of a negative),
        the mean over B. It computes 1 + K scores a row in the place of V.

        Args:     context, lengths: as forward takes them;  target: [B] ids;  negatives: [B, K] ids, drawn by
                  the caller
        """
        mean = self._mean(context, lengths)
        words = torch.cat([target.unsqueeze(1), negatives], dim=1)  # [B, 1 + K]
        scores = (self.fc.weight[words] @ mean.unsqueeze(2)).squeeze(2) + self.fc.bias[words]
        signs = torch.ones_like(scores)
        signs[:, 1:] = -1
        return -nn.functional.logsigmoid(signs * scores).sum(1).mean()

    def _mean(self, context: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, E]"""
        if context.dim() == 1:
            return self.embedding(context)
        vectors = self.embedding(context)
        if lengths is None:
            return vectors.mean(1)
        valid = valid_from_lengths(lengths, context.shape[1]).unsqueeze(2)
        return torch.where(valid, vectors, 0).sum(1) / lengths.clamp(min=1).unsqueeze(1)
