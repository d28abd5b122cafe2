"""The conditional random field: reference, C++ and Triton kernels, operations, module.

Oracles, both independent of seqkern: every sequence of tags enumerated (`enumerated`), and pytorch-crf's
method written out anew, loops and all (`TheirCRF`), beside torchcrf itself where it is installed. The rule
for kernels is compare.py's: at most twice the eager formula's error in the same dtype.
"""

import copy
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from compare import NEARBY, agree, poisoned, same_bits, within
from conftest import why_no_cpu_backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import seqkern
from seqkern import _extension, ops, reference
from seqkern.nn.crf import CRF, Constraints, bio_constraints
from seqkern.ops import _backend

# log(0) = -inf is meant; NumPy, which Triton's interpreter computes with, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")

needs_cpu = pytest.mark.skipif(why_no_cpu_backend() is not None, reason=str(why_no_cpu_backend()))
TRITON = _backend.WHY_NO_TRITON is None and _backend.triton_interprets()
needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton in its interpreter")
KERNELS = [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=needs_triton)]
BACKENDS = ["eager", *KERNELS]
INSTRUCTION_SETS = _extension._C.instruction_sets() if _extension.AVAILABLE else []
NAMES = ("emissions", "start", "end", "transitions")
F64 = torch.float64


# ---- problems ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """steps: "all" count, "lengths", a "mask" of such, or a mask with "holes". scale: of all scores."""

    T: int
    B: int
    K: int
    steps: str = "all"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0

    def __str__(self) -> str:
        name = f"T{self.T}-B{self.B}-K{self.K}-{self.steps}-{str(self.dtype).removeprefix('torch.')}"
        return name + (f"-scale{self.scale:g}" if self.scale != 1 else "")


@dataclass
class Problem:
    """emissions [T, B, K], NaN where they do not count; tags [T, B], there -100; start, end, transitions."""

    chain: tuple[Tensor, Tensor, Tensor, Tensor]
    tags: Tensor
    steps: dict[str, Tensor]
    valid: Tensor
    dvalue: Tensor

    def in_dtype(self, dtype: torch.dtype) -> "Problem":
        chain = tuple(t.to(dtype) for t in self.chain)
        return Problem(chain, self.tags, self.steps, self.valid, self.dvalue.to(dtype))


def problem_of(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=F64) * case.scale).to(case.dtype)

    T, B, K = case.T, case.B, case.K
    chain = (randn(T, B, K), randn(K), randn(K), randn(K, K))
    tags = torch.randint(0, K, (T, B), generator=generator)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    if B:
        lengths[-1] = T
    valid = torch.ones(T, B, dtype=torch.bool)
    steps: dict[str, Tensor] = {}
    if case.steps in ("lengths", "mask"):
        valid = torch.arange(T)[:, None] < lengths
        steps = {"lengths": lengths} if case.steps == "lengths" else {"mask": valid}
    elif case.steps == "holes":
        valid = torch.rand(T, B, generator=generator) < 0.6
        valid[0] = True
        steps = {"mask": valid}
    chain[0][~valid] = torch.nan
    if case.steps != "holes":  # whose padding's tags are read
        tags[~valid] = -100
    dvalue = torch.randn(B, generator=generator, dtype=F64).to(case.dtype)
    return Problem(chain, tags, steps, valid, dvalue)


