"""Taggers of token sequences: ids [B, T] to one tag for each token, with or without a CRF over the tags.

All take `lengths` [B], integers in 0..T, on the ids' device; None: every step counts. With lengths a row's
result does not depend on its padding, and an empty row has no tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.models import _layers
from seqkern.models.characters import CharacterEncoder, CharacterOptions
from seqkern.ops._attention import valid_from_lengths


class RNNTagger(nn.Module):
    """fc of the recurrent layer's output at each token.

    Construct:  RNNTagger(vocab_size, tagset_size, embed_dim, hidden_size, *, chars=None, cell="lstm",
                num_layers=1, bidirectional=False, dropout=0.0, word_dropout=0.0, unk_idx=1, padding_idx=None,
                layers=seqkern.nn)
                chars: CharacterOptions: each word's vector is the embedding's and what its characters give
                cell: "lstm", "gru", "rnn" or any other recurrent layer of `layers`
                dropout: of the words' vectors, between layers, and before fc
                word_dropout: the share of words whose embedding in training is that of the unknown word,
                unk_idx: what is learned of it, and of the characters, serves words not seen in training
    Call:       emissions = model(x, lengths, chars)
                loss = model.loss(x, tags, lengths, chars);  tags = model.decode(x, lengths, chars)
    Parameters: embedding;  rnn, batch first;  fc: Linear;  with chars also characters: CharacterEncoder
    Source:     M's RNNTagger; bidirectional and with characters: Plank et al., "Multilingual Part-of-Speech
                Tagging with Bidirectional Long Short-Term Memory Models and Auxiliary Loss", 2016
    """

    def __init__(
        self,
        vocab_size: int,
        tagset_size: int,
        embed_dim: int,
        hidden_size: int,
        *,
        chars: CharacterOptions | None = None,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        unk_idx: int = 1,
        padding_idx: int | None = None,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        if not 0 <= word_dropout <= 1:
            raise ValueError(f"word_dropout: expected a probability, 0..1, got {word_dropout}")
        self.word_dropout, self.unk_idx = word_dropout, unk_idx
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.characters = None if chars is None else CharacterEncoder(chars, layers=layers)
        self.dropout = nn.Dropout(dropout)
        input_size = embed_dim + (0 if self.characters is None else self.characters.output_size)
        self.rnn = _layers.make(
            *(layers, cell, input_size, hidden_size),
            num_layers=num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        self.fc = nn.Linear(hidden_size * (2 if bidirectional else 1), tagset_size)

    def forward(self, x: Tensor, lengths: Tensor | None = None, chars: Tensor | None = None) -> Tensor:
        """
        Args:     x: [B, T] ids of words;  lengths: [B] or None
                  chars: [B, T, C] ids of each word's characters, behind them the options' padding_idx;
                  where the model was built with chars
        Returns:  emissions [B, T, tags]: logits, or the scores that a CRF takes
        Raises:   ValueError: chars where the model was built without, none where with, or not [B, T, C]
        """
        if chars is not None and self.characters is None:
            raise ValueError("chars: expected None, the model was built without chars")
        if self.characters is not None and (chars is None or chars.dim() != 3 or chars.shape[:2] != x.shape):
            got = None if chars is None else tuple(chars.shape)
            raise ValueError(f"chars: expected [B, T, C] = ({x.shape[0]}, {x.shape[1]}, C), got {got}")
        words = x
        if self.training and self.word_dropout > 0:
            words = torch.where(torch.rand(x.shape, device=x.device) < self.word_dropout, self.unk_idx, x)
        vectors = self.embedding(words)
        if self.characters is not None:
            vectors = torch.cat([vectors, self.characters(chars)], dim=2)
        y, _ = _layers.run(self.rnn, self.dropout(vectors), lengths)
        return self.fc(self.dropout(y))

    def loss(
        self,
        x: Tensor,
        tags: Tensor,
        lengths: Tensor | None = None,
        chars: Tensor | None = None,
    ) -> Tensor:
        """The mean over all tokens of the tags' negative log-likelihood.

        Args:     tags: [B, T] ids;  beyond the lengths they may be anything;  the others: as forward
        """
        tokens = tags.numel() if lengths is None else lengths.sum().clamp(min=1)
        return self.negative_log_likelihood(self(x, lengths, chars), tags, lengths).sum() / tokens

    def negative_log_likelihood(
        self, emissions: Tensor, tags: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """-log p(tags) of each row, [B], given what forward returned."""
        tags = _valid_tags(tags, lengths, -100)
        losses = nn.functional.cross_entropy(emissions.transpose(1, 2), tags, reduction="none")
        return losses.sum(1)

    @torch.no_grad()
    def decode(
        self, x: Tensor, lengths: Tensor | None = None, chars: Tensor | None = None
    ) -> list[list[int]]:
        """The best tags, one list for each row, as long as its length. Call eval() first, as for forward."""
        return self.best_tags(self(x, lengths, chars), lengths)

    def best_tags(self, emissions: Tensor, lengths: Tensor | None = None) -> list[list[int]]:
        """The best tags given what forward returned."""
        return _cut(emissions.argmax(2).tolist(), lengths)


class BiLSTMCRF(RNNTagger):
    """A bidirectional LSTM whose emissions a conditional random field turns into sequences of tags.

    Construct:  BiLSTMCRF(vocab_size, tagset_size, embed_dim, hidden_size, padding_idx=0, chars=None, *,
                constraints=None, num_layers=1, dropout=0.0, word_dropout=0.0, unk_idx=1, layers=seqkern.nn)
                hidden_size: H of each direction;  constraints: seqkern.CRF's, such as bio_constraints(tags)
                the others: as RNNTagger
    Call:       emissions = model(x, lengths, chars)
                loss = model.loss(x, tags, lengths, chars);  tags = model.decode(x, lengths, chars)
    Parameters: those of RNNTagger, whose fc has 2H inputs;  crf: seqkern.CRF, for any `layers`, batch first
    Source:     Huang, Xu and Yu, "Bidirectional LSTM-CRF Models for Sequence Tagging", 2015; Lample et al.,
                "Neural Architectures for Named Entity Recognition", 2016
    """

    def __init__(
        self,
        vocab_size: int,
        tagset_size: int,
        embed_dim: int,
        hidden_size: int,
        padding_idx: int | None = 0,
        chars: CharacterOptions | None = None,
        *,
        constraints: Sequence[Tensor] | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        unk_idx: int = 1,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__(
            *(vocab_size, tagset_size, embed_dim, hidden_size),
            chars=chars,
            num_layers=num_layers,
            bidirectional=True,
            dropout=dropout,
            word_dropout=word_dropout,
            unk_idx=unk_idx,
            padding_idx=padding_idx,
            layers=layers,
        )
        self.crf = seqkern.nn.CRF(tagset_size, batch_first=True, constraints=constraints)

    def negative_log_likelihood(
        self, emissions: Tensor, tags: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """-log p(tags) of each row, [B], given what forward returned; 0 of an empty row."""
        tags = _valid_tags(tags, lengths, 0)
        if lengths is None:
            return -self.crf(emissions, tags, reduction="none")
        value = self.crf(emissions, tags, reduction="none", lengths=lengths.clamp(min=1))
        return -torch.where(lengths > 0, value, 0)

    def best_tags(self, emissions: Tensor, lengths: Tensor | None = None) -> list[list[int]]:
        """The tags of the highest score given what forward returned (Viterbi)."""
        if lengths is None:
            return self.crf.decode(emissions)
        return _cut(self.crf.decode(emissions, lengths=lengths.clamp(min=1)), lengths)


def _valid_tags(tags: Tensor, lengths: Tensor | None, fill: int) -> Tensor:
    """tags [B, T] with `fill` beyond the lengths."""
    if lengths is None:
        return tags
    return torch.where(valid_from_lengths(lengths, tags.shape[1]), tags, fill)


def _cut(rows: list[list[int]], lengths: Tensor | None) -> list[list[int]]:
    if lengths is None:
        return rows
    return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]
