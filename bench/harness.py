"""How a case is measured: one problem, several subjects, timed in turn.

A Problem holds one set of inputs and one state_dict, in torch.nn's module and in seqkern's. Its subjects
are closures that run the same step: "torch" is the peer, the others are seqkern's ("lengths" and
"packed" in the ragged case). A round calls each subject once (short calls: a block of them), so that
whatever disturbs the machine disturbs all (A B A B …). Medians and p20/p80 come from many rounds; a case
is slower only if the bands part.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bench import parity
from bench.cases import Case

TORCH = "torch"
Call = Callable[[], torch.Tensor]  # runs one step, returns what the loss hangs on


# --- statistics --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds per call over the rounds."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0], len(seconds))
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), deciles[1], deciles[7], len(seconds))

    def to_json(self) -> dict[str, float]:
        return {key: float(f"{value:.5g}") for key, value in dataclasses.asdict(self).items()} | {
            "rounds": self.rounds
        }


def verdict(peer: dict[str, float], ours: dict[str, float]) -> str:
    """ "faster" or "slower" where the p20–p80 bands part, else "even". Takes Spread.to_json's."""
    if ours["p20"] > peer["p80"]:
        return "slower"
    return "faster" if ours["p80"] < peer["p20"] else "even"


# --- one problem -------------------------------------------------------------------------------------------


def build(library: object, family: str, case: Case) -> torch.nn.Module:
    """The case's module of torch.nn or seqkern; time first."""
    if case.kind == "cell":
        return getattr(library, f"{family}Cell")(case.I, case.H)
    return getattr(library, family)(case.I, case.H, case.layers, bidirectional=case.bidirectional)


