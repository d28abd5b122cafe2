"""Contextual word vectors in the manner of ELMo: a language model in both directions over words that are read
from their characters, and a learned mix of its layers.

Source: Peters et al., "Deep contextualized word representations", 2018
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.models import _layers
from seqkern.models.characters import CharacterEncoder, CharacterOptions
from seqkern.ops._attention import valid_from_lengths


class BidirectionalLanguageModel(nn.Module):
    """Predicts each word from those before it, and from those behind it, by two stacks of LSTMs that share
    the words' encoder and the softmax.

    Construct:  BidirectionalLanguageModel(vocab_size, chars, hidden_size, num_layers=2, *, proj_size=0,
                dropout=0.1, layers=seqkern.nn)
                vocab_size: of the words that are predicted;  chars: CharacterOptions, projected to P
                proj_size: P, the size of each LSTM's output; 0: hidden_size
                dropout: of each LSTM's input, and before the softmax
    Call:       forward_logits, backward_logits = model(chars, lengths)
                loss = model.loss(chars, words, lengths);  vectors = model.vectors(chars, lengths)
    Parameters: characters: CharacterEncoder;  forward_layers.k, backward_layers.k: LSTM, batch first;  fc:
                Linear P → V
    From the second layer on, a layer's input is added to its output.
    """

    def __init__(
        self,
        vocab_size: int,
        chars: CharacterOptions,
        hidden_size: int,
        num_layers: int = 2,
        *,
        proj_size: int = 0,
        dropout: float = 0.1,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        size = proj_size or hidden_size
        if chars.projection not in (None, size):
            raise ValueError(f"chars.projection: expected None or P = {size}, got {chars.projection}")
        self.vector_size = 2 * size
        self.num_layers = num_layers
        self.characters = CharacterEncoder(replace(chars, projection=size), layers=layers)
        self.forward_layers, self.backward_layers = (
            nn.ModuleList(
                layers.LSTM(size, hidden_size, batch_first=True, proj_size=proj_size)
                for _ in range(num_layers)
            )
            for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(size, vocab_size)

    def forward(self, chars: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:     chars: [B, T, C] ids of each word's characters;  lengths: [B] integers in 0..T, None: all
        Returns:  logits [B, T, V] of the words t + 1, from the words up to t;  logits [B, T, V] of the words
                  t - 1, from the words t and on
        """
        ahead, back = self._outputs(chars, lengths)
        return self.fc(self.dropout(ahead[-1])), self.fc(self.dropout(back[-1]))

    def loss(self, chars: Tensor, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood of a word, over both directions: exp of it is the perplexity.

        Args:     words: [B, T] ids: each row's first word is predicted backward only, its last forward only,
                  so that sentences should stand between boundary words;  the others: as forward
        """
        ahead, back = self._outputs(chars, lengths)
        if lengths is None:
            predicted = torch.ones_like(words[:, 1:], dtype=torch.bool)
        else:  # the pairs of neighbours of which both are valid
            predicted = valid_from_lengths(lengths - 1, words.shape[1] - 1)
        losses = [
            nn.functional.cross_entropy(
                self.fc(self.dropout(y[predicted])), target[predicted], reduction="sum"
            )
            for y, target in ((ahead[-1][:, :-1], words[:, 1:]), (back[-1][:, 1:], words[:, :-1]))
        ]
        return (losses[0] + losses[1]) / (2 * predicted.sum()).clamp(min=1)

    def vectors(self, chars: Tensor, lengths: Tensor | None = None) -> Tensor:
        """All layers' vectors of each word, [num_layers + 1, B, T, 2P]: the encoder's, twice, then each
        layer's forward and backward outputs. Zero beyond the lengths."""
        ahead, back = self._outputs(chars, lengths)
        stacked = torch.stack([torch.cat(pair, dim=2) for pair in zip(ahead, back, strict=True)])
        if lengths is None:
            return stacked
        return torch.where(valid_from_lengths(lengths, chars.shape[1]).unsqueeze(2), stacked, 0)

    def _outputs(self, chars: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The words' vectors and each layer's output, [B, T, P], in both directions."""
        x = self.characters(chars)
        ahead = self._stack(self.forward_layers, x, lengths)
        back = self._stack(self.backward_layers, _reverse(x, lengths), lengths)
        return ahead, [x, *(_reverse(y, lengths) for y in back[1:])]

    def _stack(self, stack: nn.ModuleList, x: Tensor, lengths: Tensor | None) -> list[Tensor]:
        outputs = [x]
        for k, layer in enumerate(stack):
            y, _ = _layers.run(layer, self.dropout(outputs[-1]), lengths)
            outputs.append(y if k == 0 else y + outputs[-1])
        return outputs


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [B, T, F] with each row's valid steps in reverse order; its padding stays where it is."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    last = lengths.unsqueeze(1) - 1
    source = torch.where(steps <= last, last - steps, steps)  # [B, T]
    return x.gather(1, source.unsqueeze(2).expand_as(x))


class ScalarMix(nn.Module):
    """gamma * sum over layers j of softmax(weights)_j * vectors_j.

    Construct:  ScalarMix(num_layers)
    Parameters: weights [num_layers], zeros;  gamma, a scalar, 1
    Source:     Peters et al. 2018, equation 1
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors [num_layers, .., F] → [.., F]"""
        if len(vectors) != len(self.weights):
            raise ValueError(f"vectors: expected {len(self.weights)} layers, got {len(vectors)}")
        return self.gamma * torch.tensordot(torch.softmax(self.weights, 0), vectors, dims=1)


class ContextualEmbedding(nn.Module):
    """Contextual word vectors for another model: a trained language model's layers, mixed as that task likes.

    Construct:  ContextualEmbedding(language_model, *, dropout=0.5, freeze=True)
                language_model: BidirectionalLanguageModel;  dropout: of the mixed vectors
                freeze: the language model gets no gradients, and stays in evaluation mode
    Call:       x = embedding(chars, lengths)
    Parameters: language_model;  mix: ScalarMix
    """

    def __init__(
        self, language_model: BidirectionalLanguageModel, *, dropout: float = 0.5, freeze: bool = True
    ) -> None:
        super().__init__()
        self.freeze = freeze
        self.language_model = language_model
        self.mix = ScalarMix(language_model.num_layers + 1)
        self.dropout = nn.Dropout(dropout)
        self.output_size = language_model.vector_size
        if freeze:
            language_model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ContextualEmbedding:
        super().train(mode)
        if self.freeze:
            self.language_model.eval()
        return self

    def forward(self, chars: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     chars: [B, T, C] ids of each word's characters;  lengths: [B] integers in 0..T, None: all
        Returns:  [B, T, output_size], zero beyond the lengths
        """
        return self.dropout(self.mix(self.language_model.vectors(chars, lengths)))
