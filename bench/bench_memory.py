"""Peak memory of a training step, seqkern against torch.nn, each in a fresh process: see memory.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import cases, memory

if TYPE_CHECKING:
    from bench.conftest import Session

CHECK_FLOPS = 1e8


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "case"),
    [pytest.param(f, c, id=f"{f}-float32-{c}-memory") for f in cases.FAMILIES for c in cases.MEMORY],
)
def test_memory(bench_session: Session, family: str, case: str) -> None:
    session = bench_session
    if not memory.supported(session.device):
        pytest.skip("this system has no /proc/self/clear_refs to reset the high-water mark with")
    if not session.measuring:
        scaled = cases.BY_NAME[case].scaled(family, CHECK_FLOPS)
        assert memory.training_step_peak(session.library, family, scaled, session.device) >= 0
        return
    ours = "null" if session.config.option.bench_null else "seqkern"
    peaks = {side: memory.measure(family, case, side, session.threads) for side in ("torch", ours)}
    entry = {"id": f"{family}-float32-{case}-memory", "family": family, "dtype": "float32", "case": case}
    session.record("memory", entry | {"torch": peaks["torch"], "seqkern": peaks[ours]})
