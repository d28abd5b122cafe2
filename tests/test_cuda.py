"""The CUDA kernels of RNN, LSTM and GRU, run on an emulated device (tests/cuda_on_cpu): against torch.nn, by
compare.py's rule. The same kernels on a GPU: test_cuda_gpu.py.

Each tier of csrc/cuda/plan.h is forced by name, at the small sizes it can run.
"""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

import pytest
import torch
from cases import DTYPES, KINDS, Case, full_cross, legal, option_factors, our_layer, pairwise, unique
from compare import agree, check_parity, evaluate, flat, packed_call, poisoned, same_bits
from cuda_on_cpu import A100, Facts, build_and_load, counters, emulated, why_not
from test_lengths import PATTERNS, make_lengths, padding, with_lengths
from test_packed import through_packing
from torch import Tensor

from seqkern import _extension

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

needs_planner = pytest.mark.skipif(_extension._C is None, reason="needs the extension's planner")

TIERS = ("step", "block", "cluster", "grid")
PERSISTENT = TIERS[1:]
# H that a tier can cut: a block holds all of them, a cluster or the grid has two blocks at least.
HIDDEN = {"step": (1, 15, 16, 33), "block": (1, 15, 16, 33), "cluster": (17, 33, 40), "grid": (17, 33, 40)}


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """The rule is for float32 proper; what TF32 changes is tested by itself."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def can_run(tier: str, case: Case) -> bool:
    return tier == "step" or case.dtype is not torch.float64


def tiers_of(case: Case) -> list[str]:
    """The tiers for a case whose H every tier can cut."""
    return [tier for tier in TIERS if can_run(tier, case)]


def factors(kind: str, tier: str) -> dict[str, tuple]:
    """Every option, at sizes for this tier."""
    options = option_factors(kind) | {"num_layers": (1, 2), "batched": (True,), "mode": ("train",)}
    dtypes = DTYPES if tier == "step" else tuple(d for d in DTYPES if d is not torch.float64)
    return options | dict(T=(1, 2, 6), B=(1, 3, 9), I=(1, 17), H=HIDDEN[tier], dtype=dtypes)


def parity_cases() -> list[tuple[str, Case]]:
    return [
        (tier, case)
        for tier in TIERS
        for kind in KINDS
        for case in unique(legal(Case(kind, **row)) for row in pairwise(factors(kind, tier)))
        if can_run(tier, case)
    ]


def slow_cases() -> list[tuple[str, Case]]:
    """Every combination of options and dtypes for "step", a sample of them for the others.

    Few steps: torch.nn sums weight gradients step by step, and one product over all of many steps need not
    come as near. No H of 1: over thousands of cases torch.nn has no error in some single number by luck.
    """
    rng = random.Random("cuda")
    cases = []
    for tier, kind in itertools.product(TIERS, KINDS):
        for case in full_cross(kind):
            sizes = dict(T=min(case.T, 7), B=min(case.B, 9), I=min(case.I, 33))
            sizes["H"] = rng.choice([H for H in HIDDEN[tier] if H > 1])
            if can_run(tier, case) and (tier == "step" or rng.random() < 0.05):
                cases.append((tier, legal(replace(case, **sizes))))
    return list(dict.fromkeys(cases))


def named(cases: list[tuple]) -> list:
    return [pytest.param(*values, id="-".join(str(v).replace(" ", "_") for v in values)) for values in cases]


@pytest.mark.parametrize(("tier", "case"), named(parity_cases()))
def test_parity(tier: str, case: Case) -> None:
    layer = case.torch_layer()
    with emulated(tier):
        check_parity(layer, our_layer(layer), *case.inputs(), case)


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "case"), named(slow_cases()))
def test_parity_full_cross(tier: str, case: Case) -> None:
    layer = case.torch_layer()
    with emulated(tier):
        check_parity(layer, our_layer(layer), *case.inputs(), case)


def layers(T: int = 5, B: int = 4, H: int = 33, **options) -> list[Case]:
    """A layer of each family, and one with a projection: two layers, both directions, odd sizes."""
    common = dict(T=T, B=B, H=H, num_layers=2, bidirectional=True) | options
    projected = Case("lstm", proj_size=7, **common)
    return [*(Case(kind, **common) for kind in KINDS), projected]


LAYERS = [(tier, case) for case in layers() for tier in tiers_of(case)]
SIXTEEN = [(tier, case) for case in layers(dtype=torch.bfloat16) for tier in tiers_of(case)]


def test_the_emulated_kernels_run() -> None:
    """As many launches as the step-wise loop has, forward and backward."""
    case = Case("lstm", T=5, B=2)
    layer = our_layer(case.torch_layer())
    with emulated("step"):
        evaluate(layer, *case.inputs())
        # Forward and backward a step each, and in backward the states before each step.
        assert counters().launches == 5 + 5 + 1


# ---- ragged and packed batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("tier", "case"), named(LAYERS + SIXTEEN))
def test_lengths(tier: str, case: Case, pattern: str) -> None:
    layer = case.torch_layer()
    lengths = make_lengths(pattern, case.T, case.B)
    call, their_call = with_lengths(lengths), packed_call(lengths)
    with emulated(tier):
        got = check_parity(layer, our_layer(layer), *case.inputs(), f"{case} {pattern}", call, their_call)
    beyond = padding(case, lengths)
    assert (got["y"][beyond] == 0).all(), "output beyond a length is not zero"
    assert (got["d x"][beyond] == 0).all(), "gradient of padded input is not zero"


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(("tier", "case"), named(LAYERS + SIXTEEN))
def test_padding_never_leaks(tier: str, case: Case, value: str) -> None:
    """Whatever x, and the cotangent of y, hold in the padding, every output and gradient keeps its bits."""
    layer = our_layer(case.torch_layer())
    lengths = make_lengths("zeros among", case.T, case.B)
    x, hx = case.inputs()
    beyond = padding(case, lengths)[..., None]

    def run(filler: float) -> dict[str, Tensor]:
        leaves = [x.masked_fill(beyond, filler), *flat(hx)]
        for leaf in leaves:
            leaf.requires_grad_()
        states = leaves[1] if len(leaves) == 2 else tuple(leaves[1:])
        outputs = flat(layer(leaves[0], states, lengths=lengths))
        cotangents = [torch.ones_like(y) for y in outputs]
        cotangents[0] = cotangents[0].masked_fill(beyond, filler)
        grads = torch.autograd.grad(outputs, [*leaves, *layer.parameters()], cotangents)
        return {str(k): t.detach() for k, t in enumerate((*outputs, *grads))}

    with emulated(tier), poisoned():
        expected = run(0.0)
        assert all(t.isfinite().all() for t in expected.values())
        same_bits(run(float(value)), expected, case)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_beyond_the_steps_are_clamped(kind: str, tier: str) -> None:
    """On a GPU nobody looks at lengths before the kernels do, so here the operators are called."""
    case = Case(kind, T=4, B=4, H=17, bidirectional=True)
    layer, (x, hx) = case.torch_layer(), case.inputs()
    forward = getattr(build_and_load(), f"{kind}_forward").default
    rest = (False, False) if kind == "rnn" else (False,)

    def run(lengths: list[int]) -> dict[str, Tensor]:
        params = [p.detach() for p in layer.parameters()]
        return dict(enumerate(forward(x, *flat(hx), params, torch.tensor(lengths), None, *rest)))

    with emulated(tier), poisoned():
        same_bits(run([-1, 5, 2**40, -(2**40)]), run([0, 4, 4, 0]), case)


@pytest.mark.parametrize("pattern", ["ragged", "descending", "all T"])
@pytest.mark.parametrize(("tier", "case"), named(LAYERS))
def test_packed(tier: str, case: Case, pattern: str) -> None:
    layer = case.torch_layer()
    call = through_packing(make_lengths(pattern, case.T, case.B), enforce_sorted=False)
    with emulated(tier):
        check_parity(layer, our_layer(layer), *case.inputs(), f"{case} {pattern}", call, call)


def test_packed_batch_of_many_steps() -> None:
    """More steps than one launch carries to the device."""
    case = Case("gru", T=600, B=3, I=2, H=2, dtype=torch.float64)
    layer = case.torch_layer()
    call = through_packing(torch.tensor([600, 451, 2]), enforce_sorted=True)
    with emulated("step"):
        check_parity(layer, our_layer(layer), *case.inputs(), case, call, call)


# ---- sizes of 0 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tier", "case"), named(LAYERS))
def test_no_rows(tier: str, case: Case) -> None:
    layer = our_layer(case.torch_layer())
    case = replace(case, B=0)
    with emulated(tier), poisoned():
        got = evaluate(layer, *case.inputs())
    assert got["y"].shape == (case.T, 0, case.D * case.P)
    assert all((got[f"d {name}"] == 0).all() for name, _ in layer.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps(kind: str) -> None:
    """The operators themselves: seqkern.ops, as torch.nn, refuses T = 0."""
    case = Case(kind, B=2, H=3)
    layer, (_, hx) = case.torch_layer(), case.inputs()
    params = [p.detach() for p in layer.parameters()]
    x, states = torch.empty(0, case.B, case.I), flat(hx)
    ops, relu = build_and_load(), [False] if kind == "rnn" else []
    with emulated("step"), poisoned():
        y, *rest = getattr(ops, f"{kind}_forward").default(x, *states, params, None, None, *relu, True)
        *finals, reserve = rest
        assert y.shape == (0, 2, 3) and len(finals) == len(states)
        assert all(torch.equal(last, first) for last, first in zip(finals, states, strict=True))
        dx, *dstates, dparams = getattr(ops, f"{kind}_backward").default(
            *(y, *states, x, *states, params, None, None, y, reserve, *relu, True, True)
        )
    assert dx.shape == x.shape
    assert all(torch.equal(dstate, state) for dstate, state in zip(dstates, states, strict=True))
    assert all((d == 0).all() and d.shape == p.shape for d, p in zip(dparams, params, strict=True))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_features(kind: str, tier: str) -> None:
    case = Case(kind, T=3, B=2, I=1, H=17)
    layer = our_layer(case.torch_layer())
    with emulated(tier), poisoned():
        with torch.no_grad():
            layer.weight_ih_l0.zero_()
        expected = evaluate(layer, *case.inputs())
        layer.input_size, layer.weight_ih_l0 = 0, torch.nn.Parameter(layer.weight_ih_l0[:, :0])
        x, hx = case.inputs()
        got = evaluate(layer, x[..., :0], hx)
    for results in (expected, got):
        results.pop("d x"), results.pop("d weight_ih_l0")
    same_bits(got, expected, case)


# ---- how it is called --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tier", "case"), named(LAYERS + SIXTEEN))
def test_without_gradients(tier: str, case: Case) -> None:
    """The same outputs, and nothing is kept."""
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    with emulated(tier), poisoned():
        expected = flat(layer(x, hx))
        with torch.no_grad():
            got = flat(layer(x, hx))
    for a, b in zip(got, expected, strict=True):
        same_bits({"": a}, {"": b.detach()}, case)


@pytest.mark.parametrize("which", ["x", "hx", "weights"])
@pytest.mark.parametrize(("tier", "case"), named(LAYERS))
def test_some_inputs_want_gradients(tier: str, case: Case, which: str) -> None:
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    groups = {"x": [x], "hx": flat(hx), "weights": list(layer.parameters())}

    def gradients(names: list[str]) -> dict[str, Tensor]:
        for name, group in groups.items():
            for leaf in group:
                leaf.requires_grad_(name in names)
        leaves = {f"{name} {k}": leaf for name in names for k, leaf in enumerate(groups[name])}
        total = sum(y.sum() for y in flat(layer(x, hx)))
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    with emulated(tier), poisoned():
        everything = gradients(list(groups))
        alone = gradients([which])
    same_bits(alone, {name: everything[name] for name in alone}, f"{case} {which}")


@pytest.mark.parametrize(("tier", "case"), named(LAYERS))
def test_some_outputs_have_gradients(tier: str, case: Case) -> None:
    """An output without a gradient counts as one with a gradient of zeros."""
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    leaves = [t.requires_grad_() for t in (x, *flat(hx))] + list(layer.parameters())
    with emulated(tier), poisoned():
        for which in range(1 + len(flat(hx))):
            outputs = flat(layer(x, hx))
            cotangents = [torch.zeros_like(y) for y in outputs]
            cotangents[which].fill_(1)
            expected = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
            got = torch.autograd.grad(outputs[which], leaves, cotangents[which], materialize_grads=True)
            agree(dict(enumerate(got)), dict(enumerate(expected)), 0, f"{case} output {which}")


@pytest.mark.parametrize(("tier", "case"), named(LAYERS + SIXTEEN))
def test_memory_of_any_layout(tier: str, case: Case) -> None:
    """Inputs, states and weights that are not contiguous or not aligned; a gradient of stride 0."""
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()

    def odd(t: Tensor) -> Tensor:  # the last dim strided, the first element not aligned
        memory = torch.empty(2 * t.numel() + 1, dtype=t.dtype)
        view = memory[1:].view(*t.shape, 2)[..., 0]
        return view.copy_(t)

    def shifted(t: Tensor) -> Tensor:  # contiguous, not aligned
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    def run(x: Tensor, hx: tuple | Tensor) -> dict[str, Tensor]:
        x.requires_grad_()
        outputs = flat(layer(x, hx))
        total = sum(y.sum() for y in outputs)
        grads = torch.autograd.grad(total, [x, *layer.parameters()])
        return {str(k): t.detach() for k, t in enumerate((*outputs, *grads))}

    with emulated(tier), poisoned():
        expected = run(x.clone(), hx)
        for remake in (odd, shifted):
            states = remake(hx) if isinstance(hx, Tensor) else tuple(remake(state) for state in hx)
            agree(run(remake(x), states), expected, 4 * torch.finfo(x.dtype).eps, f"{case} {remake.__name__}")
        for weight in layer.parameters():
            weight.data = odd(weight.data)
        agree(run(x.clone(), hx), expected, 4 * torch.finfo(x.dtype).eps, f"{case} weights")


@pytest.mark.parametrize(("tier", "case"), named(LAYERS))
def test_autocast_and_grad_mode_stay_outside(tier: str, case: Case) -> None:
    """A backward inside autocast computes as one outside; operators run on inputs that want gradients."""
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    with emulated(tier):
        results = []
        for enabled in (False, True):
            y, _ = layer(x, hx)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(dict(enumerate(torch.autograd.grad(y.sum(), list(layer.parameters())))))
        same_bits(results[1], results[0], case)
        if case.kind == "lstm" and not case.proj_size:
            params = list(layer.parameters())[:8]
            h0, c0 = (state[:2] for state in hx)
            build_and_load().lstm_forward.default(x, h0, c0, params, None, None, True)


@pytest.mark.parametrize(("tier", "case"), named(LAYERS))
def test_every_order_of_threads_gives_the_same_bits(tier: str, case: Case) -> None:
    layer = our_layer(case.torch_layer())
    call = with_lengths(make_lengths("zeros among", case.T, case.B))
    results = []
    for seed in range(3):
        with emulated(tier, seed=seed), poisoned():
            results.append(evaluate(layer, *case.inputs(), call=call))
    same_bits(results[1], results[0], f"{case} seed 1")
    same_bits(results[2], results[0], f"{case} seed 2")


@pytest.mark.parametrize("tier", PERSISTENT)
@pytest.mark.parametrize("kind", KINDS)
def test_tf32(kind: str, tier: str) -> None:
    """The recurrence follows torch.backends.cudnn.rnn.fp32_precision: TF32 has 11 bits."""
    case = Case(kind, T=6, B=3, H=33)
    layer = our_layer(case.torch_layer())
    with emulated(tier):
        exact = evaluate(layer, *case.inputs())
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
        rounded = evaluate(layer, *case.inputs())
    agree(rounded, exact, 2.0**-9, case)
    assert all((rounded[name] != exact[name]).any() for name in ("y", "d h0"))


@pytest.mark.parametrize("tier", PERSISTENT)
@pytest.mark.parametrize("which", ["matrix", "vector"])
def test_tf32_rounds_to_nearest(which: str, tier: str) -> None:
    """The tensor core would cut off what TF32 has no bits for."""
    layer = torch.nn.RNN(1, 17, nonlinearity="relu", bias=False)
    between = 1 + 2.0**-11 + 2.0**-12  # TF32 has 1 and 1 + 2^-10
    weight, start = (between, 1.0) if which == "matrix" else (1.0, between)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    with emulated(tier), torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.copy_(weight * torch.eye(17))
        y, _ = our_layer(layer)(torch.zeros(1, 2, 1), torch.full((1, 2, 17), start))
    assert (y == 1 + 2.0**-10).all()


# ---- every way to cut a layer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A layer on a device whose size decides how the kernels cut it."""

    tier: str
    case: Case
    facts: Facts
    ragged: bool

    def plans(self) -> list[tuple[int, ...]] | None:
        """Forward's and backward's: blocks, rows, tiles, splits, KiB, jobs at a time, of all. None: none."""
        case = self.case
        sizes = (case.T, case.B, case.H, case.P, case.D, False)
        found = []
        for way in ("forward", "backward"):
            dtype = str(case.dtype).removeprefix("torch.")
            text = _extension._C.cuda_plan(case.kind, dtype, way, False, *sizes, *astuple(self.facts))
            line = re.search(rf"^(?:chosen|not): +{self.tier}, (.*?us)", text, re.MULTILINE)
            if line is None:
                return None
            found.append(tuple(int(number) for number in re.findall(r"\b(\d+)\b(?!\.)", line[1])[:8]))
        return found


