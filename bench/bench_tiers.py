"""Every tier of csrc/cuda/plan.h, forced, on the same layers: what the cost model in plan.cpp is fitted to.

Each gives µs per step, forward and forward + backward, of a layer whose input is small.
"""

from __future__ import annotations

import pytest
import torch

from bench import cases, harness

ROWS = [
    pytest.param(family, dtype, case, tier, id=f"{family}-{dtype}-{case.name}-{tier}")
    for family, dtype, case in cases.tier_cells()
    for tier in cases.TIERS
]


@pytest.mark.parametrize(("family", "dtype_name", "tier_case", "tier"), ROWS)
def test_tier(
    bench_session, benchmark, family: str, dtype_name: str, tier_case: cases.Case, tier: str
) -> None:
    session, case, dtype = bench_session, tier_case, getattr(torch, dtype_name)
    if session.device != "cuda":
        pytest.skip("needs a CUDA device; torch sees none")
    session.skip_if_late()
    ids = [f"{family}-{dtype_name}-{case.name}-{mode}-{tier}" for mode in ("forward", "training")]
    with harness.forced_tier(tier):
        try:
            harness.Problem(session.library, family, dtype, case.scaled(family, 1e9), session.device).gate()
        except (RuntimeError, ValueError) as error:
            session.drop(family, ids)
            if f"cuda tier '{tier}' was asked for" in str(error):
                pytest.skip(str(error).splitlines()[0])
            raise
        except AssertionError:
            session.drop(family, ids)
            raise
        problem = harness.Problem(session.library, family, dtype, case, session.device)
        for id_, mode in zip(ids, ("forward", "training"), strict=True):
            interleaved = harness.Interleaved({"seqkern": problem.steps(mode)["seqkern"]})
            interleaved.warm_up()
            for _ in range(15 if session.measuring else 1):
                interleaved.block("seqkern")
            spread = interleaved.spread("seqkern", mode).to_json()
            entry = {"id": id_, "family": family, "dtype": dtype_name, "case": case.name, "mode": mode}
            entry |= {"shape": case.describe(), "tier": tier, "seqkern": spread}
            entry["step_us"] = float(f"{1e6 * spread['median'] / case.T:.4g}")
            if session.measuring:
                session.record("tiers", entry)
