"""What the three reference layers share: the mask of valid steps and the order of time."""

from collections.abc import Sequence

import torch
from torch import Tensor


def valid_steps(lengths: Tensor, T: int) -> Tensor:
    """Mask [T, B, 1], True where step t of row b is data: t < lengths[b]."""
    steps = torch.arange(T, device=lengths.device).unsqueeze(1)  # [T, 1]
    return (steps < lengths).unsqueeze(-1)


def zero_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [T, B, I] with its padded steps replaced by zeros, so that a NaN there reaches neither a result nor a
    gradient (0 * NaN is NaN)."""
    return x if valid is None else torch.where(valid, x, 0)


def time_order(T: int, reverse: bool) -> range:
    """The steps in the order in which a direction visits them."""
    return range(T - 1, -1, -1) if reverse else range(T)


def join_directions(
    outputs: Sequence[Tensor], final_states: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """Per-direction y: [T, B, P] and states [B, .] -> y: [T, B, D*P] and states [D, B, .]."""
    y = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=-1)
    return (y, *(torch.stack(list(per_direction)) for per_direction in zip(*final_states, strict=True)))
