"""seqkern.models' classifiers against the tutorials' modules on torch.nn, written out here."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import agree, check_modules
from torch import Tensor, nn

import seqkern
from seqkern import models

V, E, H, C = 30, 7, 10, 3
LAYERS = [seqkern.nn, nn]


# ---- the tutorials' modules --------------------------------------------------------------------------------


class MRNNClassifier(nn.Module):
    def __init__(self, vocab_size, embed_dim, hidden_size, num_classes, layer="RNN") -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.rnn = getattr(nn, layer)(embed_dim, hidden_size, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, x):
        _, hidden = self.rnn(self.embedding(x))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.fc(hidden[-1])


class MLSTMClassifier(nn.Module):
    def __init__(
        self, vocab_size, embed_dim, hidden_dim, num_classes, num_layers=2, bidirectional=True
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.lstm = nn.LSTM(embed_dim, hidden_dim, num_layers, bidirectional=bidirectional, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(hidden_dim * 2 if bidirectional else hidden_dim, num_classes)

    def forward(self, x):
        _, (hidden, _) = self.lstm(self.embedding(x))
        hidden = torch.cat((hidden[-2], hidden[-1]), dim=1) if self.lstm.bidirectional else hidden[-1]
        return self.fc(self.dropout(hidden))


class MGRUClassifier(nn.Module):
    def __init__(
        self, vocab_size, embed_dim, hidden_dim, num_classes, num_layers=2, bidirectional=True
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.gru = nn.GRU(
            embed_dim, hidden_dim, num_layers, bidirectional=bidirectional, dropout=0.2, batch_first=True
        )
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(hidden_dim * 2 if bidirectional else hidden_dim, num_classes)

    def forward(self, x):
        _, hidden = self.gru(self.embedding(x))
        hidden = torch.cat((hidden[-2], hidden[-1]), dim=1)
        return self.fc(self.dropout(hidden))


class MGRUWithAttention(nn.Module):
    def __init__(self, vocab_size, embed_dim, hidden_dim, num_classes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.gru = nn.GRU(embed_dim, hidden_dim, batch_first=True)
        self.attention = nn.Linear(hidden_dim, 1)
        self.fc = nn.Linear(hidden_dim, num_classes)

    def forward(self, x):
        output, _ = self.gru(self.embedding(x))
        weights = torch.softmax(self.attention(output), dim=1)
        return self.fc(torch.sum(weights * output, dim=1))


class MSentimentLSTM(nn.Module):
    def __init__(self, vocab_size, embed_dim, hidden_dim, num_layers, num_classes, dropout=0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=1)
        self.lstm = nn.LSTM(
            embed_dim, hidden_dim, num_layers, bidirectional=True, dropout=dropout, batch_first=True
        )
        self.fc1 = nn.Linear(hidden_dim * 2, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.relu = nn.ReLU()

    def forward(self, text):
        _, (hidden, _) = self.lstm(self.embedding(text))
        hidden = self.dropout(torch.cat((hidden[-2], hidden[-1]), dim=1))
        return self.fc2(self.dropout(self.relu(self.fc1(hidden))))


class MAttention(nn.Module):
    def __init__(self, hidden_dim) -> None:
        super().__init__()
        self.attn = nn.Linear(hidden_dim * 2, 1)

    def forward(self, outputs):
        weights = torch.softmax(self.attn(outputs), dim=1)
        return torch.sum(weights * outputs, dim=1)


class MSentimentLSTMWithAttention(MSentimentLSTM):
    def __init__(self, vocab_size, embed_dim, hidden_dim, num_layers, num_classes, dropout=0.5) -> None:
        super().__init__(vocab_size, embed_dim, hidden_dim, num_layers, num_classes, dropout)
        self.attention = MAttention(hidden_dim)

    def forward(self, text):
        outputs, _ = self.lstm(self.embedding(text))
        context = self.attention(outputs)
        return self.fc2(self.dropout(self.relu(self.fc1(context))))


class DSentimentLSTM(nn.Module):
    def __init__(self, vocab_size, embed_dim, hidden_dim) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.lstm = nn.LSTM(embed_dim, hidden_dim, batch_first=True)
        self.fc = nn.Linear(hidden_dim, 1)

    def forward(self, text):
        _, (hidden, _) = self.lstm(self.embedding(text))
        return torch.sigmoid(self.fc(hidden[-1]))


class SLSTMModel(nn.Module):
    bidirectional = False

    def __init__(self, vocab_size, embedding_dim, hidden_dim, output_dim, n_layers=1, dropout=0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.lstm = nn.LSTM(
            *(embedding_dim, hidden_dim, n_layers),
            bidirectional=self.bidirectional,
            dropout=dropout if n_layers > 1 else 0,
            batch_first=True,
        )
        self.fc = nn.Linear(hidden_dim * 2 if self.bidirectional else hidden_dim, output_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text):
        _, (hidden, _) = self.lstm(self.embedding(text))
        hidden = torch.cat((hidden[-2], hidden[-1]), dim=1) if self.bidirectional else hidden[-1]
        return self.fc(self.dropout(hidden))


class SBiLSTMModel(SLSTMModel):
    bidirectional = True


class TTweetClassifier(nn.Module):
    """In evaluation h0 and c0 are zero, which corrects the original."""

    def __init__(self, args) -> None:
        super().__init__()
        self.hidden_dim, self.lstm_layers = args.hidden_dim, args.lstm_layers
        self.dropout = nn.Dropout(0.5)
        self.embedding = nn.Embedding(args.max_words, args.hidden_dim, padding_idx=0)
        self.lstm = nn.LSTM(args.hidden_dim, args.hidden_dim, num_layers=args.lstm_layers, batch_first=True)
        self.fc1 = nn.Linear(args.hidden_dim, 257)
        self.fc2 = nn.Linear(257, 1)

    def forward(self, x):
        h, c = (torch.zeros(self.lstm_layers, x.size(0), self.hidden_dim) for _ in range(2))
        if self.training:
            nn.init.xavier_normal_(h)
            nn.init.xavier_normal_(c)
        out, _ = self.lstm(self.embedding(x), (h.to(self.fc1.weight), c.to(self.fc1.weight)))
        out = torch.relu(self.fc1(self.dropout(out[:, -1, :])))
        return torch.sigmoid(self.fc2(self.dropout(out)))


class MEmbeddingModel(nn.Module):
    def __init__(self, vocab_size, embed_dim) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.fc = nn.Linear(embed_dim, vocab_size)

    def forward(self, context):
        return self.fc(torch.mean(self.embedding(context), dim=1))


# ---- values ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A tutorial's module, ours, and the names of its parameters.

    ours, theirs: called with args;  keys: of the state_dict, rnn(...) written out;  vanishing: the parameter
    whose exact gradient is zero;  options: of ours
    """

    name: str
    theirs: Callable[..., nn.Module]
    args: tuple
    keys: tuple[str, ...]
    vanishing: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def ours(self, layers) -> nn.Module:
        return getattr(models, self.name)(*self.args, layers=layers, **dict(self.options))

    def __str__(self) -> str:
        return "-".join([self.name, *(str(value) for _, value in self.options)])