def results_of(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Log-likelihood, log Z and marginals, with every gradient of the first two."""
    found = {}
    for name in ("log-likelihood", "log Z"):
        chain = [t.detach().requires_grad_() for t in problem.chain]
        if name == "log Z":
            value = ops.crf_log_partition(*chain, **problem.steps, backend=backend)
        else:
            value = ops.crf_log_likelihood(
                chain[0], problem.tags, *chain[1:], **problem.steps, backend=backend
            )
        grads = torch.autograd.grad(value, chain, problem.dvalue, materialize_grads=True)
        found |= {name: value.detach()} | {f"d {name} d {n}": g for n, g in zip(NAMES, grads, strict=True)}
    with torch.no_grad():
        found["marginals"] = ops.crf_marginals(*problem.chain, **problem.steps, backend=backend)
    return found


def errors_nearby(problem: Problem, draws: int = NEARBY) -> dict[str, float]:
    """The eager formula's largest error in float32 at inputs an ulp away, in proportion to the dtype.

    In float64 half as much again: there the oracle, which is the formula, has such an error of its own.
    """
    largest: dict[str, float] = {}
    dtype = problem.chain[0].dtype
    eps = torch.finfo(torch.float32).eps
    proportion = torch.finfo(dtype).eps / eps * (1.5 if dtype is F64 else 1)
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        nudged = [
            (t.double() * (1 + eps * torch.randint(-1, 2, t.shape, generator=generator))).float()
            for t in problem.chain
        ]
        near = Problem(tuple(nudged), problem.tags, problem.steps, problem.valid, problem.dvalue.float())
        exact = results_of(near.in_dtype(F64), "eager")
        for name, y in results_of(near, "eager").items():
            error = (y.double() - exact[name]).abs().max().item() if y.numel() else 0.0
            largest[name] = max(largest.get(name, 0.0), error * proportion)
    return largest


def check(case: Case, backend: str, problem: Problem | None = None) -> dict[str, Tensor]:
    """The kernels obey the rule: see compare.py."""
    problem = problem or problem_of(case)
    with poisoned():
        got = results_of(problem, backend)
    peer = results_of(problem, "eager")
    oracle = results_of(problem.in_dtype(F64), "eager")
    if case.K == 1:  # one sequence, of probability 1: sums of up to B * (2 T + 1) numbers that may cancel out
        numbers = [t.nan_to_num(0).abs().max().item() for t in (*problem.chain, problem.dvalue) if t.numel()]
        bound = case.B * (2 * case.T + 1) * torch.finfo(case.dtype).eps * max(numbers, default=0)
        for name in [name for name in got if "log-likelihood" in name or name.startswith("d ")]:
            assert ((got[name] - oracle[name]).abs() <= bound).all(), f"{case}: {name}"
            peer[name], oracle[name] = got[name], got[name].double()
    within(got, peer, oracle, case, lambda: errors_nearby(problem))
    for name, y in got.items():
        if name.endswith("emissions") or name == "marginals":
            assert (y[~problem.valid] == 0).all(), f"{case}: {name} where no step counts"
    return got


# ---- the oracles -------------------------------------------------------------------------------------------


def score_by_hand(chain: tuple[Tensor, ...], b: int, tags: tuple[int, ...]) -> float:
    """The score of tags for the first len(tags) steps of sequence b, in Python's numbers."""
    emissions, start, end, transitions = (t.tolist() for t in chain)
    score = start[tags[0]] + end[tags[-1]]
    score += sum(emissions[t][b][tag] for t, tag in enumerate(tags))
    return score + sum(transitions[i][j] for i, j in itertools.pairwise(tags))


def enumerated(chain: tuple[Tensor, ...], b: int, steps: int) -> dict[tuple[int, ...], float]:
    """Every sequence of tags for the first `steps` steps, and its score."""
    K = chain[1].shape[0]
    every = itertools.product(range(K), repeat=steps)
    return {tags: score_by_hand(chain, b, tags) for tags in every}


class TheirCRF(torch.nn.Module):
    """pytorch-crf's method: a broadcast sum and a logsumexp (a max) per step, and a trace back per sequence.
    Time first."""

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.start_transitions = torch.nn.Parameter(torch.empty(num_tags))
        self.end_transitions = torch.nn.Parameter(torch.empty(num_tags))
        self.transitions = torch.nn.Parameter(torch.empty(num_tags, num_tags))

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        T, B = tags.shape
        b = torch.arange(B)
        kept = mask.to(emissions.dtype)
        score = self.start_transitions[tags[0]] + emissions[0, b, tags[0]]
        alpha = self.start_transitions + emissions[0]
        for t in range(1, T):
            gain = self.transitions[tags[t - 1], tags[t]] + emissions[t, b, tags[t]]
            score = score + gain * kept[t]
            ahead = alpha[:, :, None] + self.transitions + emissions[t][:, None]
            alpha = torch.where(mask[t][:, None], ahead.logsumexp(1), alpha)
        score = score + self.end_transitions[tags[mask.sum(0) - 1, b]]
        return score - (alpha + self.end_transitions).logsumexp(1)

    def decode(self, emissions: Tensor, mask: Tensor) -> list[list[int]]:
        v, pointers, found = self.start_transitions + emissions[0], [], []
        for t in range(1, len(emissions)):
            ahead, pointer = (v[:, :, None] + self.transitions + emissions[t][:, None]).max(1)
            v = torch.where(mask[t][:, None], ahead, v)
            pointers.append(pointer)
        v = v + self.end_transitions
        for b, count in enumerate(mask.sum(0).tolist()):
            path = [int(v[b].argmax())]
            for pointer in reversed(pointers[: count - 1]):
                path.append(int(pointer[b, path[-1]]))
            found.append(path[::-1])
        return found


# ---- the reference against the definition ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 2, 1), (4, 3, 3), (5, 2, 2)])
@pytest.mark.parametrize("steps", ["all", "lengths", "mask"])
def test_everything_against_every_sequence(shape, steps, backend):
    case = Case(*shape, steps, F64)
    p = problem_of(case)
    z = ops.crf_log_partition(*p.chain, **p.steps, backend=backend)
    value = ops.crf_log_likelihood(p.chain[0], p.tags, *p.chain[1:], **p.steps, backend=backend)
    marginals = ops.crf_marginals(*p.chain, **p.steps, backend=backend)
    best, top = ops.crf_decode(*p.chain, **p.steps, backend=backend)
    nbest_backend = "eager" if backend == "triton" else backend
    several, tops = ops.crf_decode(*p.chain, **p.steps, n=4, backend=nbest_backend)
    for b, count in enumerate(p.valid.sum(0).tolist()):
        scores = enumerated(p.chain, b, count)
        expected = math.log(math.fsum(map(math.exp, scores.values())))
        assert z[b].item() == pytest.approx(expected, rel=1e-12)
        tags = tuple(p.tags[:count, b].tolist())
        assert value[b].item() == pytest.approx(scores[tags] - expected, rel=1e-11, abs=1e-12)
        for t, k in itertools.product(range(count), range(case.K)):
            mass = math.fsum(math.exp(s - expected) for y, s in scores.items() if y[t] == k)
            assert marginals[t, b, k].item() == pytest.approx(mass, rel=1e-10, abs=1e-14)
        ranked = sorted(scores, key=scores.get, reverse=True)
        assert tuple(best[b, :count].tolist()) == ranked[0] and (best[b, count:] == -1).all()
        assert top[b].item() == pytest.approx(scores[ranked[0]], rel=1e-12)
        for rank in range(4):
            if rank < len(ranked):
                assert tuple(several[rank, b, :count].tolist()) == ranked[rank], f"rank {rank} of {b}"
                assert tops[rank, b].item() == pytest.approx(scores[ranked[rank]], rel=1e-12)
                assert (several[rank, b, count:] == -1).all()
            else:
                assert tops[rank, b] == -torch.inf and (several[rank, b] == -1).all()


@pytest.mark.parametrize("chosen", ["log_likelihood", "log_partition", "marginals"])
@pytest.mark.parametrize("steps", ["all", "mask", "holes"])
def test_the_reference_differentiates_twice(chosen, steps):
    p = problem_of(Case(4, 2, 3, steps, F64))
    emissions = p.chain[0].nan_to_num(0).requires_grad_()
    chain = (emissions, *(t.requires_grad_() for t in p.chain[1:]))
    tags = (p.tags,) if chosen == "log_likelihood" else ()

    def call(emissions, *rest):
        return getattr(reference, f"crf_{chosen}")(emissions, *tags, *rest, p.valid)

    assert torch.autograd.gradcheck(call, chain)
    assert torch.autograd.gradgradcheck(call, chain)


# ---- the kernels against the reference ---------------------------------------------------------------------

SIZES = [(1, 1, 1), (1, 3, 17), (2, 1, 2), (15, 5, 16), (17, 17, 20), (63, 4, 15), (9, 3, 63), (33, 2, 129)]
STEPS = ["all", "lengths", "mask", "holes"]
CASES = [
    *(Case(*size, steps) for size, steps in zip(SIZES, itertools.cycle(STEPS), strict=False)),
    *(Case(*size, steps) for size, steps in zip(SIZES, itertools.cycle(STEPS[2:] + STEPS[:2]), strict=False)),
    *(Case(*size, "lengths", F64) for size in SIZES[2:6]),
    *(Case(31, 6, 7, steps, scale=scale) for steps in STEPS for scale in (0.01, 30, 1000)),
    Case(31, 6, 7, "holes", F64, scale=1000),
    Case(20, 33, 9, "mask"),
    Case(5, 0, 4),
]


@needs_cpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_kernels(case):
    check(case, "cpu")


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "size", list(itertools.product((1, 2, 17, 63), (1, 3, 4, 5, 17), (1, 2, 15, 16, 17, 63, 129)))
)
def test_cpu_kernels_everywhere(size, steps, dtype):
    check(Case(*size, steps, dtype), "cpu")


@needs_triton
@pytest.mark.parametrize(
    "case",
    [Case(5, 3, 4, "lengths"), Case(6, 2, 17, "holes"), Case(4, 2, 3, "mask", scale=1000), Case(1, 1, 1),
     Case(3, 2, 40), Case(5, 2, 4, "mask", F64), Case(3, 0, 4), Case(9, 2, 20, "all", scale=30)],
    ids=str,
)  # fmt: skip
def test_triton_kernels(case):
    check(case, "triton")


