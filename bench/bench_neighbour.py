"""A second process keeps one core busy: how much slower is a case then (busy / alone)? See neighbour.py.

seqkern runs the case as it stands. torch.nn gets at most 64 steps: a barrier a step beside a busy core
costs it milliseconds each, which would take minutes a call in c8; the ratio is a matter of single steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING

import pytest
import torch

from bench import cases, harness, neighbour

if TYPE_CHECKING:
    from bench.conftest import Session

TORCH_STEPS = 64
SECONDS, LEAST = 0.6, 3  # rounds go on this long and this often, in either state …
LIMIT = 4.0  # … unless this has passed


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
        shape = shape.scaled(family, 3e7)
    # Gated by bench_<family>.py, not again here.
    entry: dict[str, object] = {"id": f"{family}-float32-{case}-{mode}", "family": family, "dtype": "float32"}
    entry |= {"case": case, "mode": mode}
    for name in (harness.TORCH, "seqkern"):
        T = min(shape.T, TORCH_STEPS) if name == harness.TORCH else shape.T
        cut = dataclasses.replace(shape, T=T)
        problem = harness.Problem(session.library, family, torch.float32, cut, "cpu")
        step = {name: problem.steps(mode)[name]}
        if session.measuring:
            step[name]()
        alone = rounds(step, name, mode, busy=False, measuring=session.measuring)
        if session.measuring or name == "seqkern":
            busy = rounds(step, name, mode, busy=True, measuring=session.measuring)
            ratio = float(f"{busy.median / alone.median:.4g}")
            entry[name] = {"alone": alone.to_json(), "busy": busy.to_json(), "ratio": ratio, "steps": T}
    if session.measuring:
        session.record("neighbour", entry)


def rounds(step: dict, name: str, mode: str, busy: bool, measuring: bool) -> harness.Spread:
    """Seconds of one subject's calls, alone or beside a busy neighbour."""
    interleaved = harness.Interleaved(step)
    with neighbour.Neighbour() if busy else contextlib.nullcontext(), harness.no_collection():
        start, done = time.perf_counter(), 0
        while done == 0 or (measuring and more(time.perf_counter() - start, done)):
            interleaved.block(name)
            done += 1
    return interleaved.spread(name, mode)


def more(seconds: float, done: int) -> bool:
    return seconds < LIMIT and (seconds < SECONDS or done < LEAST)
