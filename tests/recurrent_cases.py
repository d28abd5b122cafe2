"""What the tests of the recurrent variants share: one frozen `Case` per request, run by name."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import recurrent_twins
import torch
from cases import SHORT
from compare import Nudge, Results, largest_errors, poisoned, within
from torch import Tensor

import seqkern
from seqkern.ops import CELLS, _layers, recurrent
from seqkern.reference.masks import recurrent_mask, variational_scale, weight_scale

CELL_NAMES = tuple(CELLS)
PLAIN = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # these have kernels of their own
HAS_C = tuple(name for name, cell in CELLS.items() if len(cell.states) > 1)
HAS_CANDIDATE = tuple(name for name, cell in CELLS.items() if cell.candidate)
CLIPS = tuple(name for name, cell in CELLS.items() if cell.clips)


@dataclass(frozen=True)
class Case:
    """One request to ops.recurrent. `form`: padded, lengths or packed; `options`: keywords, as pairs."""

    cell: str
    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741
    H: int = 6
    P: int = 0
    num_layers: int = 1
    bidirectional: bool = False
    bias: str = "both"  # "ih": b_hh and the norms' biases are left out
    hx: bool = True
    form: str = "padded"
    reset: bool = False
    training: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float64
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        words = [self.cell, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        words += [f"P{self.P}"] * (self.P > 0) + [f"L{self.num_layers}"] * (self.num_layers > 1)
        words += ["bi"] * self.bidirectional + [f"bias:{self.bias}"] * (self.bias != "both")
        words += ["hx"] * self.hx + [self.form] * (self.form != "padded") + ["reset"] * self.reset
        words += [f"{name}={value}".replace(" ", "") for name, value in self.options]
        words += ["eval"] * (not self.training)
        return "-".join([*words, SHORT[self.dtype], *[f"seed{self.seed}"] * (self.seed > 0)])

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def heads(self) -> int:
        return next(heads for heads in (4, 3, 2, 1) if self.H % heads == 0)

    def generator(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self} {what}".encode()))

    def lengths(self) -> Tensor | None:
        """[B], one of them T; packed: descending, from 1."""
        if self.form == "padded":
            return None
        low = 1 if self.form == "packed" else 0
        lengths = torch.randint(low, self.T + 1, (self.B,), generator=self.generator("lengths"))
        if self.B:
            lengths[self.B // 2] = self.T
        return lengths.sort(descending=True).values if self.form == "packed" else lengths

    def resets(self) -> Tensor | None:
        """[T, B] bool"""
        if not self.reset:
            return None
        return torch.rand(self.T, self.B, generator=self.generator("reset")) < 0.3

    def tensors(self) -> dict[str, Tensor]:
        """Input, states and parameters by name, of this dtype, on no graph; x is [T, B, I]."""
        generator = self.generator("tensors")

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        found = {"x": normal(self.T, self.B, self.I)}
        P = self.P or self.H
        for k, name in enumerate(CELLS[self.cell].states):
            if self.hx:
                found[f"{name}0"] = normal(self.num_layers * self.D, self.B, self.H if k else P)
        if "n0" in found:  # sLSTM's normaliser is positive, or zero where nothing is stored
            found["n0"] = found["n0"].abs() * (found["n0"] > -0.5)
        for name, shape in self.parameter_shapes().items():
            numbers = normal(*shape) / max(self.H, 1) ** 0.5
            found[name] = 1 + 0.3 * normal(*shape) if name.startswith("gamma") else numbers
        if self.cell.endswith("relu") and self.dtype is not torch.float64:
            self.steer(found)
        return {name: tensor.to(self.device, self.dtype) for name, tensor in found.items()}

    def steer(self, found: dict[str, Tensor]) -> None:
        """Keeps a ReLU's pre-activations far from 0, where rounding would decide their sign and with it a
        whole gradient: x[..., 0] is ±1 and decides, as in cases.steer."""
        found["x"][..., 0] = found["x"][..., 0].sign() + (found["x"][..., 0] == 0)
        if self.hx:
            found["h0"].clamp_(0, 1)
        for name in self.parameter_shapes():
            weight, deep = found[name], int(name.rpartition(".")[2]) >= self.D
            weight.clamp_(-2 / self.H**0.5, 2 / self.H**0.5).mul_(0.25)
            if name.startswith("w_ih"):
                sign = torch.where(torch.arange(self.H) % 3 == 0, 1.0, -1.0).double()
                weight.mul_(min(1.0, (self.H / weight.shape[1]) ** 0.5))
                weight[:, 0] = sign if deep else 2 * sign
                if deep:
                    weight[:, 1] = -sign

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that are there, "w_ih.0" being the first layer's and direction's."""
        I, H, P = self.I, self.H, self.P or self.H  # noqa: E741
        G = CELLS[self.cell].gates * H
        shapes = {}
        for row in range(self.num_layers * self.D):
            base = {"w_ih": (G, I if row < self.D else self.D * P), "w_hh": (G, P)}
            base |= {"b_ih": (G,), "b_hh": (G,)}
            if self.cell.startswith("indrnn"):
                base["w_hh"] = (H,)
            if self.cell == "slstm":
                base["w_hh"] = (self.heads, G // self.heads, H // self.heads)
            if self.P:
                base["w_hr"] = (P, H)
            for name in recurrent_twins.OWN.get(self.cell, ()):
                square = ("inner_w_ih", "inner_w_hh")
                base[name] = (G, H) if name in square else (H,) if name.endswith("_c") else (G,)
                if name == "w_peep":
                    base[name] = (3 * H,)
            if self.cell.startswith("layer_norm"):
                del base["b_hh"]
            for name in list(base):
                optional = name.split("_")[-2:-1] == ["b"] or name.startswith(("b_", "inner_b_", "beta_"))
                if optional and (self.bias == "none" or (self.bias == "ih" and not name.endswith("ih"))):
                    del base[name]
            shapes |= {f"{name}.{row}": shape for name, shape in base.items()}
        return shapes

    def flat_params(self, tensors: dict[str, Tensor]) -> list[Tensor | None]:
        names = recurrent_twins.names_of(self.cell)
        return [tensors.get(f"{name}.{row}") for row in range(self.num_layers * self.D) for name in names]

    def call(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(output, *final states); a packed output comes padded."""
        names = CELLS[self.cell].states
        x, hx = tensors["x"], [tensors[f"{name}0"] for name in names] if self.hx else None
        lengths, reset = self.lengths(), self.resets()
        keywords: dict[str, Any] = dict(self.options)
        if self.form == "packed":
            valid = (torch.arange(self.T).unsqueeze(1) < lengths).flatten().nonzero().squeeze(1).to(x.device)
            keywords["batch_sizes"] = (lengths > torch.arange(self.T).unsqueeze(1)).sum(1)
            x = x.flatten(0, 1)[valid]
            reset = None if reset is None else reset.flatten()[valid.cpu()]
        elif self.form == "lengths":
            keywords["lengths"] = lengths.to(x.device)
        torch.manual_seed(self.seed)
        y, finals = recurrent(
            *(self.cell, x, hx, self.flat_params(tensors)),
            reset=reset,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            training=self.training,
            **keywords,
        )
        if self.form == "packed":
            y = (
                y.new_zeros(self.T * self.B, y.shape[1])
                .index_copy(0, valid, y)
                .unflatten(0, (self.T, self.B))
            )
        return (y, *finals)

    def twin(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The same by recurrent_twins, float64."""
        names = CELLS[self.cell].states
        D, P = self.D, self.P or self.H
        keywords: dict[str, Any] = dict(self.options)
        keywords["replace"] = keywords.pop("update_gate", "keep") == "replace"
        zoneout = keywords.pop("zoneout", (0.0, 0.0))
        p = keywords.pop("recurrent_dropout", 0.0)
        variational, weight = keywords.pop("variational_dropout", 0.0), keywords.pop("weight_dropout", 0.0)
        torch.manual_seed(self.seed)
        seed = _layers.new_seed(torch.device("cpu"))
        b = torch.arange(self.B)
        params = self.flat_params(tensors)
        per_direction = len(recurrent_twins.names_of(self.cell))
        if self.hx:
            states = [tensors[f"{name}0"] for name in names]
        else:
            sizes = [self.H if k else P for k in range(len(names))]
            states = [torch.zeros(self.num_layers * D, self.B, size, dtype=torch.float64) for size in sizes]
        y, finals = tensors["x"], []
        for k in range(self.num_layers):
            weights = params[k * D * per_direction : (k + 1) * D * per_direction]
            if self.training:
                keywords["h_scale"] = variational_scale(seed, variational, b, k, D, P, torch.float64)
                chances = (*zoneout, p)
                bits = recurrent_mask(seed, chances, torch.arange(self.T)[:, None], b, k, D, self.H)
                keywords["bits"] = bits.unflatten(-1, (D, self.H))
                keywords["candidate_scale"] = 1 / (1 - p)
                for d in range(D):
                    w_hh = weights[d * per_direction + 1]
                    weights[d * per_direction + 1] = w_hh * weight_scale(seed, weight, w_hh, k, d)
            else:
                keywords["zoneout"] = zoneout
            y, *final = recurrent_twins.layer(
                *(self.cell, y, [s[k * D : (k + 1) * D] for s in states], weights),
                *(self.lengths(), self.resets()),
                **keywords,
            )
            finals.append(final)
        return (y, *(torch.cat(list(state)) for state in zip(*finals, strict=True)))

    def cotangents(self, outputs: Sequence[Tensor], rounded: torch.dtype) -> list[Tensor]:
        generator = self.generator("cotangents")
        return [
            torch.randn(y.shape, generator=generator, dtype=torch.float64).to(rounded).to(y) for y in outputs
        ]


def evaluate_case(
    case: Case, tensors: dict[str, Tensor], how: str, rounded: torch.dtype | None = None
) -> Results:
    """Every output and every gradient of a random linear function of the outputs, by name.

    Args:     how: a backend's name, "twin", or "loop", the eager formula with every operation rounded to
              the dtype, as a user's loop would be; rounded: the dtype to which the cotangents are rounded
    """
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    if how == "twin":
        outputs = case.twin(leaves)
    elif how == "loop":
        with pytest.MonkeyPatch.context() as patch, seqkern.use_backend("eager"):
            patch.setattr(_layers, "SIXTEEN_BITS", frozenset())
            outputs = case.call(leaves)
    else:
        with seqkern.use_backend(how):
            outputs = case.call(leaves)
    cotangents = case.cotangents(outputs, rounded or case.dtype)
    grown = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in grown], list(leaves.values()), [dy for _, dy in grown], materialize_grads=True
    )
    names = ["y", *(f"{name}_n" for name in CELLS[case.cell].states)]
    results = dict(zip(names, outputs, strict=True))
    results |= {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def check_parity(
    case: Case, backend: str, lay: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
) -> None:
    """Every output and gradient of the backend obeys compare's rule, a user's eager loop in the same dtype in
    torch.nn's place, against the eager formula in float64.

    lay: gives the backend the same numbers, laid out otherwise
    """
    tensors = case.tensors()
    with poisoned():
        got = evaluate_case(case, lay(tensors), backend)
    oracle = evaluate_case(case, {name: t.double() for name, t in tensors.items()}, "eager")

    def draw(nudged: Nudge, working: torch.dtype, seed: int) -> tuple[Results, Results]:
        moved = {name: nudged(t) for name, t in tensors.items()}
        exact = evaluate_case(case, {name: t.double() for name, t in moved.items()}, "eager", working)
        return by_hand(case, moved, working), exact

    within(got, by_hand(case, tensors), oracle, case, lambda: largest_errors(draw, case.dtype))


def by_hand(case: Case, tensors: dict[str, Tensor], rounded: torch.dtype | None = None) -> Results:
    """What a user's eager loop gives; where float16 overflows in it, our eager layer, float32 within."""
    loop = evaluate_case(case, tensors, "loop", rounded)
    if all(t.isfinite().all() for t in loop.values()):
        return loop
    eager = evaluate_case(case, tensors, "eager", rounded)
    return {name: torch.where(t.isfinite(), t, eager[name]) for name, t in loop.items()}
