"""Which CUDA kernel a recurrent layer takes, and why: seqkern.plan and `python -m seqkern plan`.

Needs no GPU: the choice is a function of the sizes and of a device's FACTS. What it chooses between is in
csrc/cuda/plan.h.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import torch

from seqkern import _extension
from seqkern.ops import CELLS

KINDS = ("rnn", *(name for name in CELLS if not name.startswith("rnn_")))
PASSES = ("forward", "backward")


class Facts(NamedTuple):
    """What the choice asks of a device."""

    capability: int  # 90 for 9.0
    sms: int  # multiprocessors
    shared_bytes: int  # shared memory that one block may ask for
    max_cluster: int  # blocks of the largest cluster, 1 for none


FACTS = {
    "a100": Facts(80, 108, 163 * 1024, 1),
    "h100": Facts(90, 132, 227 * 1024, 16),
    "h200": Facts(90, 132, 227 * 1024, 16),
}


def facts_of(device: int) -> Facts:
    """The facts of a CUDA device that is here, as the kernels' launches see them."""
    return Facts(*_extension._C.cuda_facts(device))


def plan(
    kind: str,
    *,
    steps: int,
    batch: int,
    hidden: int,
    proj_size: int = 0,
    bidirectional: bool = False,
    heads: int = 1,
    regularised: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> str:
    """Which CUDA kernel runs the recurrence of one layer, forward and backward, and why not the others.

    Args:
        kind: "rnn", "gru", "lstm" or another name in seqkern.ops.CELLS
        steps, batch, hidden: T, B and H of the layer; of a stack, of each layer
        heads: of an sLSTM
        regularised: zoneout, dropout within the recurrence or clipping
        device: a GPU of FACTS, such as "h100"; None: the current device
    Returns:
        lines for reading: per pass the tier chosen, the others with their estimates, and those that cannot
        run it with the reason. float32 is planned for torch.backends.cudnn.rnn.fp32_precision
    Raises:
        ValueError: no such kind or device, or a size below 1
        RuntimeError: the extension has no CUDA planner; no device named, and none here
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    for name, size in (("steps", steps), ("batch", batch), ("hidden", hidden), ("heads", heads)):
        if size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size}")
    if heads > 1 and (not CELLS.get(kind, CELLS["lstm"]).has_heads or hidden % heads):
        raise ValueError(f"heads: expected 1, or for slstm a divisor of hidden = {hidden}, got {heads}")
    if device is not None and device not in FACTS:
        raise ValueError(f"device: expected one of {', '.join(FACTS)} or None, got {device!r}")
    if not hasattr(_extension._C, "cuda_plan"):
        raise RuntimeError(f"plan: {_extension.WHY_NOT or 'this extension has no CUDA planner'}")
    if device is None and not torch.cuda.is_available():
        raise RuntimeError(f"plan: expected a device, one of {', '.join(FACTS)}: there is none here")
    facts = FACTS[device] if device is not None else facts_of(torch.cuda.current_device())
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    units = hidden // heads  # a head is planned as a direction
    sizes = (steps, batch, units, proj_size or units, (2 if bidirectional else 1) * heads, regularised)
    dtype_name = str(dtype).removeprefix("torch.")
    texts = []
    for way in PASSES:
        text = _extension._C.cuda_plan(kind, dtype_name, way, tf32, *sizes, *facts)
        texts.append("\n  ".join([f"{way}:", *text.strip().splitlines()]))
    return "\n".join(texts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqkern plan", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--hidden", type=int, required=True, metavar="H")
    parser.add_argument("--batch", type=int, default=16, metavar="B")
    parser.add_argument("--steps", type=int, default=1024, metavar="T")
    parser.add_argument("--proj-size", type=int, default=0, metavar="P")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--heads", type=int, default=1, metavar="N")
    parser.add_argument("--regularised", action="store_true")
    dtypes = ("float32", "float64", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32")
    parser.add_argument("--device", choices=FACTS, help="the GPU to plan for; the current one by default")
    options = vars(parser.parse_args(argv))
    options["dtype"] = getattr(torch, options["dtype"])
    try:
        print(plan(**options))
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
