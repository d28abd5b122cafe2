"""Several processes on one machine: the same losses as one; restarts; shards that another number can read.

The program that they run is tests/train_tasks.py; see there.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_tasks import main

from seqkern.train import checkpoint
from seqkern.train import log as logs

TESTS = Path(__file__).parent
OPTIONS = ["epochs=3", "batch=7", "log_every=1", "optimizer=sgd", "lr=0.3", "momentum=0.9"]


def environment(**values: str) -> dict[str, str]:
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))} | values


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def processes(n: int, *arguments: str, **values: str) -> None:
    """Runs train_tasks.py in a world of n processes, as torchrun would."""
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | values
    started = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "train_tasks.py"), *arguments],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(n)
    ]
    outputs = [one.communicate(timeout=120)[0] for one in started]
    assert all(one.returncode == 0 for one in started), "\n".join(outputs)
    assert not any("targets/s" in output for output in outputs[1:]), "only the leader reports"


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in logs.read(out / "log.jsonl") if event["event"] == "step"]


def same_result(one: Path, other: Path) -> None:
    results = [torch.load(out / "result.pt", weights_only=True) for out in (one, other)]
    torch.testing.assert_close(*(result["figures"] for result in results), rtol=1e-4, atol=1e-4)
    for name, value in results[0]["model"].items():
        torch.testing.assert_close(value, results[1]["model"][name], rtol=1e-3, atol=1e-4)
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    assert len(losses(one)) > 10 and len(set(losses(one))) > 10


@pytest.mark.parametrize("task", ["tagging", pytest.param("language", marks=pytest.mark.slow)])
def test_two_processes_have_the_losses_of_one(task, tmp_path):
    """37 sequences by 7: the last batches have 2, 4 tokens more on one side than on the other."""
    options = [*OPTIONS, "accumulate=2", "batch=6"] if task == "language" else OPTIONS
    main(str(tmp_path / "one"), task, *options)
    processes(2, str(tmp_path / "two"), task, *options)
    same_result(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_killed_worker_starts_again_from_the_last_checkpoint(tmp_path):
    """Two local agents, one worker each; the second's kills itself in its 12th update."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = [*OPTIONS, "save_every=4"]
    processes(2, str(whole), "tagging", *options)
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *("--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"),
                *("--rdzv-id=test", f"--rdzv-conf=is_host={int(node == 0)}", "--monitor-interval=0.2"),
                *(str(TESTS / "train_tasks.py"), str(out), "tagging", *options),
            ],
            env=environment(DIE_AT="11"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [one.communicate(timeout=180)[0] for one in agents]
    assert all(one.returncode == 0 for one in agents), "\n".join(outputs)
    assert torch.load(out / "result.pt", weights_only=True)["resumed"]
    resumed = [event["step"] for event in logs.read(out / "log.jsonl") if event["event"] == "resume"]
    assert resumed == [8]
    same_result(whole, out)


@pytest.mark.slow
def test_shards_of_two_processes_go_on_in_one(tmp_path):
    """FSDP2: as DDP step by step; stopped after an epoch, and gone on with by one process."""
    options = OPTIONS
    processes(2, str(tmp_path / "copies"), "transformed", *options)
    processes(2, str(tmp_path / "shards"), "transformed", *options, "fsdp=true", "accumulate=1")
    same_result(tmp_path / "copies", tmp_path / "shards")
    out = tmp_path / "moved"
    processes(2, str(out), "transformed", *options, "fsdp=true", "epochs=1")
    assert [path.name for path in (out / "last").iterdir()] == ["step-6"]
    (out / "last" / "step-99").mkdir()  # cut short: never read
    processes(1, str(out), "transformed", *options, "fsdp=true", RESUME="1")
    same_result(tmp_path / "copies", out)
    best = checkpoint.load(out / "best.pt")
    assert all(not name.startswith("_") for name in best["model"])


@pytest.mark.slow
def test_a_recipe_under_torchrun_makes_the_steps_of_one_process(tmp_path):
    options = ["hidden_size=32", "embed_dim=32", "word_dropout=0", "dropout=0", "epochs=1", "log_every=1"]
    command = ["-m", "seqkern", "train", "questions", "--device=cpu", *options]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for launcher, out in (([], tmp_path / "one"), (torchrun, tmp_path / "two")):
        done = subprocess.run(
            [sys.executable, *launcher, *command, f"--out={out}"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('{"recipe": "questions"') == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(losses(tmp_path / "one")) == 29