def rnn(name: str, num_layers: int, bidirectional: bool) -> tuple[str, ...]:
    """The names of a recurrent layer's parameters."""
    return tuple(
        f"{name}.{part}_l{k}{direction}"
        for k in range(num_layers)
        for direction in ("", "_reverse")[: 2 if bidirectional else 1]
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )


def linear(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


TWEETS = SimpleNamespace(batch_size=4, hidden_dim=H, lstm_layers=2, max_words=V)
EMBEDDING = ("embedding.weight",)
CASES = [
    Case("RNNClassifier", MRNNClassifier, (V, E, H, C), (*EMBEDDING, *rnn("rnn", 1, False), *linear("fc"))),
    *(
        Case(
            "RNNClassifier",
            lambda *args, layer=layer: MRNNClassifier(*args, layer),
            *((V, E, H, C), (*EMBEDDING, *rnn("rnn", 1, False), *linear("fc"))),
            options=(("cell", layer.lower()),),
        )
        for layer in ("LSTM", "GRU")
    ),
    Case("LSTMClassifier", MLSTMClassifier, (V, E, H, C), (*EMBEDDING, *rnn("lstm", 2, True), *linear("fc"))),
    Case(
        *("LSTMClassifier", MLSTMClassifier, (V, E, H, C, 1, False)),
        (*EMBEDDING, *rnn("lstm", 1, False), *linear("fc")),
    ),
    Case("GRUClassifier", MGRUClassifier, (V, E, H, C), (*EMBEDDING, *rnn("gru", 2, True), *linear("fc"))),
    Case(
        *("GRUWithAttention", MGRUWithAttention, (V, E, H, C)),
        (*EMBEDDING, *rnn("gru", 1, False), *linear("attention", "fc")),
        vanishing="attention.bias",
    ),
    Case(
        *("SentimentLSTM", MSentimentLSTM, (V, E, H, 2, C)),
        (*EMBEDDING, *rnn("lstm", 2, True), *linear("fc1", "fc2")),
    ),
    Case(
        *("SentimentLSTMWithAttention", MSentimentLSTMWithAttention, (V, E, H, 2, C)),
        (*EMBEDDING, *rnn("lstm", 2, True), *linear("fc1", "fc2", "attention.attn")),
        vanishing="attention.attn.bias",
    ),
    Case(
        "BinarySentimentLSTM", DSentimentLSTM, (V, E, H), (*EMBEDDING, *rnn("lstm", 1, False), *linear("fc"))
    ),
    Case("LSTMModel", SLSTMModel, (V, E, H, 1, 2), (*EMBEDDING, *rnn("lstm", 2, False), *linear("fc"))),
    Case("BiLSTMModel", SBiLSTMModel, (V, E, H, 1), (*EMBEDDING, *rnn("lstm", 1, True), *linear("fc"))),
    Case(
        *("TweetClassifier", TTweetClassifier, (TWEETS,)),
        (*EMBEDDING, *rnn("lstm", 2, False), *linear("fc1", "fc2")),
    ),
    Case("EmbeddingModel", MEmbeddingModel, (V, E), (*EMBEDDING, *linear("fc"))),
]
B, T = 5, 8
LENGTHS = torch.tensor([8, 3, 1, 8, 5])


def tokens() -> Tensor:
    return torch.randint(2, V, (B, T))


def loss_of(scores: Tensor) -> Tensor:
    targets = torch.arange(len(scores)) % (2 if scores.shape[1] == 1 else C)
    if scores.shape[1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(scores[:, 0], targets.to(scores))
    return nn.functional.cross_entropy(scores, targets)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_of_the_parameters(case: Case) -> None:
    assert list(case.ours(seqkern.nn).state_dict()) == list(case.keys)
    assert list(case.ours(nn).state_dict()) == list(case.keys)


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tutorials_values(case: Case, layers, backend: str) -> None:
    x = tokens()

    def run(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scores = model(x)
        return scores, loss_of(scores)

    check_modules(case.theirs(*case.args).eval(), case.ours(layers).eval(), run, str(case), case.vanishing)


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_padded_batch_is_its_rows_one_by_one(case: Case, layers, backend: str) -> None:
    x = tokens()

    def run(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if type(model).__module__ == __name__:
            scores = torch.cat([model(row[None, :n]) for row, n in zip(x, LENGTHS, strict=True)])
        else:
            scores = model(x, LENGTHS)
        return scores, loss_of(scores)

    check_modules(case.theirs(*case.args).eval(), case.ours(layers).eval(), run, str(case), case.vanishing)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_draws_what_the_tutorial_draws(case: Case) -> None:
    """Dropout, and T's random states, at the same places: from one seed, on torch.nn's layers."""
    theirs, ours = case.theirs(*case.args).train(), case.ours(nn).train()
    ours.load_state_dict(theirs.state_dict())
    x = tokens()
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(model(x))
    agree({"scores": found[0]}, {"scores": found[1]}, 1e-6, case)
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in ours.modules()):
        assert not torch.allclose(found[0], ours.eval()(x))


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_empty_text_is_like_zeros(case: Case, layers) -> None:
    """M's slip: a review that cleaning empties. Gradients stay finite, and other rows as they are."""
    model = case.ours(layers).eval()
    x, lengths = tokens(), torch.tensor([0, 3, 1, 0, 5])
    scores = model(x, lengths)
    kept = lengths > 0
    agree({"others": scores[kept]}, {"others": model(x[kept], lengths[kept])}, 1e-6, case)
    if isinstance(model, models.TweetClassifier):
        expected = torch.sigmoid(model.fc2(torch.relu(model.fc1(torch.zeros(1, H)))))
    elif isinstance(model, models.SentimentLSTM):
        expected = model.fc2(torch.relu(model.fc1(torch.zeros(1, 2 * H))))
    else:
        expected = model.fc(torch.zeros(1, model.fc.in_features))
        expected = torch.sigmoid(expected) if isinstance(model, models.BinarySentimentLSTM) else expected
    agree({"empty": scores[~kept]}, {"empty": expected.expand(2, -1)}, 1e-6, case)
    grads = torch.autograd.grad(scores.sum(), list(model.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


# ---- what only some have -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GRUWithAttention", "SentimentLSTMWithAttention"])
def test_attention_weights(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.ours(seqkern.nn).eval()
    x = tokens()
    logits, weights = model(x, LENGTHS, need_weights=True)
    assert torch.equal(logits, model(x, LENGTHS)) and weights.shape == (B, T)
    assert torch.allclose(weights.sum(1), torch.ones(B))
    assert not weights[torch.arange(T) >= LENGTHS[:, None]].any()


def test_output_attention() -> None:
    outputs = torch.randn(B, T, 2 * H)
    ours, theirs = models.OutputAttention(H), MAttention(H)
    assert list(ours.state_dict()) == ["attn.weight", "attn.bias"]

    def run(attention: nn.Module, dtype: torch.dtype) -> Tensor:
        found = attention(outputs.to(dtype))
        return found[0] if isinstance(attention, models.OutputAttention) else found

    check_modules(theirs, ours, run, "OutputAttention", "attn.bias")


@pytest.mark.parametrize("name", ["RNNClassifier", "LSTMClassifier", "GRUClassifier", "SentimentLSTM"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling(name: str, pooling: str) -> None:
    """The head sees the mean or the maximum of the outputs of each row alone."""
    args = (V, E, H, 2, C) if name == "SentimentLSTM" else (V, E, H, C)
    model = getattr(models, name)(*args, pooling=pooling).eval()
    x = tokens()
    layer = next(module for module in model.children() if isinstance(module, nn.RNNBase))
    rows = []
    for row, n in zip(x, LENGTHS.tolist(), strict=True):
        y, _ = layer(model.embedding(row[:n]))
        rows.append(y.mean(0) if pooling == "mean" else y.amax(0))
    features = torch.stack(rows)
    expected = model.fc2(torch.relu(model.fc1(features))) if name == "SentimentLSTM" else model.fc(features)
    agree({"logits": model(x, LENGTHS)}, {"logits": expected}, 1e-5, name)
    with pytest.raises(ValueError, match="pooling: expected one of last, mean, max, got 'sum'"):
        getattr(models, name)(*args, pooling="sum")


def test_binary_logits() -> None:
    model = models.BinarySentimentLSTM(V, E, H, logits=True)
    x = tokens()
    logits = model(x)
    model.logits = False
    assert torch.equal(model(x), torch.sigmoid(logits))


def test_tweets_are_seedable_in_training_and_the_same_in_evaluation() -> None:
    """T's slip: random states in evaluation, too."""
    model = models.TweetClassifier(TWEETS)
    model.dropout.p = 0.0
    x = tokens()
    drawn = [model(x, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    model.eval()
    assert torch.equal(model(x), model(x))
    ragged = model(x, LENGTHS)
    assert torch.equal(ragged[0], model(x, LENGTHS)[0])


def test_skip_gram_and_negative_sampling() -> None:
    model = models.EmbeddingModel(V, E)
    words, targets, negatives = torch.randint(V, (B,)), torch.randint(V, (B,)), torch.randint(V, (B, 4))
    logits = model(words)
    assert torch.equal(logits, model(words[:, None]))
    expected = torch.stack(
        [
            -torch.sigmoid(logits[b, targets[b]]).log()
            - (1 - torch.sigmoid(logits[b, negatives[b]])).log().sum()
            for b in range(B)
        ]
    ).mean()
    agree({"loss": model.sampled_loss(words, targets, negatives)}, {"loss": expected}, 1e-5, "skip-gram")
    context = tokens()
    logits = model(context, LENGTHS)
    expected = -nn.functional.logsigmoid(
        torch.cat([logits.gather(1, targets[:, None]), -logits.gather(1, negatives)], 1)
    )
    found = model.sampled_loss(context, targets, negatives, LENGTHS)
    agree({"loss": found}, {"loss": expected.sum(1).mean()}, 1e-5, "CBOW")


# ---- S's toy task ------------------------------------------------------------------------------------------

REVIEWS = [
    ("a warm and wonderful film i loved it", 1),
    ("brilliant acting and a beautiful story", 1),
    ("i enjoyed every minute of this great movie", 1),
    ("a dull and terrible film i hated it", 0),
    ("awful acting and a boring story", 0),
    ("i regret every minute of this bad movie", 0),
]
UNSEEN = [("a beautiful film with great acting", 1), ("a boring movie with terrible acting", 0)]


@pytest.mark.parametrize("model", ["LSTMModel", "BiLSTMModel"])
def test_six_reviews(model: str) -> None:
    """S: length 10, batch 2, E 50, H 64, Adam .01, 100 epochs: the loss falls below .1, and two unseen
    sentences are classified rightly."""
    words = sorted({word for text, _ in REVIEWS for word in text.split()})
    ids = {word: i for i, word in enumerate(words, start=2)}  # 0 padding, 1 unknown

    def encode(reviews: list[tuple[str, int]]) -> tuple[Tensor, Tensor, Tensor]:
        texts = [[ids.get(word, 1) for word in text.split()] for text, _ in reviews]
        x = torch.tensor([text + [0] * (10 - len(text)) for text in texts])
        return x, torch.tensor([len(text) for text in texts]), torch.tensor([y for _, y in reviews]).float()

    x, lengths, y = encode(REVIEWS)
    net = getattr(models, model)(len(ids) + 2, 50, 64, 1, padding_idx=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        losses = []
        for batch in torch.randperm(6).split(2):
            loss = nn.functional.binary_cross_entropy_with_logits(
                net(x[batch], lengths[batch])[:, 0], y[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses) / len(losses) < 0.1
    x, lengths, y = encode(UNSEEN)
    with torch.no_grad():
        assert torch.equal((net.eval()(x, lengths)[:, 0] > 0).float(), y)
