"""bench/gpu.sh as far as it runs without a GPU: every step's commands, up to the first need of a device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import sync  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run bench/gpu.sh itself"),
    pytest.mark.skipif(os.name != "posix", reason="a bash script"),
]


def dry_run(out: Path, *steps: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"DRY": "1", "PYTHON": sys.executable}
    environment.pop("BENCH_CASES", None)
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(out), *steps]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(["sanitize"], id="sanitize"),
        pytest.param([], id="all", marks=pytest.mark.slow),
    ],
)
def test_dry_run(tmp_path: Path, steps: list[str]) -> None:
    if not steps and sync.find_nvcc() is None:
        pytest.skip("needs nvcc")
    done = dry_run(tmp_path, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU here: a dry run" in done.stdout
    assert done.stdout.count(": exit 0 after") == (3 if steps else 9), done.stdout
    assert "command not found" not in done.stderr and "unbound variable" not in done.stderr, done.stderr


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "tset")
    assert done.returncode == 2 and "no step tset" in done.stderr


def test_the_synchronisation_benchmark_compiles_and_wants_a_device(tmp_path: Path) -> None:
    """For sm_80 and sm_90a."""
    if sync.find_nvcc() is None:
        pytest.skip("needs nvcc")
    command = [sys.executable, "-m", "bench.sync", str(tmp_path / "sync.json")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == sync.NO_DEVICE, done.stdout + done.stderr
    assert "sync: compiled" in done.stdout and "sync: no CUDA device" in done.stderr
    assert not (tmp_path / "sync.json").exists()


def test_what_the_program_prints_becomes_a_document() -> None:
    lines = (
        '{"name": "device", "model": "NVIDIA H200", "capability": 90, "sms": 132}\n'
        '{"name": "flags", "blocks": 132, "bytes": 4, "threads": 256, "us": 0.8}\n'
    )
    found = sync.document(lines)
    assert found["device"] == {"model": "NVIDIA H200", "capability": 90, "sms": 132}
    assert found["rows"] == [{"name": "flags", "blocks": 132, "bytes": 4, "threads": 256, "us": 0.8}]
