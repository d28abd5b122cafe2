"""Drawing the next token: temperature, top-k and top-p (nucleus) sampling over logits.

Source: Fan et al., "Hierarchical Neural Story Generation", 2018 (top-k); Holtzman et al., "The Curious Case
of Neural Text Degeneration", 2020 (top-p)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """logits / temperature, with -inf for the tokens that top_k and then top_p leave out.

    Args:     logits: [.., V], unnormalised or log-probabilities, floating point
              temperature: below 1 sharpens the distribution, above 1 flattens it
              top_k: keep the k largest, and what equals the smallest of them; all where k is V or more
              top_p: keep the smallest set of the likeliest tokens whose probabilities sum to at least top_p;
              the likeliest always, of equals those with the smaller ids
    Returns:  [.., V], dtype of logits
    Raises:   ValueError: temperature not above 0, top_k below 1, top_p outside 0 < top_p <= 1
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = torch.where(logits < smallest, -torch.inf, logits)
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(ordered.float(), -1)
        left_out = p.cumsum(-1) - p >= top_p  # the likelier ones suffice without it
        left_out[..., 0] = False
        logits = torch.where(torch.empty_like(left_out).scatter(-1, ids, left_out), -torch.inf, logits)
    return logits


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One id for each row, drawn from softmax(filter_logits(logits)).

    Args:     logits: [.., V];  temperature, top_k, top_p: as filter_logits takes them
              generator: on any device, which the draw is made on; None: logits' default one
    Returns:  ids: [..] int64 on logits' device
    Raises:   ValueError: as filter_logits
    """
    filtered = filter_logits(logits.float(), temperature=temperature, top_k=top_k, top_p=top_p)
    *rows, V = logits.shape
    p = torch.softmax(filtered, -1).reshape(math.prod(rows), V)
    if generator is not None:
        p = p.to(generator.device)
    return torch.multinomial(p, 1, generator=generator).view(rows).to(logits.device)
