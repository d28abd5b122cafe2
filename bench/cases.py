"""The cases, their model FLOPs and the targets they are held to.

Letters: B batch, T steps, I input, H hidden; G gates: LSTM 4, GRU 3, RNN 1; D directions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
FAMILIES = ("GRU", "LSTM", "RNN")  # the order of the tables


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. kind: "layer", "cell" (one step of a cell), or "ragged": lengths uniform in
    T/ragged_from … T, from a fixed seed."""

    name: str
    B: int
    T: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    bidirectional: bool = False
    kind: str = "layer"
    ragged_from: int = 16

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
        """[B] int64, the first one T; None unless ragged."""
        if self.kind != "ragged":
            return None
        generator = torch.Generator().manual_seed(9)
        lengths = torch.randint(
            max(1, self.T // self.ragged_from), self.T + 1, (self.B,), generator=generator
        )
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
# On a GPU. g: T 1024 unless the name says otherwise; d: DeepBench; s: small H; t: the tutorials' model.
GPU_CASES = (
    *(Case(f"g{H}-b{B}", B, 1024, H, H) for H in (512, 768, 1024) for B in (2, 16, 64, 256)),
    *(Case(f"d{H}-b{B}", B, 25, H, H) for H in (512, 1024, 2048) for B in (16, 32, 64, 128)),
    *(Case(f"d1536-b{B}", B, 50, 1536, 1536) for B in (8, 16, 32)),
    *(Case(f"d256-b{B}", B, 150, 256, 256) for B in (16, 32, 64)),
    *(Case(f"d1024-t1500-b{B}", B, 1500, 1024, 1024) for B in (32, 64)),
    Case("d2816-t1500-b32", 32, 1500, 2816, 2816),
    Case("s72", 6, 2721, 128, 72),
    Case("s168", 62, 2058, 16, 168),
    Case("s152-l4", 45, 1981, 56, 152, 4),
    Case("t256", 64, 256, 300, 256, 2, True),
    Case("t256-ragged", 64, 256, 300, 256, 2, True, "ragged", 10),
    Case("g768-ragged", 64, 1024, 768, 768, 1, False, "ragged", 10),
)
BY_NAME = {case.name: case for case in (*CASES, *GPU_CASES)}
MAIN = tuple(f"c{n}" for n in range(1, 9))  # the geometric means go over these
MEMORY = ("c3", "c4", "c5")
NEIGHBOUR = ("c1", "c4", "c5", "c7", "c8")


def grid(family: str, device: str) -> list[tuple[str, Case]]:
    """(dtype, case) measured for a family: on a CPU float32 all; bfloat16 GRU and LSTM over c1–c8; float16
    c1, c2, c7 (torch.nn takes seconds there). On a GPU what GPU_GRID says."""
    if device == "cuda":
        return [(dtype, BY_NAME[name]) for family_, dtype, name in GPU_GRID if family_ == family]
    found = [("float32", case) for case in CASES]
    if family != "RNN":
        found += [("bfloat16", BY_NAME[name]) for name in MAIN]
        found += [("float16", BY_NAME[name]) for name in ("c1", "c2", "c7")]
    return found


Cell = tuple[str, str, str]  # family, dtype, name of the case


def cells(families: str, dtypes: str, names: str) -> tuple[Cell, ...]:
    """Every combination of three lists of words."""
    rows = itertools.product(families.split(), names.split(), dtypes.split())
    return tuple((family, dtype, name) for family, name, dtype in rows)


ALL, HALF = "float16 bfloat16 float32", "float16 bfloat16"
BEST = cells("LSTM", "float16", "g768-b16")  # what cuDNN does best
SAME_IN_BF16 = cells("LSTM", "bfloat16", "g768-b16")
GRU_HALF = cells("GRU", HALF, "g512-b16 g768-b16 g1024-b16")
TUTORIAL = cells("LSTM GRU", ALL, "t256")
RAGGED = cells("LSTM GRU", ALL, "t256-ragged") + cells("LSTM", HALF, "g768-ragged")
DEEP = " ".join(f"d{H}-b{B}" for H in (512, 1024, 2048) for B in (16, 32, 64, 128))
# What is measured on a GPU, the most important first: where time runs out, the last are left out.
GPU_GRID: tuple[Cell, ...] = (
    *(*BEST, *SAME_IN_BF16, *cells("GRU", "bfloat16 float16", "g768-b16"), *TUTORIAL, *RAGGED),
    *(cell for cell in GRU_HALF if cell[2] != "g768-b16"),
    *cells("LSTM GRU", "float32", "g768-b16"),
    *cells("LSTM", ALL, "g768-b2 g768-b64 g768-b256"),
    *cells("LSTM", "float16", f"{DEEP} d1536-b8 d1536-b16 d1536-b32 d256-b16 d256-b32 d256-b64"),
    *cells("GRU", "float16", "d1024-t1500-b32 d1024-t1500-b64 d2816-t1500-b32"),
    *cells("LSTM GRU", "bfloat16 float32", "s72 s168 s152-l4"),
    *cells("RNN", "bfloat16 float32", "g768-b16 t256 t256-ragged"),
    *cells("GRU", "bfloat16", "g768-b2 g768-b64 g768-b256"),
    *cells("LSTM", "float32", "d512-b16 d512-b128 d1024-b64 d2048-b32 d1536-b16 d256-b32"),
    *cells("GRU", "float32", "d1024-t1500-b32 d2816-t1500-b32"),
)


def rank(cell: Cell) -> int:
    """A cell's place in GPU_GRID; behind all of them where it has none."""
    return _RANKS.get(cell, len(_RANKS))


_RANKS = {cell: place for place, cell in enumerate(GPU_GRID)}


# Each tier of csrc/cuda/plan.h is timed on these, forced: what the cost model there is fitted to. I is small.
TIERS = ("step", "block", "cluster", "grid")


def tier_cells() -> list[tuple[str, str, Case]]:
    """(family, dtype, case)."""
    sizes = [(H, B) for B in (16, 64, 2) for H in (64, 160, 256, 448, 640, 768, 1024, 1536)]
    rows = [("bfloat16", H, B) for H, B in sizes] + [("float32", H, 16) for H in (64, 256, 768)]
    return [
        (family, dtype, Case(f"tier{H}-b{B}", B, 256, 64, H))
        for dtype, H, B in rows
        for family in ("LSTM", "GRU")
    ]


@dataclasses.dataclass(frozen=True)
class Target:
    """A geometric mean of ratios (torch.nn time / seqkern time) to reach: on a CPU with two threads, on an
    H200. The names in `cells` are those of entries: a ragged case has two."""

    title: str
    cells: tuple[Cell, ...]
    forward: float | None
    training: float | None


C1_TO_C8 = " ".join(MAIN)
TARGETS = (
    Target("GRU float32, c1–c8", cells("GRU", "float32", C1_TO_C8), 3.2, 4.0),
    Target("RNN float32, c1–c8", cells("RNN", "float32", C1_TO_C8), 3.0, 4.0),
    Target("LSTM float32, c1–c8", cells("LSTM", "float32", C1_TO_C8), 1.25, 1.4),
    Target("GRU bfloat16, c1–c8", cells("GRU", "bfloat16", C1_TO_C8), 2.0, 2.0),
    Target("LSTM bfloat16, c1–c8", cells("LSTM", "bfloat16", C1_TO_C8), 1.0, 1.3),
    Target("GRU float16, c1 c2 c7", cells("GRU", "float16", "c1 c2 c7"), 5.0, 10.0),
    Target("LSTM float16, c1 c2 c7", cells("LSTM", "float16", "c1 c2 c7"), 5.0, 10.0),
    Target("GRU ragged `lengths`, c9", cells("GRU", "float32", "c9-lengths"), 2.0, 3.0),
    Target("LSTM ragged `lengths`, c9", cells("LSTM", "float32", "c9-lengths"), 2.0, 3.0),
    Target("GRU PackedSequence, c9", cells("GRU", "float32", "c9-packed"), 2.0, 3.0),
    Target("LSTM PackedSequence, c9", cells("LSTM", "float32", "c9-packed"), 2.0, 3.0),
    Target("GRU one step, c10", cells("GRU", "float32", "c10-b1 c10-b16"), 2.0, None),
    Target("LSTM one step, c10", cells("LSTM", "float32", "c10-b1 c10-b16"), 4.0, None),
    Target("GRU float32, c7", cells("GRU", "float32", "c7"), None, 5.0),
)
# Of a ragged case the entry that goes by lengths.
GPU_TARGETS = (
    Target("cuDNN's best case: LSTM fp16, 768, B 16, T 1024", BEST, 1.5, 1.3),
    Target("the same in bf16", SAME_IN_BF16, 2.5, 2.5),
    Target("GRU 512–1024, 16-bit", GRU_HALF, 3.0, 3.0),
    Target("two layers bidirectional, 256, B 64, T 256", TUTORIAL, 2.0, 2.0),
    Target(
        "ragged, lengths uniform in 10–100 %",
        tuple((family, dtype, f"{name}-lengths") for family, dtype, name in RAGGED),
        *(3.0, 3.0),
    ),
)
GPU_WORST_TARGET = 1.0  # any case
GPU_STEP_TARGET = 1.3  # µs per step, BEST forward
PEAK_TARGETS = {"c5": 0.80, "c6": 0.75}  # of the measured FMA peak, float32 forward
FLOOR_TARGET = 1.5  # c7 forward: times reading W_hh from cache once a step
NEIGHBOUR_TARGET = 2.5  # busy / alone
