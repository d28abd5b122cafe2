"""What the reference layers share: the mask of valid steps, the order of time, a step's options."""

import math
from collections.abc import Sequence
from typing import NamedTuple

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


class StepOptions(NamedTuple):
    """What one step of a regularised cell does beside its equations."""

    candidate: Tensor | None = None  # [B, H], the candidate's factor: 0 or 1 / (1 - p)
    cell_clip: float = math.inf
    proj_clip: float = math.inf
    eps: float = 1e-5  # of layer normalisation

    def drop(self, candidate: Tensor) -> Tensor:
        return candidate if self.candidate is None else candidate * self.candidate

    def clip(self, c: Tensor) -> Tensor:
        return c if self.cell_clip == math.inf else c.clamp(-self.cell_clip, self.cell_clip)

    def clip_projection(self, h: Tensor) -> Tensor:
        return h if self.proj_clip == math.inf else h.clamp(-self.proj_clip, self.proj_clip)


def add(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def layer_norm(y: Tensor, gamma: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    """(y - mean) / sqrt(variance + eps) * gamma + beta over the last dimension, the variance biased; the
    statistics in float32 at least.

    Literally, because F.layer_norm computes y * rstd - mean * rstd, which cancels.
    """
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return add((centred * torch.rsqrt(variance + eps)).to(y.dtype) * gamma, beta)