def random_cut(seed: int) -> Cut:
    rng = random.Random(f"cut {seed}")
    kind = rng.choice(KINDS)
    H = rng.choice((1, 16, 33, 64, 100, 129, 160))
    case = Case(
        kind,
        T=rng.choice((1, 3, 5)),
        B=rng.choice((1, 7, 9, 20, 40)),
        I=9,
        H=H,
        proj_size=rng.randint(1, H - 1) if kind == "lstm" and H > 1 and rng.random() < 0.3 else 0,
        bidirectional=rng.random() < 0.5,
        dtype=rng.choice((torch.float32, torch.bfloat16, torch.float16)),
        nonlinearity="relu" if kind == "rnn" and rng.random() < 0.5 else "tanh",
        seed=seed,
    )
    facts = Facts(
        capability=90,
        sms=rng.choice((2, 3, 5, 9, 132)),
        shared_bytes=rng.choice((48, 99, 163, 227)) << 10,
        max_cluster=rng.choice((2, 3, 5, 8, 16)),
    )
    return Cut(rng.choice(PERSISTENT), case, facts, rng.random() < 0.5)


def check_cut(cut: Cut) -> None:
    case, layer = cut.case, cut.case.torch_layer()
    calls = ()
    if cut.ragged:
        lengths = make_lengths("zeros among", case.T, case.B)
        calls = (with_lengths(lengths), packed_call(lengths))
    with emulated(cut.tier, seed=case.seed, facts=cut.facts):
        check_parity(layer, our_layer(layer), *case.inputs(), cut, *calls)


