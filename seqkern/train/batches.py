"""Batches in an order that depends on seed and epoch alone: a run can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern.text import Windows

Weighted = tuple[Any, int]  # a batch, and how many targets its loss sums over


class Batches(Protocol):
    """What a Trainer reads: the same global batches in every process, which takes its rows of each."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, *, start: int, rank: int, size: int) -> Iterator[Weighted]:
        """Rank's part of batches start, start + 1, … of an epoch, and the weights of these parts.

        A part never lacks rows, which a forward needs; one that would have none is filled and weighs 0.
        """


class ExampleBatches:
    """Batches of examples.

    Args:     examples: anything with len() and an item at each index
              order: epoch → the indices of the examples in each batch
              collate: a list of examples → a batch
              weight: a batch → how many targets its loss sums over (1 for each example: len of the list)
    """

    def __init__(
        self,
        examples: Sequence[Any],
        order: Callable[[int], Sequence[Sequence[int]]],
        collate: Callable[[list[Any]], Any],
        weight: Callable[[Any], int] | None = None,
    ) -> None:
        if not len(examples):
            raise ValueError("examples: none to learn from")
        self._examples = examples
        self._order = order
        self._collate = collate
        self._weight = weight
        self._length = len(order(0))

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, *, start: int = 0, rank: int = 0, size: int = 1) -> Iterator[Weighted]:
        for batch in self._order(epoch)[start:]:
            indices = batch[rank::size]
            filled = self._collate([self._examples[i] for i in indices or batch[:1]])
            weight = len(indices) if self._weight is None else self._weight(filled)
            yield filled, weight if indices else 0


def shuffled(n: int, batch: int, seed: int = 0) -> Callable[[int], list[list[int]]]:
    """An order for ExampleBatches: all n examples, shuffled anew for each epoch, the last batch smaller."""

    def order(epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        indices = torch.randperm(n, generator=generator).tolist()
        return [indices[i : i + batch] for i in range(0, n, batch)]

    return order


class WindowBatches:
    """The windows of a stream, one after the other, (inputs, targets) [T, B] each: for truncated BPTT.

    Raises:   ValueError: fewer rows than processes
    """

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def epoch(self, epoch: int, *, start: int = 0, rank: int = 0, size: int = 1) -> Iterator[Weighted]:
        for i in range(start, len(self._windows)):
            inputs, targets = self._windows[i]
            if inputs.shape[1] < size:
                raise ValueError(
                    f"batch: expected at least a row for each of {size} processes, got {inputs.shape[1]}"
                )
            part = inputs[:, rank::size].contiguous(), targets[:, rank::size].contiguous()
            yield part, part[1].numel()


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; tuples, lists, dicts and dataclasses are gone through."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, PackedSequence):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(part, device) for part in batch)
    if isinstance(batch, Mapping):
        return {key: to_device(part, device) for key, part in batch.items()}
    if is_dataclass(batch) and not isinstance(batch, type):
        return type(batch)(**{f.name: to_device(getattr(batch, f.name), device) for f in fields(batch)})
    return batch
