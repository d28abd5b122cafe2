"""What goes wrong around a computation: signals, memory, disks. Nothing is lost, and the process goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import why_no_cpu_backend

from seqkern.train import checkpoint

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits and signals")
needs_kernels = pytest.mark.skipif(why_no_cpu_backend() is not None, reason=str(why_no_cpu_backend()))

START = """
import os, resource, signal, sys, time
import torch, seqkern
from pathlib import Path
from seqkern.train import checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job may not have
torch.set_num_threads(2)
torch.manual_seed(0)
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", START + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed; it must have ended well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"exit {process.returncode}\n{out}\n{err}"
    return out


# ---- checkpoints -------------------------------------------------------------------------------------------


@needs_linux
def test_killed_while_it_saves(tmp_path: Path) -> None:
    """kill -9 at any moment leaves a checkpoint that is whole, one of those that were written."""
    path = tmp_path / "last.pt"
    code = """
path, step = Path(sys.argv[1]), 0
while True:
    checkpoint.save(path, {"step": step, "x": torch.full((1 << 18,), float(step))})
    step += 1
    if step == 3:
        print("going", flush=True)
"""
    seen = []
    for delay in (0.0, 0.013, 0.031):
        process = start(code, path)
        assert process.stdout.readline() == "going\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
        state = checkpoint.load(path)
        assert (state["x"] == state["step"]).all()
        seen.append(state["step"])
    assert min(seen) >= 2
    checkpoint.save(path, {"step": 0})  # what the killed ones left behind is not in the way
    assert checkpoint.load(path) == {"step": 0}


@needs_linux
def test_disk_that_fills(tmp_path: Path) -> None:
    """The message gives the system's reason; the old checkpoint stays, and nothing half written."""
    code = """
path = Path(sys.argv[1])
checkpoint.save(path, {"x": torch.ones(10)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    checkpoint.save(path, {"x": torch.ones(1 << 20)})
except checkpoint.CheckpointError as error:
    print(error)
"""
    path = tmp_path / "last.pt"
    printed = finish(start(code, path))
    assert (
        printed == f"checkpoint: {path} could not be written: File too large; an older one there is whole\n"
    )
    assert torch.equal(checkpoint.load(path)["x"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"last.pt could not be written: (Not a dir|File exi)"
    ):
        checkpoint.save(tmp_path / "file" / "last.pt", {"step": 1})


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_malicious_checkpoint(tmp_path: Path) -> None:
    """A pickle that would run a command is refused before it does."""
    torch.save({"format": checkpoint.FORMAT, "x": Malicious(tmp_path / "ran")}, tmp_path / "best.pt")
    with pytest.raises(checkpoint.CheckpointError, match="damaged or no checkpoint of seqkern"):
        checkpoint.load(tmp_path / "best.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "best.pt", weights_only=False)  # it would have
    assert (tmp_path / "ran").exists()


# ---- signals and memory ------------------------------------------------------------------------------------

LAYERS = {
    "LSTM": "seqkern.LSTM(64, 256, 2, batch_first=True)",
    "GRU": "seqkern.GRU(64, 256, 2, bidirectional=True, batch_first=True)",
    "LayerNormLSTM": "seqkern.LayerNormLSTM(64, 256, batch_first=True)",
    "TransformerEncoderLayer": "seqkern.TransformerEncoderLayer(64, 4, batch_first=True)",
}


@needs_linux
@needs_kernels
@pytest.mark.parametrize("name", LAYERS)
def test_interrupt(name: str) -> None:
    """Ctrl-C in the middle of training is Python's KeyboardInterrupt, and the layer computes as before it."""
    code = f"""
layer = {LAYERS[name]}
small, x = torch.randn(2, 5, 64), torch.randn(16, 200, 64)
first = lambda y: y[0] if isinstance(y, tuple) else y
layer.eval()
expected = first(layer(small))
try:
    print("going", flush=True)
    begin = time.monotonic()
    while time.monotonic() - begin < 60:
        first(layer(x)).sum().backward()
    print("never interrupted")
except KeyboardInterrupt:
    print("interrupted", torch.equal(first(layer(small)), expected))
"""
    process = start(code)
    assert process.stdout.readline() == "going\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert finish(process) == "interrupted True\n"


@needs_linux
@needs_kernels
@pytest.mark.parametrize("name", LAYERS)
def test_out_of_memory(name: str) -> None:
    """Forward, then backward, that cannot have their memory raise; what comes after is right."""
    code = f"""
layer = {LAYERS[name]}
first = lambda y: y[0] if isinstance(y, tuple) else y
layer.eval()
small = torch.randn(2, 5, 64)

def run(x):
    y = first(layer(x))
    return [y, *torch.autograd.grad(y.sum(), list(layer.parameters()))]

expected = run(small)
x = torch.randn(64, 400, 64)
y = first(layer(x))  # backward comes when memory is short
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
for attempt in ("y.sum().backward()", "layer(torch.randn(64, 400, 64))"):
    try:
        eval(attempt)
        print("no error", attempt)
    except (RuntimeError, MemoryError) as error:
        print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
del y
print(all(torch.equal(a, b) for a, b in zip(run(small), expected, strict=True)))
"""
    *errors, same = finish(start(code)).split()
    assert len(errors) == 2 and set(errors) <= {"RuntimeError", "MemoryError"}, errors
    assert same == "True"
