"""The recurrent variants against an eager loop, and against LSTM and GRU: the grid is in variants.py."""

from __future__ import annotations

import pytest
import torch

from bench import variants

CELLS = [
    pytest.param(
        dtype,
        case,
        mode,
        id=f"{variants.FAMILY}-{dtype}-{case.name}-{mode}",
        marks=[] if case.short else [pytest.mark.long],
    )
    for dtype, case in variants.cells("cuda" if torch.cuda.is_available() else "cpu")
    for mode in variants.MODES
]


@pytest.mark.parametrize(("dtype_name", "variant_case", "kind"), CELLS)
def test_variant(bench_session, benchmark, dtype_name, variant_case, kind) -> None:
    session, family = bench_session, variants.FAMILY
    session.skip_if_late()
    try:
        problem, gates = session.problem(variants.Problem, family, getattr(torch, dtype_name), variant_case)
    except Exception:
        parts = ("training", "backward") if kind == "training" else (kind,)
        session.drop(family, [f"{family}-{dtype_name}-{variant_case.name}-{part}" for part in parts])
        raise
    interleaved = session.time(benchmark, problem.steps(kind), "seqkern")
    if session.measuring:
        for entry in variants.entries(interleaved, problem, gates):
            session.record("variants", entry)
