"""The conditional random field's cases, and how one is measured: seqkern's module beside pytorch-crf's.

The peer is pytorch-crf itself where it is installed (as `torchcrf`), else its method written out anew: per
step a broadcast sum [B, K, K] and a logsumexp or a max over it, and in decoding a trace back per sequence, in
Python.

Letters: B batch, T steps, K tags.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch

from bench import harness, parity

FAMILY = "crf"
MODES = ("forward", "training", "decode")


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. padded: lengths are uniform in T/8 … T, given as a mask."""

    name: str
    B: int
    T: int
    K: int
    padded: bool = False

    @property
    def short(self) -> bool:
        return self.T < 1000

    def describe(self) -> str:
        return f"{self.B}, {self.T}, {self.K}{', padded' * self.padded}"

    def lengths(self) -> torch.Tensor:
        """[B] int64, the longest T."""
        if not self.padded:
            return torch.full((self.B,), self.T)
        lengths = torch.randint(
            self.T // 8, self.T + 1, (self.B,), generator=torch.Generator().manual_seed(9)
        )
        lengths[0] = self.T
        return lengths

    def flops(self, part: str) -> int:
        """Useful FLOPs: a product with the K by K matrix per step; backward three of them; decoding's are
        sums and maxima."""
        products = {"forward": 1, "backward": 3, "training": 4, "decode": 1}
        return 2 * products[part] * self.K * self.K * int(self.lengths().sum())

    def scaled(self, family: str, flops: float) -> Case:
        """The same case, cut in T so that a check of it takes about a second."""
        return dataclasses.replace(self, T=min(self.T, 64))


CASES = (
    Case("c1", 32, 128, 20),
    Case("c1-padded", 32, 128, 20, padded=True),
    Case("c2", 64, 32, 9),
    Case("c3", 4, 1024, 20),
    Case("c4", 16, 64, 100),
)
CELLS = [("float32", case) for case in CASES] + [("float64", CASES[0])]

# Ratios of pytorch-crf's time to seqkern's on two CPU cores that (32, 128, 20) is to reach.
TARGETS = {("c1", "training"): 8.0, ("c1", "decode"): 8.0}


