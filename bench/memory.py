"""Peak memory of one training step (forward + backward) in a fresh process, its allocator still empty.

    python -m bench.memory FAMILY CASE torch|seqkern [--threads N] [--steps T]    prints {"bytes": …}

CPU: the high-water mark of resident memory (VmHWM, reset through /proc/self/clear_refs) less what was
resident before the step, when the libraries, the weights, x and dy were already there. GPU:
torch.cuda.max_memory_allocated likewise.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import subprocess
import sys

import torch

from bench import cases, harness
from bench.machine import ROOT


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def supported(device: str) -> bool:
    """Whether the high-water mark can be reset here (Linux)."""
    if device == "cuda":
        return True
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        return status("VmHWM") > 0
    except (OSError, RuntimeError):
        return False


def training_step_peak(library: object, family: str, case: cases.Case, device: str) -> int:
    """Bytes that one training step adds at its peak: saved, workspaces, outputs, gradients."""
    tiny = dataclasses.replace(case, B=2, T=3, I=16, H=16)
    one_step(*prepare(library, family, tiny, device))  # loads libraries, starts threads
    step = prepare(library, family, case, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(*step)
        return torch.cuda.max_memory_allocated() - before
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    one_step(*step)
    return status("VmHWM") - before


def prepare(
    library: object, family: str, case: cases.Case, device: str
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    module = harness.build(library, family, case).to(device)
    x = torch.randn(case.T, case.B, case.I, device=device).requires_grad_()
    return module, x, torch.randn(case.T, case.B, case.H * case.D, device=device)


def one_step(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    y, _ = module(x)
    y.backward(dy)
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def measure(family: str, case: str, side: str, threads: int) -> int:
    """training_step_peak in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", family, case, side, "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=cases.FAMILIES)
    parser.add_argument("case", choices=sorted(cases.BY_NAME))
    parser.add_argument("side", choices=["torch", "seqkern", "null"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="T, in place of the case's own")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(options.threads)
    case = cases.BY_NAME[options.case]
    case = dataclasses.replace(case, T=options.steps or case.T)
    if options.side == "seqkern":
        import seqkern as library
    else:
        library = torch.nn if options.side == "torch" else harness.NullLibrary()
    print(json.dumps({"bytes": training_step_peak(library, options.family, case, device)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
