"""Truncated backpropagation through time: gradients stop at a window's edge, the state goes on.

Source: Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent
network trajectories"; the windows follow each other without overlap, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.train.corpus import Windows

State = Any  # a tensor, or a tuple of states: h for RNN and GRU, (h, c) for LSTM


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with `function` applied to each of its tensors."""
    if isinstance(state, Tensor):
        return function(state)
    return tuple(map_state(function, part) for part in state)


class TruncatedBPTT:
    """Trains a model of the form `logits, state = model(ids, state)` on windows that follow each other.

    One `step` per window: forward from the state that the window before left, detached; mean cross-entropy;
    backward; gradients clipped to the norm `clip`; optimizer and, where given, scheduler step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 1.0,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.scheduler = scheduler
        self.state: State | None = None

    def reset(self) -> None:
        """Forgets the state: the next window does not follow the last one."""
        self.state = None

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """
        Args:     inputs, targets: [T, B] int64
        Returns:  the window's mean loss, before the update, in bits per target
        """
        self.model.train()
        logits, state = self.model(inputs, self.state)
        self.state = map_state(Tensor.detach, state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item() / math.log(2)

    def train(self, windows: Windows, steps: int, *, start: int = 0) -> Iterator[float]:
        """Yields the losses of steps start, start + 1, …; from zero state again where the windows end.

        Lazy: a caller that stops asking stops the training.
        """
        device = next(self.model.parameters()).device
        for i in range(start, start + steps):
            if i % len(windows) == 0:
                self.reset()
            inputs, targets = windows[i % len(windows)]
            yield self.step(inputs.to(device), targets.to(device))