@needs_triton
def test_triton_programs_with_several_sequences(monkeypatch):
    from seqkern.triton import crf

    monkeypatch.setattr(crf, "PROGRAMS", 2)
    check(Case(4, 5, 3, "lengths"), "triton")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    before = _extension._C.instruction_set()
    _extension._C.set_instruction_set(request.param)
    yield request.param
    _extension._C.set_instruction_set(before)


@needs_cpu
@pytest.mark.parametrize(
    "case",
    [
        Case(17, 9, 20, "lengths"),
        Case(8, 5, 33, "holes"),
        Case(9, 4, 70, scale=100),
        Case(7, 3, 5, "mask", F64),
    ],
    ids=str,
)
def test_every_instruction_set(instruction_set, case):
    check(case, "cpu")
    p = problem_of(case)
    for n in (None, 3):
        got = ops.crf_decode(*p.chain, **p.steps, n=n, backend="cpu")
        want = ops.crf_decode(*p.chain, **p.steps, n=n, backend="eager")
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(F64, marks=pytest.mark.slow)], ids=str)
def test_long_sequences(dtype):
    """Nothing underflows, and no digit is lost to the length."""
    case = Case(4096, 2, 5, "lengths", dtype)
    p = problem_of(case)
    exact = results_of(p.in_dtype(F64), "eager")
    peer = results_of(p, "eager")
    with poisoned():
        got = results_of(p, "cpu")
    within(got, peer, exact, case, lambda: errors_nearby(p, draws=1))
    if dtype is torch.float32:
        mine = (got["d log Z d emissions"].double() - exact["d log Z d emissions"]).abs().max().item()
        assert mine < 2e-5, "marginals of a sequence of 4096 steps"
        got_z, exact_z = got["log Z"].double(), exact["log Z"]
        assert ((got_z - exact_z).abs() <= 4e-7 * exact_z.abs()).all()


@needs_cpu
def test_long_sequences_of_large_scores():
    """Transitions of standard deviation 50: the scaled sums would lose most columns."""
    case = Case(4096, 2, 6)
    p = problem_of(case)
    p.chain[3].mul_(50)
    exact, peer = results_of(p.in_dtype(F64), "eager"), results_of(p, "eager")
    got = results_of(p, "cpu")
    within(got, peer, exact, case, lambda: errors_nearby(p, draws=1))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_every_column_beyond_the_range_of_exponentials(dtype):
    """A chain that must go where its start is 10000 worse, and through transitions of -10000."""
    case = Case(7, 3, 4, "all", dtype)
    p = problem_of(case)
    emissions, start, end, transitions = p.chain
    start[1:] -= 10000
    transitions[:] -= 10000
    transitions.diagonal().add_(10000)
    end[0] -= 10000
    emissions[3, :, 2] += 30000
    check(case, "cpu", p)
    if TRITON:
        check(case, "triton", p)


@needs_cpu
@given(
    T=st.integers(1, 9), B=st.integers(1, 6), K=st.integers(1, 19), seed=st.integers(0, 99),
    steps=st.sampled_from(STEPS), scale=st.sampled_from([1e-3, 1.0, 60.0, 3e3]),
    forbidden=st.floats(0, 0.9),
)  # fmt: skip
def test_any_problem(T, B, K, seed, steps, scale, forbidden):
    """In float64 the kernels agree with the formula, -inf anywhere included: same values, same gradients."""
    p = problem_of(Case(T, B, K, steps, F64, scale), seed)
    generator = torch.Generator().manual_seed(seed)
    for t in p.chain:
        t[torch.rand(t.shape, generator=generator) < forbidden] = -torch.inf
    got, want = results_of(p, "cpu"), results_of(p, "eager")
    for name, y in want.items():
        assert (y.isfinite() == got[name].isfinite()).all(), name
        if name.startswith("d ") or name == "marginals":
            assert y.isfinite().all(), name
        infinite = ~y.isfinite()
        assert torch.equal(got[name][infinite], y[infinite]), name
        got[name] = got[name].masked_fill(infinite, 0)
        want[name] = y.masked_fill(infinite, 0)
    largest = max(1.0, scale) * 1e-10  # of a difference of scores
    for name, y in want.items():
        assert ((got[name] - y).abs() <= largest * (1 + y.abs())).all(), name
    best, scores = ops.crf_decode(*p.chain, **p.steps, backend="cpu")
    best_, scores_ = ops.crf_decode(*p.chain, **p.steps, backend="eager")
    assert torch.equal(scores, scores_)
    possible = scores > -torch.inf
    assert torch.equal(best[possible], best_[possible])
    assert ((best >= 0) == (torch.arange(T) < p.valid.sum(0)[:, None])).all()


@needs_cpu
@pytest.mark.parametrize("layout", ["batch first", "strided", "expanded", "every second row"])
def test_any_strides(layout):
    T, B, K = 9, 5, 6
    plain = problem_of(Case(T, B, K, "mask"))
    emissions = plain.chain[0].nan_to_num(0)
    if layout == "batch first":
        view = emissions.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        view = emissions.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "expanded":
        emissions = emissions[:1].expand(T, B, K)
        view = emissions
        emissions = emissions.contiguous()
    else:
        view = torch.stack([emissions, emissions + 7], 1).flatten(0, 1)[::2]
    assert torch.equal(view, emissions)
    found = []
    for e in (emissions, view):
        valid = plain.valid.t().contiguous().t()
        p = Problem(
            (e, *plain.chain[1:]), plain.tags.t().contiguous().t(), {"mask": valid}, valid, plain.dvalue
        )
        found.append(results_of(p, "cpu"))
    same_bits(found[1], found[0], layout)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("shape", [(40, 37, 20), (90, 5, 33), (300, 1, 9)], ids=str)
def test_threads_change_no_bit(shape, dtype):
    p = problem_of(Case(*shape, "lengths", dtype))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        try:
            found.append(results_of(p, "cpu") | {"best": ops.crf_decode(*p.chain, **p.steps)[1]})
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        same_bits(other, found[0], shape)


