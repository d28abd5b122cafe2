"""A character-level recurrent language model, its evaluation in bits per character, and sampling from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models import RNNLanguageModel
from seqkern.train.tbptt import map_state


class CharLM(RNNLanguageModel):
    """logits_t = W · rnn(embedding(id_1), …, embedding(id_t)) + b, of ids [T, B].

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
        super().__init__(
            *(vocab_size, embed_dim, hidden_size),
            cell=layer,
            num_layers=num_layers,
            logits=True,
            batch_first=False,
        )


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


def sample(
    model: RNNLanguageModel,
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
    if not len(prompt):
        raise ValueError("prompt: expected at least one id, got none")
    device = next(model.parameters()).device
    return model.generate(prompt.to(device), length, temperature, generator=generator).cpu()
