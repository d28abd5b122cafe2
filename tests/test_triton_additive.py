"""Additive attention's Triton kernels: in the interpreter, or on a CUDA device where there is one."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from attention_cases import PADDING, doubled, errors_nearby_named, evaluate_named
from cases import SHORT, pairwise, unique
from compare import agree, poisoned, same_bits, within
from test_additive_attention import Case, exact, literal, named
from torch import Tensor

from seqkern.ops import additive_attention
from seqkern.triton import INTERPRET

DEVICE = "cpu" if INTERPRET else "cuda"
pytestmark = [] if INTERPRET else [pytest.mark.gpu]


def ours(case: Case):
    padding = {name: t.to(DEVICE) for name, t in case.padding().items()}

    def call(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = {name: t.to(DEVICE) for name, t in leaves.items()}
        outputs = additive_attention(**moved, **padding, backend="triton")
        return named(tuple(y.cpu() for y in outputs))

    return call


SAMPLE = unique(
    Case(**row)
    for row in pairwise(
        dict(
            B=(1, 3), L=(1, 5, 9), S=(1, 17, 33), H=(1, 15, 33, 65), D=(1, 16, 70), keys=PADDING,
            strided=(False, True), reach=(1.0, 0.01, 20.0), dtype=tuple(SHORT),
        )
    )
)  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_parity(case):
    if case.dtype is torch.float64 and not INTERPRET:
        pytest.skip("float64 runs in the interpreter only")
    tensors, same = case.tensors(), dict(seed=3, rounded=case.dtype)
    with poisoned():
        got = evaluate_named(ours(case), tensors, **same)
    peer = evaluate_named(literal(case), tensors, **same)
    oracle = evaluate_named(exact(case), doubled(tensors), **same)
    within(got, peer, oracle, case, lambda: errors_nearby_named(literal(case), tensors))


@pytest.mark.parametrize("keys", ["lengths", "holes", "none"])
def test_padding_is_not_read(keys):
    case = Case(B=3, L=3, S=40, H=9, D=5, keys=keys)
    tensors = case.tensors()
    want = evaluate_named(ours(case), tensors, 0, torch.float32)
    for name in ("key", "value"):
        tensors[name] = torch.where(case.valid()[..., None], tensors[name], torch.nan)
    same_bits(evaluate_named(ours(case), tensors, 0, torch.float32), want, case)


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0)]
)
def test_empty(shape):
    case = Case(*shape)
    got = evaluate_named(ours(case), case.tensors(), 0, torch.float32)
    agree(got, evaluate_named(exact(case), case.tensors(), 0, torch.float32), 1e-5, case)


@pytest.mark.parametrize("wanted", ["query", "key", "v", "value"])
@pytest.mark.parametrize("output", ["context", "weights"])
def test_one_gradient_alone(wanted, output):
    case = Case(keys="lengths")
    found = []
    for call in (ours(case), exact(case)):
        leaves = {name: t.requires_grad_(name == wanted) for name, t in case.tensors().items()}
        y = call(leaves)[output]
        cotangent = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()
        grad = torch.zeros_like(leaves[wanted])
        if y.requires_grad:
            (grad,) = torch.autograd.grad(y, leaves[wanted], cotangent, materialize_grads=True)
        found.append({wanted: grad})
    agree(*found, 1e-5, case)


def test_a_nan_in_a_valid_key_shows():
    case = Case(S=40)
    tensors = case.tensors()
    tensors["key"][1, 20, 0] = torch.nan
    context = ours(case)(tensors)["context"]
    assert context[0].isfinite().all() and context[1].isnan().all()
