"""A character-level recurrent language model, its evaluation in bits per character, and sampling from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from seqkern.models import RNNLanguageModel
from seqkern.train.metrics import bits
from seqkern.train.tbptt import nats_per_token


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


def bits_per_character(
    model: nn.Module,
    streams: Sequence[Tensor],
    *,
    B: int = 32,
    T: int = 64,
    max_characters: int | None = None,
) -> float:
    """`nats_per_token` in bits: mean of −log2 p(next id), `max_characters` of each stream at most."""
    return bits(nats_per_token(model, streams, B=B, T=T, max_tokens=max_characters))


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
