"""MultiHeadAttention and scaled_dot_product_attention against their peers: the grid is in attention.py."""

from __future__ import annotations

import pytest
import torch

from bench import attention

CELLS = [
    pytest.param(
        dtype,
        case,
        mode,
        id=f"{attention.FAMILY}-{dtype}-{case.name}-{mode}",
        marks=[] if case.short else [pytest.mark.long],
    )
    for dtype, case in attention.grid("cuda" if torch.cuda.is_available() else "cpu")
    for mode in ("forward", "training")
]


@pytest.mark.parametrize(("dtype_name", "attention_case", "kind"), CELLS)
def test_attention(bench_session, benchmark, dtype_name, attention_case, kind) -> None:
    session, case, family = bench_session, attention_case, attention.FAMILY
    session.skip_if_late()
    try:
        problem, gates = session.problem(attention.problem, family, getattr(torch, dtype_name), case)
    except Exception:
        parts = ("forward",) if kind == "forward" else ("training", "backward")
        names = (case.name, f"{case.name}-lengths")
        session.drop(family, [f"{family}-{dtype_name}-{name}-{part}" for name in names for part in parts])
        raise
    interleaved = session.time(benchmark, problem.steps(kind), "seqkern")
    if not session.measuring:
        return
    peaks = {}
    if session.device == "cuda":
        peaks = {name: attention.peak_memory(step) for name, step in interleaved.steps.items()}
    for entry in attention.entries(interleaved, problem, gates):
        session.record("attention", entry | ({"peak_bytes": peaks} if peaks else {}))
