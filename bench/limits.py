"""What this machine could do at best, measured in the run that measures the cases.

fma_peak      GF/s  float32 multiply-adds in registers, all threads (seqkern._C.fma_peak, if it is there)
gemm_<dtype>  GF/s  the best matrix product: torch.mm (oneDNN for bfloat16, else MKL) or oneDNN's linear
read_<bytes>  GB/s  re-reading a buffer of that size: W_hh at batch 1, from whichever cache holds it

Each figure is the best of many: a limit is what the machine reaches undisturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench import cases


def best_rate(call: Callable[[], object], work: float, seconds: float = 0.3, device: str = "cpu") -> float:
    """`work` per second, in 1e9, of the fastest of the calls (at least 3) that fit into `seconds`."""
    call()
    best, rounds, end = float("inf"), 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        rounds += 1
    return work / best / 1e9


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def gemm_rate(dtype: torch.dtype, device: str, seconds: float = 0.3) -> float:
    """GF/s of the best [n, n] @ [n, n]."""
    n = 4096 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    rate = best_rate(lambda: torch.mm(a, b), 2 * n**3, seconds, device)
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # torch.mm takes MKL for float32, which is slow on AMD; a tensor in oneDNN's layout goes to oneDNN.
        a_ = a.to_mkldnn()
        rate = max(rate, best_rate(lambda: torch._C._nn.mkldnn_linear(a_, b), 2 * n**3, seconds))
    return rate


def read_rate(extension: object, size: int, seconds: float = 0.2) -> tuple[float, str]:
    """GB/s of re-reading `size` bytes, each thread its share, and what measured it."""
    if hasattr(extension, "read_bandwidth"):
        threads = torch.get_num_threads()
        return max(float(extension.read_bandwidth(threads, size, seconds / 5)) for _ in range(5)), "seqkern"
    buffer = torch.ones(size // 4)
    return best_rate(buffer.sum, size, seconds), "torch.sum"  # a lower bound: call and reduction included


def measure(device: str, quick: bool = False) -> dict[str, object]:
    """The limits of this machine with the current thread settings; see the module's head for the keys."""
    try:
        from seqkern import _extension

        extension = getattr(_extension, "_C", None)
    except ImportError:
        extension = None
    seconds = 0.1 if quick else 0.4
    found: dict[str, object] = {}
    if device == "cpu" and hasattr(extension, "fma_peak"):
        threads = torch.get_num_threads()
        found["fma_peak"] = max(float(extension.fma_peak(threads, seconds / 5)) for _ in range(5))
    for dtype in (
        (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    ):
        found[f"gemm_{str(dtype).removeprefix('torch.')}"] = gemm_rate(dtype, device, seconds)
    if device == "cpu":
        sizes = {
            cases.BY_NAME[name].recurrent_bytes(family, itemsize)
            for name in ("c1", "c7")
            for family in cases.FAMILIES
            for itemsize in (4, 2)
        }
        for size in sorted(sizes):
            found[f"read_{size}"], found["read_by"] = read_rate(extension, size, seconds / 2)
    return {key: round(value, 1) if isinstance(value, float) else value for key, value in found.items()}


def peak(limits: dict[str, object], dtype: str) -> tuple[float, str] | None:
    """(GF/s, its name) that a case in `dtype` is held against: FMA peak for float32, else the best GEMM.

    A peak below what a GEMM reached in the same run was disturbed, so the higher of the two counts.
    """
    names = {f"gemm_{dtype}": "best GEMM"} | ({"fma_peak": "FMA peak"} if dtype == "float32" else {})
    found = [(float(limits[key]), name) for key, name in names.items() if key in limits]
    return max(found, default=None)
