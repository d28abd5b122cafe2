"""One process or many: what torchrun starts, data-parallel (DDP) or with sharded parameters (FSDP2).

Every process goes through the same global batches and takes its rows of each; sums go over all processes. So
the number of processes changes neither what a batch is nor its gradient.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from seqkern.train import checkpoint


@dataclass(frozen=True)
class World:
    """The processes that train together; by default, this one alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the processes, in float64."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all."""
        self.sum(0)


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """The world that torchrun's environment describes (gloo on a CPU, NCCL on GPUs); without torchrun, one.

    Args:     device: None is a GPU where there is one (of several, the process's own), else the CPU
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ:
        yield World(device=torch.device(device))
        return
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(found)
    backend = "nccl" if found.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=_meet(rank, size), rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), found)
    finally:
        dist.destroy_process_group()


def _meet(rank: int, size: int) -> dist.Store:
    """A part of torchrun's store that belongs to the processes of this start alone.

    The store outlives the processes. torch keeps their starts apart by TORCHELASTIC_RESTART_COUNT, which an
    agent raises only for failures of its own workers: after a failure on one node, the nodes' counts differ
    for a while, and processes would wait for each other in vain or meet the addresses of dead ones. So they
    agree here: the leader shows a fresh name, the others answer it with fresh tokens of their own, and what
    the leader then confirms can only be the tokens of processes that live.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("seqkern/name", mine)
        tokens = [store.get(f"seqkern/{mine}/{other}").decode() for other in range(1, size)]
        store.set(f"seqkern/{mine}/all", " ".join(tokens))
        return dist.PrefixStore(f"seqkern/{mine}", store)
    while True:
        name = store.get("seqkern/name").decode()
        store.set(f"seqkern/{name}/{rank}", mine)
        while store.get("seqkern/name").decode() == name:
            # Confirmed without us, a name is of an earlier start: the next one will come.
            everyone = f"seqkern/{name}/all"
            if store.check([everyone]) and mine in store.get(everyone).decode().split():
                return dist.PrefixStore(f"seqkern/{name}", store)
            time.sleep(0.05)


def was_restarted(world: World) -> bool:
    """Whether torchrun has started the processes again after a failure.

    An agent counts the failures of its own workers only, so one process that knows is enough.
    """
    return world.sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))[0] > 0


def replicate(module: nn.Module, world: World) -> nn.Module:
    """`module` in DistributedDataParallel, or itself where there is one process."""
    if world.size == 1:
        return module
    return DistributedDataParallel(module, device_ids=[world.device] if world.device.type == "cuda" else None)


@contextmanager
def synchronised(module: nn.Module, on: bool) -> Iterator[None]:
    """Off, forward and backward leave the gradients to each process: for all micro-batches but the last."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)
    quiet = isinstance(module, DistributedDataParallel) and not on
    with module.no_sync() if quiet else nullcontext():
        yield


# ---- FSDP2 --------------------------------------------------------------------------------------------


def shard(module: nn.Module, world: World) -> None:
    """Shards the parameters over the processes, in place: each layer of a stack apart, then the rest.

    Raises:   ValueError: no stack of layers (a ModuleList, as Transformers have), or not under torchrun
    """
    if not dist.is_initialized():
        raise ValueError("fsdp: expected to run under torchrun")
    layers = [part for stack in module.modules() if isinstance(stack, nn.ModuleList) for part in stack]
    if not layers:
        raise ValueError("fsdp: expected a model with a stack of layers, such as a Transformer")
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    for part in [*layers, module]:
        fully_shard(part, mesh=mesh)


def full_state(module: nn.Module) -> dict[str, Any]:
    """The state_dict of a sharded module with whole tensors, in every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))


def save_sharded(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rest: dict[str, Any],
    world: World,
) -> None:
    """Writes folder/step-N: every process its shards, then the leader `rest`; then older ones go.

    A folder without `rest` was cut short and is never read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    here = folder / f"step-{step}"
    if world.leads:
        shutil.rmtree(here, ignore_errors=True)
    world.barrier()
    model_state, optimizer_state = get_state_dict(module, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=here)
    if world.leads:
        checkpoint.save(here / "rest.pt", rest)
        for other in folder.glob("step-*"):
            if other != here:
                shutil.rmtree(other)
    world.barrier()


def newest_sharded(folder: Path) -> Path | None:
    """The newest complete checkpoint that `save_sharded` wrote."""
    complete = [path.parent for path in folder.glob("step-*/rest.pt")]
    return max(complete, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def load_sharded(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Reads the model and the optimizer, at any number of processes; returns `rest`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model_state, optimizer_state = get_state_dict(module, optimizer)
    rest = checkpoint.load(path / "rest.pt")
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(module, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return rest
