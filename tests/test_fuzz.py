"""A bounded run of fuzz_operators.py, in a process of its own: `make fuzz` has the hour."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import why_no_cpu_backend
from fuzz_operators import IN_PYTHON

PROGRAM = Path(__file__).with_name("fuzz_operators.py")


@pytest.mark.skipif(why_no_cpu_backend() is not None, reason=str(why_no_cpu_backend()))
@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_nothing_crashes(count: int) -> None:
    """Every compiled operator is called, some calls are right, more are refused, and the process lives."""
    environment = os.environ | {
        "PYTHONPATH": str(PROGRAM.parents[1]),
        "GLIBC_TUNABLES": "glibc.malloc.check=3",
        "MALLOC_PERTURB_": "165",
    }
    command = [sys.executable, str(PROGRAM), "--count", str(count), "--seed", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert done.returncode == 0, (
        f"exit {done.returncode} after case {done.stdout[-500:]}\n{done.stderr[-2000:]}"
    )
    operators, outcomes = done.stdout.splitlines()[-2:]
    every = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("seqkern::")}
    assert set(operators.split()[1:]) == every - {f"seqkern::{name}" for name in IN_PYTHON}
    counts = dict(part.split("=") for part in outcomes.split()[1:])
    assert int(counts["returned"]) > count / 10 and int(counts["RuntimeError"]) > count / 10
