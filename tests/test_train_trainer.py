"""seqkern.train: options, schedules, the loop, checkpoints, resumption, on tasks of a few dozen sequences."""

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from train_tasks import KilledError, Language, Tagging, train

import seqkern
from seqkern.text import Windows
from seqkern.train import checkpoint
from seqkern.train import log as logs
from seqkern.train.batches import ExampleBatches, WindowBatches, shuffled, to_device
from seqkern.train.checkpoint import CheckpointError
from seqkern.train.config import Training, describe, from_state, with_options
from seqkern.train.optim import learning_rate_factor, make_optimizer, orthogonal_
from seqkern.train.trainer import Trainer


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing takes longer than these trainings do."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("seqkern.train.trainer.draw", lambda log, picture: None)


# ---- options --------------------------------------------------------------------------------------------


def test_options_are_read_by_type():
    config = with_options(
        Training(), ["lr=0.5", "epochs=3", "orthogonal=yes", "schedule=cosine", "minutes=1.5"]
    )
    assert (config.lr, config.epochs, config.orthogonal, config.schedule) == (0.5, 3, True, "cosine")
    assert config.minutes == 1.5 and type(config.epochs) is int and with_options(config, []) == config
    assert from_state(Training, vars(config)) == config
    assert "lr=0.5" in describe(config) and "learning rate" in describe(config)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lr", "expected key=value, got 'lr'"),
        ("rate=1", r"no key 'rate'; known, with their values: seed=0, epochs=10, .*lr=0.001"),
        ("epochs=2.5", "epochs: expected int, got '2.5'"),
        ("lr=fast", "lr: expected float, got 'fast'"),
        (
            "schedule=linear",
            "schedule: expected one of constant, plateau, .*, got 'linear'",
        ),
        ("orthogonal=maybe", "orthogonal: expected true or false, got 'maybe'"),
        ("epochs=0", "epochs: expected at least 1, got 0"),
        ("lr=-1", "lr: expected a number above 0, got -1.0"),
        ("lr=nan", "lr: expected a number above 0, got nan"),
        ("minutes=0", "minutes: expected a number above 0, got 0"),
        ("label_smoothing=1", "label_smoothing: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_options_errors(option, message):
    with pytest.raises(ValueError, match=message):
        with_options(Training(), [option])


def test_config_of_another_version():
    state = vars(Training()) | {"gone": 1}
    del state["lr"]
    with pytest.raises(ValueError, match="the keys differ in gone, lr"):
        from_state(Training, state)


# ---- optimizers, schedules, initial values ------------------------------------------------------------


def test_learning_rate_factor():
    warm = [learning_rate_factor("constant", 4, step, 0) for step in (0, 1, 3, 4, 99)]
    assert warm == [0.25, 0.5, 1, 1, 1]
    assert learning_rate_factor("cosine", 0, 5, 0.5) == pytest.approx(0.5)
    assert learning_rate_factor("cosine", 0, 5, 0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert learning_rate_factor("cosine", 0, 5, 1.2) == pytest.approx(0, abs=1e-12)
    # Vaswani et al.: proportional to min(step^-0.5, step * warmup^-1.5), steps counted from 1
    for step in (1, 50, 100, 400, 10_000):
        expected = min(step**-0.5, step * 100**-1.5) / 100**-0.5
        assert learning_rate_factor("inverse-sqrt", 100, step - 1, 0) == pytest.approx(expected)


def test_warm_up_takes_a_fifth_of_a_short_run_at_most(tmp_path):
    config = Training(epochs=2, batch=8, warmup=1000, log_every=1)  # 10 updates
    train(Tagging(config), config, tmp_path)
    rates = [e["lr"] for e in logs.read(tmp_path / "log.jsonl") if e["event"] == "step"]
    assert rates == pytest.approx([5e-4, *[1e-3] * 9])


def test_weight_decay_is_of_matrices():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = make_optimizer(model, Training(weight_decay=0.1, optimizer="adamw"))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[0].weight)}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4


