"""The conditional random field against pytorch-crf: the grid is in crf.py."""

from __future__ import annotations

import pytest
import torch

from bench import crf

CELLS = [
    pytest.param(
        dtype,
        case,
        mode,
        id=f"{crf.FAMILY}-{dtype}-{case.name}-{mode}",
        marks=[] if case.short else [pytest.mark.long],
    )
    for dtype, case in crf.CELLS
    for mode in crf.MODES
]


@pytest.mark.parametrize(("dtype_name", "crf_case", "kind"), CELLS)
def test_crf(bench_session, benchmark, dtype_name, crf_case, kind) -> None:
    session, family = bench_session, crf.FAMILY
    session.skip_if_late()
    try:
        problem, gates = session.problem(crf.Problem, family, getattr(torch, dtype_name), crf_case)
    except Exception:
        parts = ("training", "backward") if kind == "training" else (kind,)
        session.drop(family, [f"{family}-{dtype_name}-{crf_case.name}-{part}" for part in parts])
        raise
    interleaved = session.time(benchmark, problem.steps(kind), "seqkern")
    if session.measuring:
        for entry in crf.entries(interleaved, problem, gates):
            session.record("crf", entry)
