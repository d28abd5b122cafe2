"""The CUDA kernels of csrc/cuda on CPU tensors: compiled for the host, on an emulated device (device.h).

with emulated("cluster", seed=3):
    seqkern.LSTM(...)(x)            # forward and backward run the CUDA kernels

SEQKERN_CUDA_ON_CPU names a directory with a finished cuda_on_cpu.so and cuda_on_cpu_selftest; without it both
are built under build/.
"""

import functools
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

import seqkern

ROOT = Path(__file__).parents[2]
KINDS = ("rnn", "gru", "lstm", "recurrent")  # modules of seqkern.ops, each with its operators
BUILD = ROOT / "build" / f"cuda_on_cpu-{sys.implementation.cache_tag}"


@dataclass(frozen=True)
class Facts:
    """What the emulated device has."""

    capability: int = 90
    sms: int = 132
    shared_bytes: int = 227 << 10
    max_cluster: int = 16


H100 = Facts()
A100 = Facts(capability=80, sms=108, shared_bytes=163 << 10, max_cluster=1)


@dataclass(frozen=True)
class Counters:
    """Of the emulated device, since the innermost `emulated` began."""

    launches: int
    switches: int
    rounds: int
    pushes: int


def _tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def why_not() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if os.environ.get("SEQKERN_CUDA_ON_CPU"):
        return None
    if not (ROOT / "CMakeLists.txt").exists():
        return "the CUDA kernels' sources are not here"
    missing = [name for name in ("cmake", "ninja", "c++") if _tool(name) is None]
    return f"building the CUDA kernels for the CPU takes {', '.join(missing)}" if missing else None


@functools.cache
def built(target: str) -> Path:
    """The directory where `target` now is. Raises where it does not compile."""
    if path := os.environ.get("SEQKERN_CUDA_ON_CPU"):
        return Path(path)
    cmake, ninja = _tool("cmake"), _tool("ninja")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", "-DSEQKERN_CUDA=OFF"),
        f"-DSEQKERN_OUTPUT_DIR={BUILD}",
    ]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    for command in (configure, [cmake, "--build", str(BUILD), "--target", target, "--parallel", jobs]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-6000:]}")
    return BUILD / "tests" / "cuda_on_cpu"


@functools.cache
def build_and_load():
    """torch.ops.seqkern_cuda_on_cpu."""
    torch.ops.load_library(str(built("cuda_on_cpu") / "cuda_on_cpu.so"))
    return torch.ops.seqkern_cuda_on_cpu


@contextmanager
def emulated(
    tier: str | None = None, seed: int = 0, facts: Facts = H100, free_sms: int | None = None
) -> Iterator[None]:
    """seqkern's recurrent layers run on the CUDA kernels, for CPU tensors.

    tier: the one that layers must take, "step", "block", "cluster" or "grid"; None: the kernels' own choice
    seed: of the order in which the emulated device runs blocks, warps and lanes
    free_sms: multiprocessors that kernels get; others than facts has are reserved, as under MPS
    """
    ops = build_and_load()
    kept = []
    for kind in KINDS:
        module = importlib.import_module(f"seqkern.ops.{kind}")
        kept.append((module, module._forward, module._backward))
    ops.configure(seed, *astuple(facts), facts.sms if free_sms is None else free_sms)
    ops.force_tier(tier or "")
    try:
        for kind, (module, _, _) in zip(KINDS, kept, strict=True):
            module._forward = getattr(ops, f"{kind}_forward").default
            module._backward = getattr(ops, f"{kind}_backward").default
        with seqkern.use_backend("cpu"):
            yield
    finally:
        for module, forward, backward in kept:
            module._forward, module._backward = forward, backward
        ops.force_tier("")


def counters() -> Counters:
    return Counters(*build_and_load().counters())
