"""The CUDA kernels of every recurrent cell and regulariser, on an emulated device: against
the eager formula in float64 by compare.py's rule, as test_variants.py has the CPU's. See tests/cuda_on_cpu.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from cases import pairwise
from compare import Results, agree, poisoned, same_bits
from cuda_on_cpu import Facts, counters, emulated, why_not
from recurrent_cases import CELL_NAMES, PLAIN, Case, check_parity, evaluate_case
from test_variants import regularised
from torch import Tensor

from seqkern.ops import CELLS

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The cells whose sequence one launch can run, and the H, of a head, that a tier can cut.
PERSISTENT = tuple(name for name in CELL_NAMES if not name.startswith("indrnn"))
HIDDEN = {"block": (15, 20), "cluster": (20, 40), "grid": (20, 33)}
NORMALISED = tuple(name for name in CELL_NAMES if CELLS[name].normalises)
each_cell = pytest.mark.parametrize("cell", CELL_NAMES)


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """The rule is for float32 proper."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def kernel_cases(cell: str, tier: str = "step", slow: bool = False) -> list[Case]:
    """Pairs of options and dtypes at small sizes; slow: of sizes, too."""
    options = dict(
        bidirectional=(False, True),
        bias=("both", "ih", "none"),
        hx=(True, False),
        form=("padded", "lengths", "packed"),
        options=((), *(regularised(cell) if slow else regularised(cell)[:1] + regularised(cell)[-1:])),
        training=(True, False),
        dtype=DTYPES,
        T=(1, 6),
        B=(1, 5),
        I=(5,),
        # A row of one or two units has hardly a degree of freedom left once it is normalised.
        H=(7 if CELLS[cell].normalises else 1, 15, 20),
    )
    if slow:
        options |= dict(num_layers=(1, 2), T=(1, 2, 9), B=(1, 3, 9), I=(1, 17), H=(7, 15, 16, 33))
    if tier != "step":
        heads = 4 if cell == "slstm" else 1
        sizes = HIDDEN[tier] if slow else HIDDEN[tier][:1]
        if not slow:
            options |= dict(bias=("both",), hx=(True,), options=((), regularised(cell)[-1]), T=(6,))
        options |= dict(H=[H * heads for H in sizes], dtype=[d for d in DTYPES if d is not torch.float64])
    rows = pairwise(options)
    if cell == "lstm" and tier == "step":
        rows += [
            dict(P=5, H=17, B=8, dtype=dtype, bidirectional=True, form=form, options=options)
            for dtype, form, options in (
                (torch.float32, "lengths", (("proj_clip", 0.2), ("cell_clip", 0.5))),
                (torch.bfloat16, "packed", (("zoneout", (0.0, 0.3)), ("variational_dropout", 0.3))),
            )
        ]
    for row in rows:
        if cell.endswith("relu") and row["dtype"] is not torch.float64 and row.get("num_layers") == 2:
            # Two units steer the second layer's ReLU (Case.steer), unless a mask keeps them from it.
            row["num_layers"] = 2 if row["H"] > 1 and not row["options"] else 1
    found = dict.fromkeys(Case(cell, **row) for row in rows)
    # What nothing regularises inside goes to torch.nn's cells' own operators: test_cuda.py.
    return [case for case in found if cell not in PLAIN or case.options]


@pytest.mark.parametrize("case", [case for cell in CELL_NAMES for case in kernel_cases(cell)], ids=str)
def test_parity(case: Case) -> None:
    """All outputs and all gradients."""
    with emulated("step"):
        check_parity(case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for cell in CELL_NAMES for c in kernel_cases(cell, slow=True)], ids=str)
def test_parity_at_more_sizes(case: Case) -> None:
    with emulated("step"):
        check_parity(case, "cpu")


def persistent_cases(slow: bool = False) -> list:
    return [
        pytest.param(tier, case, id=f"{tier}-{case}")
        for tier in HIDDEN
        for cell in PERSISTENT
        for case in kernel_cases(cell, tier, slow)
    ]


@pytest.mark.parametrize(("tier", "case"), persistent_cases())
def test_parity_in_one_launch(tier: str, case: Case) -> None:
    with emulated(tier):
        check_parity(case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "case"), persistent_cases(slow=True))
def test_parity_in_one_launch_at_more_sizes(tier: str, case: Case) -> None:
    with emulated(tier):
        check_parity(case, "cpu")


def everything(cell: str, **options) -> Case:
    """Odd sizes, both directions, every regulariser."""
    sizes = dict(T=5, B=4, I=3, H=20, bidirectional=True, dtype=torch.float32)
    return Case(cell, **sizes | dict(options=regularised(cell)[-1]) | options)


@each_cell
def test_the_order_of_threads_changes_nothing(cell: str) -> None:
    case = everything(cell, form="lengths")
    runs = []
    for seed in (1, 2):
        with emulated("step", seed=seed), poisoned():
            runs.append(evaluate_case(case, case.tensors(), "cpu"))
    same_bits(runs[1], runs[0], case)


@each_cell
def test_padding_never_leaks(cell: str) -> None:
    """Whatever x holds past the lengths, every output and gradient keeps its bits."""
    case = everything(cell, form="lengths")
    tensors = case.tensors()
    beyond = torch.arange(case.T).unsqueeze(1) >= case.lengths()

    def run(filler: float) -> Results:
        results = evaluate_case(
            case, tensors | {"x": tensors["x"].masked_fill(beyond[..., None], filler)}, "cpu"
        )
        assert (results["y"][beyond] == 0).all() and (results["d x"][beyond] == 0).all()
        return results

    with emulated("step"), poisoned():
        expected = run(0.0)
        assert all(t.isfinite().all() for t in expected.values())
        same_bits(run(torch.nan), expected, case)


