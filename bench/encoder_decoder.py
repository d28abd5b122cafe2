"""Additive attention and the decoder that uses it: seqkern and the formula in eager PyTorch, in turn.

Letters: B batch, L queries (or steps), S keys, H size of the tanh layer, of values and of a hidden state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from bench import harness, parity

FAMILY = "encoder_decoder"


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. kind: "additive", the attention of given queries; "lstm" or "gru", a decoder's L steps with
    teacher forcing, its inputs half of H."""

    name: str
    kind: str
    B: int
    L: int
    S: int
    H: int
    padded: bool = False

    def describe(self) -> str:
        return f"{self.kind} {self.B}, {self.L}, {self.S}, {self.H}" + ", padded" * self.padded

    def lengths(self) -> torch.Tensor:
        """[B] int64: S, or, padded, uniform in S/8 … S."""
        if not self.padded:
            return torch.full((self.B,), self.S)
        generator = torch.Generator().manual_seed(9)
        return torch.randint(max(1, self.S // 8), self.S + 1, (self.B,), generator=generator)

    def flops(self, part: str) -> int:
        """Per pair of a valid key and a query 3 H of the score (an addition, a tanh, a multiplication, as
        one each) and 2 H of the context; of a decoder the products besides. Backward counts twice."""
        pairs = self.L * int(self.lengths().sum())
        count = 5 * self.H * pairs
        if self.kind != "additive":
            gates = 4 if self.kind == "lstm" else 3
            step = gates * self.H * (self.H // 2 + 2 * self.H) + self.H * self.H  # of [x; context], h; query
            count += 2 * self.B * self.L * step + 2 * self.B * self.S * self.H * self.H
        return count * {"forward": 1, "backward": 2, "training": 3}[part]

    def scaled(self, family: str, flops: float) -> Case:
        """The same case with B and then L cut so that a forward pass stays within `flops`."""
        case = self
        while case.flops("forward") > flops and (case.B > 2 or case.L > 4):
            smaller = dict(B=max(2, case.B // 2)) if case.B > 2 else dict(L=max(4, case.L // 2))
            case = dataclasses.replace(case, **smaller)
        return case


CASES = (
    Case("a1", "additive", 64, 32, 64, 512),
    Case("a1-padded", "additive", 64, 32, 64, 512, padded=True),
    Case("a2", "additive", 32, 1, 50, 256),
    Case("d1", "lstm", 64, 32, 64, 512),
    Case("d2", "gru", 32, 20, 30, 256),
    Case("d2-padded", "gru", 32, 20, 30, 256, padded=True),
)
TARGET = ("a1", 6.0)  # of the eager formula's time, forward + backward, on two cores


class Problem:
    """One case: the same leaves for seqkern's operation and for the formula."""

    def __init__(self, library: object, family: str, dtype: torch.dtype, case: Case, device: str) -> None:
        self.library, self.dtype, self.case, self.device = library, dtype, case, device
        generator = torch.Generator().manual_seed(2)
        B, L, S, H = case.B, case.L, case.S, case.H

        def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(device=device, dtype=dtype)

        self.lengths = case.lengths().to(device) if case.padded else None
        self.dy = randn(B, L, H)
        self.leaves = dict(keys=randn(B, S, H), v=randn(H, scale=H**-0.5))
        if case.kind == "additive":
            self.leaves |= dict(query=randn(B, L, H), values=randn(B, S, H))
        else:
            gates = (4 if case.kind == "lstm" else 3) * H
            shapes = dict(w_ih=(gates, H // 2 + H), w_hh=(gates, H), b_ih=(gates,), b_hh=(gates,))
            shapes |= dict(w_query=(H, H), w_key=(H, H))
            self.leaves |= {name: randn(*shape, scale=H**-0.5) for name, shape in shapes.items()}
            self.leaves["x"] = randn(L, B, H // 2)

    # Each subject takes the leaves and returns [B, L, H].

    def ours(self, **p: torch.Tensor) -> torch.Tensor:
        ops, padding = self.library.ops, dict(lengths=self.lengths)
        if self.case.kind == "additive":
            return ops.additive_attention(p["query"], p["keys"], p["v"], p["values"], **padding)[0]
        h = p["x"].new_zeros((self.case.B, self.case.H))
        output, *_ = ops.attention_decoder(
            p["x"],
            (h, h) if self.case.kind == "lstm" else h,
            [p["w_ih"], p["w_hh"], p["b_ih"], p["b_hh"]],
            p["w_query"],
            torch.nn.functional.linear(p["keys"], p["w_key"]),
            p["v"],
            p["keys"],
            **padding,
        )
        return output.transpose(0, 1)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, v: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        score = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v
        if self.lengths is not None:
            padding = torch.arange(self.case.S, device=self.device) >= self.lengths[:, None]
            score = score.masked_fill(padding.unsqueeze(1), -torch.inf)
        return torch.bmm(torch.softmax(score, -1), values)

    def eager(self, **p: torch.Tensor) -> torch.Tensor:
        if self.case.kind == "additive":
            return self.attend(p["query"], p["keys"], p["v"], p["values"])
        weights = (p["w_ih"], p["w_hh"], p["b_ih"], p["b_hh"])
        key = p["keys"] @ p["w_key"].T
        h = c = p["x"].new_zeros((self.case.B, self.case.H))
        outputs = []
        for x in p["x"].unbind(0):
            query = (h @ p["w_query"].T).unsqueeze(1)
            step = torch.cat([x, self.attend(query, key, p["v"], p["keys"]).squeeze(1)], -1)
            if self.case.kind == "lstm":
                h, c = torch.lstm_cell(step, (h, c), *weights)
            else:
                h = torch.gru_cell(step, h, *weights)
            outputs.append(h)
        return torch.stack(outputs, 1)

    def steps(self, mode: str) -> dict[str, Callable[[], dict[str, float]]]:
        leaves = {name: t.detach().requires_grad_(mode != "forward") for name, t in self.leaves.items()}
        steps: dict[str, Callable[[], dict[str, float]]] = {}
        for name, form in (("eager", self.eager), ("seqkern", self.ours)):
            call = functools.partial(form, **leaves)
            if mode == "forward":
                steps[name] = functools.partial(harness.timed_forward, call, self.device)
            else:
                steps[name] = functools.partial(
                    harness.timed_training, call, list(leaves.values()), self.dy, self.device
                )
        return steps

    def results(self, form: Callable[..., torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in self.leaves.items()}
        y = form(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype))
        return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}

    def gate(self) -> dict[str, parity.Parity]:
        referee = self.results(self.eager, parity.REFEREE[self.dtype])
        found = parity.compare(
            self.results(self.ours, self.dtype),
            *(self.results(self.eager, self.dtype), referee, self.dtype, self.case.L),
            f"{self.case.name} {self.dtype}",
        )
        return {"seqkern": found}


def entries(
    interleaved: harness.Interleaved, problem: Problem, gates: dict[str, parity.Parity]
) -> Iterator[dict[str, object]]:
    """The JSON entries: one a part."""
    case = problem.case
    dtype = str(problem.dtype).removeprefix("torch.")
    for part in interleaved.seconds["seqkern"]:
        ours, theirs = (interleaved.spread(name, part).to_json() for name in ("seqkern", "eager"))
        flops = case.flops(part)
        yield {
            "id": f"{FAMILY}-{dtype}-{case.name}-{part}",
            "family": FAMILY,
            "level": FAMILY,
            "dtype": dtype,
            "case": case.name,
            "mode": part,
            "shape": case.describe(),
            "peers": {"eager": theirs},
            "best": "eager",
            "seqkern": ours,
            "ratio": float(f"{theirs['median'] / ours['median']:.4g}"),
            "verdict": harness.verdict(theirs, ours),
            "gflops": float(f"{flops / ours['median'] / 1e9:.4g}"),
            "best_gflops": float(f"{flops / theirs['median'] / 1e9:.4g}"),
            "parity": gates["seqkern"].to_json(),
        }