class Problem:
    """Inputs, states, output gradients and both modules of one (family, dtype, case), from a fixed seed.

    x: [T, B, I] (cell: [B, I]);  h0, c0: [layers*D, B, H] (cell: [B, H]), always given;  dy like y.
    """

    def __init__(self, library: object, family: str, dtype: torch.dtype, case: Case, device: str) -> None:
        T, B, I, H, D = case.T, case.B, case.I, case.H, case.D  # noqa: E741
        self.family, self.dtype, self.case, self.device = family, dtype, case, device
        generator = torch.Generator().manual_seed(2)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.torch_module = build(torch.nn, family, case).to(device=device, dtype=dtype)
        self.seqkern_module = build(library, family, case).to(device=device, dtype=dtype)
        self.seqkern_module.load_state_dict(self.torch_module.state_dict())
        lead, state = ((T, B), (case.layers * D, B, H)) if case.kind != "cell" else ((B,), (B, H))
        self.x = randn(*lead, I)
        self.states = tuple(randn(*state) for _ in range(2 if family == "LSTM" else 1))
        self.dy = randn(*lead, H * D if case.kind != "cell" else H)
        self.dstates = tuple(randn(*state) for _ in self.states)
        self.lengths = case.lengths()

    # What is timed. The loss hangs on y alone, as in training; the gate below takes every output.

    def subjects(self) -> dict[str, tuple[torch.nn.Module, Call, list[torch.Tensor]]]:
        """name -> (module, step, inputs whose gradient is asked for)."""
        hx = self.states if self.family == "LSTM" else self.states[0]
        theirs, ours, x = self.torch_module, self.seqkern_module, self.x.detach()
        if self.lengths is None:
            return {
                TORCH: (theirs, lambda: first(theirs(x, hx)), [x]),
                "seqkern": (ours, lambda: first(ours(x, hx)), [x]),
            }
        # Ragged: both packed layers get a ready PackedSequence; what torch.nn's user pays for packing
        # padded data and unpacking is timed on its own ("packing").
        packed, lengths, T = self.pack(x), self.lengths.to(self.device), self.case.T
        return {
            TORCH: (theirs, lambda: theirs(packed, hx)[0].data, [packed.data]),
            "lengths": (ours, lambda: ours(x, hx, lengths=lengths)[0], [x]),
            "packed": (ours, lambda: ours(packed, hx)[0].data, [packed.data]),
            "packing": (torch.nn.Module(), lambda: pad_packed_sequence(self.pack(x), total_length=T)[0], [x]),
        }

    def pack(self, x: torch.Tensor) -> PackedSequence:
        return pack_padded_sequence(x, self.lengths, enforce_sorted=False)

    def steps(self, mode: str) -> dict[str, Callable[[], dict[str, float]]]:
        """name -> a function that runs one step and returns its seconds by part:
        {"forward"} in eval without grad, or {"training", "backward"} where training is forward + backward."""
        steps: dict[str, Callable[[], dict[str, float]]] = {}
        for name, (module, call, inputs) in self.subjects().items():
            module.train(mode != "forward")
            if mode == "forward":
                steps[name] = lambda call=call: timed_forward(call, self.device)
                continue
            for tensor in inputs:
                tensor.requires_grad_()
            with torch.no_grad():
                dy = torch.randn_like(call())
            leaves = [*inputs, *module.parameters()]
            steps[name] = lambda call=call, leaves=leaves, dy=dy: timed_training(
                call, leaves, dy, self.device
            )
        return steps

    # What is gated: every output and every gradient, at this problem's shape.

    def results(self, form: str, module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """One forward and backward in `dtype`; outputs padded. form: "plain", "lengths" or "packed"."""
        x = self.x.detach().to(dtype).requires_grad_()
        states = tuple(state.detach().to(dtype).requires_grad_() for state in self.states)
        hx = states if self.family == "LSTM" else states[0]
        if self.case.kind == "cell":
            out = module(x, hx)
            y, last = first(out), (out if isinstance(out, tuple) else (out,))
        elif form == "packed":
            y, last = module(self.pack(x), hx)
            y, _ = pad_packed_sequence(y, total_length=self.case.T)
        elif form == "lengths":
            y, last = module(x, hx, lengths=self.lengths.to(self.device))
        else:
            y, last = module(x, hx)
        last = last if isinstance(last, tuple) else (last,)
        module.zero_grad(set_to_none=True)
        outputs = [y, *last]
        torch.autograd.backward(outputs, [d.to(dtype) for d in (self.dy, *self.dstates)])
        found = dict(zip(("y", "h_n", "c_n"), outputs, strict=False))
        found |= {"dx": x.grad} | {f"d{name}0": state.grad for name, state in zip("hc", states, strict=False)}
        found |= {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
        module.zero_grad(set_to_none=True)
        return {name: tensor.detach() for name, tensor in found.items()}

    def gate(self) -> dict[str, parity.Parity]:
        """The parity of each seqkern subject; raises parity.ParityError. See parity.py."""
        wide = parity.referee(self.dtype, self.device)
        theirs = "plain" if self.lengths is None else "packed"
        referee = self.results(theirs, copy.deepcopy(self.torch_module).to(wide), wide)
        peer = self.results(theirs, self.torch_module, self.dtype)
        where = f"{self.family} {self.dtype} {self.case.name}"
        forms = {"seqkern": "plain"} if self.lengths is None else {"lengths": "lengths", "packed": "packed"}
        return {
            name: parity.compare(
                self.results(form, self.seqkern_module, self.dtype),
                peer,
                referee,
                self.dtype,
                self.case.T,
                where,
            )
            for name, form in forms.items()
        }


class NullLibrary:
    """torch.nn in seqkern's place (--benchmark-null): every ratio should be 1, so it measures the harness."""

    def __getattr__(self, name: str) -> type:
        base = getattr(torch.nn, name)

        class Null(base):  # type: ignore[misc, valid-type]
            def forward(
                self, input: torch.Tensor, hx: object = None, *, lengths: torch.Tensor | None = None
            ) -> object:
                if lengths is None:
                    return super().forward(input, hx)
                packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
                y, last = super().forward(packed, hx)
                return pad_packed_sequence(y, total_length=input.shape[0])[0], last

        return Null


def first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


# --- timing ------------------------------------------------------------------------------------------------

_flush: torch.Tensor | None = None


Mark = float | torch.cuda.Event  # a moment: of the processor's clock, or on a GPU's stream


def start_clock(device: str) -> Mark:
    """On a GPU: after its L2 has been overwritten and everything has finished. So what it waits for the
    processor counts, as it does for a program that looks at each result."""
    global _flush
    if device == "cuda":
        if _flush is None:
            _flush = torch.empty(
                2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device=device
            )
        _flush.zero_()
        torch.cuda.synchronize()
    return mark(device)


def mark(device: str) -> Mark:
    if device == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def between(start: Mark, end: Mark) -> float:
    """Seconds."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timed_forward(call: Call, device: str) -> dict[str, float]:
    with torch.no_grad():
        start = start_clock(device)
        out = call()
        end = mark(device)
    del out
    return {"forward": between(start, end)}


def timed_training(call: Call, leaves: list[torch.Tensor], dy: torch.Tensor, device: str) -> dict[str, float]:
    for leaf in leaves:
        leaf.grad = None
    start = start_clock(device)
    y = call()
    middle = mark(device)
    y.backward(dy)
    end = mark(device)
    return {"training": between(start, end), "backward": between(middle, end)}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long one case may take: `seconds` of rounds, at least `least` of them, at most `most`; 3 do
    once `limit` seconds have passed: for long cases, and for a machine that has become busy since the
    warm-up."""

    seconds: float
    least: int
    most: int = 300
    limit: float = 20.0

    def rounds(self, seconds_per_round: float) -> int:
        """Rounds to plan, given how long one took while warming up."""
        return max(self.least, min(self.most, int(self.seconds / max(seconds_per_round, 1e-9))))

    def spent(self, seconds: float, rounds: int) -> bool:
        """Whether to stop before all planned rounds are done."""
        if rounds < self.least:
            return rounds >= 3 and seconds > self.limit
        return seconds > 3 * self.seconds


class OutOfTimeError(Exception):
    """Ends the rounds early."""


class Interleaved:
    """Times subjects in turn. Short calls run in blocks, so that caches are warm as in a real loop."""

    BLOCK_SECONDS, BLOCK_CALLS = 2e-3, 16

    def __init__(self, steps: dict[str, Callable[[], dict[str, float]]]) -> None:
        self.steps = steps
        self.seconds: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
        self.calls = 1

    def warm_up(self) -> float:
        """Every subject until warm (at least once more than its first call, unless that is slow).
        Sets the block size; returns the expected seconds of a round."""
        total, slowest = 0.0, 0.0
        for step in self.steps.values():
            seconds = largest_part(step())
            if seconds < 0.5:  # the gate has already run the shape once
                seconds = min(largest_part(step()) for _ in range(3 if seconds < 0.1 else 1))
            total += seconds
            slowest = max(slowest, seconds)
        self.calls = max(1, min(self.BLOCK_CALLS, math.ceil(self.BLOCK_SECONDS / slowest)))
        return total * self.calls

    def block(self, name: str) -> None:
        """One block of one subject; the mean seconds of its calls go on record."""
        parts = [self.steps[name]() for _ in range(self.calls)]
        for part in parts[0]:
            self.seconds[name].setdefault(part, []).append(sum(p[part] for p in parts) / self.calls)

    def spread(self, name: str, part: str) -> Spread:
        return Spread.of(self.seconds[name][part])


def largest_part(parts: dict[str, float]) -> float:
    return max(parts.values())


class no_collection:  # noqa: N801  (a context manager, used like a function)
    """Python's garbage collector stays out of the timings."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *exc: object) -> None:
        gc.enable()


@contextlib.contextmanager
def forced_tier(tier: str) -> Iterator[None]:
    """seqkern's recurrent layers on CUDA take this tier of csrc/cuda/plan.h, or raise."""
    from seqkern import _extension

    _extension._C.set_cuda_tier(tier)
    try:
        yield
    finally:
        _extension._C.set_cuda_tier("")


def speed_entries(
    interleaved: Interleaved, problem: Problem, mode: str, gates: dict[str, parity.Parity]
) -> Iterator[dict[str, object]]:
    """The JSON entries of a measured case: one a seqkern subject and part (backward beside training)."""
    family, case = problem.family, problem.case
    dtype = str(problem.dtype).removeprefix("torch.")
    for name in interleaved.steps:
        if name in (TORCH, "packing"):
            continue
        case_name = case.name if name == "seqkern" else f"{case.name}-{name}"
        for part in interleaved.seconds[name]:
            peer, ours = (interleaved.spread(who, part).to_json() for who in (TORCH, name))
            flops = case.flops(family, part)
            entry: dict[str, object] = {
                "id": f"{family}-{dtype}-{case_name}-{part}",
                "family": family,
                "dtype": dtype,
                "case": case_name,
                "mode": part,
                "shape": case.describe(),
                "torch": peer,
                "seqkern": ours,
                "ratio": float(f"{peer['median'] / ours['median']:.4g}"),
                "verdict": verdict(peer, ours),
                "gflops": float(f"{flops / ours['median'] / 1e9:.4g}"),
                "torch_gflops": float(f"{flops / peer['median'] / 1e9:.4g}"),
                "parity": gates[name].to_json(),
            }
            if case.name in ("c1", "c7") and part == "forward":
                entry["recurrent_bytes"] = case.recurrent_bytes(family, problem.dtype.itemsize)
                entry["steps"] = case.T
            if "packing" in interleaved.steps:
                entry["torch_packing"] = interleaved.spread("packing", part).to_json()
            yield entry