class TheirMethod(torch.nn.Module):
    """pytorch-crf's method; time first."""

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.start_transitions = torch.nn.Parameter(torch.empty(num_tags))
        self.end_transitions = torch.nn.Parameter(torch.empty(num_tags))
        self.transitions = torch.nn.Parameter(torch.empty(num_tags, num_tags))

    def forward(self, emissions: torch.Tensor, tags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        T, B = tags.shape
        b, kept = torch.arange(B, device=tags.device), mask.to(emissions.dtype)
        score = self.start_transitions[tags[0]] + emissions[0, b, tags[0]]
        for t in range(1, T):
            score = score + self.transitions[tags[t - 1], tags[t]] * kept[t]
            score = score + emissions[t, b, tags[t]] * kept[t]
        score = score + self.end_transitions[tags[mask.sum(0) - 1, b]]
        alpha = self.start_transitions + emissions[0]
        for t in range(1, T):
            ahead = alpha.unsqueeze(2) + self.transitions + emissions[t].unsqueeze(1)
            alpha = torch.where(mask[t].unsqueeze(1), torch.logsumexp(ahead, 1), alpha)
        return (score - torch.logsumexp(alpha + self.end_transitions, 1)).sum()

    def decode(self, emissions: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        v, pointers, found = self.start_transitions + emissions[0], [], []
        for t in range(1, len(emissions)):
            ahead, pointer = (v.unsqueeze(2) + self.transitions + emissions[t].unsqueeze(1)).max(1)
            v = torch.where(mask[t].unsqueeze(1), ahead, v)
            pointers.append(pointer)
        v = v + self.end_transitions
        lasts = mask.sum(0) - 1
        for b in range(v.shape[0]):
            path = [v[b].max(0).indices.item()]
            for pointer in reversed(pointers[: lasts[b]]):
                path.append(pointer[b][path[-1]].item())
            found.append(path[::-1])
        return found


def their_module(K: int) -> tuple[str, torch.nn.Module]:
    """(name, module) of the peer."""
    if importlib.util.find_spec("torchcrf") is None:
        return "pytorch-crf's method", TheirMethod(K)
    import torchcrf

    return "pytorch-crf", torchcrf.CRF(K)


class Problem:
    """emissions [T, B, K] and tags [T, B] from a fixed seed; both modules with equal parameters."""

    def __init__(self, library: object, family: str, dtype: torch.dtype, case: Case, device: str) -> None:
        self.dtype, self.case, self.device = dtype, case, device
        generator = torch.Generator().manual_seed(2)
        ours = library.CRF(case.K) if hasattr(library, "CRF") else their_module(case.K)[1]
        self.peer, theirs = their_module(case.K)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)
        theirs.load_state_dict(ours.state_dict())
        self.ours, self.theirs = (m.to(device=device, dtype=dtype) for m in (ours, theirs))
        emissions = torch.randn(case.T, case.B, case.K, generator=generator)
        self.emissions = emissions.to(device=device, dtype=dtype)
        self.tags = torch.randint(0, case.K, (case.T, case.B), generator=generator).to(device)
        self.mask = (torch.arange(case.T)[:, None] < case.lengths()).to(device)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {self.peer: self.theirs, "seqkern": self.ours}

    def steps(self, mode: str) -> dict[str, Callable[[], dict[str, float]]]:
        steps: dict[str, Callable[[], dict[str, float]]] = {}
        emissions = self.emissions.detach().requires_grad_(mode == "training")
        one = torch.ones((), dtype=self.dtype, device=self.device)
        for name, module in self.modules().items():
            call = functools.partial(module, emissions, self.tags, self.mask)
            if mode == "decode":
                steps[name] = functools.partial(
                    self.timed_decode, functools.partial(module.decode, emissions, self.mask)
                )
            elif mode == "forward":
                steps[name] = functools.partial(harness.timed_forward, call, self.device)
            else:
                leaves = [emissions, *module.parameters()]
                steps[name] = functools.partial(harness.timed_training, call, leaves, one, self.device)
        return steps

    def timed_decode(self, call: Callable[[], list[list[int]]]) -> dict[str, float]:
        return {"decode": harness.timed_forward(call, self.device)["forward"]}

    def results(self, module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        emissions = self.emissions.detach().to(dtype).requires_grad_()
        value = module(emissions, self.tags, self.mask)
        leaves = {"emissions": emissions, **dict(module.named_parameters())}
        grads = torch.autograd.grad(value, list(leaves.values()))
        found = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {"value": value.detach(), **found}

    def gate(self) -> dict[str, parity.Parity]:
        with torch.no_grad():
            best = {name: m.decode(self.emissions, self.mask) for name, m in self.modules().items()}
        if best["seqkern"] != best[self.peer]:
            raise parity.ParityError(f"{self.case.name} {self.dtype}: best sequences are not {self.peer}'s")
        referee = self.results(copy.deepcopy(self.theirs).double(), torch.float64)
        peer = self.results(self.theirs, self.dtype)
        if self.dtype is torch.float64:  # the referee is no better: its float32 error, in proportion
            share = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            rounded = self.results(copy.deepcopy(self.theirs).float(), torch.float32)
            peer = {name: exact + (rounded[name].double() - exact) * share for name, exact in referee.items()}
        where = f"{self.case.name} {self.dtype}"
        got = self.results(self.ours, self.dtype)
        return {"seqkern": parity.compare(got, peer, referee, self.dtype, self.case.T, where)}


def entries(
    interleaved: harness.Interleaved, problem: Problem, gates: dict[str, parity.Parity]
) -> Iterator[dict[str, object]]:
    """The JSON entries: one a part."""
    case, dtype = problem.case, str(problem.dtype).removeprefix("torch.")
    for part in interleaved.seconds["seqkern"]:
        ours, theirs = (interleaved.spread(name, part).to_json() for name in ("seqkern", problem.peer))
        yield {
            "id": f"{FAMILY}-{dtype}-{case.name}-{part}",
            "family": FAMILY,
            "dtype": dtype,
            "case": case.name,
            "mode": part,
            "shape": case.describe(),
            "peers": {problem.peer: theirs},
            "best": problem.peer,
            "seqkern": ours,
            "ratio": float(f"{theirs['median'] / ours['median']:.4g}"),
            "verdict": harness.verdict(theirs, ours),
            "gflops": float(f"{case.flops(part) / ours['median'] / 1e9:.4g}"),
            "best_gflops": float(f"{case.flops(part) / theirs['median'] / 1e9:.4g}"),
            "parity": gates["seqkern"].to_json(),
        }