# ---- the best sequences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", STEPS)
def test_best_sequence_is_the_formulas_bit_for_bit(backend, steps):
    shapes = [(6, 4, 5)] if backend == "triton" else [(129, 9, 20), (2, 3, 1), (63, 5, 33), (1, 2, 4)]
    for shape in shapes:
        p = problem_of(Case(*shape, steps))
        got = ops.crf_decode(*p.chain, **p.steps, backend=backend)
        want = reference.crf_best(*p.chain, p.valid)
        assert torch.equal(got[0], want[0][0]) and torch.equal(got[1], want[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_lower_tag(backend):
    emissions = torch.zeros(5, 2, 4)
    emissions[2, 0, 2:] = 1
    zeros = torch.zeros(4)
    best, scores = ops.crf_decode(emissions, zeros, zeros, torch.zeros(4, 4), backend=backend)
    assert best.tolist() == [[0, 0, 2, 0, 0], [0] * 5] and scores.tolist() == [1, 0]


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_several_sequences_are_distinct_and_sorted(backend, n):
    p = problem_of(Case(7, 3, 4, "lengths"))
    tags, scores = ops.crf_decode(*p.chain, **p.steps, n=n, backend=backend)
    assert tags.shape == (n, 3, 7) and scores.shape == (n, 3)
    one, top = ops.crf_decode(*p.chain, **p.steps, backend=backend)
    assert torch.equal(tags[0], one) and torch.equal(scores[0], top)
    assert (scores[:-1] >= scores[1:]).all()
    exact = tuple(t.double() for t in p.chain)
    for b, count in enumerate(p.valid.sum(0).tolist()):
        rows = [tuple(row[:count]) for row in tags[:, b].tolist()]
        possible = min(n, 4**count)
        assert len(set(rows[:possible])) == possible
        for row, score in zip(rows[:possible], scores[:, b].tolist(), strict=False):
            assert score == pytest.approx(score_by_hand(exact, b, row), rel=1e-5)
        assert (scores[possible:, b] == -torch.inf).all() and (tags[possible:, b] == -1).all()


@needs_cpu
@pytest.mark.parametrize("steps", STEPS)
def test_several_sequences_of_the_kernel_are_the_formulas(steps):
    p = problem_of(Case(17, 6, 9, steps))
    for n in (2, 5):
        for got, want in zip(
            ops.crf_decode(*p.chain, **p.steps, n=n, backend="cpu"),
            ops.crf_decode(*p.chain, **p.steps, n=n, backend="eager"),
            strict=True,
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_does_not_leave_its_sequence(backend):
    p = problem_of(Case(6, 3, 4))
    clean = results_of(p, backend)
    p.chain[0][2, 1, 3] = torch.nan
    found = results_of(p, backend)
    assert found["log Z"].isnan().tolist() == [False, True, False]
    assert found["log-likelihood"].isnan().tolist() == [False, True, False]
    for name in ("marginals", "d log Z d emissions"):
        assert torch.equal(found[name][:, ::2], clean[name][:, ::2]), name
        assert found[name][:3, 1].isnan().all(), name
    best, _ = ops.crf_decode(*p.chain, backend=backend)
    assert ((best >= 0) & (best < 4)).all()
    assert torch.equal(best[::2], ops.crf_decode(*clean_chain(p), backend=backend)[0][::2])


def clean_chain(p: Problem) -> tuple[Tensor, ...]:
    return (p.chain[0].nan_to_num(0), *p.chain[1:])


# ---- constraints and tags known in part --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_allowed_tags_against_every_sequence(backend):
    T, B, K = 4, 3, 3
    p = problem_of(Case(T, B, K, "all", F64))
    generator = torch.Generator().manual_seed(5)
    allowed = torch.rand(T, B, K, generator=generator) < 0.6
    allowed[..., 0] |= ~allowed.any(-1)
    p.chain[0][~allowed] = torch.nan  # never read
    chain = [t.clone().requires_grad_() for t in p.chain]
    options = dict(allowed=allowed, backend=backend)
    z = ops.crf_log_partition(*chain, **options)
    (gradient,) = torch.autograd.grad(z.sum(), chain[0])
    marginals = ops.crf_marginals(*p.chain, **options)
    best, _ = ops.crf_decode(*p.chain, **options)
    assert (gradient[~allowed] == 0).all() and (marginals[~allowed] == 0).all()
    assert torch.allclose(gradient, marginals, rtol=0, atol=1e-14)
    for b in range(B):
        scores = {
            tags: score
            for tags, score in enumerated((p.chain[0].nan_to_num(0), *p.chain[1:]), b, T).items()
            if all(allowed[t, b, tag] for t, tag in enumerate(tags))
        }
        assert z[b].item() == pytest.approx(math.log(math.fsum(map(math.exp, scores.values()))), rel=1e-12)
        assert tuple(best[b].tolist()) == max(scores, key=scores.get)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_sequences_that_are_impossible(backend, dtype):
    """log Z is -inf and has no gradient; the tags' log-likelihood is -inf; nothing is NaN."""
    p = problem_of(Case(5, 3, 4, "all", dtype))
    p.chain[0][2, 1] = -torch.inf  # of sequence 1 nothing is possible
    p.chain[0][3, 2, int(p.tags[3, 2])] = -torch.inf  # of sequence 2 all but its tags
    found = results_of(p, backend)
    assert (found["log Z"] == -torch.inf).tolist() == [False, True, False]
    assert (found["log-likelihood"] == -torch.inf).tolist() == [False, True, True]
    for name, y in found.items():
        if name.startswith("d ") or name == "marginals":
            assert y.isfinite().all(), name
    assert (found["d log Z d emissions"][:, 1] == 0).all() and (found["marginals"][:, 1] == 0).all()
    assert torch.allclose(found["marginals"][:, [0, 2]].sum(-1), torch.ones(5, 2, dtype=dtype))
    assert (found["d log-likelihood d emissions"][:, 1].count_nonzero(-1) == 1).all(), "the tags' own"
    best, scores = ops.crf_decode(*p.chain, backend=backend)
    assert scores[1] == -torch.inf and ((best >= 0) & (best < 4)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transitions_that_nothing_may_take(backend):
    """A tag that nothing leads to, and one that leads nowhere."""
    case = Case(6, 3, 4, "lengths", F64)
    p = problem_of(case)
    p.chain[3][:, 1] = -torch.inf
    p.chain[3][2, :] = -torch.inf
    found, want = results_of(p, backend), results_of(p, "eager")
    assert torch.equal(found.pop("log-likelihood"), want.pop("log-likelihood")), "-inf"
    agree(found, want, 1e-13, case)
    assert (found["marginals"][1:, :, 1] == 0).all()
    assert (found["d log Z d transitions"][:, 1] == 0).all()


def allowed_of(tags: list[str], constraints: Constraints) -> tuple[set[str], set[str], set[tuple[str, str]]]:
    start, end, transitions = constraints
    return (
        {tags[i] for i in start.nonzero().flatten()},
        {tags[i] for i in end.nonzero().flatten()},
        {(tags[i], tags[j]) for i, j in transitions.nonzero().tolist()},
    )


def test_bio_constraints():
    tags = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    start, end, pairs = allowed_of(tags, bio_constraints(tags))
    assert start == {"O", "B-X", "B-Y"} and end == set(tags)
    forbidden = {(a, f"I-{k}") for k in "XY" for a in tags if a not in (f"B-{k}", f"I-{k}")}
    assert pairs == set(itertools.product(tags, tags)) - forbidden


@pytest.mark.parametrize(("scheme", "last", "whole"), [("BIOUL", "L", "U"), ("BIOES", "E", "S")])
def test_constraints_with_last_and_whole(scheme, last, whole):
    tags = ["O", *(f"{prefix}-{kind}" for kind in "XY" for prefix in ("B", "I", last, whole))]
    start, end, pairs = allowed_of(tags, bio_constraints(tags, scheme))
    opening = {"O", *(f"{prefix}-{kind}" for kind in "XY" for prefix in ("B", whole))}
    closing = {"O", *(f"{prefix}-{kind}" for kind in "XY" for prefix in (last, whole))}
    inner = {(f"{a}-{k}", f"{b}-{k}") for k in "XY" for a in ("B", "I") for b in ("I", last)}
    assert start == opening and end == closing
    assert pairs == set(itertools.product(closing, opening)) | inner


@pytest.mark.parametrize(
    ("tags", "scheme", "message"),
    [
        (["O", "X-PER"], "BIO", r"tags: expected O, B-…, I-… in BIO, got 'X-PER'"),
        (["O", "U-PER"], "BIO", "got 'U-PER'"),
        (["B"], "BIO", "got 'B'"),
        (["-PER"], "BIO", "got '-PER'"),
        (["O"], "IOB", "scheme: expected one of BIO, BIOUL, BIOES, got 'IOB'"),
    ],
)
def test_constraints_refuse(tags, scheme, message):
    with pytest.raises(ValueError, match=message):
        bio_constraints(tags, scheme)


def test_module_obeys_its_constraints(backend):
    names = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    crf = CRF(5, constraints=bio_constraints(names), dtype=F64)
    emissions = torch.randn(30, 8, 5, dtype=F64) * 5
    for tags in crf.decode(emissions):
        for before, after in itertools.pairwise(["O", *(names[tag] for tag in tags)]):
            assert not after.startswith("I-") or before[1:] == after[1:], tags
    bad = torch.zeros(3, 1, dtype=torch.long)
    bad[1] = 2  # I-X after O
    value = crf(emissions[:3, :1], bad)
    assert value == -torch.inf
    value.backward()
    assert crf.transitions.grad.isfinite().all() and crf.transitions.grad[0, 2] == 0
    assert list(crf.state_dict()) == ["start_transitions", "end_transitions", "transitions"]
    p = crf.marginals(emissions)
    assert (p[0, :, [2, 4]] == 0).all() and torch.allclose(p.sum(-1), torch.ones(30, 8, dtype=F64))
    assert copy.deepcopy(crf).decode(emissions) == crf.decode(emissions)


def test_tags_known_in_part(backend):
    """log Z of the allowed less log Z is the logarithm of the sum of all their probabilities."""
    crf = CRF(3).double()
    emissions = torch.randn(3, 1, 3, dtype=F64)
    known = torch.ones(3, 1, 3, dtype=torch.bool)
    known[1] = torch.tensor([False, True, False])
    value = crf.log_partition(emissions, allowed=known) - crf.log_partition(emissions)
    every = [
        crf(emissions, torch.tensor([[a], [1], [c]]), reduction="none").exp()
        for a, c in itertools.product(range(3), range(3))
    ]
    assert torch.allclose(value.exp(), sum(every), rtol=1e-12)
    assert torch.allclose(value.exp(), crf.marginals(emissions)[1, :, 1], rtol=1e-12)


# ---- autograd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", ["all", "mask", "holes"])
def test_gradcheck(backend, steps):
    p = problem_of(Case(4, 2, 3, steps, F64))
    chain = tuple(t.nan_to_num(0).requires_grad_() for t in p.chain)
    options = dict(mask=p.valid, backend=backend)

    def likelihood(emissions, *rest):
        return ops.crf_log_likelihood(emissions, p.tags, *rest, **options)

    def partition(*chain):
        return ops.crf_log_partition(*chain, **options)

    def marginals(*chain):
        return ops.crf_marginals(*chain, **options)

    for call in (likelihood, partition, marginals):
        if backend == "triton":  # in the interpreter
            assert torch.autograd.gradcheck(call, chain, fast_mode=True)
            continue
        assert torch.autograd.gradcheck(call, chain)
        assert torch.autograd.gradgradcheck(call, chain)


@needs_cpu
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4))[1:], ids=str)
def test_gradients_of_any_subset(wanted):
    p = problem_of(Case(5, 3, 4, "lengths"))
    chain = [t.detach().requires_grad_(want) for t, want in zip(p.chain, wanted, strict=True)]
    value = ops.crf_log_likelihood(chain[0], p.tags, *chain[1:], **p.steps, backend="cpu")
    value.backward(p.dvalue)
    every = results_of(p, "cpu")
    for name, t, want in zip(NAMES, chain, wanted, strict=True):
        assert (t.grad is not None) == want
        if want:
            assert torch.equal(t.grad, every[f"d log-likelihood d {name}"])


@needs_cpu
def test_marginals_gradient_accumulates_without_a_graph():
    p = problem_of(Case(4, 2, 3))
    emissions = p.chain[0].clone().requires_grad_()
    ops.crf_marginals(emissions, *p.chain[1:], backend="cpu")[1, 0, 2].backward()
    assert emissions.grad is not None and not emissions.grad.requires_grad


@needs_cpu
def test_one_tensor_for_start_and_end():
    p = problem_of(Case(4, 2, 3, "all", F64))
    both = p.chain[1].clone().requires_grad_()
    value = ops.crf_log_partition(p.chain[0], both, both, p.chain[3], backend="cpu").sum()
    (gradient,) = torch.autograd.grad(value, both)
    twice = [p.chain[1].clone().requires_grad_() for _ in range(2)]
    value = ops.crf_log_partition(p.chain[0], *twice, p.chain[3], backend="cpu").sum()
    assert torch.allclose(gradient, sum(torch.autograd.grad(value, twice)))


def test_functional_transforms_take_the_formula():
    p = problem_of(Case(4, 2, 3, "all", F64))

    def value(emissions):
        return ops.crf_log_partition(emissions, *p.chain[1:]).sum()

    gradient = torch.func.grad(value)(p.chain[0])
    assert torch.allclose(gradient, ops.crf_marginals(*p.chain))
    many = torch.randn(3, *p.chain[0].shape, dtype=F64)
    mapped = torch.func.vmap(lambda e: ops.crf_log_partition(e, *p.chain[1:]))(many)
    assert torch.allclose(mapped, torch.stack([ops.crf_log_partition(e, *p.chain[1:]) for e in many]))
    _, tangent = torch.func.jvp(value, (p.chain[0],), (torch.ones_like(p.chain[0]),))
    assert torch.allclose(tangent, torch.tensor(8.0, dtype=F64)), "all marginals of 4 steps of 2 sequences"


@needs_cpu
@pytest.mark.parametrize("steps", ["all", "lengths", "mask"])
def test_compiles_to_one_graph(steps):
    torch.compiler.reset()
    p = problem_of(Case(6, 3, 4, steps))
    crf = CRF(4)

    def train(emissions, tags):
        return crf(emissions, tags, **p.steps), crf.log_partition(emissions, **p.steps)

    def infer(emissions):
        scores = (crf.start_transitions, crf.end_transitions, crf.transitions)
        return crf.marginals(emissions, **p.steps), *ops.crf_decode(emissions, *scores, **p.steps)

    found = []
    for run in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        emissions = p.chain[0].clone().requires_grad_()
        crf.zero_grad()
        value, z = run(train)(emissions, p.tags)
        (value + z.sum()).backward()
        with torch.no_grad():
            rest = run(infer)(p.chain[0])
        found.append([value, z, emissions.grad, *(q.grad for q in crf.parameters()), *rest])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@needs_cpu
@pytest.mark.parametrize("kind", ["forward", "backward", "decode"])
def test_operators_tell_what_they_return(kind):
    """opcheck: schemas and fake kernels."""
    for steps in ("all", "lengths", "mask"):
        p = problem_of(Case(5, 3, 18, steps))
        time_first = tuple(t.nan_to_num(0) for t in p.chain)
        batch_first = (time_first[0].transpose(0, 1).contiguous().transpose(0, 1), *time_first[1:])
        given_steps = (p.steps.get("mask"), p.steps.get("lengths"))
        tests = ("test_schema", "test_faketensor")
        for chain in (time_first, batch_first):
            if kind == "decode":
                arguments = (*chain, *given_steps, 2)
            else:
                arguments = (*chain, p.tags, *given_steps, True)
            if kind == "backward":
                _, alphas = torch.ops.seqkern.crf_forward(*arguments)
                arguments = (p.dvalue, *arguments[:-1], alphas, True)
            operator = getattr(torch.ops.seqkern, f"crf_{kind}").default
            torch.library.opcheck(operator, arguments, test_utils=tests)


# ---- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_computed_in_float32(backend, half):
    p = problem_of(Case(5, 3, 4))
    rounded = [t.to(half).requires_grad_() for t in p.chain]
    wide = [t.detach().float().requires_grad_() for t in rounded]
    value = ops.crf_log_likelihood(rounded[0], p.tags, *rounded[1:])
    want = ops.crf_log_likelihood(wide[0], p.tags, *wide[1:])
    assert value.dtype is torch.float32 and torch.equal(value, want)
    for got, exact in zip(
        torch.autograd.grad(value.sum(), rounded), torch.autograd.grad(want.sum(), wide), strict=True
    ):
        assert got.dtype is half and torch.equal(got, exact.to(half))


def test_autocast_computes_in_float32(backend):
    crf = CRF(4)
    emissions = torch.randn(5, 3, 4)
    tags = torch.zeros(5, 3, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        value = crf(emissions.bfloat16(), tags)
        assert value.dtype is torch.float32
        assert torch.equal(crf(emissions, tags), crf(emissions, tags))
    assert torch.equal(value, crf(emissions.bfloat16().float(), tags))


def test_the_widest_dtype_counts(backend):
    crf = CRF(4)
    emissions = torch.randn(5, 3, 4, dtype=F64)
    assert crf.log_partition(emissions).dtype is F64
    assert crf.log_partition(emissions.int()).dtype is torch.float32
    assert crf.double().log_partition(emissions.float()).dtype is F64


# ---- the module --------------------------------------------------------------------------------------------


def their_pair(K: int, batch_first: bool = False) -> tuple[CRF, TheirCRF]:
    ours, theirs = CRF(K, batch_first), TheirCRF(K)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_module_against_pytorch_crfs_method(backend, steps, batch_first):
    p = problem_of(Case(17, 6, 5, steps))
    ours, theirs = their_pair(5, batch_first)
    turn = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    emissions = p.chain[0].nan_to_num(0)
    tags = p.tags.clamp(min=0)
    mine, other = emissions.clone().requires_grad_(), emissions.clone().requires_grad_()
    value = ours(turn(mine), turn(tags), turn(p.valid), reduction="none")
    want = theirs(other, tags, p.valid)
    assert torch.allclose(value, want, rtol=1e-5, atol=1e-4)
    value.sum().backward()
    want.sum().backward()
    assert torch.allclose(mine.grad, other.grad, atol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4), name
    assert ours.decode(turn(emissions), turn(p.valid)) == theirs.decode(emissions, p.valid)


@pytest.mark.parametrize("batch_first", [False, True])
def test_module_against_torchcrf(batch_first):
    torchcrf = pytest.importorskip("torchcrf", reason="pytorch-crf is not installed")
    torch.manual_seed(3)
    theirs = torchcrf.CRF(5, batch_first)
    torch.manual_seed(3)
    ours = CRF(5, batch_first)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), "the same initial values"
    assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    for steps in STEPS:
        p = problem_of(Case(17, 6, 5, steps))
        turn = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
        arguments = turn(p.chain[0].nan_to_num(0)), turn(p.tags.clamp(min=0)), turn(p.valid)
        for reduction in ("none", "sum", "mean", "token_mean"):
            got, want = (m(*arguments, reduction=reduction) for m in (ours, theirs))
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)
        assert ours.decode(arguments[0], arguments[2]) == theirs.decode(arguments[0], arguments[2])


