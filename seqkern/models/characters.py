"""Words from their characters: a bidirectional LSTM, or convolutions of several widths, over each word.

chars [B, T, C] int64: the characters of each word, behind them padding_idx, which is no character. A word of
no characters, such as padding of the sentence, gives zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.models import _layers
from seqkern.ops._attention import valid_from_lengths


@dataclass(frozen=True)
class CharacterOptions:
    """How words are read from their characters.

    vocab_size: number of characters;  embed_dim: of a character;  padding_idx: behind a word's last character
    encoder: "lstm", bidirectional, or "cnn"
    hidden_size: of each direction of the LSTM: a word's vector has 2 * hidden_size
    filters: (width, number) of each convolution: a word's vector has as many elements as there are filters
    highways: highway layers behind the convolutions
    projection: size that the word's vector is projected to, None: it is not
    dropout: of the characters' vectors
    """

    vocab_size: int
    embed_dim: int = 30
    encoder: str = "lstm"
    hidden_size: int = 25
    filters: tuple[tuple[int, int], ...] = ((3, 30),)
    highways: int = 0
    projection: int | None = None
    dropout: float = 0.0
    padding_idx: int = 0

    def __post_init__(self) -> None:
        if self.encoder not in ("lstm", "cnn"):
            raise ValueError(f"encoder: expected 'lstm' or 'cnn', got {self.encoder!r}")
        if not self.filters or any(width < 1 or number < 1 for width, number in self.filters):
            raise ValueError(f"filters: expected pairs of numbers above 0, got {self.filters}")


class CharacterEncoder(nn.Module):
    """Words' vectors [B, T, output_size] from their characters [B, T, C].

    Construct:  CharacterEncoder(options, *, layers=seqkern.nn)
    Parameters: embedding;  "lstm": lstm, batch first;  "cnn": convolutions.k, highways.k;  projection
    Source:     Lample et al., "Neural Architectures for Named Entity Recognition", 2016 (LSTM); Ma and Hovy,
                "End-to-end Sequence Labeling via Bi-directional LSTM-CNNs-CRF", 2016; Kim et al.,
                "Character-Aware Neural Language Models", 2016 (several widths, highways)
    """

    def __init__(self, options: CharacterOptions, *, layers: ModuleType = seqkern.nn) -> None:
        super().__init__()
        self.options = options
        self.embedding = nn.Embedding(options.vocab_size, options.embed_dim, padding_idx=options.padding_idx)
        self.dropout = nn.Dropout(options.dropout)
        if options.encoder == "lstm":
            self.lstm = layers.LSTM(
                options.embed_dim, options.hidden_size, batch_first=True, bidirectional=True
            )
            size = 2 * options.hidden_size
        else:
            self.convolutions = nn.ModuleList(
                nn.Conv1d(options.embed_dim, number, width) for width, number in options.filters
            )
            size = sum(number for _, number in options.filters)
        self.highways = nn.ModuleList(Highway(size) for _ in range(options.highways))
        self.projection = None if options.projection is None else nn.Linear(size, options.projection)
        self.output_size = size if options.projection is None else options.projection

    def forward(self, chars: Tensor) -> Tensor:
        """
        Args:     chars: [B, T, C] int64
        Returns:  [B, T, output_size]
        """
        if chars.dim() != 3:
            raise ValueError(f"chars: expected [B, T, C], got {tuple(chars.shape)}")
        B, T, C = chars.shape
        words = chars.reshape(B * T, C)
        lengths = (words != self.options.padding_idx).sum(1)
        x = self.dropout(self.embedding(words))
        x = self._read_lstm(x, lengths) if self.options.encoder == "lstm" else self._convolve(x, lengths)
        for highway in self.highways:
            x = highway(x)
        if self.projection is not None:
            x = self.projection(x)
        return torch.where((lengths > 0).unsqueeze(1), x, 0).view(B, T, self.output_size)

    def _read_lstm(self, x: Tensor, lengths: Tensor) -> Tensor:
        _, state = _layers.run(self.lstm, x, lengths)
        return _layers.last_hidden(state, bidirectional=True)

    def _convolve(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The maximum over the word of relu(convolution), the word between zeros."""
        valid = valid_from_lengths(lengths, x.shape[1]).unsqueeze(2)
        x = torch.where(valid, x, 0).transpose(1, 2)  # [B * T, embed_dim, C]
        maps = []
        for convolution in self.convolutions:
            (width,) = convolution.kernel_size
            maps.append(convolution(nn.functional.pad(x, ((width - 1) // 2, width // 2))))
        y = torch.cat(maps, dim=1).transpose(1, 2)
        return _layers.max_over_time(torch.relu(y), lengths)


class Highway(nn.Module):
    """y = g * relu(W x + b) + (1 - g) * x,  g = sigmoid(V x + c).

    Construct:  Highway(size)
    Parameters: transform (W, b), gate (V, c; c starts at -1, so that the layer begins by carrying x)
    Source:     Srivastava, Greff and Schmidhuber, "Highway Networks", 2015
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.transform = nn.Linear(size, size)
        self.gate = nn.Linear(size, size)
        nn.init.constant_(self.gate.bias, -1)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., size] → [.., size]"""
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.relu(self.transform(x)) + (1 - gate) * x
