"""Additive attention: the operation on every backend and instruction set, beside the literal formula."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from attention_cases import (
    PADDING,
    doubled,
    errors_nearby_named,
    evaluate_named,
    normal,
    valid_places,
)
from cases import SHORT, pairwise, unique
from compare import ORACLES_AGREE, agree, poisoned, same_bits, within
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import seqkern
from seqkern import _extension
from seqkern.ops import _fake, additive_attention
from seqkern.reference import additive_attention as reference

INSTRUCTION_SETS = _extension._C.instruction_sets() if _extension.AVAILABLE else []


@dataclass(frozen=True)
class Case:
    """One call. keys: which are real; reach: how far queries and keys spread."""

    B: int = 2
    L: int = 5
    S: int = 7
    H: int = 8
    D: int = 8
    keys: str = "all"
    strided: bool = False
    reach: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        words = [f"B{self.B}", f"L{self.L}", f"S{self.S}", f"H{self.H}", f"D{self.D}"]
        words += [f"keys.{self.keys}"] * (self.keys != "all") + ["strided"] * self.strided
        words += [f"reach{self.reach}"] * (self.reach != 1) + [SHORT[self.dtype]]
        return "-".join([*words, *([f"seed{self.seed}"] if self.seed else [])])

    def valid(self) -> Tensor:
        if self.keys == "all":
            return torch.ones((self.B, self.S), dtype=torch.bool)
        return valid_places(self.keys, self.B, self.S, torch.Generator().manual_seed(self.seed))

    def padding(self) -> dict[str, Tensor]:
        if self.keys == "all":
            return {}
        if self.keys == "lengths":
            return {"lengths": self.valid().sum(1)}
        return {"key_padding_mask": ~self.valid()}

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        shapes = dict(query=(self.B, self.L, self.H), key=(self.B, self.S, self.H), v=(self.H,))
        shapes["value"] = (self.B, self.S, self.D)
        found = {name: normal(shape, generator, torch.float64) for name, shape in shapes.items()}
        found["query"] *= self.reach
        found["key"] *= self.reach
        found["v"] /= max(self.H, 1) ** 0.5
        found = {name: x.to(self.dtype) for name, x in found.items()}
        return {name: odd(x) for name, x in found.items()} if self.strided else found


def odd(x: Tensor) -> Tensor:
    """x with no dimension contiguous."""
    memory = x.new_full([2 * size + 1 for size in x.shape], math.nan)
    return memory[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)


Call = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def ours(case: Case) -> Call:
    return lambda leaves: named(additive_attention(**leaves, **case.padding()))


def literal(case: Case) -> Call:
    """The formula as anyone writes it; rows without a key are set to zero."""
    valid = case.valid()

    def call(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        query, key, v, value = leaves["query"], leaves["key"], leaves["v"], leaves["value"]
        score = (torch.tanh(query[:, :, None] + key[:, None]) * v).sum(-1)
        score = score.masked_fill(~valid[:, None], -math.inf)
        some = valid.any(1)[:, None, None]
        weights = torch.softmax(torch.where(some, score, 0), -1)
        weights = torch.where(valid[:, None], weights, 0)
        return named((torch.bmm(weights, value), weights))

    return call


def exact(case: Case) -> Call:
    return lambda leaves: named(reference(**leaves, key_valid=case.valid()))


def named(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("context", "weights"), outputs, strict=True))


def check(case: Case) -> None:
    """Every output and every gradient obeys the rule beside the literal formula of the same dtype."""
    tensors, same = case.tensors(), dict(seed=3, rounded=case.dtype)
    with poisoned():
        got = evaluate_named(ours(case), tensors, **same)
    peer = evaluate_named(literal(case), tensors, **same)
    oracle = evaluate_named(exact(case), doubled(tensors), **same)
    second = evaluate_named(literal(case), doubled(tensors), **same)
    agree(oracle, second, ORACLES_AGREE, f"{case}: the reference (got) against the formula in float64")
    within(got, peer, oracle, case, lambda: errors_nearby_named(literal(case), tensors))


SIZES = (1, 15, 17, 63, 129)
FACTORS: dict[str, tuple] = dict(
    B=(1, 3), L=(1, 4, 17), S=(1, 15, 65), H=(1, 15, 16, 33, 129), D=(1, 17, 64), keys=PADDING,
    strided=(False, True), dtype=tuple(SHORT),
)  # fmt: skip
SAMPLE = unique(Case(**row) for row in pairwise(FACTORS))
LARGE = [
    Case(B=2, L=70, S=150, H=40, D=24),
    Case(B=1, L=129, S=129, H=129, D=129, keys="holes"),
    Case(B=5, L=9, S=31, H=300, D=100, keys="lengths"),
    Case(B=70, L=3, S=4, H=17, D=5),
]
RANGES = [
    Case(L=9, S=17, H=65, reach=reach, dtype=dtype)
    for reach in (1e-4, 0.01, 5.0, 12.0, 100.0, 1e30)
    for dtype in (torch.float32, torch.float64)
]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_parity(case, backend):
    check(case)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_parity_of_several_blocks(case, cpu_backend):
    check(case)


@pytest.mark.parametrize("case", RANGES, ids=str)
def test_parity_near_and_far_from_zero(case, cpu_backend):
    """The factored tanh within its range, near zero too; the exact one beyond it."""
    check(case)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    before = _extension._C.instruction_set()
    _extension._C.set_instruction_set(request.param)
    yield request.param
    _extension._C.set_instruction_set(before)


@pytest.mark.parametrize(
    "case",
    [
        *(
            Case(B=3, L=9, S=19, H=41, D=23, keys=keys, dtype=dtype)
            for keys in ("holes", "lengths")
            for dtype in SHORT
        ),
        Case(B=2, L=5, S=70, H=17, D=3, reach=9.0),
        Case(B=2, L=6, S=7, H=17, D=3, reach=0.001),
    ],
    ids=str,
)
def test_parity_on_each_instruction_set(case, instruction_set, cpu_backend):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_parity_of_many(seed, cpu_backend):
    # At 0.01 tanh' is nearly 1 and the scores' gradients add up to 0: dquery keeps a few thousandths of its
    # terms, and in float64 the two oracles' roundings are no longer 1e-12 apart.
    factors = FACTORS | dict(L=SIZES, S=SIZES, H=SIZES, D=SIZES, reach=(0.1, 1.0, 12.0))
    for row in pairwise(factors, seed):
        check(replace(Case(**row), seed=seed + 1))


def test_one_query_beyond_the_range_leaves_the_others_alone(cpu_backend):
    case = Case(B=2, L=70, S=9, H=33)
    tensors = case.tensors()
    tensors["query"][0, 1, 5] = 300.0
    tensors["key"][1, 2, 3] = -50.0
    tensors["query"][1, 3, 3] = 50.0
    got = evaluate_named(ours(case), tensors, 0, torch.float32)
    peer = evaluate_named(literal(case), tensors, 0, torch.float32)
    oracle = evaluate_named(exact(case), doubled(tensors), 0, torch.float32)
    within(got, peer, oracle, case, lambda: errors_nearby_named(literal(case), tensors))


# ---- padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [kind for kind in PADDING if kind != "all"])
@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
def test_padding_is_not_read(keys, dtype, backend):
    case = Case(B=4, L=3, S=17, H=19, D=5, keys=keys, dtype=dtype)
    tensors = case.tensors()
    want = evaluate_named(ours(case), tensors, 0, dtype)
    junk = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    for name in ("key", "value"):
        x = tensors[name]
        filler = junk[torch.arange(x.shape[-1]) % 3].expand(x.shape)
        tensors[name] = torch.where(case.valid()[..., None], x, filler)
    same_bits(evaluate_named(ours(case), tensors, 0, dtype), want, case)


def test_rows_without_keys_give_zeros(backend):
    _query, _key, _v, _value = leaves = [
        torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (2, 5, 4), (4,), (2, 5, 6))
    ]
    context, weights = additive_attention(*leaves, lengths=torch.tensor([0, 2]))
    assert not context[0].any() and not weights[0].any() and not weights[1, :, 2:].any()
    grads = torch.autograd.grad(context.sum() + weights.square().sum(), leaves)
    assert not any(g[0].any() for g in (grads[0], grads[1], grads[3]))
    assert all(g.isfinite().all() for g in grads) and grads[1][1, :2].any()


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0)]
)
def test_empty(shape, backend):
    B, L, S, H, D = shape
    case = Case(B=B, L=L, S=S, H=H, D=D)
    got = evaluate_named(ours(case), case.tensors(), 0, torch.float32)
    want = evaluate_named(exact(case), case.tensors(), 0, torch.float32)
    agree(got, want, 1e-5, case)


# ---- gradients ---------------------------------------------------------------------------------------------


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("padding", ["none", "lengths", "holes"])
def test_gradients_of_both_orders(padding, backend):
    options = {
        "none": {},
        "lengths": dict(lengths=torch.tensor([4, 0, 2])),
        "holes": dict(key_padding_mask=torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()),
    }[padding]
    leaves = doubles(3, 2, 3), doubles(3, 4, 3), doubles(3), doubles(3, 4, 2)
    call = lambda *tensors: additive_attention(*tensors, **options)  # noqa: E731
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("needed", [n for n in itertools.product((False, True), repeat=4) if any(n)])
@pytest.mark.parametrize("output", ["context", "weights", "both"])
def test_any_subset_of_gradients(needed, output, backend):
    case = Case(keys="holes")
    leaves = {n: t.requires_grad_(need) for (n, t), need in zip(case.tensors().items(), needed, strict=True)}

    def gradients(call: Call) -> dict[str, Tensor]:
        outputs = call(leaves)
        loss = sum(
            (y * torch.arange(y.numel()).view(y.shape).sin()).sum()
            for n, y in outputs.items()
            if output in (n, "both")
        )
        wanted = {n: t for n, t in leaves.items() if t.requires_grad}
        if not loss.requires_grad:  # the weights do not depend on the values
            return {n: torch.zeros_like(t) for n, t in wanted.items()}
        return dict(
            zip(wanted, torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True), strict=True)
        )

    agree(gradients(ours(case)), gradients(exact(case)), 1e-5, case)


def test_the_caller_may_change_what_he_gets(cpu_backend):
    case = Case(keys="lengths", dtype=torch.float64)

    def call(leaves: dict[str, Tensor], change: bool) -> dict[str, Tensor]:
        found = ours(case)(leaves)
        if change:
            found["weights"].mul_(2)
            found["context"].mul_(3)
            return found
        return {"context": found["context"] * 3, "weights": found["weights"] * 2}

    got = evaluate_named(lambda leaves: call(leaves, True), case.tensors(), 0, torch.float64)
    want = evaluate_named(lambda leaves: call(leaves, False), case.tensors(), 0, torch.float64)
    agree(got, want, 1e-12, case)


def test_transforms_take_the_eager_formula():
    case = Case(dtype=torch.float64)
    q, k, v, value = case.tensors().values()
    want, _ = reference(q, k, v, value)
    rows = torch.func.vmap(lambda q, k, value: additive_attention(q[None], k[None], v, value[None])[0][0])(
        q, k, value
    )
    torch.testing.assert_close(rows, want)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        tangent = forward_ad.unpack_dual(additive_attention(dual, k, v, value)[0]).tangent
    expected = torch.func.jvp(lambda q: reference(q, k, v, value)[0], (q,), (torch.ones_like(q),))[1]
    torch.testing.assert_close(tangent, expected)


# ---- the program around it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["all", "lengths", "holes"])
def test_threads_agree_bit_for_bit(keys, cpu_backend):
    case = Case(B=3, L=70, S=33, H=150, D=140, keys=keys)
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        try:
            found.append(evaluate_named(ours(case), case.tensors(), 0, torch.float32))
        finally:
            torch.set_num_threads(2)
    for got in found[1:]:
        same_bits(got, found[0], case)


def test_the_tanh_layer_is_never_made(cpu_backend):
    """What forward and backward allocate, all together, is O(B L (S + H)); [B, L, S, H] is 210 MB here."""
    case = Case(B=2, L=160, S=160, H=1024, D=16)
    leaves = {name: t.requires_grad_() for name, t in case.tensors().items()}
    with torch.profiler.profile(profile_memory=True) as profile:
        context, _ = additive_attention(**leaves)
        context.sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < allocated < 24e6, f"{allocated / 1e6} MB"


def test_autocast(backend):
    case = Case()
    tensors = case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = additive_attention(**tensors)
    assert context.dtype is weights.dtype is torch.bfloat16
    want, _ = additive_attention(**{name: t.bfloat16() for name, t in tensors.items()})
    assert torch.equal(context, want)


@pytest.mark.parametrize("keys", ["all", "lengths", "holes"])
def test_compiles_whole(keys, cpu_backend):
    case = Case(keys=keys)
    leaves = [t.requires_grad_() for t in case.tensors().values()]
    padding = case.padding()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return additive_attention(*tensors, **padding)

    got = call(*leaves)
    want = additive_attention(*leaves, **padding)
    for y, y_ in zip(got, want, strict=True):
        assert torch.equal(y, y_)
    cotangents = [torch.randn_like(y) for y in want]
    for g, g_ in zip(
        torch.autograd.grad(got, leaves, cotangents),
        torch.autograd.grad(want, leaves, cotangents),
        strict=True,
    ):
        assert torch.equal(g, g_)


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@pytest.mark.parametrize("keys", ["all", "lengths", "holes"])
def test_fake_kernels_tell_the_truth(dtype, keys, cpu_backend):
    case = Case(keys=keys, strided=True, dtype=dtype)
    padding = case.padding()
    valid = ~padding["key_padding_mask"] if "key_padding_mask" in padding else None
    inputs = (*case.tensors().values(), valid, padding.get("lengths"))
    forward = torch.ops.seqkern.additive_attention_forward.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, inputs, test_utils=tests)
    context, weights = forward(*inputs)
    backward = torch.ops.seqkern.additive_attention_backward.default
    for needed in ((True,) * 4, (True, False, False, True), (False, True, True, False)):
        torch.library.opcheck(backward, (context, None, *inputs, weights, *needed), test_utils=tests)
    assert _fake.additive_attention_forward(*inputs)[1].dtype is weights.dtype


# ---- errors ------------------------------------------------------------------------------------------------


def arguments(**change: Any) -> dict[str, Any]:
    shapes = dict(query=(2, 3, 4), key=(2, 5, 4), v=(4,), value=(2, 5, 6))
    return {name: torch.randn(shape) for name, shape in shapes.items()} | change


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(query=torch.randn(2, 4)), RuntimeError, r"query: expected \[B, L, H\], got \(2, 4\)"),
    (
        dict(key=torch.randn(2, 5, 3)),
        RuntimeError,
        r"key: expected \[B, S, H\] = \(2, 5, 4\), got \(2, 5, 3\)",
    ),
    (
        dict(key=torch.randn(3, 5, 4)),
        RuntimeError,
        r"key: expected \[B, S, H\] = \(2, 5, 4\), got \(3, 5, 4\)",
    ),
    (dict(v=torch.randn(4, 1)), RuntimeError, r"v: expected \[H\] = \(4,\), got \(4, 1\)"),
    (
        dict(value=torch.randn(2, 4, 6)),
        RuntimeError,
        r"value: expected \[B, S, D\] = \(2, 5, 6\), got \(2, 4, 6\)",
    ),
    (dict(value=torch.randn(5, 6)), RuntimeError, r"value: expected \[B, S, D\], got \(5, 6\)"),
    (
        dict(query=torch.ones(2, 3, 4, dtype=torch.int64)),
        RuntimeError,
        "query: expected a floating dtype, got torch.int64",
    ),
    (dict(v=torch.randn(4).double()), RuntimeError, "v: expected the dtype of query, torch.float32, got"),
    (
        dict(key=torch.randn(2, 5, 4, device="meta")),
        RuntimeError,
        "key: expected the device of query, cpu, got meta",
    ),
    (
        dict(key_padding_mask=torch.ones(2, 4).bool()),
        ValueError,
        r"key_padding_mask: expected \[B, S\] = \(2, 5\)",
    ),
    (dict(key_padding_mask=torch.ones(2, 5)), ValueError, "key_padding_mask: expected bool, got"),
    (dict(lengths=torch.tensor([1, 6])), ValueError, r"lengths: expected values in 0..T = 0..5, got len"),
    (
        dict(lengths=torch.tensor([1, 2]), key_padding_mask=torch.ones(2, 5).bool()),
        ValueError,
        "lengths: expected None with key_padding_mask",
    ),
    (dict(backend="cuda"), RuntimeError, "cuda has no kernel for additive_attention"),
    (dict(backend="gpu"), ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        additive_attention(**arguments(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(key=torch.randn(2, 5, 3)), r"key: expected shape \[2, 5, 4\], got \[2, 5, 3\]"),
        (dict(value=torch.randn(2, 5, 6).double()), "value: expected Float, got Double"),
        (dict(v=torch.randn(5)), r"v: expected shape \[4\], got \[5\]"),
        (dict(query=torch.randn(4)), r"query, key, value: expected \[B, L, H\]"),
        (dict(lengths=torch.tensor([1])), r"lengths: expected shape \[2\], got \[1\]"),
        (dict(key_valid=torch.ones(2, 4).bool()), r"key_valid: expected shape \[2, 5\], got \[2, 4\]"),
    ],
)
def test_operator_refuses_memory_that_does_not_fit(change, message, cpu_backend):
    given = arguments() | dict(key_valid=None, lengths=None) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.seqkern.additive_attention_forward(**given)


def test_operator_refuses_lengths_out_of_range(cpu_backend):
    with pytest.raises(ValueError, match="lengths: expected 0 to S = 5, got 6 at 1"):
        torch.ops.seqkern.additive_attention_forward(
            **arguments(), key_valid=None, lengths=torch.tensor([1, 6])
        )


def test_a_named_backend_runs_or_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match=r"triton needs tensors on a CUDA device|Triton is not installed"):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        additive_attention(**arguments(backend="triton"))
    monkeypatch.setattr(seqkern.ops._backend, "WHY_NO_KERNELS", "left out")
    with pytest.raises(RuntimeError, match="cpu needs the compiled extension: left out"):
        additive_attention(**arguments(backend="cpu"))
    with torch.no_grad():  # free choice: the eager formula
        context, _ = additive_attention(**arguments())
    assert context.shape == (2, 3, 6)
