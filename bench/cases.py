"""The cases, their model FLOPs and the targets they are held to.

Letters: B batch, T steps, I input, H hidden; G gates: LSTM 4, GRU 3, RNN 1; D directions.
"""

from __future__ import annotations

import dataclasses
import math

import torch

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
FAMILIES = ("GRU", "LSTM", "RNN")  # the order of the tables


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. kind: "layer", "cell" (one step of a cell), or "ragged" (lengths 16 to T, fixed seed)."""

    name: str
    B: int
    T: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    bidirectional: bool = False
    kind: str = "layer"

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def short(self) -> bool:
        """Part of --benchmark-quick: a call of torch.nn takes well under a second."""
        return self.kind != "ragged" and self.flops("LSTM") < 3e10

    @property
    def modes(self) -> tuple[str, ...]:
        """One decoding step is inference only; all else is measured forward, and forward + backward."""
        return ("forward",) if self.T == 1 else ("forward", "training")

    def describe(self) -> str:
        return f"{self.B}, {self.T}, {self.I}, {self.H}, {self.layers}{' bi' if self.bidirectional else ''}"

    def lengths(self) -> torch.Tensor | None:
        """[B] int64: uniform in T/16 … T, the first one T; None unless ragged."""
        if self.kind != "ragged":
            return None
        generator = torch.Generator().manual_seed(9)
        lengths = torch.randint(max(1, self.T // 16), self.T + 1, (self.B,), generator=generator)
        lengths[0] = self.T
        return lengths

    def steps(self) -> int:
        """Valid time steps over the batch: B * T, or the sum of the lengths."""
        lengths = self.lengths()
        return self.B * self.T if lengths is None else int(lengths.sum())

    def flops(self, family: str, mode: str = "forward") -> int:
        """Model FLOPs: 2*G*H*(I + H)*D a layer and valid step; three times that forward and backward."""
        total, width = 0, self.I
        for _ in range(self.layers):
            total += 2 * self.steps() * GATES[family] * self.H * (width + self.H) * self.D
            width = self.H * self.D
        return total * {"forward": 1, "backward": 2, "training": 3}[mode]

    def recurrent_bytes(self, family: str, itemsize: int) -> int:
        """Bytes of one direction's W_hh, [G*H, H]: what a step at batch 1 reads at the least."""
        return GATES[family] * self.H * self.H * itemsize

    def scaled(self, family: str, flops: float) -> Case:
        """The same case with T cut so that a forward pass stays within `flops`: checks, cheap gates."""
        T = min(self.T, max(2, math.floor(self.T * flops / self.flops(family))))
        return self if T == self.T else dataclasses.replace(self, T=T)


CASES = (
    Case("c1", 1, 128, 128, 128),
    Case("c2", 32, 20, 100, 128),
    Case("c3", 32, 50, 300, 256, 2, True),
    Case("c4", 64, 256, 300, 256, 2, True),
    Case("c5", 32, 128, 512, 512),
    Case("c6", 64, 128, 1024, 1024),
    Case("c7", 1, 256, 512, 512),
    Case("c8", 8, 2000, 256, 256, 2),
    Case("c9", 64, 256, 300, 256, 2, True, "ragged"),
    Case("c10-b1", 1, 1, 512, 512),
    Case("c10-b16", 16, 1, 512, 512),
    Case("c10-cell-b1", 1, 1, 512, 512, kind="cell"),
    Case("c10-cell-b16", 16, 1, 512, 512, kind="cell"),
)
BY_NAME = {case.name: case for case in CASES}
MAIN = tuple(f"c{n}" for n in range(1, 9))  # the geometric means go over these
MEMORY = ("c3", "c4", "c5")
NEIGHBOUR = ("c1", "c4", "c5", "c7", "c8")


def grid(family: str, device: str) -> list[tuple[str, Case]]:
    """(dtype, case) measured for a family: float32 all; bfloat16 GRU and LSTM over c1–c8; float16 c1, c2, c7
    on a CPU (torch.nn takes seconds there), c1–c8 on a GPU."""
    cells = [("float32", case) for case in CASES]
    if family != "RNN":
        half = MAIN if device == "cuda" else ("c1", "c2", "c7")
        cells += [("bfloat16", BY_NAME[name]) for name in MAIN]
        cells += [("float16", BY_NAME[name]) for name in half]
    return cells


@dataclasses.dataclass(frozen=True)
class Target:
    """A geometric mean of ratios (torch.nn time / seqkern time) to reach on a CPU with two threads."""

    title: str
    family: str
    dtype: str
    cases: tuple[str, ...]
    forward: float | None
    training: float | None
    note: str = ""


TARGETS = (
    Target("GRU float32, c1–c8", "GRU", "float32", MAIN, 3.2, 4.0),
    Target("RNN float32, c1–c8", "RNN", "float32", MAIN, 3.0, 4.0),
    Target("LSTM float32, c1–c8", "LSTM", "float32", MAIN, 1.25, 1.4),
    Target("GRU bfloat16, c1–c8", "GRU", "bfloat16", MAIN, 2.0, 2.0),
    Target("LSTM bfloat16, c1–c8", "LSTM", "bfloat16", MAIN, 1.0, 1.3),
    Target("GRU float16, c1 c2 c7", "GRU", "float16", ("c1", "c2", "c7"), 5.0, 10.0),
    Target("LSTM float16, c1 c2 c7", "LSTM", "float16", ("c1", "c2", "c7"), 5.0, 10.0),
    Target("GRU ragged `lengths`, c9", "GRU", "float32", ("c9-lengths",), 2.0, 3.0),
    Target("LSTM ragged `lengths`, c9", "LSTM", "float32", ("c9-lengths",), 2.0, 3.0),
    Target("GRU PackedSequence, c9", "GRU", "float32", ("c9-packed",), 2.0, 3.0),
    Target("LSTM PackedSequence, c9", "LSTM", "float32", ("c9-packed",), 2.0, 3.0),
    Target("GRU one step, c10", "GRU", "float32", ("c10-b1", "c10-b16"), 2.0, None),
    Target("LSTM one step, c10", "LSTM", "float32", ("c10-b1", "c10-b16"), 4.0, None),
    Target("GRU float32, c7", "GRU", "float32", ("c7",), None, 5.0),
)
PEAK_TARGETS = {"c5": 0.80, "c6": 0.75}  # of the measured FMA peak, float32 forward
FLOOR_TARGET = 1.5  # c7 forward: times reading W_hh from cache once a step
NEIGHBOUR_TARGET = 2.5  # busy / alone
