"""The public tutorials' own snippets with the import changed: from one state_dict, the same values.

M PyTorch Masterclass (part 3), C CMSC 473/673, S PyTorch sequence modeling, T Tutorial 07 (sequential tasks).
"""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import check_modules, flat
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkern

# What a snippet sees as `nn`: torch.nn, or the same with seqkern's layers in it.
LAYERS = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
SEQKERN = SimpleNamespace(**(vars(nn) | {name: getattr(seqkern, name) for name in LAYERS}))


def compare_modules(make: Callable, run: Callable, case: str, vanishing: str = "") -> tuple[Tensor, ...]:
    """make(nn) → module; run(module, dtype) → outputs. check_modules for it on torch.nn and on seqkern."""
    theirs, ours = make(nn), make(SEQKERN)
    assert any(type(m).__module__.startswith("seqkern") for m in ours.modules()), (
        "the snippet uses no seqkern"
    )
    return check_modules(theirs, ours, run, case, vanishing)


@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    ("options", "states"),
    [({}, 1), ({"num_layers": 2}, 2), ({"num_layers": 3}, 3), ({"bidirectional": True}, 2)],
    ids=["one layer", "two layers", "three layers", "bidirectional"],
)
def test_rnn_of_100_to_128(layer: str, options: dict, states: int, backend: str) -> None:
    """M: rnn = nn.RNN(100, 128, batch_first=True); x = torch.randn(32, 20, 100); output, hidden = rnn(x)"""
    x = torch.randn(32, 20, 100)
    output, *hidden = compare_modules(
        lambda nn: getattr(nn, layer)(input_size=100, hidden_size=128, batch_first=True, **options),
        lambda rnn, dtype: rnn(x.to(dtype)),
        f"{layer} {options}",
    )
    assert output.shape == (32, 20, 128 * (2 if options.get("bidirectional") else 1))
    assert all(h.shape == (states, 32, 128) for h in hidden)
    if "bidirectional" in options:
        assert torch.equal(output[:, -1, :128], hidden[0][0])
        assert torch.equal(output[:, 0, 128:], hidden[0][1])
    else:
        assert torch.equal(output[:, -1], hidden[0][-1])


def test_lstm_of_5_3_10_to_20(backend: str) -> None:
    """S: nn.LSTM(10, 20, 2), input (5, 3, 10), h0, c0 (2, 3, 20): output, (hn, cn) = rnn(input, (h0, c0))"""
    x, h0, c0 = torch.randn(5, 3, 10), torch.randn(2, 3, 20), torch.randn(2, 3, 20)
    output, hn, cn = compare_modules(
        lambda nn: nn.LSTM(10, 20, 2), lambda rnn, d: rnn(x.to(d), (h0.to(d), c0.to(d))), "LSTM(10, 20, 2)"
    )
    assert output.shape == (5, 3, 20)
    assert hn.shape == cn.shape == (2, 3, 20)
    assert torch.equal(output[-1], hn[-1])


@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_of_6_3_10_to_20(cell: str, backend: str) -> None:
    """torch's own example: for i in range(6): hx = rnn(input[i], hx); output.append(hx)"""
    x, h0, c0 = torch.randn(6, 3, 10), torch.randn(3, 20), torch.randn(3, 20)

    def run(rnn: nn.Module, dtype: torch.dtype) -> Tensor:
        hx = (h0.to(dtype), c0.to(dtype)) if cell == "LSTMCell" else h0.to(dtype)
        output = []
        for x_t in x.to(dtype):
            hx = rnn(x_t, hx)
            output.append(flat(hx)[0])
        return torch.stack(output)

    (output,) = compare_modules(lambda nn: getattr(nn, cell)(10, 20), run, cell)
    assert output.shape == (6, 3, 20)


