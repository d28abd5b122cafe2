"""Additive attention and decoders with it against the eager formula: cases in encoder_decoder.py."""

from __future__ import annotations

import pytest
import torch

from bench import encoder_decoder

CELLS = [
    pytest.param(case, mode, id=f"{encoder_decoder.FAMILY}-float32-{case.name}-{mode}")
    for case in encoder_decoder.CASES
    for mode in ("forward", "training")
]


@pytest.mark.parametrize(("encoder_decoder_case", "kind"), CELLS)
def test_encoder_decoder(bench_session, benchmark, encoder_decoder_case, kind) -> None:
    session, case, family = bench_session, encoder_decoder_case, encoder_decoder.FAMILY
    session.skip_if_late()
    try:
        problem, gates = session.problem(encoder_decoder.Problem, family, torch.float32, case)
    except Exception:
        parts = ("forward",) if kind == "forward" else ("training", "backward")
        session.drop(family, [f"{family}-float32-{case.name}-{part}" for part in parts])
        raise
    interleaved = session.time(benchmark, problem.steps(kind), "seqkern")
    if session.measuring:
        for entry in encoder_decoder.entries(interleaved, problem, gates):
            session.record("attention", entry)
