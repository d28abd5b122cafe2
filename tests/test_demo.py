"""seqkern.train: truncated BPTT, evaluation, and the `demo` and `verify` commands, on small text."""

import io
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from texts import some_texts, write_some_texts
from torch import nn

import seqkern
from seqkern.text import (
    CharCorpus,
    Windows,
)
from seqkern.train import compare, demo, verify
from seqkern.train.char_lm import CharLM, bits_per_character, sample
from seqkern.train.progress import Progress
from seqkern.train.tbptt import TruncatedBPTT, detach_state, map_state, reset_state


@pytest.fixture(autouse=True)
def one_thread():
    """The shapes here are too small for two, which only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    return write_some_texts(tmp_path / "corpus")


# ---- training -------------------------------------------------------------------------------------


def make_trainer(layer, vocab_size, lr=1e-2, **options):
    torch.manual_seed(0)
    model = CharLM(vocab_size, embed_dim=8, hidden_size=16, layer=layer, **options)
    return TruncatedBPTT(model, torch.optim.Adam(model.parameters(), lr=lr))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_training_lowers_the_loss_and_equals_torch(kind):
    corpus = CharCorpus.from_texts(some_texts())
    windows = Windows(corpus.train, B=8, T=16)
    losses = []
    for layer in (getattr(nn, kind), getattr(seqkern, kind)):
        trainer = make_trainer(layer, len(corpus.vocabulary))
        losses.append(torch.tensor(list(trainer.train(windows, 30))))
    assert losses[0][0] == pytest.approx(math.log2(len(corpus.vocabulary)), abs=0.5)  # in bits
    assert losses[1][-5:].mean() < losses[1][0] - 0.7
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-4)


def test_state_is_carried_and_detached():
    """Without updates, windows in turn give the losses of one long window."""
    corpus = CharCorpus.from_texts(some_texts())
    trainer = make_trainer(seqkern.LSTM, len(corpus.vocabulary), lr=0.0)
    windows = Windows(corpus.train, B=4, T=8)
    short = [trainer.step(*windows[i]) for i in range(3)]
    assert not any(part.requires_grad for part in trainer.state)
    carried = trainer.state
    trainer.reset()
    long = Windows(corpus.train, B=4, T=24)
    assert trainer.step(*long[0]) == pytest.approx(sum(short) / 3, abs=1e-5)
    torch.testing.assert_close(trainer.state, carried)
    trainer.reset()
    assert trainer.step(*windows[1]) != pytest.approx(short[1], abs=1e-4)


def test_training_starts_over_where_the_windows_end():
    corpus = CharCorpus.from_texts(some_texts())
    windows = Windows(corpus.train[: 4 * (2 * 8 + 1)], B=4, T=8)
    assert len(windows) == 2
    losses = list(make_trainer(nn.GRU, len(corpus.vocabulary), lr=0.0).train(windows, 5))
    assert losses[2:] == pytest.approx([*losses[:2], losses[0]], abs=1e-6)
    # In two calls, as the demo trains in blocks: the same steps.
    trainer = make_trainer(nn.GRU, len(corpus.vocabulary), lr=0.0)
    assert [*trainer.train(windows, 3), *trainer.train(windows, 2, start=3)] == losses


def test_gradients_are_clipped():
    trainer = make_trainer(nn.LSTM, 10)
    trainer.clip = 1e-3
    trainer.step(torch.randint(10, (5, 2)), torch.randint(10, (5, 2)))
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_map_state_keeps_the_structure():
    h, c = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert torch.equal(map_state(torch.neg, h), -h)
    mapped = map_state(torch.neg, (h, c))
    assert isinstance(mapped, tuple) and torch.equal(mapped[1], -c)


def test_detach_and_reset_state():
    h = torch.randn(2, 3, 4, requires_grad=True)
    state = (h * 2, (h * 3,))
    detached = detach_state(state)
    assert not detached[0].requires_grad and torch.equal(detached[1][0], state[1][0])
    fresh = reset_state(state, torch.tensor([False, True, False]))
    assert (fresh[0][:, 1] == 0).all() and torch.equal(fresh[1][0][:, [0, 2]], state[1][0][:, [0, 2]])
    (dh,) = torch.autograd.grad(fresh[0].sum(), h)
    assert (dh[:, 1] == 0).all() and (dh[:, 0] == 2).all()


@pytest.mark.parametrize("layer", [seqkern.SLSTM, seqkern.GRU, seqkern.LayerNormLSTM])
def test_tbptt_of_any_cell_and_loss(layer):
    """A window's gradients are those from its detached initial state, whatever the loss; rows that are reset
    begin from zeros, inside the window and at its edge."""
    torch.manual_seed(0)
    model = layer(3, 4)
    trainer = TruncatedBPTT(
        model, torch.optim.SGD(model.parameters(), lr=0.0), clip=1e9, loss=nn.functional.mse_loss
    )
    x, y = torch.randn(4, 2, 3), torch.randn(4, 2, 4)
    first = trainer.step(x, y)
    assert first == pytest.approx(nn.functional.mse_loss(model(x)[0], y).item())
    carried = trainer.state
    assert all(not s.requires_grad for s in (carried if isinstance(carried, tuple) else (carried,)))
    trainer.step(x, y)
    grads = [w.grad.clone() for w in model.parameters()]
    expected = torch.autograd.grad(nn.functional.mse_loss(model(x, carried)[0], y), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))

    reset = torch.tensor([True, False])
    trainer.state = carried
    assert trainer.step(x, y, reset=reset) != trainer.step(x, y)
    trainer.state = carried
    both = torch.zeros(4, 2, dtype=torch.bool)
    both[0] = True
    assert trainer.step(x, y, reset=both) == pytest.approx(first)
    trainer.state = carried
    assert trainer.step(x, y, reset=torch.tensor([True, True])) == pytest.approx(first)


# ---- evaluation and sampling ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_bits_per_character_is_that_of_each_stream_read_whole(kind):
    torch.manual_seed(0)
    model = CharLM(11, embed_dim=4, hidden_size=8, num_layers=2, layer=getattr(seqkern, kind)).train()
    streams = [torch.randint(11, (n,)) for n in (5, 33, 1, 2, 17, 18, 40)]
    bits, count = 0.0, 0
    for stream in streams:
        stream = stream[:31]  # 30 to predict
        if len(stream) > 1:
            logits, _ = model(stream[:-1, None])
            bits += nn.functional.cross_entropy(logits[:, 0], stream[1:], reduction="sum").item() / math.log(
                2
            )
            count += len(stream) - 1
    found = bits_per_character(model, streams, B=3, T=7, max_characters=30)
    assert found == pytest.approx(bits / count, rel=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="streams: no stream with at least two ids"):
        bits_per_character(model, [torch.tensor([1])])


def test_sample_continues_the_prompt():
    torch.manual_seed(0)
    model = CharLM(11, embed_dim=4, hidden_size=8, layer=seqkern.LSTM)
    prompt = torch.tensor([3, 1, 4])
    draws = [sample(model, prompt, 20, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert draws[0].shape == (23,) and torch.equal(draws[0][:3], prompt)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    # Nearly greedy: each id is the likeliest after all ids before it, so the state has been carried.
    cold = sample(model, prompt, 20, temperature=1e-4)
    logits, _ = model(cold[:-1, None])
    assert torch.equal(logits[2:, 0].argmax(-1), cold[3:])
    with pytest.raises(ValueError, match="prompt: expected at least one id"):
        sample(model, prompt[:0], 1)
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        sample(model, prompt, 1, temperature=0)


# ---- parity and its failures ----------------------------------------------------------------------


def test_parity_finds_a_wrong_gradient():
    class WrongGRU(nn.GRU):
        def forward(self, x, hx=None):
            y, h = super().forward(x, hx)
            if y.requires_grad:
                y.register_hook(lambda dy: dy * 1.001)
            return y, h

    assert compare.parity(compare.recurrent(nn.GRU, nn.GRU, (5, 3, 7, 9))).ok
    result = compare.parity(compare.recurrent(nn.GRU, WrongGRU, (5, 3, 7, 9)))
    assert not result.ok and result.tensor.startswith("d_")


def test_parity_finds_nan_and_wrong_shapes():
    class NanGRU(nn.GRU):
        def forward(self, x, hx=None):
            y, h = super().forward(x, hx)
            return y * float("nan"), h

    assert not compare.parity(compare.recurrent(nn.GRU, NanGRU, (5, 3, 7, 9))).ok
    assert compare._error(torch.zeros(2), torch.zeros(3)) == float("inf")


def test_in_turn_takes_turns():
    calls = []
    compare.in_turn(lambda: calls.append("p"), lambda: calls.append("o"), seconds=0, min_rounds=3)
    assert "".join(calls) == "po" + "po" + "op" + "po"  # the first pair warms up


# ---- the commands ---------------------------------------------------------------------------------


def test_demo_quick(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert demo.main(["--quick", "--corpus", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "training 12/12",
        "held-out files",
        "the curves differ by at most",
        "the speed of torch.nn.LSTM",
        "\n    def ",
        "Parity with torch.nn, and speed",
        f"loss curves: {out / 'losses.png'}",
    ):
        assert expected in printed, expected
    rows = [line.split() for line in printed.splitlines() if line.split()[1:2] == ["ok"]]
    assert [row[0] for row in rows] == ["LSTM", "LSTM", "GRU", "GRU", "RNN", "RNN"]
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_demo_without_matplotlib(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    monkeypatch.setattr(demo, "comparisons", lambda quick: [])
    args = ["--quick", "--steps", "2", "--corpus", str(folder), "--out", str(tmp_path)]
    assert demo.main(args) == 0
    assert "not drawn, matplotlib is not installed" in capsys.readouterr().out


def test_demo_fails_where_the_layers_disagree(folder, tmp_path, capsys, monkeypatch):
    class WrongLSTM(nn.LSTM):
        def forward(self, x, hx=None):
            y, h = super().forward(x, hx)
            return y * 1.1, h

    monkeypatch.setattr(seqkern, "LSTM", WrongLSTM)
    monkeypatch.setattr(
        demo, "comparisons", lambda quick: [compare.recurrent(nn.LSTM, WrongLSTM, (3, 2, 4, 5))]
    )
    args = ["--quick", "--steps", "2", "--corpus", str(folder), "--out", str(tmp_path)]
    assert demo.main(args) == 1
    printed = capsys.readouterr().out
    assert "FAILED the first 2 losses should agree" in printed
    assert "FAILED WrongLSTM, B 2, T 3, I 4, H 5: " in printed


def test_training_stops_when_its_time_is_over(folder, capsys):
    settings = replace(demo.QUICK, seconds=0.0)
    corpus, _ = demo.load_corpus(folder, settings)
    runs = [demo.make_run(name, nn.LSTM, len(corpus.vocabulary), settings, 0) for name in ("a", "b")]
    demo.train_in_turn(runs, Windows(corpus.train, settings.B, settings.T), settings)
    assert len(runs[0].losses) == len(runs[1].losses) == settings.block
    assert "stopped after 3 of 12 steps: 0 s are over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--corpus", "/nowhere/at/all"], "corpus: no file or folder at /nowhere/at/all"),
        (["--corpus", "EMPTY"], "holds no UTF-8 text"),
        (["--corpus", "SHORT"], "corpus: 7 ids are too few for 32 rows of 64 steps (at least 2080)"),
        (["--steps", "0"], "argument --steps: expected at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid"),
        (["--prompt", ""], "--prompt: expected at least one character"),
        (["--quick", "--corpus", "LONG", "--out", "SHORT"], "--out: cannot make the folder"),
    ],
    ids=["missing", "empty", "short", "no steps", "steps", "prompt", "out"],
)
def test_demo_errors(args, message, tmp_path, capsys):
    files = {"EMPTY": "", "SHORT": "import", "LONG": "import this\n" * 500}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as exit_:
        demo.main([str(tmp_path / arg) if arg in files else arg for arg in args])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_verify(capsys, monkeypatch):
    timed = verify.timed
    rows = {name: row._replace(comparisons=row.comparisons[:1]) for name, row in verify.layers().items()}
    monkeypatch.setattr(verify, "layers", lambda: rows)
    monkeypatch.setattr(verify, "timed", lambda: dict(list(timed().items())[:2]))
    assert verify.main(["--seconds", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "everything agrees with torch.nn" in printed
    assert all(
        name in printed for name in ["LSTM, proj_size", "GRUCell", "SLSTM", "CRF", "eager", "bfloat16"]
    )
    assert not seqkern._extension.AVAILABLE or re.search(
        r"^LSTM, training +cpu .* ms +[\d.]+ ", printed, re.M
    )


def test_verify_takes_every_time():
    for name, (comparison, training) in verify.timed().items():
        found = compare.speed(comparison, training=training, seconds=0, min_rounds=1)
        assert found.ours > 0 and found.peer > 0, name


def test_parity_asks_a_lucky_peer_again(monkeypatch):
    """Where torch.nn is nearer than can be asked for, its error on problems next door counts."""
    comparison = compare.recurrent(nn.GRU, seqkern.GRU, (5, 3, 7, 9))
    honest, asked = compare._peer_errors, []

    def lucky(comparison, peer, inputs, device):
        errors, exact = honest(comparison, peer, inputs, device)
        asked.append(1)
        return (errors if len(asked) > 1 else dict.fromkeys(errors, 0.0)), exact

    monkeypatch.setattr(compare, "_peer_errors", lucky)
    assert compare.parity(comparison, floor_ulp=1e-3).ok
    assert len(asked) == 1 + compare.NEARBY


def test_verify_fails_where_a_layer_disagrees(capsys, monkeypatch):
    class WrongRNN(nn.RNN):
        def forward(self, x, hx=None):
            y, h = super().forward(x, hx)
            return y + 1, h

    wrong = verify.Row("rnn", [compare.recurrent(nn.RNN, WrongRNN, (3, 2, 4, 5))])
    monkeypatch.setattr(verify, "layers", lambda: {"RNN": wrong})
    assert verify.main(["--seconds", "0"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED RNN on eager, float32" in printed and "output0: error" in printed


def test_instruction_set_is_put_back():
    before = seqkern.info().instruction_set
    for place in verify.places():
        isa = place.instruction_set
        with verify.instruction_set(isa):
            assert isa is None or seqkern.info().instruction_set == isa
    assert seqkern.info().instruction_set == before


def test_import_seqkern_loads_no_training():
    unwanted = ("seqkern.models", "seqkern.text", "seqkern.train", "matplotlib")
    code = f"import sys, seqkern; print([name for name in sys.modules if name.startswith({unwanted})])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


# ---- the progress bar -----------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_redraws_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Progress("training", 4, stream=stream, width=4) as progress:
        progress.update(2, "long note")
        progress.update(4, "note")
    assert stream.getvalue() == "\r[##..] training 2/4  long note\r[####] training 4/4  note     \n"


def test_progress_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    Progress("training", 4, stream=stream, width=4).update(2, "a long note")
    assert stream.getvalue() == "\r[##..] training 2/4"


def test_progress_elsewhere_prints_a_line_per_tenth():
    stream = io.StringIO()
    with Progress("training", 40, stream=stream) as progress:
        for done in range(1, 41):
            progress.update(done)
    assert stream.getvalue().splitlines() == [f"training {done}/40" for done in range(4, 41, 4)]
