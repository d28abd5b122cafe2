"""seqkern.models: running layers over padded rows, and the recurrent networks by hand."""

import pytest
import torch
from compare import agree, check_modules, check_parity, flat, packed_call
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqkern
from seqkern.models import CharRNN, RNNStep, SimpleRNN, _layers

LAYERS = [seqkern.nn, nn]
LENGTHS = torch.tensor([5, 0, 3, 1, 0, 5])


# ---- running a layer over padded rows ----------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["TBI", "BTI"])
@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_run_is_packing_with_empty_rows_aside(cell: str, layers, batch_first: bool, given: bool) -> None:
    options = dict(num_layers=2, bidirectional=True, batch_first=batch_first)
    theirs = getattr(nn, cell)(3, 4, **options)
    ours = _layers.make(layers, cell, 3, 4, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 5, 3) if batch_first else torch.randn(5, 6, 3)
    hx = None
    if given:
        hx = torch.randn(4, 6, 4) if cell != "LSTM" else (torch.randn(4, 6, 4), torch.randn(4, 6, 4))
    check_parity(
        *(theirs, ours, x, hx, f"{cell} {layers.__name__}"),
        call=lambda layer, x, hx: _layers.run(layer, x, LENGTHS, hx),
        their_call=packed_call(LENGTHS),
    )


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
def test_run_without_lengths_is_the_layer(layers) -> None:
    layer = layers.LSTM(3, 4)
    x, hx = torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    for given in (None, hx):
        found, expected = flat(_layers.run(layer, x, state=given)), flat(layer(x, given))
        assert all(torch.equal(y, y_) for y, y_ in zip(found, expected, strict=True))


def test_padding_of_nan_reaches_nothing_on_torchs_layers() -> None:
    """An empty row runs for one step in torch.nn's layer: what its padding holds must not show."""
    layer = nn.GRU(3, 4, batch_first=True)
    x = torch.randn(6, 5, 3)
    padding = torch.arange(5) >= LENGTHS[:, None]
    results = []
    for fill in (0.0, float("nan")):
        y, h_n = _layers.run(layer, x.masked_fill(padding[:, :, None], fill), LENGTHS)
        results.append([y, h_n, *torch.autograd.grad(y.sum() + h_n.sum(), list(layer.parameters()))])
    assert all(torch.equal(y, y_) for y, y_ in zip(*results, strict=True))


def test_errors_of_run_and_make() -> None:
    layer = nn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"lengths: expected values in 0..T = 0..5, got lengths\[1\] = 6"):
        _layers.run(layer, x, torch.tensor([1, 6]))
    with pytest.raises(ValueError, match=r"lengths: expected \[B\] = \(2,\), got \(1,\)"):
        _layers.run(layer, x, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"reset: expected None with torch\.nn's GRU; seqkern\.nn's layers"):
        _layers.run(layer, x, reset=torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"cell: expected one of gru, lstm, rnn of torch\.nn, got 'mgu'"):
        _layers.make(nn, "mgu", 3, 4)
    with pytest.raises(ValueError, match=r"cell: expected one of cifg, .* of seqkern.nn, got 'Linear'"):
        _layers.make(seqkern.nn, "Linear", 3, 4)
    with pytest.raises(ValueError, match=r"weight_dropout, zoneout: expected none with torch\.nn\.LSTM"):
        _layers.make(nn, "lstm", 3, 4, weight_dropout=0.1, zoneout=0.1)


def test_make_finds_every_layer_by_its_name() -> None:
    assert type(_layers.make(nn, "lstm", 3, 4)) is nn.LSTM
    assert type(_layers.make(seqkern.nn, "LSTM", 3, 4)) is seqkern.LSTM
    assert type(_layers.make(seqkern.nn, "layer_norm_gru", 3, 4)) is seqkern.LayerNormGRU
    assert type(_layers.make(seqkern.nn, "peephole_lstm", 3, 4)) is seqkern.PeepholeLSTM
    assert _layers.make(seqkern.nn, "gru", 3, 4, zoneout=0.25).zoneout == 0.25
    assert _layers.make(seqkern.nn, lambda *sizes: sizes, 3, 4) == (3, 4)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
def test_pooling_sees_valid_steps_only(pooling: str, layers) -> None:
    layer = layers.LSTM(3, 4, bidirectional=True, batch_first=True)
    x = torch.randn(6, 5, 3)
    pooled = _layers.pool(pooling, *_layers.run(layer, x, LENGTHS), LENGTHS, True)
    rows = []
    for row, length in zip(x, LENGTHS.tolist(), strict=True):
        if length == 0:
            rows.append(torch.zeros(8))
            continue
        y, (h_n, _) = layer(row[:length])
        final = torch.cat([h_n[0], h_n[1]])
        rows.append({"last": final, "mean": y.mean(0), "max": y.max(0).values}[pooling])
        whole = _layers.pool(pooling, y.unsqueeze(0), (h_n.unsqueeze(1),), None, True)[0]
        agree({"row": whole}, {"row": rows[-1]}, 1e-6, pooling)
    agree({"rows": pooled}, {"rows": torch.stack(rows)}, 1e-6, pooling)