@pytest.mark.parametrize("layers", [nn, seqkern.nn], ids=["torch.nn", "seqkern.nn"])
def test_orthogonal(layers):
    model = orthogonal_(nn.ModuleList([layers.LSTM(3, 5, 2, bidirectional=True), layers.GRUCell(3, 5)]))
    blocks = [w.split(5) for name, w in model.named_parameters() if "weight_hh" in name]
    assert [len(gates) for gates in blocks] == [4, 4, 4, 4, 3]
    for gates in blocks:
        for gate in gates:
            torch.testing.assert_close(gate @ gate.T, torch.eye(5))


def test_orthogonal_of_the_variants_and_projections():
    projected = orthogonal_(seqkern.LSTM(3, 6, proj_size=2))
    for gate in projected.weight_hh_l0.split(6):
        torch.testing.assert_close(gate.T @ gate, torch.eye(2))
    peephole = orthogonal_(seqkern.nn.PeepholeLSTM(3, 5))
    torch.testing.assert_close(peephole.weight_hh_l0[:5] @ peephole.weight_hh_l0[:5].T, torch.eye(5))
    before = seqkern.nn.IndRNN(3, 5)
    u = before.weight_hh_l0.clone()
    assert torch.equal(orthogonal_(before).weight_hh_l0, u)


# ---- batches ----------------------------------------------------------------------------------------------


def test_example_batches_are_whole_and_can_start_anywhere():
    batches = ExampleBatches(list(range(10)), shuffled(10, 4, seed=1), list)
    assert len(batches) == 3
    epochs = [list(batches.epoch(e)) for e in (0, 1)]
    for epoch in epochs:
        assert sorted(x for batch, _ in epoch for x in batch) == list(range(10))
        assert [n for _, n in epoch] == [4, 4, 2]
    assert epochs[0] != epochs[1] and list(batches.epoch(1)) == epochs[1]
    assert list(batches.epoch(1, start=2)) == epochs[1][2:]
    with pytest.raises(ValueError, match="examples: none"):
        ExampleBatches([], shuffled(0, 4), list)


def test_the_parts_of_all_processes_are_the_batch():
    batches = ExampleBatches(list(range(10)), shuffled(10, 4), list)
    whole = [batch for batch, _ in batches.epoch(0)]
    parts = [list(batches.epoch(0, rank=r, size=3)) for r in range(3)]
    for i, batch in enumerate(whole):
        mine = [part[i][0][: part[i][1]] for part in parts]
        assert sorted(x for rows in mine for x in rows) == sorted(batch)
        assert sum(part[i][1] for part in parts) == len(batch)
    filled = parts[2][2]  # two examples for three processes
    assert filled == (whole[2][:1], 0)


def test_window_batches_share_out_rows():
    batches = WindowBatches(Windows(torch.arange(100), 4, 5))
    inputs, targets = next(batches.epoch(0, start=1))[0]
    assert torch.equal(targets, inputs + 1) and inputs[0, 0] == 5
    (mine, _), weight = next(batches.epoch(0, start=1, rank=1, size=2))
    assert torch.equal(mine, inputs[:, 1::2]) and weight == 10
    with pytest.raises(ValueError, match="a row for each of 5 processes, got 4"):
        next(batches.epoch(0, size=5))


def test_to_device_goes_through_containers():
    meta = torch.device("meta")
    found = to_device({"a": (torch.ones(1), [torch.ones(2)]), "b": "text"}, meta)
    assert found["a"][0].device == found["a"][1][0].device == meta and found["b"] == "text"
    packed = nn.utils.rnn.PackedSequence(torch.ones(2, 3), torch.tensor([2]))
    assert to_device(packed, meta).data.device == meta


# ---- the loop ----------------------------------------------------------------------------------------


def test_accumulated_gradient_is_that_of_the_big_batch():
    """Batches of 12 in one update, against 3 times 4: of the same tokens, in parts of unequal size."""
    gradients = []
    for batch, accumulate in ((12, 1), (4, 3)):
        config = Training(batch=batch, accumulate=accumulate, clip=math.inf, optimizer="sgd", lr=1e-3)
        task = Tagging(config, dropout=0.0, dtype=torch.float64)
        trainer = Trainer(task, config)
        trainer._started = trainer._seconds_before = 0.0
        group, last = next(trainer._groups())
        assert len(group) == accumulate and not last
        trainer._update(group)
        gradients.append([p.grad for p in task.model.parameters()])
        assert sum(w for _, w in group) == trainer.at.targets
    for one, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(one, parts, rtol=1e-12, atol=1e-14)
        assert one.abs().max() > 0


def test_training_learns_draws_its_curves_and_ends_with_the_best_model(tmp_path, capsys):
    config = Training(epochs=40, batch=8, lr=0.02, log_every=5)
    task = Tagging(config, dropout=0.0)
    result = train(task, config, tmp_path)
    assert result.figures["accuracy"] > 0.9
    assert task.evaluate(task.model)["accuracy"] == pytest.approx(result.figures["accuracy"])
    assert result.steps == 40 * 5 and 0 < result.best_step <= result.steps
    best = checkpoint.load(tmp_path / "best.pt")
    assert best["step"] == result.best_step and best["figures"] == result.figures
    assert all(torch.equal(v, best["model"][k]) for k, v in task.model.state_dict().items())
    events = logs.read(tmp_path / "log.jsonl")
    assert [e["event"] for e in events].count("evaluation") == 40
    assert max(e["accuracy"] for e in events if e["event"] == "evaluation") == result.figures["accuracy"]
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert len(losses) == 41 and losses[-1] < losses[0] / 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert ("targets/s" in printed and "epoch" not in printed.split("\n")[0]) or "training 1/40" in printed


def test_label_of_the_clip_is_the_largest_norm():
    config = Training(clip=1e-3, optimizer="sgd", lr=1.0, batch=37)
    task = Tagging(config, dropout=0.0)
    before = nn.utils.parameters_to_vector(task.model.parameters()).detach().clone()
    trainer = Trainer(task, config)
    trainer._started = trainer._seconds_before = 0.0
    trainer._update(next(trainer._groups())[0])
    moved = nn.utils.parameters_to_vector(task.model.parameters()).detach() - before
    assert moved.norm() == pytest.approx(1e-3, rel=1e-2)


class Scripted(Tagging):
    """Its evaluations give the figures of a script."""

    script = ()

    def evaluate(self, model):
        self.asked = getattr(self, "asked", -1) + 1
        return {"accuracy": self.script[self.asked]}


def test_early_stopping_and_plateau(tmp_path):
    config = Training(
        epochs=20, batch=37, schedule="plateau", plateau_patience=1, lr=0.5, patience=4, optimizer="sgd"
    )
    task = Scripted(config)
    task.script = [0.5, 0.6, 0.6, 0.4, 0.5, 0.6, 0.9]
    result = train(task, config, tmp_path)
    assert result.steps == 6 and result.figures == {"accuracy": 0.6} and result.best_step == 2
    logged = logs.read(tmp_path / "log.jsonl")
    assert [e["best"] for e in logged if e["event"] == "evaluation"] == [True, True, *[False] * 4]
    lr = checkpoint.load(tmp_path / "last.pt")["optimizer"]["param_groups"][0]["lr"]
    assert lr == 0.125  # halved after the 2nd evaluation without improvement, and after the 4th


