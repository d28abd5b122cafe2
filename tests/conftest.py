"""What every test shares: the two backends, the data directory, seeds, threads, hypothesis' profiles.

Options:  --data=PATH   real data for the tests that want it (default: SEQKERN_DATA); without it they skip
Markers:  slow          full crosses and long fuzzing: `-m "not slow"` leaves them out
          gpu           needs a CUDA device, else skips
"""

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# OpenMP's waiting threads sleep rather than spin: the many small layers here run several times faster where
# another process wants a core. OpenMP reads it when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Without a GPU Triton's kernels run in its interpreter. Triton reads this when it is first imported, which
# torch.compile does.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Where compare.poisoned asks for deterministic algorithms, cuBLAS wants this; it reads it when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

sys.path.insert(0, str(Path(__file__).parent))  # `import cases`, also in a spawned worker

import seqkern
from seqkern import _extension

COMMON = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.register_profile("default", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("slow", max_examples=500, **COMMON)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        default=os.environ.get("SEQKERN_DATA"),
        help="directory of real data (default: SEQKERN_DATA); tests that want it skip without it",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: full crosses and long fuzzing")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Each test has its own numbers, the same in every run and in any order."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest) -> Path:
    where = request.config.getoption("--data")
    if not where:
        pytest.skip("needs real data: pytest --data=PATH, or the variable SEQKERN_DATA")
    path = Path(where)
    if not path.is_dir():
        raise pytest.UsageError(f"--data {where}: no such directory")
    return path


def why_no_cpu_backend() -> str | None:
    if not _extension.AVAILABLE:
        return f"the extension is not loaded: {_extension.WHY_NOT}"
    missing = [
        f"{kind}_{way}"
        for kind in ("rnn", "lstm", "gru")
        for way in ("forward", "backward")
        if not has_cpu_kernel(f"seqkern::{kind}_{way}")
    ]
    return f"the extension has no CPU kernel for {', '.join(missing)}" if missing else None


def has_cpu_kernel(name: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    except RuntimeError:  # no such operator
        return False


@pytest.fixture
def cpu_backend() -> Iterator[str]:
    """The C++ kernels, or a skip that says why there are none."""
    if why := why_no_cpu_backend():
        pytest.skip(why)
    with seqkern.use_backend("cpu"):
        yield "cpu"


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend, each forced by name."""
    if request.param == "cpu" and (why := why_no_cpu_backend()):
        pytest.skip(why)
    with seqkern.use_backend(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of OpenMP threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def instruction_sets() -> list[str]:
    return list(_extension._C.instruction_sets()) if _extension.AVAILABLE else ["none built"]


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest, cpu_backend: str) -> Iterator[str]:
    """Forces one instruction set, and puts back the one before."""
    before = _extension._C.instruction_set()
    _extension._C.set_instruction_set(request.param)
    assert _extension._C.instruction_set() == request.param
    yield request.param
    _extension._C.set_instruction_set(before)
