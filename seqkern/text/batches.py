"""From lists of ids to tensors: padding, collating with lengths, batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

Ids: TypeAlias = Sequence[int] | Tensor
Label = TypeVar("Label")


def pad_sequences(sequences: Sequence[Ids], max_len: int | None = None, pad_val: int = 0) -> Tensor:
    """The sequences as rows, cut or padded at the end to one length: M's pad_sequences.

    Args:     sequences: B lists, or tensors [n] int64
              max_len: T; None: the longest sequence's length
    Returns:  [B, T] int64
    """
    rows = [_as_list(ids) for ids in _cut(sequences, max_len)]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    T = max(map(len, rows), default=0) if max_len is None else max_len
    padded = torch.full((len(rows), T), pad_val, dtype=torch.int64)
    flat = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
    padded[torch.arange(T) < lengths[:, None]] = flat
    return padded


def _cut(sequences: Sequence[Ids], max_len: int | None) -> list[Ids]:
    if max_len is not None and max_len < 0:
        raise ValueError(f"max_len: expected at least 0 or None, got {max_len}")
    return [ids[:max_len] for ids in sequences]


def _as_list(ids: Ids) -> Sequence[int]:
    return ids.tolist() if isinstance(ids, Tensor) else ids


def _cut_and_padded(sequences: Sequence[Ids], max_len: int | None, pad: int) -> tuple[Tensor, Tensor]:
    """The rows [B, T] and lengths [B]; T is the longest row's length, at most max_len."""
    sequences = _cut(sequences, max_len)
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    return pad_sequences(sequences, pad_val=pad), lengths


def _longest_first(batch: Sequence[tuple[Ids, Label]]) -> Sequence[tuple[Ids, Label]]:
    return sorted(batch, key=lambda sample: -len(sample[0]))


def collate(
    batch: Sequence[tuple[Ids, float]], *, pad: int = 0, max_len: int | None = None, sort: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (ids, label) → (ids [B, T], lengths [B], labels [B]), int64; labels as torch.tensor has them.

    For DataLoader(collate_fn=functools.partial(collate, pad=1)).

    Args:     max_len: longer sequences lose their end
              sort: the longest first, as pack_padded_sequence(enforce_sorted=True) wants it
    """
    if sort:
        batch = _longest_first(batch)
    ids, lengths = _cut_and_padded([ids for ids, _ in batch], max_len, pad)
    return ids, lengths, torch.tensor([label for _, label in batch])


def collate_pairs(
    batch: Sequence[tuple[Ids, Ids]],
    *,
    pad: int = 0,
    target_pad: int | None = None,
    max_len: int | None = None,
    sort: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples (ids, target ids) → (ids [B, S], lengths [B], targets [B, T], target lengths [B]), int64.

    For translation, and for tagging, where `target_pad=-100` is what cross_entropy leaves out.

    Args:     target_pad: by default `pad`
              max_len: longer sequences, on either side, lose their end
              sort: the longest source first
    """
    if sort:
        batch = _longest_first(batch)
    ids, lengths = _cut_and_padded([ids for ids, _ in batch], max_len, pad)
    target_pad = pad if target_pad is None else target_pad
    targets, target_lengths = _cut_and_padded([targets for _, targets in batch], max_len, target_pad)
    return ids, lengths, targets, target_lengths


def collate_offsets(batch: Sequence[tuple[Ids, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (ids, label) → (ids [N], offsets [B], labels [B]), for torch.nn.EmbeddingBag.

    ids are the sequences one after the other; sequence b starts at offsets[b].
    """
    sequences = [_as_list(ids) for ids, _ in batch]
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    flat = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64)
    return flat, lengths.cumsum(0) - lengths, torch.tensor([label for _, label in batch])


def one_hot(ids: Tensor, num_classes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., num_classes]: 1 at each id, else 0, in a dtype that layers take.

    Args:     ids: [...] int64
    Raises:   ValueError: an id outside 0 … num_classes - 1 (on a CPU)
    """
    if ids.device.type == "cpu" and ids.numel():
        least, most = ids.min().item(), ids.max().item()
        if least < 0 or most >= num_classes:
            raise ValueError(f"ids: expected 0 to {num_classes - 1}, got {least if least < 0 else most}")
    zeros = torch.zeros(*ids.shape, num_classes, dtype=dtype, device=ids.device)
    return zeros.scatter_(-1, ids.unsqueeze(-1), 1)


class BucketSampler(Sampler[list[int]]):
    """Batches of sequences of like length, so that little is padding: DataLoader(batch_sampler=this).

    The indices are shuffled, cut into pools of `pool` batches, sorted by length in each pool, cut into
    batches, and the batches shuffled: a function of seed and epoch (`set_epoch`) alone. With shuffle=False
    the pools are taken as they come and the batches are in order.

    With several ranks a batch of batch_size · num_replicas is made, the same on all, and each rank takes
    every num_replicas-th sample of it. The ranks so make the steps that one rank with their summed batch size
    would; only where the last batch does not divide by their number, some of its samples come twice.

    A run is resumed with `state_dict` and `load_state_dict`: the next iteration then begins where the saved
    one was; the iteration after it at the beginning again.

    Args:     lengths: of each sequence;  batch_size: of one rank
              drop_last: leaves out the samples that don't fill a batch; they differ from epoch to epoch
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        pool: int = 100,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("pool", pool), ("num_replicas", num_replicas)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank: expected 0 to {num_replicas - 1} of {num_replicas} replicas, got {rank}")
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.pool = pool
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.position = 0  # batches handed out in the iteration that runs
        self._start = 0  # where the next iteration begins

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        full, rest = divmod(len(self.lengths), self._global_batch)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch is another order. Nothing happens where it is that of a state just loaded."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        self.position, self._start = self._start, 0
        for batch in self._batches()[self.position :]:
            short = -len(batch) % self.num_replicas
            batch += (batch * short)[:short]
            self.position += 1
            yield batch[self.rank :: self.num_replicas]

    def _batches(self) -> list[list[int]]:
        """The epoch's batches of all ranks together."""
        n, size = len(self.lengths), self._global_batch
        # The generator looks at 32 bits of its seed; the factor keeps the epochs of neighbouring seeds apart.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**32)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        if self.drop_last:
            order = order[: n // size * size]
        batches = []
        for first in range(0, len(order), self.pool * size):
            pool = order[first : first + self.pool * size]
            by_length = pool[self.lengths[pool].sort(stable=True).indices]
            batches += [batch.tolist() for batch in by_length.split(size)]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return batches

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """
        Args:     position: batches used up in this epoch. By default those handed out, which is more where a
                  DataLoader with workers reads ahead
        """
        position = self.position if position is None else position
        return {"epoch": self.epoch, "position": position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError: the state is that of other lengths' number, seed, pool or batch size of all ranks."""
        for name, ours in self._identity().items():
            if state[name] != ours:
                raise ValueError(f"{name}: expected {ours}, that of this sampler, got {state[name]}")
        self.epoch = state["epoch"]
        self.position = self._start = state["position"]

    def _identity(self) -> dict[str, Any]:
        return {
            "samples": len(self.lengths),
            "global_batch": self._global_batch,
            "pool": self.pool,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }
