"""A second process keeps one core busy: how much slower is a case then (busy / alone)? See neighbour.py."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest
import torch

from bench import cases, harness, neighbour

if TYPE_CHECKING:
    from bench.conftest import Session

ALONE = harness.Budget(seconds=0.5, least=3)
BUSY_SECONDS, BUSY_LEAST, BUSY_LIMIT = (
    1.5,
    3,
    8.0,
)  # rounds go on for 1.5 s, at least 3 of them unless 8 s have passed


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "case", "mode"),
    [
        pytest.param(f, c, m, id=f"{f}-float32-{c}-{m}-neighbour")
        for f in cases.FAMILIES
        for c in cases.NEIGHBOUR
        for m in ("forward", "training")
    ],
)
def test_neighbour(bench_session: Session, family: str, case: str, mode: str) -> None:
    session, shape = bench_session, cases.BY_NAME[case]
    if session.device != "cpu":
        pytest.skip("a question for the CPU")
    if not neighbour.possible(session.threads):
        pytest.skip(f"needs 2 cores or more, and as many threads as cores: has {session.threads} threads")
    if not session.measuring:
        shape = shape.scaled(family, 1e8)
    problem = harness.Problem(
        session.library, family, torch.float32, shape, "cpu"
    )  # gated by bench_<family>.py
    steps = problem.steps(mode)
    spreads = {}
    for state in ("alone", "busy"):
        interleaved = harness.Interleaved(steps)
        with neighbour.Neighbour() if state == "busy" else contextlib.nullcontext(), harness.no_collection():
            if state == "alone":
                rounds = ALONE.rounds(interleaved.warm_up()) if session.measuring else 1
                for _ in range(rounds):
                    for name in steps:
                        interleaved.block(name)
            else:
                start, rounds = time.perf_counter(), 0
                while rounds == 0 or (session.measuring and more(time.perf_counter() - start, rounds)):
                    for name in steps:
                        interleaved.block(name)
                    rounds += 1
        spreads[state] = {name: interleaved.spread(name, mode) for name in steps}
    if not session.measuring:
        return
    entry: dict[str, object] = {"id": f"{family}-float32-{case}-{mode}", "family": family, "dtype": "float32"}
    entry |= {"case": case, "mode": mode}
    for name in steps:
        alone, busy = spreads["alone"][name], spreads["busy"][name]
        ratio = float(f"{busy.median / alone.median:.4g}")
        entry[name] = {"alone": alone.to_json(), "busy": busy.to_json(), "ratio": ratio}
    session.record("neighbour", entry)


def more(seconds: float, rounds: int) -> bool:
    return seconds < BUSY_LIMIT and (seconds < BUSY_SECONDS or rounds < BUSY_LEAST)
