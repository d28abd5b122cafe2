"""seqkern.models' taggers and character encoders against modules on torch.nn, written out here."""

import itertools

import pytest
import torch
from compare import agree, check_modules
from torch import Tensor, nn

import seqkern
from seqkern.models import BiLSTMCRF, CharacterEncoder, CharacterOptions, RNNTagger

V, K, E, H = 20, 4, 6, 8
B, T, C, LETTERS = 4, 5, 6, 15
LENGTHS = torch.tensor([5, 2, 1, 4])
LAYERS = [seqkern.nn, nn]
LSTM_CHARS = CharacterOptions(LETTERS, embed_dim=5, hidden_size=3)
CNN_CHARS = CharacterOptions(
    LETTERS, embed_dim=5, encoder="cnn", filters=((1, 2), (2, 3), (3, 4)), highways=1
)


def words() -> Tensor:
    return torch.randint(2, V, (B, T))


def letters() -> tuple[Tensor, Tensor]:
    """chars [B, T, C], 0 behind each word's last; their numbers [B, T]."""
    counts = torch.randint(1, C + 1, (B, T))
    counts[torch.arange(T) >= LENGTHS[:, None]] = 0
    chars = torch.randint(1, LETTERS, (B, T, C))
    return chars.masked_fill(torch.arange(C) >= counts[:, :, None], 0), counts


# ---- the same on torch.nn ----------------------------------------------------------------------------------


