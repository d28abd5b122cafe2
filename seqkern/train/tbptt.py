"""Truncated backpropagation through time: gradients stop at a window's edge, the state goes on.

Source: Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent
network trajectories"; the windows follow each other without overlap, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.text import Windows

State = Any  # a tensor, or a tuple of states: h for RNN and GRU, (h, c) for LSTM, as each cell carries it


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with `function` applied to each of its tensors."""
    if isinstance(state, Tensor):
        return function(state)
    return tuple(map_state(function, part) for part in state)


def detach_state(state: State) -> State:
    """The state cut from the graph that computed it: the next window starts from its values alone."""
    return map_state(Tensor.detach, state)


def reset_state(state: State, rows: Tensor) -> State:
    """The state [..., B, .] with zeros in the rows [B] that are True, through which no gradient passes."""
    return map_state(lambda part: torch.where(rows.to(part.device).unsqueeze(1), 0, part), state)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class TruncatedBPTT:
    """Trains a model of the form `outputs, state = model(inputs, state)` on windows that follow each other.

    One `step` per window: forward from the state that the window before left, detached; the loss of outputs
    and targets; backward; gradients clipped to the norm `clip`; optimizer and, where given, scheduler step.
    Without `loss` it is a language model's: outputs are logits [T, B, V], and the loss is the mean
    cross-entropy, which `step` tells in bits per target.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 1.0,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.scheduler = scheduler
        self.loss = _cross_entropy if loss is None else loss
        self.unit = math.log(2) if loss is None else 1.0
        self.state: State | None = None

    def reset(self) -> None:
        """Forgets the state: the next window does not follow the last one."""
        self.state = None

    def step(self, inputs: Any, targets: Any, *, reset: Tensor | None = None) -> float:
        """
        Args:     inputs, targets: what the model and the loss take; a language model's: [T, B] int64
                  reset: bool, [B]: rows that start from zeros; [T, B]: given to the model as `reset`, which
                  seqkern's layers take: sequences that start inside the window
        Returns:  the window's loss, before the update; cross-entropy in bits per target
        """
        self.model.train()
        keywords = {}
        if reset is not None and reset.dim() == 1:
            self.state = None if self.state is None else reset_state(self.state, reset)
        elif reset is not None:
            keywords = {"reset": reset}
        outputs, state = self.model(inputs, self.state, **keywords)
        self.state = detach_state(state)
        loss = self.loss(outputs, targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item() / self.unit

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


@torch.no_grad()
def nats_per_token(
    model: nn.Module,
    streams: Sequence[Tensor],
    *,
    B: int = 32,
    T: int = 64,
    max_tokens: int | None = None,
) -> float:
    """Mean of −ln p(next id) over `streams`, each read from zero state with the state carried to its end.

    Args:     model: as TruncatedBPTT takes a language model, logits [T, B, V] of ids [T, B]
              streams: int64 [n] each, n ≥ 2;  max_tokens: read no further than this in each stream
              B, T: streams side by side, and steps in a call of the model
    Raises:   ValueError: no stream with at least two ids
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    limit = None if max_tokens is None else max_tokens + 1
    # Longest first: the rows of a batch that still have tokens left are then its first ones.
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
    return nats / count


def _first_rows(n: int, state: Tensor) -> Tensor:
    """state: [num_layers, B, H]"""
    return state[:, :n].contiguous()