@each_cell
def test_strides(cell: str) -> None:
    """Inputs, states and parameters of any strides, not aligned."""
    case = everything(cell)
    tensors = case.tensors()

    def odd(t: Tensor) -> Tensor:
        return torch.empty(2 * t.numel() + 1, dtype=t.dtype)[1:].view(*t.shape, 2)[..., 0].copy_(t)

    with emulated("step"), poisoned():
        expected = evaluate_case(case, tensors, "cpu")
        got = evaluate_case(case, {name: odd(t) for name, t in tensors.items()}, "cpu")
    agree(got, expected, 1e-6, case)  # another layout may be another order of torch's sums


@each_cell
def test_no_rows(cell: str) -> None:
    case = everything(cell, B=0, options=())
    with emulated("step"), poisoned():
        results = evaluate_case(case, case.tensors(), "cpu")
    assert results["y"].shape == (case.T, 0, 2 * case.H)
    assert all((results[f"d {name}"] == 0).all() for name in case.parameter_shapes())


# ---- rows whose sums the blocks of a launch exchange within each step --------------------------------------


@pytest.mark.parametrize(("tier", "H"), [("block", 20), ("cluster", 40), ("grid", 40)])
@pytest.mark.parametrize("cell", NORMALISED)
def test_sums_of_rows_in_any_order(cell: str, tier: str, H: int) -> None:
    """A group that takes several jobs in turns, one of them without steps, gives the same bits whatever the
    order of threads, and whatever x and the gradients of y hold past the lengths."""
    case = everything(cell, T=3, B=36, H=H, form="lengths")
    tensors = case.tensors()
    lengths = torch.tensor([0] * 32 + [3, 0, 1, 2])  # a job has 32 rows at most
    beyond = (torch.arange(case.T).unsqueeze(1) >= lengths).unsqueeze(-1)

    def run(seed: int, filler: float) -> Results:
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        leaves["x"] = tensors["x"].masked_fill(beyond, filler).requires_grad_()
        with (
            pytest.MonkeyPatch.context() as patch,
            emulated(tier, seed=seed, facts=Facts(sms=3, shared_bytes=24 << 10, max_cluster=3)),
            poisoned(),
        ):
            patch.setattr(Case, "lengths", lambda _: lengths)
            y, *finals = case.call(leaves)
            cotangents = case.cotangents((y, *finals), case.dtype)
            cotangents[0].masked_fill_(beyond, filler)
            grads = torch.autograd.grad((y, *finals), list(leaves.values()), cotangents)
        for padded in (y.detach(), grads[0]):  # x comes first
            assert (padded.masked_select(beyond) == 0).all()
        return {str(k): t.detach() for k, t in enumerate((y, *finals, *grads))}

    expected = run(0, 0.0)
    assert all(t.isfinite().all() for t in expected.values())
    same_bits(run(1, torch.nan), expected, f"{case} seed 1, NaN")
    same_bits(run(2, torch.inf), expected, f"{case} seed 2, inf")


def random_cut(cell: str, seed: int) -> tuple[str, Case, Facts]:
    """A case on a device of an odd size, which decides how the kernels cut it."""
    rng = random.Random(f"{cell} {seed}")
    case = Case(
        cell,
        T=rng.choice((1, 2, 5)),
        B=rng.choice((1, 7, 9, 20)),
        I=9,
        H=rng.choice((16, 33, 64, 100, 129)),
        bidirectional=rng.random() < 0.5,
        form=rng.choice(("padded", "lengths", "packed")),
        options=rng.choice(((), *regularised(cell))),
        dtype=rng.choice((torch.float32, torch.bfloat16, torch.float16)),
        seed=seed,
    )
    facts = Facts(
        sms=rng.choice((2, 3, 5, 9, 132)),
        shared_bytes=rng.choice((24, 48, 99, 227)) << 10,
        max_cluster=rng.choice((2, 3, 5, 8, 16)),
    )
    return rng.choice(tuple(HIDDEN)), case, facts


def check_cuts(cell: str, seeds: range) -> None:
    """Those of them that the tier can run."""
    for tier, case, facts in (random_cut(cell, seed) for seed in seeds):
        with emulated(tier, seed=case.seed, facts=facts):
            try:
                check_parity(case, "cpu")
            except ValueError as error:
                assert "was asked for: " in str(error), error  # the planner's: no such cut fits


@pytest.mark.parametrize("cell", NORMALISED)
def test_any_cut(cell: str) -> None:
    check_cuts(cell, range(3))


@pytest.mark.slow
@pytest.mark.parametrize("cell", PERSISTENT)
def test_any_cut_at_length(cell: str) -> None:
    check_cuts(cell, range(3, 100))


# ---- launches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "launches"),
    [
        # Forward and backward a launch a step, two with a second product, then h before each step; of
        # normalised rows one for all of x's.
        ("peephole_lstm", 5 + 5 + 2),
        ("slstm", 5 + 5 + 2 * 4),
        ("mgu", 2 * (5 + 5) + 2),
        ("layer_norm_gru", 1 + 5 + 5 + 1 + 2),
        ("indrnn_tanh", 1 + 1),
    ],
)
def test_both_directions_share_a_launch(cell: str, launches: int) -> None:
    case = everything(cell)
    with emulated("step"):
        evaluate_case(case, case.tensors(), "cpu")
        assert counters().launches == launches