@needs_planner
@pytest.mark.parametrize("part", range(4))
def test_any_cut(part: int) -> None:
    """Devices of odd sizes make the planner cut small layers in all the ways it would cut large ones."""
    for seed in range(40 * part, 40 * (part + 1)):
        cut = random_cut(seed)
        if cut.plans():
            check_cut(cut)


@pytest.mark.slow
@needs_planner
@pytest.mark.parametrize("part", range(10))
def test_any_cut_at_length(part: int) -> None:
    for seed in range(160 + 150 * part, 160 + 150 * (part + 1)):
        cut = random_cut(seed)
        if cut.plans():
            check_cut(cut)


@pytest.mark.parametrize(("kind", "H"), [("rnn", 512), ("gru", 384), ("rnn", 1024)])
def test_long_sums_of_float32(kind: str, H: int) -> None:
    """Many products added up by one warp: the tensor cores' truncation must not pile up."""
    facts = Facts(sms=H // 64)
    case = Case(kind, T=4, B=5, I=9, H=H)
    layer = case.torch_layer()
    with emulated("grid", facts=facts):
        check_parity(layer, our_layer(layer), *case.inputs(), case)


@pytest.mark.parametrize("tier", PERSISTENT)
def test_infinite_numbers_stay_infinite(tier: str) -> None:
    """An infinite h has no lower part: inf - inf is NaN, which float32's three products must leave out."""
    case = Case("rnn", nonlinearity="relu", T=2, B=2, H=17)
    layer, (x, h0) = case.torch_layer(), case.inputs()
    with emulated(tier), torch.no_grad():
        layer.weight_hh_l0.abs_()
        h0[0, 0, 3] = torch.inf
        expected, _ = layer(x, h0)
        got, _ = our_layer(layer)(x, h0)
    assert (expected[:, 0] == torch.inf).all()
    assert (got[:, 0] == torch.inf).all() and got[:, 1].isfinite().all()


@pytest.mark.parametrize("case", layers(T=3, H=140), ids=str)
def test_a_device_that_is_smaller_than_it_says(case: Case) -> None:
    """Where part of it is reserved, blocks that wait for each other may not fit: then it goes step by step,
    unless the tier was asked for."""
    layer = case.torch_layer()
    with emulated(facts=A100, free_sms=1):
        check_parity(layer, our_layer(layer), *case.inputs(), case)
        assert counters().launches > 2 * case.T, "not step by step"
    with (
        emulated("cluster", free_sms=1),
        pytest.raises(RuntimeError, match="'cluster' was asked for: the device"),
    ):
        layer_ = our_layer(layer)
        layer_(*case.inputs())


@needs_planner
def test_the_cuts_differ() -> None:
    """What the tests above rest on: each tier is there, with several tiles and splits, and jobs in turns."""
    cuts = [(cut.tier, plan) for cut in map(random_cut, range(160)) for plan in cut.plans() or ()]
    for tier in PERSISTENT:
        mine = [plan for tier_, plan in cuts if tier_ == tier]
        assert len(set(mine)) > 20, f"{tier}: {len(set(mine))} cuts"
        blocks, rows, tiles, _, splits, _, running, jobs = zip(*mine, strict=True)
        assert set(rows) >= {8, 16}
        assert len(set(tiles)) >= 3
        assert len(set(splits)) >= 3
        assert any(a < b for a, b in zip(running, jobs, strict=True)), f"{tier}: no job waits for its turn"
        assert tier == "block" or max(blocks) >= 5


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", PERSISTENT)
def test_a_tier_that_cannot_run_it_says_why(tier: str) -> None:
    layer = our_layer(Case("lstm", dtype=torch.float64).torch_layer())
    x, hx = Case("lstm", dtype=torch.float64).inputs()
    with emulated(tier), pytest.raises((RuntimeError, ValueError), match=f"cuda tier '{tier}' .*float64"):
        layer(x, hx)


def test_an_unknown_tier() -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"tier: expected step, block.*got warp"):
        build_and_load().force_tier("warp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 17)), r"x: expected \[T, B, I\], got \[3, 17\]"),
        (dict(x=torch.zeros(3, 2, 16)), r"w_ih: expected shape \[60, 16\], got \[60, 17\]"),
        (dict(h0=torch.zeros(1, 3, 15)), r"h0: expected shape \[1, 2, 15\], got \[1, 3, 15\]"),
        (dict(h0=torch.zeros(3, 2, 15)), r"h0: expected \[1 or 2, B, P\], got \[3, 2, 15\]"),
        (dict(c0=torch.zeros(1, 2, 15).double()), r"c0: expected Float as x, got Double"),
        (
            dict(lengths=torch.zeros(3).long()),
            r"lengths: expected \[B\] = \[2\] .* got \[3\] Long",
        ),
        (dict(lengths=torch.zeros(2)), r"lengths: expected \[B\] = \[2\] int64 on cpu, got \[2\] Float"),
        (
            dict(x=torch.zeros(3, 17), sizes=torch.tensor([2, 2])),
            "batch_sizes: their sum is 4, but x has 3",
        ),
        (
            dict(x=torch.zeros(3, 17), sizes=torch.tensor([1, 2])),
            "batch_sizes: .* do not grow, got 2",
        ),
        (dict(params=3), "params: expected 2 to 5 per direction, got 1 for 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_operators_check_memory(change: dict, message: str) -> None:
    case = Case("lstm", T=3, B=2)
    layer, (x, (h0, c0)) = case.torch_layer(), case.inputs()
    params = [p.detach() for p in layer.parameters()]
    if "params" in change:
        params = params[: change["params"] // 3]
    given = dict(x=x, h0=h0, c0=c0, lengths=None, sizes=None) | change
    arguments = (given["x"], given["h0"], given["c0"], params, given["lengths"], given["sizes"], True)
    with pytest.raises(RuntimeError, match=message):
        build_and_load().lstm_forward.default(*arguments)


def test_backward_checks_memory() -> None:
    case = Case("lstm", T=3, B=2)
    layer, (x, (h0, c0)) = case.torch_layer(), case.inputs()
    params = [p.detach() for p in layer.parameters()]
    ops = build_and_load()
    y, _, _, reserve = ops.lstm_forward.default(x, h0, c0, params, None, None, True)
    backward = ops.lstm_backward.default

    def run(dy=None, dh_n=None, y=y, reserve=reserve):
        return backward(dy, dh_n, None, x, h0, c0, params, None, None, y, reserve, True, True)

    for wrong, message in (
        (dict(dy=y[:2]), r"dy: expected shape \[3, 2, 15\], got \[2, 2, 15\]"),
        (dict(dh_n=h0[..., :3]), r"dh_n: expected shape \[1, 2, 15\], got \[1, 2, 3\]"),
        (dict(y=y.double()), "y: expected Float as x, got Double"),
        (dict(reserve=reserve[:2]), r"reserve: expected shape \[6, 80\], got \[2, 80\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**wrong)
    run(dy=y)