def test_evaluations_and_the_time_budget(tmp_path):
    config = Training(epochs=4, batch=8, evaluate_every=2)
    train(Tagging(config), config, tmp_path)
    events = logs.read(tmp_path / "log.jsonl")
    assert [e["step"] for e in events if e["event"] == "evaluation"] == [
        2,
        4,
        5,
        6,
        8,
        10,
        12,
        14,
        15,
        16,
        18,
        20,
    ]
    config = Training(epochs=1000, batch=8, minutes=0.2 / 60, schedule="cosine", log_every=1)
    result = train(Tagging(config), config, tmp_path / "timed")
    assert result.steps < 5000 and result.seconds < 5
    rates = [e["lr"] for e in logs.read(tmp_path / "timed" / "log.jsonl") if e["event"] == "step"]
    assert rates[-1] < 0.2 * rates[0]  # the cosine ends with the time


def test_average_is_what_is_evaluated():
    config = Training(epochs=3, batch=8, average=0.9, lr=0.05)
    task = Tagging(config, dropout=0.0)
    trainer = Trainer(task, config)
    expected = None
    update = trainer._update

    def recording(group):
        nonlocal expected
        update(group)
        values = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        n = trainer.at.step - 1
        decay = min(0.9, (1 + n) / (10 + n))
        expected = (
            values
            if expected is None
            else {k: decay * expected[k] + (1 - decay) * v for k, v in values.items()}
        )

    trainer._update = recording
    trainer.fit()
    for name, value in trainer.average.module.state_dict().items():
        if trainer.at.worse == 0:
            torch.testing.assert_close(value, expected[name])
    assert trainer.at.worse == 0  # or the comparison above was not made


def test_mixed_precision_on_the_cpu():
    config = Training(epochs=2, batch=8, amp="bf16")
    task = Tagging(config)
    seen = []
    task.model.fc.register_forward_hook(lambda module, x, y: seen.append((module.training, y.dtype)))
    train(task, config, None)
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(p.dtype is torch.float32 for p in task.model.parameters())


def test_a_loss_that_is_not_finite_ends_the_run():
    config = Training(epochs=2, batch=8, log_every=1)
    task = Tagging(config)
    with torch.no_grad():
        task.model.fc.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss: nan before update 1; a smaller lr"):
        train(task, config, None)


# ---- resumption --------------------------------------------------------------------------------------

RUNS = {
    "adam": Training(epochs=3, batch=4, save_every=2),
    "everything": Training(
        epochs=3,
        batch=4,
        save_every=2,
        accumulate=2,
        average=0.8,
        schedule="plateau",
        plateau_patience=0,
        warmup=3,
        evaluate_every=3,
        amp="bf16",
        log_every=3,
    ),
    "cosine, sgd": Training(
        epochs=3, batch=4, save_every=3, schedule="cosine", optimizer="sgd", momentum=0.9, lr=0.1
    ),
}


@pytest.mark.parametrize("task", [Tagging, Language])
@pytest.mark.parametrize("run", RUNS)
def test_a_killed_run_goes_on_bit_for_bit(run, task, tmp_path):
    config = RUNS[run]
    whole = task(config)
    expected = train(whole, config, tmp_path / "whole")
    total = len(whole.losses)
    for die_at in (total // 2, total - 1):
        out = tmp_path / str(die_at)
        first = task(config)
        with pytest.raises(KilledError):
            train(first, config, out, die_at=die_at)
        at = checkpoint.load(out / "last.pt")["at"]
        torch.manual_seed(99)  # whatever state the new process is in
        second = task(config)
        result = train(second, config, out, resume=True)
        kept = at["epoch"] * len(whole.batches) + at["batch"]
        assert 0 < kept <= die_at and (whole.losses[:kept] + second.losses) == whole.losses
        assert result.figures == expected.figures and result.best_step == expected.best_step
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, second.model.state_dict()[name]), name
        assert same_events(out / "log.jsonl") == same_events(tmp_path / "whole" / "log.jsonl")


def same_events(path: Path) -> list[dict]:
    """What two logs of one run have in common: all but times."""
    timed = {"seconds", "rate", "targets_per_second"}
    return [
        {k: v for k, v in event.items() if k not in timed}
        for event in logs.read(path)
        if event["event"] in ("step", "evaluation")
    ]


