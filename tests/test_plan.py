"""seqkern.plan and `python -m seqkern plan`: which CUDA kernel a layer takes, without a GPU."""

import pytest
import torch

import seqkern
from seqkern import __main__ as command_line
from seqkern import _extension
from seqkern.plan import FACTS, KINDS

needs_planner = pytest.mark.skipif(
    not hasattr(_extension._C, "cuda_plan"), reason="the extension has no CUDA planner"
)
CASE = dict(steps=1024, batch=16, hidden=768, dtype=torch.bfloat16)
TIERS = ("step", "block", "cluster", "grid")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@needs_planner
@pytest.mark.parametrize("device", FACTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_names_both_passes(kind: str, dtype: torch.dtype, device: str) -> None:
    text = seqkern.plan(kind, **CASE | {"dtype": dtype}, device=device)
    forward, backward = text.removeprefix("forward:\n").split("\nbackward:\n")
    for lines in (forward.splitlines(), backward.splitlines()):
        assert lines[0].startswith("  chosen: ") and len(lines) == 4, text  # a line per tier
        assert sum(line.startswith("  chosen: ") for line in lines) == 1, text
        assert {tier for tier in TIERS if any(tier in line for line in lines)} == set(TIERS), text


@needs_planner
def test_clusters_are_for_who_has_them() -> None:
    small = dict(steps=100, batch=16, hidden=256, dtype=torch.float16)
    with_clusters, without = (seqkern.plan("lstm", **small, device=device) for device in ("h200", "a100"))
    assert "never:  cluster, sm_80 has no clusters" in without
    assert "never:  cluster" not in with_clusters


@needs_planner
@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("indrnn_relu", {}, "indrnn_relu has no product"),
        ("lstm", {"regularised": True, "proj_size": 64}, "a projection's kernels do not regularise"),
    ],
)
def test_what_goes_step_by_step(kind: str, options: dict, reason: str) -> None:
    text = seqkern.plan(kind, **CASE, **options, device="h100")
    assert text.count("chosen: step") == 2 and text.count(f"never:  cluster, {reason}") == 2, text


@needs_planner
@pytest.mark.parametrize(
    "kind",
    [
        *("peephole_lstm", "cifg_lstm", "mgu", "gru_reset_before", "nested_gru"),
        *("layer_norm_lstm", "layer_norm_gru"),
    ],
)
def test_variants_take_one_launch(kind: str) -> None:
    text = seqkern.plan(kind, **CASE | {"hidden": 256}, regularised=True, device="h100")
    assert "chosen: step" not in text, text


@needs_planner
def test_heads_are_planned_as_directions() -> None:
    text = seqkern.plan("slstm", **CASE | {"hidden": 1024}, heads=8, device="h100")
    assert "16 of 16 jobs at a time" in text and "chosen: step" not in text, text
    with pytest.raises(ValueError, match="heads: expected 1, or for slstm a divisor of hidden = 768, got 2"):
        seqkern.plan("gru", **CASE, heads=2, device="h100")


@needs_planner
def test_the_command_prints_what_the_function_says(capsys: pytest.CaptureFixture) -> None:
    words = "plan lstm --hidden 768 --batch 16 --steps 1024 --dtype bfloat16 --device h100"
    assert command_line.main(words.split()) == 0
    assert capsys.readouterr().out == seqkern.plan("lstm", **CASE, device="h100") + "\n"


@needs_planner
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_device_must_be_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="plan: expected a device, one of a100, h100, h200"):
        seqkern.plan("gru", **CASE)
    assert command_line.main(["plan", "gru", "--hidden", "64"]) == 1
    assert "expected a device" in capsys.readouterr().err


@needs_planner
@pytest.mark.gpu
def test_the_current_device_is_the_default() -> None:
    assert "forward:\n  chosen: " in seqkern.plan("gru", **CASE)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("mlp", {}, "kind: expected one of rnn, gru, lstm, peephole_lstm, .*, got 'mlp'"),
        ("gru", {"device": "tpu"}, "device: expected one of a100, h100, h200 or None, got 'tpu'"),
        ("gru", {"hidden": 0}, "hidden: expected 1 or more, got 0"),
    ],
)
def test_wrong_arguments(kind: str, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seqkern.plan(kind, **CASE | changed)


def test_without_the_extension_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_C", None)
    with pytest.raises(RuntimeError, match="plan: "):
        seqkern.plan("lstm", **CASE, device="h100")
