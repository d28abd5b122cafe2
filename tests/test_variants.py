"""Every recurrent cell through ops.recurrent: against its equations, and the kernels against both."""

from collections.abc import Iterator

import pytest
import torch
from cases import pairwise
from compare import agree
from conftest import has_cpu_kernel, why_no_cpu_backend
from recurrent_cases import CELL_NAMES, PLAIN, Case, check_parity, evaluate_case

import seqkern
from seqkern.ops import CELLS, _backend

each_cell = pytest.mark.parametrize("cell", CELL_NAMES)


def why_no_kernel(cell: str = "") -> str | None:
    """Why this cell's plain layer has no CPU kernel, if that is so."""
    if cell in PLAIN or why_no_cpu_backend():
        return why_no_cpu_backend()
    return None if has_cpu_kernel("seqkern::recurrent_forward") else _backend.WHY_NO_RECURRENT


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu" and (why := why_no_kernel()):
        pytest.skip(why)
    with seqkern.use_backend(request.param):
        yield request.param


# ---- the eager formula against the papers' equations -------------------------------------------------------


def regularised(cell: str) -> list[tuple[tuple[str, object], ...]]:
    """Sets of regularisers that mean something for the cell."""
    spec = CELLS[cell]
    zone_c = 0.3 if len(spec.states) > 1 else 0.0
    sets = [
        (("zoneout", (0.4, zone_c)),),
        (("variational_dropout", 0.4), ("weight_dropout", 0.3)),
    ]
    everything = [*sets[0], *sets[1]]
    if spec.candidate:
        sets.append((("recurrent_dropout", 0.4),))
        everything.append(("recurrent_dropout", 0.25))
    if spec.clips:
        sets.append((("cell_clip", 0.3),))
        everything.append(("cell_clip", 0.5))
    return [*sets, tuple(everything)]


def twin_cases(cell: str) -> list[Case]:
    cases = [
        Case(cell),
        Case(cell, bias="ih", hx=False),
        Case(cell, bias="none", bidirectional=True),
        Case(cell, bidirectional=True, num_layers=2, form="lengths"),
        Case(cell, bidirectional=True, form="packed", T=6, B=4),
        Case(cell, H=1, I=1, T=2),
        *(Case(cell, options=options) for options in regularised(cell)),
        Case(cell, options=regularised(cell)[-1], training=False),
        Case(cell, options=regularised(cell)[-1], num_layers=2, bidirectional=True, form="lengths"),
        Case(cell, options=regularised(cell)[-1], bidirectional=True, form="packed"),
    ]
    if cell == "lstm":
        cases += [
            Case(cell, P=4, bidirectional=True, options=(("zoneout", (0.0, 0.3)),)),
            Case(cell, P=4, num_layers=2, options=(("proj_clip", 0.2), ("cell_clip", 0.4))),
            Case(cell, P=4, options=(("zoneout", (0.0, 0.3)),), training=False),
        ]
    if cell in ("gru", "gru_reset_before"):
        cases += [
            Case(cell, options=(("update_gate", "replace"),), bidirectional=True),
            Case(cell, options=(("update_gate", "replace"), ("zoneout", (0.3, 0.0)))),
        ]
    return cases


@pytest.mark.parametrize("case", [case for cell in CELL_NAMES for case in twin_cases(cell)], ids=str)
def test_equations(case: Case) -> None:
    tensors = case.tensors()
    agree(evaluate_case(case, tensors, "eager"), evaluate_case(case, tensors, "twin"), 1e-11, case)


# ---- the kernels against the eager formula -----------------------------------------------------------------


def kernel_cases(cell: str, slow: bool = False) -> list[Case]:
    """Pairs of sizes in float32; pairs of options and dtypes at small sizes."""
    sizes = dict(T=(1, 2, 7, 33), B=(1, 3, 8, 33), I=(1, 16, 17), H=(1, 15, 16, 17, 33, 65))
    options = dict(
        bidirectional=(False, True),
        num_layers=(1, 2),
        bias=("both", "ih", "none"),
        hx=(True, False),
        form=("padded", "lengths", "packed"),
        options=((), *regularised(cell)),
        training=(True, False),
        dtype=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    )
    small = dict(T=(1, 2, 7), B=(1, 3, 8), I=(5,), H=(1, 15, 16, 33))
    if slow:
        small = sizes
    rows = [row | dict(dtype=torch.float32) for row in pairwise(sizes)] + pairwise(options | small)
    if cell == "lstm":
        rows += [dict(P=5, H=17, T=7, B=8, dtype=torch.float32, options=(("proj_clip", 0.2),))]
    for row in rows:
        if cell.endswith("relu") and row["dtype"] is not torch.float64 and row.get("num_layers") == 2:
            # Two units steer the second layer's ReLU (Case.steer), unless a mask keeps them from it.
            row["num_layers"] = 2 if row["H"] > 1 and not row["options"] else 1
    return list(dict.fromkeys(Case(cell, **row) for row in rows))


@pytest.mark.parametrize("case", [case for cell in CELL_NAMES for case in kernel_cases(cell)], ids=str)
def test_parity(case: Case) -> None:
    """All outputs and all gradients of the C++ kernels."""
    if why := why_no_kernel(case.cell if not case.options else ""):
        pytest.skip(why)
    check_parity(case, "cpu")
