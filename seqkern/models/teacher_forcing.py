"""Teacher forcing: which of a decoder's inputs are the target's, and how many steps run in one call."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch


def scheduled_sampling(epoch: int, total_epochs: int, minimum: float = 0.5) -> float:
    """The teacher-forcing ratio of epoch 0 … total_epochs - 1: max(minimum, 1 - epoch / total_epochs).

    Raises:   ValueError: an epoch outside, or a minimum outside 0..1
    Source:   Bengio et al., "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks",
              2015, its linear decay
    """
    if not 0 <= epoch < total_epochs:
        raise ValueError(f"epoch: expected 0 to total_epochs - 1 = {total_epochs - 1}, got {epoch}")
    if not 0 <= minimum <= 1:
        raise ValueError(f"minimum: expected 0 to 1, got {minimum}")
    return max(minimum, 1 - epoch / total_epochs)


def forced_runs(
    steps: int, teacher_forcing_ratio: float, generator: torch.Generator | None = None
) -> Iterator[tuple[int, int]]:
    """(start, stop) of the runs of steps whose inputs are known when the run starts, in order.

    Each step after the first is given the target with probability teacher_forcing_ratio, for all rows alike,
    else the model's own last prediction: there a new run starts, and only there. With ratio 1 there is one
    run. The coins come from torch's generator, or from the one given, on the CPU.

    Raises:   ValueError: a ratio outside 0..1
    """
    if not 0 <= teacher_forcing_ratio <= 1:
        raise ValueError(f"teacher_forcing_ratio: expected 0 to 1, got {teacher_forcing_ratio}")
    if steps < 1:
        return
    own = torch.rand(steps - 1, generator=generator) >= teacher_forcing_ratio
    starts = [0, *(own.nonzero().squeeze(1) + 1).tolist(), steps]
    yield from pairwise(starts)