def test_initial_values_are_pytorch_crfs():
    """Uniform in ±0.1, drawn for start, end, transitions in this order."""
    torch.manual_seed(5)
    want = [torch.empty(shape).uniform_(-0.1, 0.1) for shape in ((6,), (6,), (6, 6))]
    torch.manual_seed(5)
    crf = CRF(6)
    assert [name for name, _ in crf.named_parameters()] == [
        "start_transitions",
        "end_transitions",
        "transitions",
    ]
    for got, expected in zip(crf.parameters(), want, strict=True):
        assert torch.equal(got, expected)


def test_module_is_a_good_citizen():
    crf = seqkern.CRF(5, batch_first=True)
    assert seqkern.nn.CRF is seqkern.CRF is CRF
    assert repr(crf) == "CRF(num_tags=5)" and crf.num_tags == 5 and crf.batch_first
    again = pickle.loads(pickle.dumps(crf))
    assert all(torch.equal(a, b) for a, b in zip(crf.parameters(), again.parameters(), strict=True))
    assert CRF(3, dtype=F64).transitions.dtype is F64
    assert CRF(3, device="meta").transitions.is_meta
    emissions, tags = torch.randn(2, 4, 5), torch.zeros(2, 4, dtype=torch.long)
    halved = {name: p.detach() / 2 for name, p in crf.named_parameters()}
    value = torch.func.functional_call(crf, halved, (emissions, tags))
    other = CRF(5, True)
    other.load_state_dict(halved)
    assert torch.equal(value, other(emissions, tags))


