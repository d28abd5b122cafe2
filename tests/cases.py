"""What is tested: one frozen `Case` per layer and input, with a readable id, and which of them run.

Letters: T steps, B batch, I input size, H hidden size, P projection, L layers, D directions.
"""

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import seqkern

State = Tensor | tuple[Tensor, Tensor]

SIZES = (1, 15, 16, 17, 31, 33, 63, 65, 129)
STEPS = (1, 2, 7, 33)
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33)
SHORT = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
DTYPES = tuple(SHORT)

TORCH = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
OURS = {"rnn": seqkern.RNN, "lstm": seqkern.LSTM, "gru": seqkern.GRU}
TORCH_CELL = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
OUR_CELL = {"rnn": seqkern.RNNCell, "lstm": seqkern.LSTMCell, "gru": seqkern.GRUCell}
KINDS = tuple(TORCH)


@dataclass(frozen=True)
class Case:
    """One layer and one input. `hx`: initial states are given; `mode`: train or eval."""

    kind: str
    T: int = 7
    B: int = 3
    I: int = 17  # noqa: E741
    H: int = 15
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False
    proj_size: int = 0
    nonlinearity: str = "tanh"
    hx: bool = True
    batched: bool = True
    dtype: torch.dtype = torch.float32
    mode: str = "train"
    seed: int = 0

    def __str__(self) -> str:
        words = [self.kind if self.nonlinearity == "tanh" else f"{self.kind}.{self.nonlinearity}"]
        words += [f"T{self.T}", f"B{self.B}" if self.batched else "unbatched", f"I{self.I}", f"H{self.H}"]
        words += [f"P{self.proj_size}"] * (self.proj_size > 0) + [f"L{self.num_layers}"] * (
            self.num_layers > 1
        )
        words += ["bi"] * self.bidirectional + ["nobias"] * (not self.bias) + ["bf"] * self.batch_first
        words += ["hx"] * self.hx + [SHORT[self.dtype]] + ["eval"] * (self.mode == "eval")
        words += [f"seed{self.seed}"] * (self.seed > 0)
        return "-".join(words)

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def P(self) -> int:
        return self.proj_size or self.H

    def options(self) -> dict[str, Any]:
        """The constructor's keywords."""
        options = {
            name: getattr(self, name) for name in ("num_layers", "bias", "batch_first", "bidirectional")
        }
        if self.kind == "lstm":
            options["proj_size"] = self.proj_size
        if self.kind == "rnn":
            options["nonlinearity"] = self.nonlinearity
        return options

    def generator(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self} {what}".encode()))

    def torch_layer(self) -> nn.RNNBase:
        """torch.nn's layer with this case's own weights."""
        layer = TORCH[self.kind](self.I, self.H, dtype=self.dtype, **self.options())
        reach = self.H**-0.5
        generator = self.generator("weights")
        with torch.no_grad():
            for weight in layer.parameters():
                numbers = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_((2 * numbers - 1) * reach)
            if self.away_from_kink:
                steer(layer)
        return layer.train(self.mode == "train")

    def inputs(self) -> tuple[Tensor, State | None]:
        """x and hx, the latter None if the case gives none. Contiguous, on no graph."""
        normal = self.normal(self.generator("inputs"))
        shape = (self.B, self.T, self.I) if self.batch_first else (self.T, self.B, self.I)
        x = normal(*(shape if self.batched else (self.T, self.I)))
        if self.away_from_kink:
            x[..., 0] = x[..., 0].sign() + (x[..., 0] == 0)
        if not self.hx:
            return x, None
        rows = (self.num_layers * self.D, self.B) if self.batched else (self.num_layers * self.D,)
        h0 = normal(*rows, self.P)
        if self.away_from_kink:
            h0 = h0.clamp(0, 1)
        return x, (h0, normal(*rows, self.H)) if self.kind == "lstm" else h0

    def normal(self, generator: torch.Generator) -> Callable[..., Tensor]:
        return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

    @property
    def away_from_kink(self) -> bool:
        """Below float64, a ReLU's random pre-activations come so near to 0 that rounding decides their sign,
        and with it a whole gradient: no bound on rounding errors holds there. `steer` keeps them away."""
        return self.nonlinearity == "relu" and self.dtype != torch.float64


def steer(layer: nn.RNNBase) -> None:
    """Weights under which every pre-activation is far from 0, and its sign changes from row to row and step.

    x[..., 0] is ±1. In the first layer column 0 of w_ih is ±2, and all the rest too small to turn the sign.
    There unit 0 is on where x[..., 0] = 1, unit 1 where it is -1; so ±(h[0] - h[1]) steers the next layer.
    """
    for name, weight in layer.named_parameters():
        deep = "_l0" not in name
        if name.startswith("weight_ih"):
            sign = torch.where(torch.arange(len(weight)) % 3 == 0, 1.0, -1.0).to(weight.dtype)
            weight.mul_(0.25 * min(1.0, (layer.hidden_size / weight.size(1)) ** 0.5))
            weight[:, 0] = sign if deep else 2 * sign
            if deep:
                weight[:, 1] = -sign
        else:
            weight.mul_(0.25)


