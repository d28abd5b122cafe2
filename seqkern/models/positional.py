"""Sinusoids of the positions, added to embeddings.

Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(max_len: int, d_model: int) -> Tensor:
    """[max_len, d_model]: sin(t · 10000^(-2i/d)) in column 2i, its cos in column 2i + 1; any d_model."""
    position = torch.arange(max_len).unsqueeze(1).float()
    frequency = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
    table = torch.empty(max_len, d_model)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)[:, : d_model // 2]
    return table


class PositionalEncoding(nn.Module):
    """x plus the sinusoids of its positions (M, S: batch first; D: time first).

    Construct:  PositionalEncoding(d_model, max_len=5000, batch_first=True)
    Call:       y = encoding(x);  encoding(x, offset) for a part that starts at position offset
    Buffer:     pe [1, max_len, d_model], time first [max_len, d_model]

    Corrected:  D slices its table so that it is added along the batch; here along time.
    """

    def __init__(self, d_model: int, max_len: int = 5000, batch_first: bool = True) -> None:
        super().__init__()
        table = sinusoids(max_len, d_model)
        self.batch_first = batch_first
        self.register_buffer("pe", table.unsqueeze(0) if batch_first else table)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """
        Args:     x: [B, T, E], time first [T, B, E];  offset: the position of its first step
        Raises:   ValueError: positions beyond max_len
        """
        if self.batch_first:
            return x + _rows(self.pe[0], offset, x.shape[1])
        return x + _rows(self.pe, offset, x.shape[0]).unsqueeze(1)


class DropoutPositionalEncoding(nn.Module):
    """dropout(x plus the sinusoids of its positions), batch first (T's PositionalEncoding).

    Construct:  DropoutPositionalEncoding(num_hiddens, dropout, max_len=1000)
    Buffer:     P [1, max_len, num_hiddens], outside the state_dict as in T
    """

    def __init__(self, num_hiddens: int, dropout: float, max_len: int = 1000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("P", sinusoids(max_len, num_hiddens).unsqueeze(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:     x: [B, T, num_hiddens]
        Raises:   ValueError: positions beyond max_len
        """
        return self.dropout(x + _rows(self.P[0], 0, x.shape[1]))


def _rows(table: Tensor, offset: int, T: int) -> Tensor:
    if offset + T > len(table):
        raise ValueError(
            f"x: expected positions below max_len = {len(table)}, got {offset} to {offset + T - 1}"
        )
    return table[offset : offset + T]