@pytest.mark.parametrize("steps", ["all", "lengths", "mask", "bytes"])
def test_reductions(backend, steps):
    p = problem_of(Case(9, 4, 3, steps.replace("bytes", "mask")))
    if steps == "bytes":
        p.steps["mask"] = p.steps["mask"].to(torch.uint8) * 3
    crf = CRF(3)
    each = crf(p.chain[0], p.tags, reduction="none", **p.steps)
    assert each.shape == (4,)
    assert torch.equal(crf(p.chain[0], p.tags, **p.steps), each.sum())
    assert torch.equal(crf(p.chain[0], p.tags, reduction="mean", **p.steps), each.mean())
    token_mean = crf(p.chain[0], p.tags, reduction="token_mean", **p.steps)
    assert torch.allclose(token_mean, each.sum() / p.valid.sum())


@pytest.mark.parametrize("batch_first", [False, True])
def test_decode_returns(backend, batch_first):
    p = problem_of(Case(6, 3, 4, "lengths"))
    lengths = p.steps["lengths"]
    crf = CRF(4, batch_first)
    emissions = p.chain[0].transpose(0, 1) if batch_first else p.chain[0]
    found, scores = crf.decode(emissions, lengths=lengths, return_scores=True)
    assert [len(tags) for tags in found] == lengths.tolist() and scores.shape == (3,)
    assert all(type(tag) is int for tags in found for tag in tags)
    mask = p.valid.t() if batch_first else p.valid
    assert crf.decode(emissions, mask) == crf.decode(emissions, mask.byte()) == found
    assert crf.decode(emissions.nan_to_num(0))[0][: int(lengths[0])]
    several, tops = crf.decode(emissions, mask, nbest=3, pad_tag=9, return_scores=True)
    assert several.shape == (3, 3, 6) and several.dtype is torch.int64 and tops.shape == (3, 3)
    assert [row[:n] for row, n in zip(several[0].tolist(), lengths.tolist(), strict=True)] == found
    assert (several[:, ~p.valid.t()] == 9).all() and torch.equal(tops[0], scores)
    assert (crf.decode(emissions, mask, nbest=3)[:, ~p.valid.t()] == -1).all()
    marginals = crf.marginals(emissions, lengths=lengths)
    assert marginals.shape == emissions.shape
    total = marginals.sum(-1).t() if batch_first else marginals.sum(-1)
    assert torch.allclose(total, p.valid.float())


