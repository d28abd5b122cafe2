"""Checkpoints that are whole or not there, and hold nothing that runs: written at once, read weights-only."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = "seqkern checkpoint 1"


class CheckpointError(ValueError):
    """A checkpoint missing, cut short, not one of ours, or not to be written; the message says which."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, None, and lists, tuples and dicts of them) to `path`.

    Into a file beside it, which is synced to the disk and then takes the old one's place: at any moment,
    `path` is the old checkpoint or the new one.

    Raises:   TypeError: a value that a weights-only load would refuse, with its place
              CheckpointError: the disk is full or refuses; what was at `path` still is
    """
    _check_plain(state, "state")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            _save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: {path} could not be written: {error.strerror or error}; an older one there is whole"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    """torch.save, whose own word for a write that failed does not say why."""
    failures = []

    class Writer:
        flush = file.flush

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failures.append(error)
                raise

    try:
        torch.save(state, Writer())
    except RuntimeError:
        if failures:
            raise failures[0] from None
        raise


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk, as fsync does a file's contents."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, tensors on the CPU.

    Raises:   CheckpointError: nothing at `path`, or a file that is cut short, damaged or not `save`'s
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no file at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint: {path} is cut short, damaged or no checkpoint of seqkern ({reason})"
        ) from error
    found = state.pop("format", None) if isinstance(state, dict) else None
    if found != FORMAT:
        what = f"says {found!r}" if found else "has no format"
        raise CheckpointError(f"checkpoint: {path} is not one of seqkern: expected {FORMAT!r}, it {what}")
    return state


def _check_plain(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{place}: expected keys of str or int, got {key!r}")
            _check_plain(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_plain(item, f"{place}[{i}]")
    elif not (value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str)):
        raise TypeError(f"{place}: expected a tensor, number, string, list or dict, got {type(value)}")


def rng_state() -> dict[str, Any]:
    """The state of torch's generators and Python's."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned; GPUs that are not there are passed over."""
    torch.set_rng_state(state["torch"])
    for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
