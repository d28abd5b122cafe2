"""The emulated CUDA device itself (tests/cuda_on_cpu): what it must compute, and the faults it must find."""

import re
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import built, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SOURCE = Path(__file__).parent / "cuda_on_cpu" / "selftest.cpp"
CHECKS = re.findall(r"^    CHECK\((\w+)\),$", SOURCE.read_text(), re.M)


def test_checks_are_found():
    assert {"sum_without_barriers", "ring_without_a_push", "broken_flags"} <= set(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_device(check):
    program = built("cuda_on_cpu_selftest") / "cuda_on_cpu_selftest"
    done = subprocess.run([program, check], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"ok {check}\n"), done.stdout + done.stderr