def test_no_sequences(backend):
    crf = CRF(3)
    nothing = torch.zeros(4, 0, 3, requires_grad=True)
    tags = torch.zeros(4, 0, dtype=torch.long)
    assert crf(nothing, tags) == 0 and crf(nothing, tags, reduction="none").shape == (0,)
    crf(nothing, tags).backward()
    assert nothing.grad.shape == (4, 0, 3)
    assert crf.transitions.grad is None or (crf.transitions.grad == 0).all()
    assert crf.decode(nothing) == [] and crf.marginals(nothing).shape == (4, 0, 3)


# ---- errors ------------------------------------------------------------------------------------------------

E, TAGS = torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.long)
HOLE = torch.tensor([[1, 0], [1, 1], [1, 1], [1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: CRF(0), ValueError, "invalid number of tags: expected at least 1, got 0"),
        (lambda c: c(E[0], TAGS), ValueError, r"emissions: expected 3 dimensions, got \(2, 3\)"),
        (lambda c: c(E[..., :2], TAGS), ValueError, r"emissions: expected K = num_tags = 3, got \(4, 2, 2\)"),
        (lambda c: c(E[:0], TAGS[:0]), ValueError, "emissions: expected at least one step, got T = 0"),
        (
            lambda c: c(E, TAGS[:3]),
            ValueError,
            r"tags: expected \[T, B\] = \(4, 2\) as emissions, got \(3, 2\)",
        ),
        (lambda c: c(E, TAGS.float()), ValueError, "tags: expected integers, got torch.float32"),
        (lambda c: c(E, TAGS + 3), IndexError, r"tags: .* 0\.\.K-1 = 0\.\.2, got 3 at step . of sequence ."),
        (lambda c: c(E, TAGS - 1), IndexError, r"tags: expected values in 0\.\.K-1 = 0\.\.2, got -1"),
        (
            lambda c: c(E, TAGS, reduction="max"),
            ValueError,
            "invalid reduction: .*none, sum, mean.*got 'max'",
        ),
        (lambda c: c(E, TAGS, HOLE), ValueError, "timestep must all be on, got off for sequence 1"),
        (lambda c: c.decode(E, HOLE), ValueError, "mask of the first timestep must all be on"),
        (lambda c: c.marginals(E, HOLE), ValueError, "mask of the first timestep must all be on"),
        (lambda c: c.decode(E, HOLE[:3]), ValueError, r"mask: expected \[T, B\] = \(4, 2\)"),
        (
            lambda c: c.decode(E, HOLE.float()),
            ValueError,
            "mask: expected bool or integers, got torch.float32",
        ),
        (
            lambda c: c.decode(E, lengths=torch.tensor([0, 4])),
            ValueError,
            r"lengths: .*1\.\.T.*got lengths\[0\] = 0",
        ),
        (lambda c: c.decode(E, lengths=torch.tensor([1, 5])), ValueError, r"lengths: .*got lengths\[1\] = 5"),
        (lambda c: c.decode(E, lengths=torch.tensor([1])), ValueError, r"lengths: expected \[B\] = \(2,\)"),
        (
            lambda c: c.decode(E, HOLE, lengths=torch.tensor([1, 2])),
            ValueError,
            "lengths: expected None with mask",
        ),
        (lambda c: c.decode(E, nbest=0), ValueError, "nbest: expected at least 1, got 0"),
        (lambda c: c.decode(E, allowed=E), ValueError, "allowed: expected bool, got torch.float32"),
        (lambda c: c.decode(E, allowed=E[0] > 0), ValueError, r"allowed: expected \[T, B, K\] = \(4, 2, 3\)"),
        (
            lambda c: c(E.to("meta"), TAGS),
            RuntimeError,
            "start_transitions: expected the device of emissions, meta",
        ),
        (
            lambda c: c(E, TAGS.to("meta")),
            RuntimeError,
            "tags: expected the device of emissions, cpu, got meta",
        ),
        (
            lambda c: CRF(3, constraints=bio_constraints(["O"])),
            ValueError,
            r"constraints.start: expected \(3,\) bool",
        ),
        (
            lambda c: CRF(3, constraints=[E]),
            ValueError,
            "constraints: expected start, end, transitions, got 1",
        ),
        (
            lambda c: ops.crf_log_partition(E, torch.zeros(3), torch.zeros(2), torch.zeros(3, 3)),
            ValueError,
            r"end_transitions: expected \(3,\) for K = 3 tags, got \(2,\)",
        ),
    ],
)
def test_errors(backend, call, error, message):
    with pytest.raises(error, match=message):
        call(CRF(3))


