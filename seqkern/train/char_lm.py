"""A character-level recurrent language model, its evaluation in bits per character, and sampling from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.train.tbptt import State, map_state


class CharLM(nn.Module):
    """logits_t = W · rnn(embedding(id_1), …, embedding(id_t)) + b

    `layer` is any recurrent layer with torch.nn's constructor: torch.nn.LSTM, seqkern.LSTM, seqkern.GRU, …
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        embed_dim: int = 64,
        hidden_size: int = 256,
        num_layers: int = 1,
        layer: Callable[..., nn.RNNBase] = nn.LSTM,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.rnn = layer(embed_dim, hidden_size, num_layers)
        self.fc = nn.Linear(hidden_size, vocab_size)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """
        Args:     ids: [T, B] int64;  state: what the call before returned, or None for zeros
        Returns:  logits: [T, B, V];  state after the last step
        """
        y, state = self.rnn(self.embedding(ids), state)
        return self.fc(y), state


@torch.no_grad()
def bits_per_character(
    model: nn.Module,
    streams: Sequence[Tensor],
    *,
    B: int = 32,
    T: int = 64,
    max_characters: int | None = None,
) -> float:
    """Mean of −log2 p(next id) over `streams`, each read from zero state with the state carried to its end.

    Args:     streams: int64 [n] each, n ≥ 2;  max_characters: read no further than this in each stream
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    limit = None if max_characters is None else max_characters + 1
    # Longest first: the rows of a batch that still have characters left are then its first ones.
    streams = sorted((stream[:limit] for stream in streams if len(stream) > 1), key=len, reverse=True)
    nats, count = 0.0, 0
    for first in range(0, len(streams), B):
        rows = streams[first : first + B]
        ids = nn.utils.rnn.pad_sequence(list(rows), padding_value=-1).to(device)  # [n, B]
        inputs, targets = ids[:-1].clamp(min=0), ids[1:]
        state = None
        for start in range(0, len(inputs), T):
            active = sum(len(row) - 1 > start for row in rows)
            if state is not None:
                state = map_state(partial(_first_rows, active), state)
            logits, state = model(inputs[start : start + T, :active], state)
            wanted = targets[start : start + T, :active]
            nats += F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum"
            ).item()
            count += int((wanted >= 0).sum())
    model.train(was_training)
    if not count:
        raise ValueError("streams: no stream with at least two ids")
    return nats / count / math.log(2)


def _first_rows(n: int, state: Tensor) -> Tensor:
    """state: [num_layers, B, H]"""
    return state[:, :n].contiguous()


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The prompt and `length` ids drawn after it, one by one, from softmax(logits / temperature).

    Args:     prompt: [n] int64, n ≥ 1;  generator: on the CPU
    Returns:  ids: [n + length], on the CPU
    """
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if not len(prompt):
        raise ValueError("prompt: expected at least one id, got none")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ids = prompt.cpu().tolist()
    inputs, state = prompt[:, None], None
    for _ in range(length):
        logits, state = model(inputs.to(device), state)
        p = torch.softmax(logits[-1, 0].float().cpu() / temperature, dim=0)
        inputs = torch.multinomial(p, 1, generator=generator)[:, None]
        ids.append(inputs.item())
    model.train(was_training)
    return torch.tensor(ids)
