"""The random masks of regularised recurrences: functions of a seed and of positions alone.

A layer's stream in one direction is s = 2 * layer + direction (1: reverse). Philox's last counter is
8 * s + purpose; the others and the unit are given with each function. So any order of computing, padding,
packing and cutting of a batch draws the same bits, and backward draws them again from the seed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkern.reference._philox import hits

ZONE_H, ZONE_C, DROP = 0, 1, 2  # purposes, and bits of recurrent_mask
VARIATIONAL, WEIGHT = 3, 4


def recurrent_mask(
    seed: Tensor, probabilities: Sequence[float], t: Tensor, b: Tensor, layer: int, D: int, H: int
) -> Tensor:
    """What is kept and dropped at each step: uint8 [*shape, D*H], t and b broadcasting to `shape`.

    Bit 0: h stays as it was; bit 1: so do the states after h; bit 2: the candidate is dropped. The counters:
    t, b, and the unit 0 … H-1.

    Args:
        seed: [1] int64 on any device
        probabilities: of the three bits
        t, b: int64, the step and the row of the batch as its owner numbers them
    """
    mask = torch.zeros((*torch.broadcast_shapes(t.shape, b.shape), D, H), dtype=torch.uint8, device=t.device)
    for purpose, p in zip((ZONE_H, ZONE_C, DROP), probabilities, strict=True):
        if p > 0:
            streams = _streams(layer, D, purpose, t.device)
            mask = (
                mask | hits(seed, p, H, t.unsqueeze(-1), b.unsqueeze(-1), streams).to(torch.uint8) << purpose
            )
    return mask.flatten(-2)


def variational_scale(
    seed: Tensor, p: float, b: Tensor, layer: int, D: int, P: int, dtype: torch.dtype
) -> Tensor:
    """One mask for all steps of a row: [D, B, P], 0 with probability p, else 1 / (1 - p).

    The counters: 0, b [B], and the unit 0 … P-1.
    """
    streams = _streams(layer, D, VARIATIONAL, b.device).unsqueeze(-1)
    return keep_scale(hits(seed, p, P, torch.zeros_like(b), b, streams), p, dtype)


def weight_scale(seed: Tensor, p: float, weight: Tensor, layer: int, d: int) -> Tensor:
    """One mask for all rows and steps, of weight's shape and dtype: 0 with probability p, else 1 / (1 - p).

    The counters: the weight's row, 0, and its column as the unit. A weight of three dimensions counts its
    rows through the first two, one of one dimension is a row.
    """
    columns = weight.shape[-1]
    rows = torch.arange(weight.numel() // max(columns, 1), device=weight.device)
    stream = _streams(layer, d + 1, WEIGHT, weight.device)[d]
    dropped = hits(seed, p, columns, rows, torch.zeros_like(rows), stream)
    return keep_scale(dropped, p, weight.dtype).view(weight.shape)


def keep_scale(dropped: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return (~dropped).to(dtype) * candidate_scale(p)


def candidate_scale(p: float) -> float:
    """The factor of what dropout of probability p keeps."""
    return 1 / (1 - p) if p < 1 else 0.0


def _streams(layer: int, D: int, purpose: int, device: torch.device) -> Tensor:
    """Philox's last counter for each direction, [D]."""
    return torch.arange(D, device=device) * 8 + (16 * layer + purpose)