def test_padding_may_hold_any_tag(backend):
    """pytorch-crf reads it; here -100 and the like are fine where no step counts."""
    crf, lengths = CRF(3), torch.tensor([2, 4])
    tags = TAGS.clone()
    tags[2:, 0] = -100
    assert torch.equal(crf(E, tags, lengths=lengths), crf(E, TAGS, lengths=lengths))


@needs_cpu
def test_named_backends_run_or_say_why():
    scores = (torch.zeros(3), torch.zeros(3), torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="backend 'cuda' was asked for: cuda has no kernel for crf"):
        ops.crf_log_partition(E, *scores, backend="cuda")
    with pytest.raises(RuntimeError, match="triton has no kernel for crf_nbest"):
        ops.crf_decode(E, *scores, n=2, backend="triton")
    wide = torch.zeros(1, 1, 129), torch.zeros(129), torch.zeros(129), torch.zeros(129, 129)
    if TRITON:
        with pytest.raises(RuntimeError, match="triton needs num_tags <= 128, got 129"):
            ops.crf_log_partition(*wide, backend="triton")


@pytest.mark.parametrize(
    ("op", "device", "dtype", "keywords", "expected"),
    [
        ("crf", "cpu", torch.float32, {}, "cpu"),
        ("crf", "cpu", F64, {}, "cpu"),
        ("crf", "cpu", torch.bfloat16, {}, "eager"),
        ("crf", "cpu", torch.float32, {"missing": "none"}, "eager"),
        ("crf", "cpu", torch.float32, {"transformed": True}, "eager"),
        ("crf", "cpu", torch.float32, {"interpreted": True}, "cpu"),
        ("crf", "cuda", torch.float32, {}, "triton"),
        ("crf", "cuda", F64, {"num_tags": 128}, "triton"),
        ("crf", "cuda", torch.float32, {"num_tags": 129}, "eager"),
        ("crf", "cuda", torch.float32, {"missing": "no Triton"}, "eager"),
        ("crf", "meta", torch.float32, {}, "eager"),
        ("crf_nbest", "cpu", torch.float32, {}, "cpu"),
        ("crf_nbest", "cuda", torch.float32, {}, "eager"),
    ],
)
def test_choice_of_backend(op, device, dtype, keywords, expected):
    assert _backend.choose(op, device, dtype, **keywords) == expected


@needs_cpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"emissions": E.half()}, RuntimeError, "emissions: expected float32 or float64"),
        ({"emissions": E[0]}, RuntimeError, r"emissions: expected \[T, B, K\] with T > 0 and K > 0"),
        ({"start": torch.zeros(2)}, RuntimeError, r"start: expected shape \[3\], got \[2\]"),
        ({"end": torch.zeros(3, dtype=F64)}, RuntimeError, "end: expected Float, got Double"),
        ({"transitions": torch.zeros(3, 4)}, RuntimeError, r"transitions: expected shape \[3, 3\]"),
        ({"tags": TAGS[:2]}, RuntimeError, r"tags: expected shape \[4, 2\], got \[2, 2\]"),
        ({"tags": TAGS.int()}, RuntimeError, "tags: expected Long, got Int"),
        ({"mask": HOLE.byte()}, RuntimeError, "mask: expected Bool, got Byte"),
        (
            {"mask": HOLE, "lengths": torch.ones(2, dtype=torch.long)},
            RuntimeError,
            "lengths: not with a mask",
        ),
        (
            {"lengths": torch.ones(3, dtype=torch.long)},
            RuntimeError,
            r"lengths: expected shape \[2\], got \[3\]",
        ),
    ],
)
def test_operators_refuse_memory_that_does_not_fit(change, error, message):
    arguments = dict(
        emissions=E, start=torch.zeros(3), end=torch.zeros(3), transitions=torch.zeros(3, 3), tags=TAGS,
        mask=None, lengths=None, save=True,
    )  # fmt: skip
    with pytest.raises(error, match=message):
        torch.ops.seqkern.crf_forward(**(arguments | change))
    _, alphas = torch.ops.seqkern.crf_forward(**arguments)
    del arguments["save"]
    with pytest.raises(RuntimeError, match=r"alphas: expected shape \[2, 4, 16\], got \[2, 3, 16\]"):
        torch.ops.seqkern.crf_backward(
            dvalue=torch.ones(2), **arguments, alphas=alphas[:, :3], need_dparams=True
        )


# ---- Triton, ahead of time ---------------------------------------------------------------------------------

# Bytes that ptxas may spill: only backward at 128 tags, whose two matrices fill half of all registers.
SPILLED = {(64, "crf_backward_kernel"): 64, (128, "crf_backward_kernel"): 1024}


def compile_all(arch: int, tags: list[int]) -> dict[str, dict[str, int]]:
    """Registers, bytes spilled and shared memory of each kernel as its launcher would compile it."""
    from test_triton_compiled import compile_kernel

    from seqkern.triton import crf

    launched, figures = [], {}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **arguments: launched.append((self.kernel, arguments))

    for name in ("crf_forward_kernel", "crf_backward_kernel", "crf_decode_kernel"):
        setattr(crf, name, Recorder(getattr(crf, name)))
    for K in tags:

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        launched.clear()
        T, B = 128, 32
        scores = (empty(K), empty(K), empty(K, K))
        tags_, mask = empty(T, B, dtype=torch.int64), empty(T, B, dtype=torch.bool)
        for steps in ((mask, None), (None, empty(B, dtype=torch.int64))):
            _, alphas = crf.crf_forward(empty(T, B, K), *scores, tags_, *steps, True)
            crf.crf_backward(empty(B), empty(T, B, K), *scores, tags_, *steps, alphas, True)
            crf.crf_decode(empty(T, B, K), *scores, *steps, 1)
            for kernel, arguments in launched:
                figures[f"{K} {kernel.__name__} {steps[0] is None}"] = compile_kernel(kernel, arguments, arch)
            launched.clear()
    return figures


@pytest.mark.skipif(_backend.WHY_NO_TRITON is not None, reason=str(_backend.WHY_NO_TRITON))
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90], ids="sm_{}".format)
def test_triton_kernels_compile(arch):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as cache:
        environment |= dict(TRITON_CACHE_DIR=cache, TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")
        environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
        done = subprocess.run(
            [sys.executable, __file__, str(arch)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert len(figures) == 18
    for name, figure in figures.items():
        K, kernel, _ = name.split()
        assert figure["spilled"] <= SPILLED.get((int(K), kernel), 0), f"{name}: {figure}"
        assert figure["shared"] <= 8192, f"{name}: {figure}"


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    print(json.dumps(compile_all(int(sys.argv[1]), [20, 64, 128])))