def our_layer(layer: nn.RNNBase) -> nn.RNNBase:
    """seqkern's twin of torch.nn's `layer`: the same options, parameters and mode."""
    kind = next(kind for kind in KINDS if type(layer) is TORCH[kind])
    names = ["num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    names += {"rnn": ["nonlinearity"], "lstm": ["proj_size"], "gru": []}[kind]
    options = {name: getattr(layer, name) for name in names}
    twin = OURS[kind](layer.input_size, layer.hidden_size, dtype=layer.weight_ih_l0.dtype, **options)
    twin.load_state_dict(layer.state_dict())
    return twin.train(layer.training)


def pairwise(factors: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of factors in which each pair of values of two factors occurs; greedy, deterministic."""
    rng = random.Random(seed)
    names = list(factors)
    pairs = list(itertools.combinations(names, 2))
    wanted = {(a, va, b, vb) for a, b in pairs for va in factors[a] for vb in factors[b]}

    def covered(row: dict[str, Any]) -> set[tuple[str, Any, str, Any]]:
        return {(a, row[a], b, row[b]) for a, b in pairs} & wanted

    rows = []
    order = sorted(wanted, key=repr)
    rng.shuffle(order)
    for a, va, b, vb in order:
        if (a, va, b, vb) not in wanted:
            continue
        tries = [{name: rng.choice(factors[name]) for name in names} | {a: va, b: vb} for _ in range(20)]
        best = max(tries, key=lambda row: len(covered(row)))
        wanted -= covered(best)
        rows.append(best)
    return rows


def option_factors(kind: str) -> dict[str, Sequence[Any]]:
    """Everything about a case but its sizes and its dtype."""
    factors: dict[str, Sequence[Any]] = dict(
        num_layers=(1, 2, 3),
        bias=(True, False),
        batch_first=(False, True),
        bidirectional=(False, True),
        hx=(True, False),
        batched=(True, False),
        mode=("train", "eval"),
    )
    if kind == "lstm":
        factors["proj_size"] = (0, 1, 8, 14)
    if kind == "rnn":
        factors["nonlinearity"] = ("tanh", "relu")
    return factors


def legal(case: Case) -> Case:
    """The nearest case that the constructor takes and that means something."""
    proj_size = min(case.proj_size, case.H - 1)
    B = case.B if case.batched else 1
    H = case.H
    if case.away_from_kink and case.num_layers > 1:
        H = max(H, 2)
    return replace(case, proj_size=proj_size, B=B, H=H)


def unique(cases: Iterator[Case]) -> list[Case]:
    return list(dict.fromkeys(cases))


def sample(kind: str) -> list[Case]:
    """The default run: in float32 each pair of values of any two options or sizes; at small sizes each pair
    of values of any two options or dtypes."""
    options = option_factors(kind)
    sizes = dict(T=STEPS, B=BATCHES, I=SIZES, H=SIZES)
    others = dict(T=(1, 2, 7), B=(1, 3, 8, 9), I=(1, 16, 17), H=(1, 15, 16, 33), dtype=DTYPES)
    rows = pairwise(options | sizes) + pairwise(options | others)
    return unique(legal(Case(kind, **row)) for row in rows)


def full_cross(kind: str) -> list[Case]:
    """Slow: every combination of options and dtypes, each at sizes drawn from the lists."""
    options = option_factors(kind) | {"dtype": DTYPES}
    rng = random.Random(kind)
    cases = []
    for values in itertools.product(*options.values()):
        row = dict(zip(options, values, strict=True))
        large = row["dtype"] in (torch.float32, torch.float64)
        sizes = dict(
            T=rng.choice(STEPS if large else (1, 2, 7)),
            B=rng.choice(BATCHES if large else (1, 3, 8, 9)),
            I=rng.choice(SIZES if large else (1, 16, 17)),
            H=rng.choice(SIZES if large else (1, 15, 16, 33)),
        )
        cases.append(legal(Case(kind, **row, **sizes)))
    return unique(iter(cases))


def wide(kind: str) -> list[Case]:
    """Long sums: sizes at which it shows how the thousands of terms of a product are added up."""
    cases = [
        Case(kind, T=4, B=17, I=300, H=512),
        Case(kind, T=3, B=1, I=1024, H=512, bidirectional=True),
        Case(kind, T=2, B=9, I=512, H=512, dtype=torch.bfloat16),
    ]
    return [*cases, Case(kind, T=3, B=9, I=300, H=600, proj_size=512)] if kind == "lstm" else cases


def wider(kind: str) -> list[Case]:
    """Slow: the benchmarks' largest layer, but for float64, where the oracle is no better."""
    cases = [Case(kind, T=3, B=9, I=1024, H=1024, dtype=d) for d in DTYPES if d is not torch.float64]
    return [*cases, Case(kind, T=3, B=9, I=300, H=1024, proj_size=512)] if kind == "lstm" else cases
