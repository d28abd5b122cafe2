"""Hugging Face models on seqkern's attention, beside "sdpa" and "eager": cases in huggingface.py."""

from __future__ import annotations

import pytest
import torch

from bench import huggingface

CELLS = [
    pytest.param(case, mode, id=f"{huggingface.FAMILY}-float32-{case.name}-{mode}")
    for case in huggingface.CASES
    for mode in ("forward", "training")
]


@pytest.mark.parametrize(("huggingface_case", "kind"), CELLS)
def test_huggingface(bench_session, benchmark, huggingface_case, kind) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    session, case, family = bench_session, huggingface_case, huggingface.FAMILY
    session.skip_if_late()
    try:
        problem, gates = session.problem(huggingface.Problem, family, torch.float32, case)
    except Exception:
        parts = ("forward",) if kind == "forward" else ("training", "backward")
        session.drop(family, [f"{family}-float32-{case.name}-{part}" for part in parts])
        raise
    interleaved = session.time(benchmark, problem.steps(kind), "seqkern")
    if session.measuring:
        for entry in huggingface.entries(interleaved, problem, gates):
            session.record("attention", entry)