class MRNNTagger(nn.Module):
    def __init__(self, vocab_size, tagset_size, embed_dim, hidden_size, bidirectional=False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.rnn = nn.LSTM(embed_dim, hidden_size, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(hidden_size * (2 if bidirectional else 1), tagset_size)

    def forward(self, x):
        out, _ = self.rnn(self.embedding(x))
        return self.fc(out)


class CRF(nn.Module):
    """The log-likelihood of one sequence, step by step; the best tags, of all sequences."""

    def __init__(self, num_tags) -> None:
        super().__init__()
        self.start_transitions = nn.Parameter(torch.randn(num_tags))
        self.end_transitions = nn.Parameter(torch.randn(num_tags))
        self.transitions = nn.Parameter(torch.randn(num_tags, num_tags))

    def score(self, emissions, tags):
        value = self.start_transitions[tags[0]] + self.end_transitions[tags[-1]]
        value = value + sum(emissions[t, tag] for t, tag in enumerate(tags))
        return value + sum(self.transitions[i, j] for i, j in itertools.pairwise(tags))

    def log_likelihood(self, emissions, tags):
        alpha = self.start_transitions + emissions[0]
        for emission in emissions[1:]:
            alpha = torch.logsumexp(alpha[:, None] + self.transitions + emission, 0)
        return self.score(emissions, tags) - torch.logsumexp(alpha + self.end_transitions, 0)

    def best(self, emissions):
        sequences = itertools.product(range(emissions.shape[1]), repeat=len(emissions))
        return max(sequences, key=lambda tags: self.score(emissions, tags).item())


class TwinBiLSTMCRF(MRNNTagger):
    def __init__(self, vocab_size, tagset_size, embed_dim, hidden_size) -> None:
        super().__init__(vocab_size, tagset_size, embed_dim, hidden_size, bidirectional=True)
        self.crf = CRF(tagset_size)


class CharLSTM(nn.Module):
    """One word at a time: the last states of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 3, batch_first=True, bidirectional=True)

    def forward(self, chars, counts):
        rows = []
        for word, n in zip(chars.flatten(0, 1), counts.flatten().tolist(), strict=True):
            if n == 0:
                rows.append(self.embedding.weight.new_zeros(6))
                continue
            _, (hidden, _) = self.lstm(self.embedding(word[None, :n]))
            rows.append(torch.cat([hidden[0, 0], hidden[1, 0]]))
        return torch.stack(rows).view(*counts.shape, 6)


class CharCNN(nn.Module):
    """One word at a time: windows of each width over the word between zeros; a highway layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, 5, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(5, number, width) for width, number in CNN_CHARS.filters)
        self.highways = nn.ModuleList(
            [nn.ModuleDict({"transform": nn.Linear(9, 9), "gate": nn.Linear(9, 9)})]
        )

    def forward(self, chars, counts):
        rows = []
        for word, n in zip(chars.flatten(0, 1), counts.flatten().tolist(), strict=True):
            if n == 0:
                rows.append(self.embedding.weight.new_zeros(9))
                continue
            x = self.embedding(word[:n]).T  # [5, n]
            maxima = []
            for convolution in self.convolutions:
                before = (convolution.kernel_size[0] - 1) // 2
                after = convolution.kernel_size[0] - 1 - before
                y = convolution(nn.functional.pad(x, (before, after))[None])[0]
                maxima.append(y.relu().max(1).values)
            y = torch.cat(maxima)
            gate = torch.sigmoid(self.highways[0]["gate"](y))
            rows.append(gate * self.highways[0]["transform"](y).relu() + (1 - gate) * y)
        return torch.stack(rows).view(*counts.shape, 9)


# ---- RNNTagger ---------------------------------------------------------------------------------------------

RNN_KEYS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
FORWARD_KEYS = [f"rnn.{key}_l0" for key in RNN_KEYS]
BACKWARD_KEYS = [f"{key}_reverse" for key in FORWARD_KEYS]
CRF_KEYS = ["crf.start_transitions", "crf.end_transitions", "crf.transitions"]


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rnn_tagger(bidirectional: bool, layers, backend: str) -> None:
    """M's values; with lengths, each row alone; the loss is the mean over tokens, whatever padding holds."""
    x, tags = words(), torch.randint(K, (B, T))
    tags[torch.arange(T) >= LENGTHS[:, None]] = -100
    theirs = MRNNTagger(V, K, E, H, bidirectional)
    ours = RNNTagger(V, K, E, H, bidirectional=bidirectional, layers=layers)
    both = [*FORWARD_KEYS, *BACKWARD_KEYS] if bidirectional else FORWARD_KEYS
    assert list(ours.state_dict()) == ["embedding.weight", *both, "fc.weight", "fc.bias"]
    check_modules(theirs, ours, lambda model, dtype: model(x), "RNNTagger")

    def run(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if isinstance(model, RNNTagger):
            rows = [emissions[:n] for emissions, n in zip(model(x, LENGTHS), LENGTHS, strict=True)]
            return (*rows, model.loss(x, tags, LENGTHS))
        rows = [model(row[None, :n])[0] for row, n in zip(x, LENGTHS, strict=True)]
        valid = torch.cat([row[:n] for row, n in zip(tags, LENGTHS, strict=True)])
        return (*rows, nn.functional.cross_entropy(torch.cat(rows), valid))

    check_modules(theirs, ours, run, "RNNTagger, lengths")
    best = [row.argmax(1).tolist() for row in run(theirs, torch.float32)[:-1]]
    assert ours.decode(x, LENGTHS) == best
    assert ours.decode(x) == theirs(x).argmax(2).tolist()


# ---- BiLSTMCRF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
def test_bilstm_crf(layers, backend: str) -> None:
    x, tags = words(), torch.randint(K, (B, T))
    theirs, ours = TwinBiLSTMCRF(V, K, E, H), BiLSTMCRF(V, K, E, H, layers=layers)
    keys = ["embedding.weight", *FORWARD_KEYS, *BACKWARD_KEYS, "fc.weight", "fc.bias", *CRF_KEYS]
    assert list(ours.state_dict()) == keys
    assert ours.embedding.padding_idx == 0

    def run(lengths: Tensor):
        def loss(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            if isinstance(model, BiLSTMCRF):
                given = None if lengths is whole else lengths
                emissions = model(x, given)
                return model.negative_log_likelihood(emissions, tags, given), model.loss(x, tags, given)
            values = torch.stack(
                [
                    -model.crf.log_likelihood(model(x[None, b, :n])[0], tags[b, :n].tolist())
                    for b, n in enumerate(lengths.tolist())
                ]
            )
            return values, values.sum() / lengths.sum()

        return loss

    whole = torch.full((B,), T)
    check_modules(theirs, ours, run(whole), "BiLSTMCRF")
    tags[torch.arange(T) >= LENGTHS[:, None]] = -100
    check_modules(theirs, ours, run(LENGTHS), "BiLSTMCRF, lengths")
    with torch.no_grad():
        best = [list(theirs.crf.best(theirs(x[None, b, :n])[0])) for b, n in enumerate(LENGTHS.tolist())]
        assert ours.decode(x, LENGTHS) == best
        assert ours.decode(x) == [list(theirs.crf.best(row)) for row in theirs(x)]


@pytest.mark.parametrize("model", [RNNTagger, BiLSTMCRF])
@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
def test_an_empty_row_has_no_tags_and_no_loss(model: type, layers) -> None:
    constraints = {}
    if model is BiLSTMCRF:  # tag 0, which stands in padding, may not begin a sequence
        constraints["constraints"] = seqkern.bio_constraints(["I-A", "B-A", "O", "B-B"])
    tagger = model(V, K, E, H, chars=LSTM_CHARS, layers=layers, **constraints)
    x, (chars, _) = words(), letters()
    lengths, tags = torch.tensor([3, 0, 1, 0]), torch.tensor([1, 0, 0, 2, 3]).expand(B, T)
    chars[torch.arange(T) >= lengths[:, None]] = 0
    kept = lengths > 0
    value = tagger.loss(x, tags, lengths, chars)
    agree(
        {"loss": value}, {"loss": tagger.loss(x[kept], tags[kept], lengths[kept], chars[kept])}, 1e-6, model
    )
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, list(tagger.parameters())))
    decoded = tagger.decode(x, lengths, chars)
    assert [len(row) for row in decoded] == [3, 0, 1, 0]
    assert tagger.loss(x, tags, torch.zeros(B, dtype=torch.long), chars).item() == 0


def test_constraints_hold() -> None:
    """I-x follows B-x or I-x only, however much the emissions want it elsewhere."""
    names = ["O", "B-A", "I-A", "B-B"]
    tagger = BiLSTMCRF(V, K, E, H, constraints=seqkern.bio_constraints(names))
    with torch.no_grad():
        tagger.fc.bias[2] = 9.0
    decoded = [[names[tag] for tag in row] for row in tagger.decode(words(), LENGTHS)]
    for row in decoded:
        assert all(before in ("B-A", "I-A") for before, tag in itertools.pairwise(row) if tag == "I-A")
        assert row[0] != "I-A"
    assert any("I-A" in row for row in decoded)


# ---- characters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
@pytest.mark.parametrize(
    ("options", "twin"), [(LSTM_CHARS, CharLSTM), (CNN_CHARS, CharCNN)], ids=["lstm", "cnn"]
)
def test_words_are_read_one_by_one(options: CharacterOptions, twin: type, layers, backend: str) -> None:
    chars, counts = letters()
    theirs, ours = twin(), CharacterEncoder(options, layers=layers)
    lstm_keys = [f"lstm.{key}_l0{suffix}" for suffix in ("", "_reverse") for key in RNN_KEYS]
    cnn_keys = [f"convolutions.{k}.{part}" for k in range(3) for part in ("weight", "bias")]
    cnn_keys += [f"highways.0.{name}.{part}" for name in ("transform", "gate") for part in ("weight", "bias")]
    expected = cnn_keys if options.encoder == "cnn" else lstm_keys
    assert list(ours.state_dict()) == ["embedding.weight", *expected]

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        return model(chars) if isinstance(model, CharacterEncoder) else model(chars, counts)

    (vectors,) = check_modules(theirs, ours, run, options.encoder)
    assert vectors.shape == (B, T, ours.output_size) == (B, T, 6 if options.encoder == "lstm" else 9)
    wider = nn.functional.pad(chars, (0, 3))  # padding to another width changes nothing
    agree({"vectors": ours(wider)}, {"vectors": vectors}, 1e-6, options.encoder)


def test_projection_of_words() -> None:
    options = CharacterOptions(LETTERS, encoder="cnn", projection=4)
    encoder = CharacterEncoder(options)
    chars, counts = letters()
    vectors = encoder(chars)
    assert vectors.shape == (B, T, 4) and encoder.output_size == 4
    assert not vectors[counts == 0].any() and vectors[counts > 0].any(1).all()


@pytest.mark.parametrize("model", [RNNTagger, BiLSTMCRF])
@pytest.mark.parametrize("options", [LSTM_CHARS, CNN_CHARS], ids=["lstm", "cnn"])
def test_a_tagger_reads_words_and_their_characters(model: type, options: CharacterOptions) -> None:
    tagger = model(V, K, E, H, chars=options)
    x, (chars, _) = words(), letters()
    emissions = tagger(x, LENGTHS, chars)
    joined = torch.cat([tagger.embedding(x), tagger.characters(chars)], dim=2)
    y, _ = tagger.rnn(joined, lengths=LENGTHS)
    assert torch.equal(emissions, tagger.fc(y))
    for b, n in enumerate(LENGTHS.tolist()):
        alone = tagger(x[b : b + 1, :n], None, chars[b : b + 1, :n])
        agree({"row": emissions[b : b + 1, :n]}, {"row": alone}, 1e-5, b)
    changed = chars.clone()
    changed[0, 0, 0] = 1 + chars[0, 0, 0] % (LETTERS - 1)
    assert not torch.allclose(tagger(x, LENGTHS, changed)[0], emissions[0])
    with pytest.raises(ValueError, match=r"chars: expected \[B, T, C\] = \(4, 5, C\), got None"):
        tagger(x, LENGTHS)
    with pytest.raises(ValueError, match=r"chars: expected \[B, T, C\] = \(4, 5, C\), got \(4, 4, 6\)"):
        tagger(x, LENGTHS, chars[:, :4])
    with pytest.raises(ValueError, match="chars: expected None, the model was built without chars"):
        model(V, K, E, H)(x, LENGTHS, chars)


def test_word_dropout_teaches_the_unknown_word() -> None:
    tagger = RNNTagger(V, K, E, H, word_dropout=0.5, unk_idx=1)
    x = words()
    unknown = tagger(torch.ones_like(x))
    tagger.word_dropout = 1.0
    assert torch.equal(tagger(x), unknown)
    assert not torch.allclose(tagger.eval()(x), unknown)
    with pytest.raises(ValueError, match=r"word_dropout: expected a probability, 0\.\.1, got 1\.5"):
        RNNTagger(V, K, E, H, word_dropout=1.5)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="encoder: expected 'lstm' or 'cnn', got 'gru'"):
        CharacterOptions(LETTERS, encoder="gru")
    with pytest.raises(ValueError, match="filters: expected pairs of numbers above 0, got"):
        CharacterOptions(LETTERS, encoder="cnn", filters=((0, 3),))
    with pytest.raises(ValueError, match=r"chars: expected \[B, T, C\], got \(4, 5\)"):
        CharacterEncoder(LSTM_CHARS)(words())
