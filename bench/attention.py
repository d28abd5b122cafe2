"""Attention's cases and how one is measured: seqkern and every peer on the same inputs, in turn.

Two levels. A "module" case is self-attention with torch.nn.MultiheadAttention as its peer, projections
included. A "function" case is scaled dot-product attention alone; its peers are each of torch's own kernels
forced by name, FlexAttention with the making of its block mask, and torch's packed attention with packing
and unpacking. A peer that cannot do a case is left out.

Letters: B batch, L queries and keys, N heads, Nk heads of keys and values, E head dim.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench import harness, parity

Call = harness.Call
FAMILY = "attention"
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape.

    fill: the lengths' mean over L, 1 for no padding
    skew: lengths are "uniform" around that, or a few are long among many short ones: "skewed"
    pad: padding is on the "right", the "left", or makes "holes"
    """

    name: str
    level: str
    B: int
    L: int
    N: int
    E: int
    Nk: int = 0
    causal: bool = False
    fill: float = 1.0
    skew: str = "uniform"
    pad: str = "right"
    weights: bool = False

    @property
    def kv_heads(self) -> int:
        return self.Nk or self.N

    @property
    def padded(self) -> bool:
        return self.fill < 1

    @property
    def short(self) -> bool:
        return self.flops("training") < 2e11

    def describe(self) -> str:
        words = [f"{self.B}, {self.L}, {self.N}{f'/{self.Nk}' if self.Nk else ''}, {self.E}"]
        words += [f"{self.fill:.0%} {self.skew} {self.pad}"] * self.padded + ["causal"] * self.causal
        return ", ".join(words + ["weights"] * self.weights)

    def lengths(self) -> torch.Tensor:
        """[B] int64, the longest L. A fill of 9/16 is uniform in L/8 … L."""
        if not self.padded:
            return torch.full((self.B,), self.L)
        generator = torch.Generator().manual_seed(9)
        random = torch.rand(self.B, generator=generator, dtype=torch.float64)
        if self.skew == "uniform":
            half = min(self.fill, 1 - self.fill)
            share = self.fill + half * (2 * random - 1)
        else:  # one in four is long
            share = torch.where(torch.arange(self.B) % 4 == 0, 1.0, (4 * self.fill - 1) / 3 * (0.5 + random))
        lengths = (share * self.L).round().long().clamp(1, self.L)
        lengths[0] = self.L
        return lengths

    def padding(self) -> torch.Tensor:
        """[B, L] bool, True is padding."""
        padding = torch.arange(self.L) >= self.lengths()[:, None]
        if self.pad == "left":
            return padding.flip(1)
        if self.pad == "holes":
            generator = torch.Generator().manual_seed(10)
            order = torch.argsort(torch.rand(self.B, self.L, generator=generator), 1)
            return torch.gather(padding, 1, order)
        return padding

    def pairs(self) -> int:
        """Pairs of a query and a key that attend, all queries counted."""
        valid = ~self.padding()
        if not self.causal:
            return self.L * int(valid.sum())
        return int(valid.cumsum(1).sum())

    def flops(self, part: str) -> int:
        """Useful FLOPs: 4 E a pair and head forward, 2.5 times that backward; with the projections of all
        queries and valid keys in a module."""
        attention = 4 * self.E * self.N * self.pairs()
        linear = 0
        if self.level == "module":
            D = self.N * self.E
            linear = 2 * D * D * 2 * (self.B * self.L + int(self.lengths().sum()))
        factors = {"forward": (1, 1), "backward": (2.5, 2), "training": (3.5, 3)}
        return int(attention * factors[part][0] + linear * factors[part][1])

    def scaled(self, family: str, flops: float) -> Case:
        """The same case with B and then L cut so that a forward pass stays within `flops`."""
        case = self
        while case.flops("forward") > flops and (case.B > 2 or case.L > 32):
            case = (
                dataclasses.replace(case, B=max(2, case.B // 2))
                if case.B > 2
                else (dataclasses.replace(case, L=max(32, case.L // 2)))
            )
        return case


UNIFORM = 9 / 16  # lengths uniform in L/8 … L
SHAPES = {"m1": (32, 128, 8, 64), "m2": (8, 1024, 8, 64), "m3": (64, 50, 4, 32), "m4": (1, 512, 12, 64)}
PADDED = {"p1": (32, 512, 12, 64), "p2": (16, 1500, 8, 64), "p3": (64, 128, 8, 64), "p4": (8, 2048, 16, 64)}


def module_cases() -> Iterator[Case]:
    for name, shape in SHAPES.items():
        for weights in (False, True):
            for causal in (False, True):
                for fill in (1.0, UNIFORM) if shape[0] > 1 else (1.0,):
                    words = [name] + ["padded"] * (fill < 1) + ["causal"] * causal + ["weights"] * weights
                    yield Case("-".join(words), "module", *shape, causal=causal, fill=fill, weights=weights)


def padded_cases() -> Iterator[Case]:
    """Function level, of the shapes that models have."""
    for name, shape in PADDED.items():
        for causal in (False, True):
            for fill in (0.25, 0.5, 0.75, 1.0):
                for skew in ("uniform", "skewed") if fill == 0.5 else ("uniform",):
                    for pad in (
                        ("right", "left", "holes") if fill == 0.5 and skew == "uniform" else ("right",)
                    ):
                        words = [name, f"{fill:.0%}".rstrip("%"), *([skew] if skew == "skewed" else [])]
                        words += [pad] * (pad != "right") + ["causal"] * causal
                        yield Case(
                            "-".join(words), "function", *shape, causal=causal, fill=fill, skew=skew, pad=pad
                        )


def dense_cases() -> Iterator[Case]:
    """B·L = 16384 and N·E = 2048; and long sequences with grouped heads."""
    for E in (64, 128, 256):
        for L in (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (False, True):
                name = f"d{E}-{L}{'-causal' * causal}"
                yield Case(name, "function", 16384 // L, L, 2048 // E, E, causal=causal)
    for L in (2048, 8192, 32768):
        yield Case(f"g128-{L}-causal", "function", 1, L, 64, 128, Nk=8, causal=True)


def grid(device: str) -> list[tuple[str, Case]]:
    """(dtype, case) to measure."""
    modules = list(module_cases())
    if device == "cpu":
        small = [case for case in padded_cases() if case.name in ("p3-50", "p3-50-causal", "p3-50-left")]
        cells = [("float32", case) for case in modules + small]
        return cells + [("bfloat16", c) for c in modules if c.name.split("-")[0] in ("m1", "m2")]
    cells = [("bfloat16", case) for case in [*modules, *padded_cases(), *dense_cases()]]
    cells += [("float16", case) for case in dense_cases() if case.L in (2048, 8192)]
    half = [case for case in padded_cases() if case.fill == 0.5 and case.pad == "right"]
    return cells + [("float32", case) for case in half]


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of torch.nn's time to seqkern's, forward + backward, that each case is to reach on a CPU."""

    title: str
    case: str
    ratio: float


TARGETS = (
    Target("(32, 128, 8, 64), padded", "m1-padded", 1.5),
    Target("(8, 1024, 8, 64), padded", "m2-padded", 1.5),
    Target("(32, 128, 8, 64), padded, with weights", "m1-padded-weights", 1.6),
    Target("(8, 1024, 8, 64), padded, with weights", "m2-padded-weights", 1.6),
)


# --- one problem -------------------------------------------------------------------------------------------


class ModuleProblem:
    """Self-attention: one x [B, L, N * E], torch.nn's module and seqkern's with equal weights."""

    def __init__(self, library: object, family: str, dtype: torch.dtype, case: Case, device: str) -> None:
        self.library, self.dtype, self.case, self.device = library, dtype, case, device
        generator = torch.Generator().manual_seed(2)
        D = case.N * case.E
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            module = torch.nn.MultiheadAttention(D, case.N, batch_first=True)
        self.torch_module = module.to(device=device, dtype=dtype)
        ours = library.MultiHeadAttention(D, case.N, batch_first=True)
        ours.load_state_dict(module.state_dict())
        self.seqkern_module = ours.to(device=device, dtype=dtype)
        self.x = torch.randn(case.B, case.L, D, generator=generator).to(device=device, dtype=dtype)
        self.padding = case.padding().to(device) if case.padded else None
        self.lengths = case.lengths().to(device)
        self.mask = None
        if case.causal:
            self.mask = torch.ones(case.L, case.L, dtype=torch.bool, device=device).triu(1)

    def call(self, module: torch.nn.Module, form: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """form: "torch", "seqkern" (the same meaning) or "lengths" (padded queries left out too)."""
        options = {"need_weights": self.case.weights}
        if form == "torch":
            options |= {"attn_mask": self.mask, "is_causal": self.case.causal}
        else:
            options |= {"is_causal": self.case.causal}
        if form == "lengths":
            options |= {"lengths": self.lengths, "query_lengths": self.lengths}
        else:
            options |= {"key_padding_mask": self.padding}
        return module(x, x, x, **options)

    def forms(self) -> list[str]:
        lengths = ["lengths"] if self.case.padded and not hasattr(self.library, "null") else []
        return ["torch", "seqkern", *lengths]

    def steps(self, mode: str) -> dict[str, Callable[[], dict[str, float]]]:
        steps: dict[str, Callable[[], dict[str, float]]] = {}
        x = self.x.detach().requires_grad_(mode != "forward")
        dy = torch.randn_like(self.x)
        for form in self.forms():
            module = self.torch_module if form == "torch" else self.seqkern_module
            call = functools.partial(lambda module, form: self.call(module, form, x)[0], module, form)
            if mode == "forward":
                # In eval torch.nn takes its fast path where it has one: that is what it is measured with.
                steps[form] = functools.partial(self.eval_step, module, call)
            else:
                leaves = [x, *module.parameters()]
                steps[form] = functools.partial(self.train_step, module, call, leaves, dy)
        return steps

    def eval_step(self, module: torch.nn.Module, call: Call) -> dict[str, float]:
        module.eval()
        return harness.timed_forward(call, self.device)

    def train_step(
        self, module: torch.nn.Module, call: Call, leaves: list[torch.Tensor], dy: torch.Tensor
    ) -> dict[str, float]:
        module.train()
        return harness.timed_training(call, leaves, dy, self.device)

    def results(self, form: str, module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Outputs, weights and gradients; padded queries count for nothing, so that the forms compare."""
        module.train()
        valid = torch.ones_like(self.x[..., :1]).to(dtype)
        if self.padding is not None:
            valid = (~self.padding).unsqueeze(-1).to(dtype)
        x = self.x.detach().to(dtype).requires_grad_()
        y, w = self.call(module, form, x)
        generator = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(y.shape, generator=generator).to(y) * valid]
        outputs = [y]
        if w is not None:
            outputs.append(w)
            cotangents.append(torch.randn(w.shape, generator=generator).to(w) * valid)
        leaves = {"x": x, **dict(module.named_parameters())}
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        found = {"y": y * valid} | ({"w": w * valid} if w is not None else {})
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {name: tensor.detach() for name, tensor in found.items()}

    def gate(self) -> dict[str, parity.Parity]:
        wide = parity.REFEREE[self.dtype]
        referee = self.results("torch", copy.deepcopy(self.torch_module).to(wide), wide)
        peer = self.results("torch", self.torch_module, self.dtype)
        return {
            form: parity.compare(
                self.results(form, self.seqkern_module, self.dtype),
                *(peer, referee, self.dtype, self.case.L, f"{self.case.name} {self.dtype} {form}"),
            )
            for form in self.forms()[1:]
        }


class FunctionProblem:
    """Attention alone: q [B, N, L, E], k, v [B, Nk, L, E] as a projection leaves them, heads side by side."""

    def __init__(self, library: object, family: str, dtype: torch.dtype, case: Case, device: str) -> None:
        self.library, self.dtype, self.case, self.device = library, dtype, case, device
        generator = torch.Generator().manual_seed(2)

        def randn(heads: int) -> torch.Tensor:
            x = torch.randn(case.B, case.L, heads, case.E, generator=generator)
            return x.to(device=device, dtype=dtype).transpose(1, 2)

        self.q, self.k, self.v = randn(case.N), randn(case.kv_heads), randn(case.kv_heads)
        self.padding = case.padding().to(device) if case.padded else None
        self.lengths = case.lengths().to(device)
        self.dy = randn(case.N)
        if self.padding is not None:
            self.dy = self.dy.masked_fill(self.padding[:, None, :, None], 0)

    # Peers. Each takes q, k, v and returns [B, N, L, E]; what it makes of the masks is part of its time.

    def sdpa(self, backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        mask, causal = None, self.case.causal
        if self.padding is not None:
            mask = ~self.padding[:, None, None, :]
            if causal:
                mask = mask & torch.ones(self.case.L, self.case.L, dtype=torch.bool, device=q.device).tril()
                causal = False
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, enable_gqa=self.case.kv_heads != self.case.N
            )

    def flex(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import create_block_mask

        case, padding = self.case, self.padding
        block_mask = None
        if case.causal or padding is not None:

            def allowed(b, h, q_idx, kv_idx):
                found = q_idx >= kv_idx if case.causal else q_idx >= 0
                return found if padding is None else found & ~padding[b, kv_idx]

            B = case.B if padding is not None else None
            block_mask = create_block_mask(allowed, B, None, case.L, case.L, device=q.device)
        return compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=case.kv_heads != case.N)

    def varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Packing and unpacking by index, the causal mask within; padded queries are left out."""
        from torch.nn.attention.varlen import varlen_attn

        case = self.case
        rows = (~self.padding).flatten().nonzero().squeeze(1)
        cu = F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
        packed = [x.transpose(1, 2).flatten(0, 1).index_select(0, rows) for x in (q, k, v)]
        out = varlen_attn(*packed, cu, cu, case.L, case.L, is_causal=case.causal)
        return (
            out.new_zeros((case.B * case.L, *out.shape[1:]))
            .index_copy(0, rows, out)
            .unflatten(0, (case.B, case.L))
            .transpose(1, 2)
        )

    def ours(self, lengths: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        options = {"is_causal": self.case.causal, "enable_gqa": self.case.kv_heads != self.case.N}
        if lengths:
            options |= {"lengths": self.lengths, "query_lengths": self.lengths}
        elif self.padding is not None:
            options["key_padding_mask"] = self.padding
        return self.library.scaled_dot_product_attention(q, k, v, **options)

    def forms(self) -> dict[str, Callable[..., torch.Tensor]]:
        """Every subject that can do the case, found by trying it."""
        forms: dict[str, Callable[..., torch.Tensor]] = {
            f"sdpa {name.split('_')[0].lower()}": functools.partial(self.sdpa, name) for name in BACKENDS
        }
        right = self.padding is not None and self.case.pad == "right"
        if self.device == "cuda":
            forms["flex"] = self.flex
            if right and self.case.kv_heads == self.case.N:
                forms["varlen"] = self.varlen
        found = {}
        for name, form in forms.items():
            try:
                self.results(form, self.dtype)
            except (RuntimeError, ImportError, torch.OutOfMemoryError):
                continue  # this kernel has no way to do it
            found[name] = form
        found["seqkern"] = functools.partial(self.ours, False)
        if right:
            found["lengths"] = functools.partial(self.ours, True)
        return found

    def steps(self, mode: str) -> dict[str, Callable[[], dict[str, float]]]:
        leaves = [x.detach().requires_grad_(mode != "forward") for x in (self.q, self.k, self.v)]
        steps: dict[str, Callable[[], dict[str, float]]] = {}
        for name, form in self.forms().items():
            call = functools.partial(form, *leaves)
            if mode == "forward":
                steps[name] = functools.partial(harness.timed_forward, call, self.device)
            else:
                steps[name] = functools.partial(harness.timed_training, call, leaves, self.dy, self.device)
        return steps

    def results(self, form: Callable[..., torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        y = form(*leaves)
        grads = torch.autograd.grad(y, leaves, self.dy.to(dtype))
        if self.padding is not None:
            y = y.masked_fill(self.padding[:, None, :, None], 0)
        return {"y": y.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    def gate(self) -> dict[str, parity.Parity]:
        math = functools.partial(self.sdpa, "MATH")
        referee = self.results(math, parity.REFEREE[self.dtype])
        peer = self.results(math, self.dtype)
        return {
            name: parity.compare(
                self.results(form, self.dtype),
                *(peer, referee, self.dtype, self.case.L, f"{self.case.name} {self.dtype} {name}"),
            )
            for name, form in self.forms().items()
            if name in ("seqkern", "lengths")
        }


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


Problem = ModuleProblem | FunctionProblem


def problem(library: object, family: str, dtype: torch.dtype, case: Case, device: str) -> Problem:
    return (ModuleProblem if case.level == "module" else FunctionProblem)(
        library, family, dtype, case, device
    )


def entries(
    interleaved: harness.Interleaved, problem: Problem, gates: dict[str, parity.Parity]
) -> Iterator[dict[str, object]]:
    """The JSON entries: one a seqkern subject and part, with every peer; the ratio is to the fastest peer."""
    case = problem.case
    dtype = str(problem.dtype).removeprefix("torch.")
    peers = [name for name in interleaved.steps if name not in gates]
    for name in gates:
        case_name = case.name if name == "seqkern" else f"{case.name}-{name}"
        for part in interleaved.seconds[name]:
            ours = interleaved.spread(name, part).to_json()
            theirs = {peer: interleaved.spread(peer, part).to_json() for peer in peers}
            best = min(theirs, key=lambda peer: theirs[peer]["median"])
            flops = case.flops(part)
            yield {
                "id": f"{FAMILY}-{dtype}-{case_name}-{part}",
                "family": FAMILY,
                "level": case.level,
                "dtype": dtype,
                "case": case_name,
                "mode": part,
                "shape": case.describe(),
                "peers": theirs,
                "best": best,
                "seqkern": ours,
                "ratio": float(f"{theirs[best]['median'] / ours['median']:.4g}"),
                "verdict": harness.verdict(theirs[best], ours),
                "gflops": float(f"{flops / ours['median'] / 1e9:.4g}"),
                "best_gflops": float(f"{flops / theirs[best]['median'] / 1e9:.4g}"),
                "parity": gates[name].to_json(),
            }


def peak_memory(step: Callable[[], object]) -> int | None:
    """Bytes that one step adds at its peak, on a GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