def test_attend_gives_padding_no_weight() -> None:
    scores, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, 4)
    context, weights = _layers.attend(scores, y, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        expected = torch.softmax(scores[b, :length], 0)
        agree({"weights": weights[b, :length]}, {"weights": expected}, 1e-6, length)
        assert not weights[b, length:].any()
        agree({"context": context[b]}, {"context": expected @ y[b, :length]}, 1e-6, length)
    (d_scores,) = torch.autograd.grad(context.sum(), scores)
    assert d_scores.isfinite().all() and not d_scores[torch.arange(5) >= LENGTHS[:, None]].any()


# ---- M: a step by hand -------------------------------------------------------------------------------------


class MSimpleRNN(nn.Module):
    def __init__(self, input_size, hidden_size, output_size) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.i2h = nn.Linear(input_size + hidden_size, hidden_size)
        self.i2o = nn.Linear(input_size + hidden_size, output_size)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, input, hidden):
        combined = torch.cat((input, hidden), 1)
        hidden = torch.tanh(self.i2h(combined))
        output = self.softmax(self.i2o(combined))
        return output, hidden


def test_rnn_step() -> None:
    xs, h, targets = torch.randn(4, 3, 5), torch.randn(3, 7), torch.randint(6, (3,))

    def run(step: nn.Module, dtype: torch.dtype) -> tuple:
        hidden = h.to(dtype)
        for x in xs.to(dtype):
            output, hidden = step(x, hidden)
        return output, hidden, nn.functional.nll_loss(output, targets)

    ours = RNNStep(5, 7, 6)
    assert list(ours.state_dict()) == ["i2h.weight", "i2h.bias", "i2o.weight", "i2o.bias"]
    check_modules(MSimpleRNN(5, 7, 6), ours, run, "RNNStep")
    assert torch.equal(ours.init_hidden(3), torch.zeros(3, 7)) and ours.init_hidden().shape == (1, 7)
    assert ours.double().init_hidden(2).dtype == torch.float64


# ---- S and C: a layer and a head ---------------------------------------------------------------------------


class SSimpleRNN(nn.Module):
    def __init__(self, input_size, hidden_size, output_size) -> None:
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x):
        out, _ = self.rnn(x)
        return self.fc(out[:, -1, :])


class CCharRNN(nn.Module):
    def __init__(self, input_size, hidden_size, output_size) -> None:
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size)
        self.h2o = nn.Linear(hidden_size, output_size)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, line):
        _, hidden = self.rnn(line)
        return self.softmax(self.h2o(hidden[0]))


RNN_KEYS = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"]
TARGETS = torch.tensor([2, 0, 1, 3])


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
def test_simple_rnn(layers, backend: str) -> None:
    x, lengths = torch.randn(4, 6, 5), torch.tensor([6, 2, 1, 4])
    ours = SimpleRNN(5, 8, 4, layers=layers)
    assert list(ours.state_dict()) == [*RNN_KEYS, "fc.weight", "fc.bias"]

    def whole(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = model(x.to(dtype))
        return logits, nn.functional.cross_entropy(logits, TARGETS)

    def ragged(model: nn.Module, dtype: torch.dtype) -> Tensor:
        if isinstance(model, SimpleRNN):
            return model(x.to(dtype), lengths)
        return torch.cat([model(row[None, :n].to(dtype)) for row, n in zip(x, lengths, strict=True)])

    theirs = SSimpleRNN(5, 8, 4)
    check_modules(theirs, ours, whole, "SimpleRNN")
    check_modules(theirs, ours, ragged, "SimpleRNN, lengths")


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
def test_char_rnn(layers, backend: str) -> None:
    lengths = torch.tensor([6, 2, 1, 4])
    lines = nn.functional.one_hot(torch.randint(0, 9, (6, 4)), 9)
    ours = CharRNN(9, 12, 4, layers=layers)
    assert list(ours.state_dict()) == [*RNN_KEYS, "h2o.weight", "h2o.bias"]

    def run(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Names one by one, as in C, or all at once; the losses summed, as there."""
        x = lines.to(dtype)
        if isinstance(model, CharRNN):
            scores = model(x, lengths)
        else:
            scores = torch.cat([model(x[:n, [b]]) for b, n in enumerate(lengths)])
        return scores, nn.functional.nll_loss(scores, TARGETS, reduction="sum")

    theirs = CCharRNN(9, 12, 4)
    scores, loss = check_modules(theirs, ours, run, "CharRNN")

    improved = CharRNN(9, 12, 4, logits=True, layers=layers)
    improved.load_state_dict(theirs.state_dict())
    logits = improved(lines.float(), lengths)
    assert not torch.allclose(logits.exp().sum(1), torch.ones(4))
    expected = nn.functional.cross_entropy(logits, TARGETS, reduction="sum")
    agree(
        {"loss": loss, "scores": scores}, {"loss": expected, "scores": logits.log_softmax(1)}, 1e-6, "logits"
    )


def test_char_rnn_of_packed_names_equals_the_batch() -> None:
    """The same names in torch.nn's own way."""
    lengths = torch.tensor([6, 2, 1, 4])
    x = nn.functional.one_hot(torch.randint(0, 9, (6, 4)), 9).float()
    theirs, ours = CCharRNN(9, 12, 4), CharRNN(9, 12, 4)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False))
    agree({"scores": ours(x, lengths)}, {"scores": expected}, 1e-5, "packed")
