"""The recurrent variants: cases, and how one is measured, beside eager loops and beside seqkern's LSTM or GRU
of the same size. The loops: on a CPU a user's, which calls the cell once per step; the eager backend's, which
multiplies all steps' inputs at once; on a GPU also haste's design, a product and a pointwise kernel per step.

`to_base` is a variant's time over that of its base, `scaled` the same after dividing by the ratio of their
work: what a variant costs beyond it. On a CPU the work is FLOPs, on a GPU the exchanges between blocks that a
step has to wait for, one after the other.

Letters: B batch, T steps, I input, H hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

import seqkern
from bench import harness, parity
from seqkern.train.tbptt import map_state

FAMILY = "variants"
MODES = ("forward", "training")
CELLS, LOOP, STEPS = "cell by cell", "eager loop", "step by step"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A module, and seqkern's layer that it is compared with."""

    name: str
    base: str
    module: str
    of_input: int  # rows of H that are multiplied by x
    of_hidden: int  # by vectors of H
    exchanges: int = 1  # of a step: of h, of what a second product multiplies, of a normalised row's sums
    options: tuple[tuple[str, object], ...] = ()


BASES = {"LSTM": (4, 4), "GRU": (3, 3), "RNN": (1, 1)}
VARIANTS = (
    Variant("PeepholeLSTM", "LSTM", "PeepholeLSTM", 4, 4),
    Variant("CIFGLSTM", "LSTM", "CIFGLSTM", 3, 3),
    Variant("LayerNormLSTM", "LSTM", "LayerNormLSTM", 4, 4, 3),
    Variant("NestedLSTM", "LSTM", "NestedLSTM", 4, 12, 2),
    Variant("SLSTM", "LSTM", "SLSTM", 4, 4),  # one head
    Variant("LayerNormGRU", "GRU", "LayerNormGRU", 3, 3, 2),
    Variant("GRU, reset before", "GRU", "GRU", 3, 3, 2, (("reset_after", False),)),
    Variant("MGU", "GRU", "MGU", 2, 2, 2),
    Variant("NestedGRU", "GRU", "NestedGRU", 3, 9, 2),
    Variant("IndRNN", "RNN", "IndRNN", 1, 0),
    Variant("LSTM, zoneout", "LSTM", "LSTM", 4, 4, 1, (("zoneout", (0.1, 0.1)),)),
    Variant("LSTM, recurrent dropout", "LSTM", "LSTM", 4, 4, 1, (("recurrent_dropout", 0.1),)),
    Variant("LSTM, variational dropout", "LSTM", "LSTM", 4, 4, 1, (("variational_dropout", 0.1),)),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant at one size."""

    name: str
    variant: str
    B: int = 64
    T: int = 128
    I: int = 300  # noqa: E741
    H: int = 256
    device: str = "cpu"
    short: bool = False

    def describe(self) -> str:
        return f"{self.B}, {self.T}, {self.I}, {self.H}"

    def flops(self, part: str) -> int:
        """Of the products with x and with vectors of H; backward twice forward's."""
        passes = {"forward": 1, "backward": 2, "training": 3}[part]
        variant = BY_NAME[self.variant]
        return passes * self.products(variant.of_input, variant.of_hidden)

    def work(self, part: str) -> float:
        """Over the base's: see above."""
        variant = BY_NAME[self.variant]
        if self.device == "cuda":
            return variant.exchanges
        passes = {"forward": 1, "backward": 2, "training": 3}[part]
        return self.flops(part) / (passes * self.products(*BASES[variant.base]))

    def products(self, of_input: int, of_hidden: int) -> int:
        return 2 * self.B * self.T * self.H * (of_input * self.I + of_hidden * self.H)

    def scaled(self, family: str, flops: float) -> Case:
        """The same case, cut in T so that a check of it takes about a second."""
        return dataclasses.replace(self, T=min(self.T, 8))


def cells(device: str) -> list[tuple[str, Case]]:
    """(dtype, case); on a GPU the most important first."""
    names = [(v.name, v.name.lower().replace(", ", "-").replace(" ", "-")) for v in VARIANTS]
    if device == "cpu":
        return [("float32", Case(slug, name)) for name, slug in names]
    sizes = [("bfloat16", 64, 256, 256), ("bfloat16", 16, 256, 768), ("float32", 64, 256, 256)]
    return [
        (dtype, Case(f"{slug}-{H}", name, B, T, H, H, device="cuda"))
        for dtype, B, T, H in sizes
        for name, slug in names
    ]


CELLS_TARGET = 8.0  # times faster than cell by cell, forward and backward, on two CPU cores
STEPS_TARGET = 3.0  # times faster than step by step, on a GPU
BASE_TARGET = 1.3  # times the base's time, in proportion to the work


class Problem:
    """x [T, B, I] and dy from a fixed seed; the variant, and its base, with parameters of the usual size.

    All go on from the states after a few steps: from zeros, a normalised W_hh h of zeros multiplies gradients
    by 1 / sqrt(eps), and their rounding with them.
    """

    def __init__(self, library: object, family: str, dtype: torch.dtype, case: Case, device: str) -> None:
        variant = BY_NAME[case.variant]
        self.dtype, self.case, self.device, self.base_name = dtype, case, device, variant.base
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            sizes, options = (case.I, case.H), dict(variant.options)
            self.module = getattr(seqkern, variant.module)(*sizes, **options).to(device=device, dtype=dtype)
            self.cell: torch.nn.Module | None = None
            if device == "cpu" and not variant.name.startswith("LSTM, "):  # whose cell is torch.nn's
                self.cell = getattr(seqkern, f"{variant.module}Cell")(*sizes, **options).to(dtype=dtype)
                state = self.module.state_dict()
                self.cell.load_state_dict({name.replace("_l0", ""): number for name, number in state.items()})
            self.base = getattr(seqkern, variant.base)(case.I, case.H).to(device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(case.T, case.B, case.I, generator=generator).to(device=device, dtype=dtype)
        self.dy = torch.randn(case.T, case.B, case.H, generator=generator).to(device=device, dtype=dtype)

        before = torch.randn(3, case.B, case.I, generator=generator).to(device=device, dtype=dtype)
        with torch.no_grad(), seqkern.use_backend("eager"):
            self.state, self.base_state = self.module(before)[1], self.base(before)[1]

    def loop(self) -> torch.Tensor:
        with seqkern.use_backend("eager"):
            return self.module(self.x, self.state)[0]

    def cell_by_cell(self) -> torch.Tensor:
        state, ys = map_state(lambda part: part[0], self.state), []
        with seqkern.use_backend("eager"):
            for x in self.x:
                state = self.cell(x, state)
                ys.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(ys)

    def subjects(self) -> dict[str, tuple[torch.nn.Module, Callable[[], torch.Tensor]]]:
        def run() -> torch.Tensor:
            return self.module(self.x, self.state)[0]

        found = {
            LOOP: (self.module, self.loop),
            "seqkern": (self.module, run),
            self.base_name: (self.base, lambda: self.base(self.x, self.base_state)[0]),
        }
        if self.cell is not None:
            found[CELLS] = (self.cell, self.cell_by_cell)
        if self.device == "cuda" and BY_NAME[self.case.variant].of_hidden > 0:
            found[STEPS] = (self.module, run)
        return found

    def steps(self, mode: str) -> dict[str, Callable[[], dict[str, float]]]:
        steps: dict[str, Callable[[], dict[str, float]]] = {}
        self.x = self.x.detach().requires_grad_(mode == "training")
        for name, (module, call) in self.subjects().items():
            module.train(mode == "training")
            if mode == "forward":
                step = functools.partial(harness.timed_forward, call, self.device)
            else:
                leaves = [self.x, *module.parameters()]
                step = functools.partial(harness.timed_training, call, leaves, self.dy, self.device)
            steps[name] = harness.forced_tier("step")(step) if name == STEPS else step
        return steps

    def results(self, backend: str | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """One forward and backward in training, with the same random masks each time."""
        self.module.to(dtype=dtype).train()
        x = self.x.detach().to(dtype).requires_grad_()
        leaves = {"x": x, **dict(self.module.named_parameters())}
        with torch.random.fork_rng(devices=[]), seqkern.use_backend(backend):
            torch.manual_seed(3)
            y = self.module(x, map_state(lambda part: part.to(dtype), self.state))[0]
            grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype))
        self.module.to(dtype=self.dtype)
        found = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {"y": y.detach(), **found}

    def gate(self) -> dict[str, parity.Parity]:
        referee = self.results("eager", torch.float64)
        peer = self.results("eager", self.dtype)
        where = f"{self.case.name} {self.dtype}"
        got = self.results(None, self.dtype)
        return {"seqkern": parity.compare(got, peer, referee, self.dtype, self.case.T, where)}


def entries(
    interleaved: harness.Interleaved, problem: Problem, gates: dict[str, parity.Parity]
) -> Iterator[dict[str, object]]:
    """The JSON entries: one a part."""
    case, dtype = problem.case, str(problem.dtype).removeprefix("torch.")
    for part in interleaved.seconds["seqkern"]:
        spreads = {name: interleaved.spread(name, part).to_json() for name in interleaved.steps}
        ours, theirs, base = (spreads[name] for name in ("seqkern", LOOP, problem.base_name))
        to_base = ours["median"] / base["median"]
        entry = {
            "id": f"{FAMILY}-{dtype}-{case.name}-{part}",
            "family": FAMILY,
            "dtype": dtype,
            "case": case.name,
            "mode": part,
            "shape": f"{case.variant} {case.describe()}",
            "peers": {name: spread for name, spread in spreads.items() if name != "seqkern"},
            "best": LOOP,
            "seqkern": ours,
            "ratio": float(f"{theirs['median'] / ours['median']:.4g}"),
            "base": problem.base_name,
            "to_base": float(f"{to_base:.4g}"),
            "scaled": float(f"{to_base / case.work(part):.4g}"),
            "verdict": harness.verdict(theirs, ours),
            "gflops": float(f"{case.flops(part) / ours['median'] / 1e9:.4g}"),
            "best_gflops": float(f"{case.flops(part) / theirs['median'] / 1e9:.4g}"),
            "parity": gates["seqkern"].to_json(),
        }
        for key, name in (("to_cells", CELLS), ("to_steps", STEPS)):
            if name in spreads:
                entry[key] = float(f"{spreads[name]['median'] / ours['median']:.4g}")
        yield entry