def test_at_least_one_run_is_killed_within_an_epoch():
    """What the test above is about: some of its checkpoints lie between two epochs' ends."""
    config = RUNS["adam"]
    steps = [s for s in range(2, 30, config.save_every) if s % len(Tagging(config).batches)]
    assert steps


def test_a_finished_run_goes_on_where_more_epochs_are_wanted(tmp_path):
    short, long = Training(epochs=2, batch=8), Training(epochs=4, batch=8)
    train(Tagging(short), short, tmp_path / "short")
    result = train(Tagging(long), long, tmp_path / "short", resume=True)
    whole = train(Tagging(long), long, tmp_path / "whole")
    assert (result.steps, result.figures) == (whole.steps, whole.figures)
    again = train(Tagging(long), long, tmp_path / "short", resume=True)  # nothing left to do
    assert (again.steps, again.figures) == (whole.steps, whole.figures)


# ---- checkpoints ---------------------------------------------------------------------------------------


def test_checkpoint_holds_plain_values(tmp_path):
    state = {"a": torch.arange(3), "b": [1, 2.5, None, "ä", True], "c": {"d": (1, 2)}, "e": {0: 1}}
    checkpoint.save(tmp_path / "new" / "x.pt", state)
    found = checkpoint.load(tmp_path / "new" / "x.pt")
    assert torch.equal(found.pop("a"), state.pop("a")) and found == state
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.pt"]
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]: expected a tensor, number.*PosixPath"):
        checkpoint.save(tmp_path / "x.pt", {"a": [1, Path("x")]})


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"a": 1})

    def fails(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(
        CheckpointError, match=r"x.pt could not be written: no space left on device; an older"
    ):
        checkpoint.save(path, {"a": 2})
    assert checkpoint.load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_checkpoint_errors(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match=r"no file at .*last.pt"):
        checkpoint.load(path)
    config = Training(epochs=1, batch=37)
    train(Tagging(config), config, tmp_path)
    whole = path.read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(
            CheckpointError, match=r"last.pt is cut short, damaged or no checkpoint of seqkern"
        ):
            train(Tagging(config), config, tmp_path, resume=True)
    path.write_bytes(b"PK not really a zip file")
    with pytest.raises(CheckpointError, match="cut short, damaged or no checkpoint"):
        checkpoint.load(path)
    torch.save(nn.Linear(1, 1), path)  # an object: weights only refuses it
    with pytest.raises(CheckpointError, match="cut short, damaged or no checkpoint"):
        checkpoint.load(path)
    torch.save(nn.Linear(1, 1).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"is not one of seqkern: expected .*, it has no format"):
        checkpoint.load(path)
    torch.save({"format": "seqkern checkpoint 0"}, path)
    with pytest.raises(CheckpointError, match="it says 'seqkern checkpoint 0'"):
        checkpoint.load(path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    config = Training(epochs=1, batch=8)
    train(Tagging(config), config, tmp_path)
    other = Training(epochs=1, batch=8, lr=0.5, clip=2.0)
    with pytest.raises(CheckpointError, match="was made with other clip, lr"):
        train(Tagging(other), other, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="was made with another recipe"):
        train(Language(config), config, tmp_path, resume=True)
    wider = Tagging(config)
    wider.model.fc = nn.Linear(8, 6)
    with pytest.raises(CheckpointError, match=r"does not fit this model: (.|\n)*fc\.weight"):
        train(wider, config, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="expected a folder `out`"):
        train(Tagging(config), config, None, resume=True)


def test_log_reads_past_a_line_cut_short(tmp_path):
    log = logs.Log(tmp_path / "log.jsonl")
    log.write("step", step=1, loss=math.nan)
    log.write("step", step=2, loss=2.0)
    log.write("step", step=1, loss=1.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "st')
    assert logs.read(tmp_path / "log.jsonl") == [
        {"event": "step", "step": 2, "loss": 2.0},
        {"event": "step", "step": 1, "loss": 1.0},
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["loss"] is None
