"""Recurrent language models: the next token's distribution, training in windows, generation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.models import _layers
from seqkern.models._layers import State
from seqkern.models.sampling import sample


class LockedDropout(nn.Module):
    """Dropout with one mask for all time steps.

    Construct:  LockedDropout(p, batch_first=True)
    Call:       x = dropout(x), of x [B, T, F], without batch_first [T, B, F]
    Source:     Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
                Networks", 2016
    """

    def __init__(self, p: float, batch_first: bool = True) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p: expected a probability, 0 <= p < 1, got {p}")
        self.p, self.batch_first = p, batch_first

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        time = 1 if self.batch_first else 0
        mask = torch.empty_like(x.narrow(time, 0, 1)).bernoulli_(1 - self.p)
        return x * (mask / (1 - self.p))


class RNNLanguageModel(nn.Module):
    """log p(token_{t+1} | token_1, …, token_t) = log_softmax(fc(rnn(embedding(tokens))_t)).

    Construct:  RNNLanguageModel(vocab_size, embed_dim, hidden_size, *, cell="gru", num_layers=1, dropout=0.0,
                locked=False, embedding_dropout=0.0, tie_weights=False, logits=False, batch_first=True,
                padding_idx=None, layers=seqkern.nn, **regularisers)
                cell: "gru", "lstm", "rnn" or any other recurrent layer of `layers`; or a callable that makes
                one
                dropout: of embedded tokens, between layers, and before fc (Zaremba et al. 2014)
                locked: the first and the last of these with one mask for all steps (LockedDropout)
                embedding_dropout: share of the words dropped altogether, all of their occurrences (Gal and
                Ghahramani 2016)
                tie_weights: fc's weight is the embedding's, initialised uniformly in ±0.1 (Press and Wolf
                2017); embed_dim must be hidden_size
                logits: return unnormalised scores, for CrossEntropyLoss
                batch_first: tokens [B, T]; else [T, B], as seqkern.text.Windows gives them
                regularisers: of the recurrence, such as variational_dropout and weight_dropout
                (seqkern.nn.Regularised); torch.nn's layers have none
    Call:       scores, state = model(tokens, state)
                tokens = model.generate(start_tokens, max_len, temperature, top_k, top_p, generator)
    Parameters: embedding;  rnn;  fc: Linear
    Corrected:  M's generate feeds one token at a time without carrying the state, drops the prompt, samples
                row 0 only and crashes where it joins 2-D and 1-D ids; here the state goes on, and the result
                is [B, prompt + max_len]
    Source:     M's RNNLanguageModel; Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language
                Models", 2018
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        hidden_size: int,
        *,
        cell: str | Callable[..., nn.Module] = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        locked: bool = False,
        embedding_dropout: float = 0.0,
        tie_weights: bool = False,
        logits: bool = False,
        batch_first: bool = True,
        padding_idx: int | None = None,
        layers: ModuleType = seqkern.nn,
        **regularisers: Any,
    ) -> None:
        super().__init__()
        if tie_weights and embed_dim != hidden_size:
            raise ValueError(
                f"tie_weights: expected embed_dim = hidden_size, got {embed_dim} and {hidden_size}"
            )
        if not 0 <= embedding_dropout < 1:
            raise ValueError(
                f"embedding_dropout: expected a probability, 0 <= p < 1, got {embedding_dropout}"
            )
        self.logits, self.batch_first, self.embedding_dropout = logits, batch_first, embedding_dropout
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.rnn = _layers.make(
            *(layers, cell, embed_dim, hidden_size, num_layers),
            batch_first=batch_first,
            dropout=dropout if num_layers > 1 else 0.0,
            **regularisers,
        )
        self.fc = nn.Linear(hidden_size, vocab_size)
        self.log_softmax = nn.LogSoftmax(dim=2)
        self.dropout = LockedDropout(dropout, batch_first) if locked else nn.Dropout(dropout)
        if tie_weights:
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
            nn.init.zeros_(self.fc.bias)
            self.fc.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """
        Args:     tokens: [B, T] ids, without batch_first [T, B]
                  state: what the call before returned, None for zeros
                  lengths: [B] integers in 0..T, None: all steps
                  reset: bool, as tokens: rows that start from zeros at that step, which seqkern's layers take
        Returns:  log-probabilities, or logits, [B, T, V] or [T, B, V];  the state after each row's last step
        """
        x = self.dropout(self._embed(tokens))
        y, state = _layers.run(self.rnn, x, lengths, state, reset=reset)
        scores = self.fc(self.dropout(y))
        return (scores if self.logits else self.log_softmax(scores)), state

    def _embed(self, tokens: Tensor) -> Tensor:
        if not self.training or self.embedding_dropout == 0:
            return self.embedding(tokens)
        weight = self.embedding.weight
        kept = torch.empty_like(weight[:, :1]).bernoulli_(1 - self.embedding_dropout)
        weight = weight * (kept / (1 - self.embedding_dropout))
        return nn.functional.embedding(tokens, weight, self.embedding.padding_idx)

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

        Args:     start_tokens: [B, P] ids, or [P], P at least 1, whatever batch_first is
                  temperature, top_k, top_p, generator: as seqkern.models.sampling.sample takes them
                  eos_idx: a row that has drawn it goes on with it to its end
        Returns:  [B, P + max_len], or [P + max_len]
        Raises:   ValueError: an empty or wrongly shaped prompt, max_len below 0, and as sample
        """
        if start_tokens.dim() not in (1, 2) or start_tokens.shape[-1] == 0:
            raise ValueError(
                f"start_tokens: expected [B, P] or [P] with P of at least 1, got {tuple(start_tokens.shape)}"
            )
        if max_len < 0:
            raise ValueError(f"max_len: expected at least 0, got {max_len}")
        prompt = start_tokens if start_tokens.dim() == 2 else start_tokens.unsqueeze(0)
        was_training = self.training
        self.eval()
        try:
            tokens = [prompt]
            finished = torch.zeros_like(prompt[:, :1], dtype=torch.bool)
            state = None
            for _ in range(max_len):
                scores, state = self(tokens[-1] if self.batch_first else tokens[-1].t(), state)
                last = scores[:, -1] if self.batch_first else scores[-1]
                drawn = sample(last, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
                drawn = drawn.unsqueeze(1)
                if eos_idx is not None:
                    drawn = torch.where(finished, eos_idx, drawn)
                    finished = finished | (drawn == eos_idx)
                tokens.append(drawn)
        finally:
            self.train(was_training)
        ids = torch.cat(tokens, dim=1)
        return ids if start_tokens.dim() == 2 else ids.squeeze(0)


def char_language_model(
    vocab_size: int, embed_dim: int = 128, hidden_size: int = 512, **options: Any
) -> RNNLanguageModel:
    """An LSTM over characters for windows [T, B]: S's exercise, sized for tiny shakespeare.

    Args:     options: RNNLanguageModel's, in the place of cell="lstm", logits=True, batch_first=False
    """
    options = {"cell": "lstm", "logits": True, "batch_first": False, **options}
    return RNNLanguageModel(vocab_size, embed_dim, hidden_size, **options)


def word_language_model(vocab_size: int, hidden_size: int = 650, **options: Any) -> RNNLanguageModel:
    """A two-layer LSTM over words for windows [T, B], embedding and output tied: sized for WikiText-2.

    Args:     options: RNNLanguageModel's, in the place of cell="lstm", num_layers=2, dropout=0.5,
              tie_weights=True, logits=True, batch_first=False
    Source:   Zaremba, Sutskever and Vinyals, "Recurrent Neural Network Regularization", 2014 (its medium
              model)
    """
    medium = {"cell": "lstm", "num_layers": 2, "dropout": 0.5, "tie_weights": True}
    options = {**medium, "logits": True, "batch_first": False, **options}
    return RNNLanguageModel(vocab_size, hidden_size, hidden_size, **options)