class RNNClassifier(nn.Module):
    """M: the last layer's final hidden state of a packed batch."""

    def __init__(self, nn, layer: str, vocab_size=50, embed_dim=16, hidden_size=24, num_classes=5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        self.rnn = getattr(nn, layer)(embed_dim, hidden_size, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        _, hidden = self.rnn(packed)
        return self.fc(flat(hidden)[0][-1])


class RNNClassifierWithLengths(RNNClassifier):
    """The same without packing: what `lengths` is for."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if isinstance(self.rnn, (seqkern.RNN, seqkern.LSTM, seqkern.GRU)):
            _, hidden = self.rnn(self.embedding(x), lengths=lengths)
            return self.fc(flat(hidden)[0][-1])
        return super().forward(x, lengths)


def padded_tokens(B: int = 6, T: int = 11, vocab_size: int = 50) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([11, 3, 7, 1, 11, 5])[:B]
    x = torch.randint(1, vocab_size, (B, T))
    return x.masked_fill(torch.arange(T) >= lengths[:, None], 0), lengths


@pytest.mark.parametrize("model", [RNNClassifier, RNNClassifierWithLengths])
@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
def test_classifier(layer: str, model: type, backend: str) -> None:
    x, lengths = padded_tokens()
    (logits,) = compare_modules(lambda nn: model(nn, layer), lambda net, dtype: net(x, lengths), layer)
    assert logits.shape == (6, 5)


class LSTMClassifier(nn.Module):
    """M: two bidirectional layers; cat(hidden[-2], hidden[-1])."""

    def __init__(self, nn, vocab_size=50, embed_dim=16, hidden_dim=24, num_classes=3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.lstm = nn.LSTM(
            embed_dim, hidden_dim, num_layers=2, bidirectional=True, dropout=0.2, batch_first=True
        )
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(2 * hidden_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(x))
        return self.fc(self.dropout(torch.cat([hidden[-2], hidden[-1]], dim=1)))


def test_bidirectional_classifier(backend: str) -> None:
    x, _ = padded_tokens()
    (logits,) = compare_modules(
        lambda nn: LSTMClassifier(nn).eval(), lambda net, dtype: net(x), "LSTMClassifier"
    )
    assert logits.shape == (6, 3)


class GRUWithAttention(nn.Module):
    """M: softmax over time of attention(output), weighted sum."""

    def __init__(self, nn, vocab_size=50, embed_dim=16, hidden_dim=24, num_classes=3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.gru = nn.GRU(embed_dim, hidden_dim, batch_first=True)
        self.attention = nn.Linear(hidden_dim, 1)
        self.fc = nn.Linear(hidden_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.gru(self.embedding(x))
        weights = torch.softmax(self.attention(output), dim=1)
        return self.fc((weights * output).sum(dim=1))


def test_gru_with_attention(backend: str) -> None:
    x, _ = padded_tokens()
    (logits,) = compare_modules(
        GRUWithAttention, lambda net, dtype: net(x), "GRUWithAttention", "attention.bias"
    )
    assert logits.shape == (6, 3)


class Seq2Seq(nn.Module):
    """M: an LSTM encoder of packed sources, an LSTM decoder that runs one token at a time."""

    def __init__(self, nn, vocab_size=50, embed_size=16, hidden_size=24) -> None:
        super().__init__()
        self.source = nn.Embedding(vocab_size, embed_size)
        self.target = nn.Embedding(vocab_size, embed_size)
        self.encoder = nn.LSTM(embed_size, hidden_size, 2, batch_first=True)
        self.decoder = nn.LSTM(embed_size, hidden_size, 2, batch_first=True)
        self.fc = nn.Linear(hidden_size, vocab_size)

    def forward(self, src: Tensor, lengths: Tensor, trg: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.source(src), lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, cell) = self.encoder(packed)
        steps = []
        for token in trg.T:
            output, (hidden, cell) = self.decoder(self.target(token.unsqueeze(1)), (hidden, cell))
            steps.append(self.fc(output.squeeze(1)))
        return torch.stack(steps, dim=1)


def test_seq2seq(backend: str) -> None:
    src, lengths = padded_tokens()
    trg = torch.randint(1, 50, (6, 4))
    (logits,) = compare_modules(Seq2Seq, lambda net, dtype: net(src, lengths, trg), "Seq2Seq")
    assert logits.shape == (6, 4, 50)


class Encoder(nn.Module):
    """M, with attention, time first: a bidirectional encoder whose outputs and states the decoder reads."""

    def __init__(self, nn) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 24, 2, dropout=0.5, bidirectional=True)
        self.attn = nn.Linear(48, 1)

    def forward(self, src: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = pack_padded_sequence(self.embedding(src), lengths, enforce_sorted=False)
        outputs, (hidden, cell) = self.rnn(packed)
        outputs, _ = pad_packed_sequence(outputs, total_length=len(src))
        return outputs * torch.softmax(self.attn(outputs), dim=0), hidden, cell


def test_encoder_with_attention(backend: str) -> None:
    x, lengths = padded_tokens()
    outputs, hidden, cell = compare_modules(
        lambda nn: Encoder(nn).eval(), lambda net, dtype: net(x.T, lengths), "Encoder", "attn.bias"
    )
    assert outputs.shape == (11, 6, 48)
    assert hidden.shape == cell.shape == (4, 6, 24)


class TweetClassifier(nn.Module):
    """T: random initial states, the last step through two linear layers."""

    def __init__(self, nn, hidden_dim=32, lstm_layers=2, max_words=50) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.embedding = nn.Embedding(max_words, hidden_dim, padding_idx=0)
        self.lstm = nn.LSTM(hidden_dim, hidden_dim, num_layers=lstm_layers, batch_first=True)
        self.fc1 = nn.Linear(hidden_dim, 257)
        self.fc2 = nn.Linear(257, 1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(x), (h, c))
        out = torch.relu(self.fc1(self.dropout(out)[:, -1, :]))
        return torch.sigmoid(self.fc2(self.dropout(out)))


def test_tweet_classifier(backend: str) -> None:
    x, _ = padded_tokens()
    h, c = (nn.init.xavier_normal_(torch.empty(2, 6, 32)) for _ in range(2))
    (score,) = compare_modules(
        lambda nn: TweetClassifier(nn).eval(), lambda net, d: net(x, h.to(d), c.to(d)), "TweetClassifier"
    )
    assert score.shape == (6, 1)


class CharRNN(nn.Module):
    """C: names letter by letter, time first; log-probabilities of the final hidden state."""

    def __init__(self, nn, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size)
        self.h2o = nn.Linear(hidden_size, output_size)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, line: Tensor) -> Tensor:
        _, hidden = self.rnn(line)
        return self.softmax(self.h2o(hidden[0]))


def test_char_rnn(backend: str) -> None:
    line = nn.functional.one_hot(torch.randint(0, 57, (6, 1)), 57)
    (scores,) = compare_modules(
        lambda nn: CharRNN(nn, 57, 128, 18), lambda net, dtype: net(line.to(dtype)), "CharRNN"
    )
    assert scores.shape == (1, 18)


def test_names_to_languages(data: Path, backend: str) -> None:
    """C on the real names: SGD of the tutorial's kind, the same losses on both, and they fall."""
    files = sorted((data / "names").glob("*.txt"))
    if not files:
        pytest.skip(f"no names/*.txt under {data}")
    letters = " .,;'-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    rng = random.Random(0)
    lines = [
        (name, i) for i, file in enumerate(files) for name in file.read_text("utf-8").split("\n") if name
    ]
    rng.shuffle(lines)

    def one_hot(name: str) -> Tensor:
        indices = torch.tensor([max(0, letters.find(letter)) for letter in name])
        return nn.functional.one_hot(indices, len(letters)).float().unsqueeze(1)

    torch.manual_seed(0)
    first = CharRNN(nn, len(letters), 64, len(files))
    losses = []
    for module in (nn, SEQKERN):
        net = CharRNN(module, len(letters), 64, len(files))
        net.load_state_dict(first.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        trace = []
        for step in range(12):
            batch = lines[32 * step : 32 * step + 32]
            scores = torch.cat([net(one_hot(name)) for name, _ in batch])
            loss = nn.functional.nll_loss(scores, torch.tensor([i for _, i in batch]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 3)
            optimizer.step()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert sum(losses[1][-3:]) < sum(losses[1][:3])
