"""seqkern.models' language models and sampling: values, generation, ELMo's vectors."""

import gzip
import math
from pathlib import Path

import pytest
import torch
from compare import agree, check_modules
from torch import Tensor, nn

import seqkern
from seqkern.models import (
    BidirectionalLanguageModel,
    CharacterOptions,
    ContextualEmbedding,
    RNNLanguageModel,
    ScalarMix,
    char_language_model,
    filter_logits,
    sample,
    word_language_model,
)
from seqkern.models.language_models import LockedDropout
from seqkern.text import Windows
from seqkern.train.tbptt import TruncatedBPTT

V, E, H, B, T = 20, 6, 8, 3, 7
LAYERS = [seqkern.nn, nn]


# ---- sampling ----------------------------------------------------------------------------------------------

P = torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2])


def test_filter_logits_keeps_the_likeliest() -> None:
    logits = torch.stack([P.log(), P.flip(0).log() + 3])  # unnormalised, too

    def kept(**options) -> list[list[int]]:
        found = filter_logits(logits, **options)
        alike = torch.where(found.isfinite(), found, 0)
        agree({"kept": alike}, {"kept": torch.where(found.isfinite(), logits, 0)}, 0, options)
        return [row.isfinite().nonzero()[:, 0].tolist() for row in found]

    every = [0, 1, 2, 3, 4]
    assert kept() == kept(top_k=5) == kept(top_k=9) == kept(top_p=1.0) == [every, every]
    assert kept(top_k=1) == [[0], [4]]
    assert kept(top_k=3) == [[0, 2, 4], [0, 2, 4]]
    assert kept(top_k=4) == [every, every]  # the fourth and the fifth are alike
    assert kept(top_p=0.3) == [[0], [4]]
    assert kept(top_p=0.65) == kept(top_p=0.6999) == [[0, 2], [2, 4]]
    assert kept(top_p=0.92) == [[0, 1, 2, 4], [0, 1, 2, 4]]  # of equals, the smaller id
    assert kept(top_k=3, top_p=0.75) == [[0, 2], [2, 4]]  # of the three: 4/9, 3/9, 2/9
    assert torch.equal(filter_logits(logits, temperature=0.5), logits / 0.5)
    assert filter_logits(logits[0], temperature=0.25, top_p=0.7).isfinite().tolist() == [True] + [False] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_filter_logits_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, V).to(dtype)
    found = filter_logits(logits, temperature=0.7, top_k=5, top_p=0.9)
    assert found.dtype == dtype and found.shape == logits.shape
    assert (found.isfinite().sum(-1) >= 1).all() and (found.isfinite().sum(-1) <= 5).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, P),
        ({"temperature": 2.0}, P.sqrt() / P.sqrt().sum()),
        ({"top_k": 2}, torch.tensor([4, 0, 3, 0, 0]) / 7),
        ({"top_p": 0.85}, torch.tensor([4, 0, 3, 0, 2]) / 9),
    ],
    ids=str,
)
def test_sample_has_the_distribution(options: dict, expected: Tensor) -> None:
    """The share of each id among n draws: within five standard deviations."""
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    ids = sample((P.log() - 2).expand(4, n // 4, 5), generator=generator, **options)
    assert ids.shape == (4, n // 4) and ids.dtype == torch.int64
    share = torch.bincount(ids.flatten(), minlength=5) / n
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all(), (share, expected)


def test_sample_shapes_and_seeds() -> None:
    logits = torch.randn(V)
    assert sample(logits).shape == () and sample(logits[None, None]).shape == (1, 1)
    assert sample(torch.empty(0, V)).shape == (0,)
    draws = [sample(logits.expand(50, V), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(sample(logits.expand(50, V), top_k=1), logits.argmax().expand(50))


def test_options_that_sampling_refuses() -> None:
    for options, message in (
        ({"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ({"temperature": -1.0}, "temperature: expected a number above 0, got -1.0"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0 and at most 1, got 1.5"),
    ):
        for function in (filter_logits, sample):
            with pytest.raises(ValueError, match=message):
                function(torch.zeros(V), **options)


# ---- RNNLanguageModel --------------------------------------------------------------------------------------


class MRNNLanguageModel(nn.Module):
    def __init__(self, vocab_size, embed_dim, hidden_size, layer="GRU", num_layers=1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.rnn = getattr(nn, layer)(embed_dim, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, vocab_size)
        self.log_softmax = nn.LogSoftmax(dim=2)

    def forward(self, x, hidden=None):
        out, hidden = self.rnn(self.embedding(x), hidden)
        return self.log_softmax(self.fc(out)), hidden


RNN_KEYS = [f"rnn.{part}_l0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
@pytest.mark.parametrize(("cell", "num_layers"), [("GRU", 1), ("LSTM", 2), ("RNN", 1)])
def test_language_model(cell: str, num_layers: int, layers, backend: str) -> None:
    ids, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    theirs = MRNNLanguageModel(V, E, H, cell, num_layers)
    ours = RNNLanguageModel(V, E, H, cell=cell.lower(), num_layers=num_layers, layers=layers)

    def run(model: nn.Module, dtype: torch.dtype) -> tuple:
        scores, state = model(ids)
        again, state = model(ids, state)
        return scores, again, state, nn.functional.nll_loss(scores.transpose(1, 2), targets)

    check_modules(theirs, ours, run, cell)


def test_names_of_the_language_models_parameters() -> None:
    assert list(RNNLanguageModel(V, E, H).state_dict()) == [
        "embedding.weight",
        *RNN_KEYS,
        "fc.weight",
        "fc.bias",
    ]


def test_layouts_logits_and_lengths() -> None:
    model = RNNLanguageModel(V, E, H, cell="lstm")
    ids = torch.randint(V, (B, T))
    scores, state = model(ids)
    agree({"p": scores.exp().sum(2)}, {"p": torch.ones(B, T)}, 1e-5, "log-probabilities")
    time_first = RNNLanguageModel(V, E, H, cell="lstm", logits=True, batch_first=False)
    time_first.load_state_dict(model.state_dict())
    logits, their_state = time_first(ids.T)
    agree({"scores": logits.log_softmax(2)}, {"scores": scores.transpose(0, 1)}, 1e-5, "time first")
    agree(dict(zip("hc", their_state, strict=True)), dict(zip("hc", state, strict=True)), 1e-5, "state")
    lengths = torch.tensor([7, 3, 0])
    ragged, (h_n, _) = model(ids, lengths=lengths)
    agree({"row": ragged[1, :3]}, {"row": model(ids[1:2, :3])[0][0]}, 1e-5, "lengths")
    agree({"h": h_n[:, 1]}, {"h": model(ids[1:2, :3])[1][0][:, 0]}, 1e-5, "lengths")
    assert not h_n[:, 2].any()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
def test_generate_equals_recomputing_without_state(batch_first: bool, layers) -> None:
    """Greedy: at each step the likeliest token after all tokens before it, read anew."""
    model = RNNLanguageModel(V, E, H, cell="lstm", num_layers=2, dropout=0.5, layers=layers).train()
    model.batch_first = model.rnn.batch_first = batch_first
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # so that it does not repeat one token
    prompt = torch.randint(V, (B, 4))
    found = model.generate(prompt, 12, top_k=1)
    assert model.training and found.shape == (B, 16)
    model.eval()
    ids = prompt
    for _ in range(12):
        scores = model(ids)[0][:, -1] if batch_first else model(ids.T)[0][-1]
        ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    assert len(set(found[:, 4:].flatten().tolist())) > 1
    assert torch.equal(model.generate(prompt[1], 12, top_k=1), found[1])  # [P] → [P + max_len]


def test_generate_draws_from_the_models_distribution() -> None:
    """The same draws as sampling, with the same seed, from distributions recomputed without state."""
    model = RNNLanguageModel(V, E, H).eval()
    prompt = torch.randint(V, (B, 4))
    options = dict(temperature=0.8, top_k=15, top_p=0.9)
    found = model.generate(prompt, 9, **options, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    ids = prompt
    for _ in range(9):
        drawn = sample(model(ids)[0][:, -1], **options, generator=generator)
        ids = torch.cat([ids, drawn[:, None]], 1)
    assert torch.equal(found, ids)
    assert model.generate(prompt).shape == (B, 4 + 100)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_generate_stops_at_the_end() -> None:
    model = RNNLanguageModel(V, E, H)
    prompt = torch.randint(V, (40, 1))
    ids = model.generate(prompt, 30, eos_idx=3)[:, 1:]
    ended = (ids == 3).cumsum(1) > 0
    assert ended.any() and (ids[ended] == 3).all() and not ended.all()


def test_what_generate_refuses() -> None:
    model = RNNLanguageModel(V, E, H)
    with pytest.raises(ValueError, match=r"start_tokens: expected \[B, P\] or \[P\] .* got \(2, 0\)"):
        model.generate(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="max_len: expected at least 0, got -1"):
        model.generate(torch.zeros(2, 1, dtype=torch.long), -1)
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        model.generate(torch.zeros(2, 1, dtype=torch.long), top_k=0)
    assert model.training


def test_tied_weights_are_one_parameter() -> None:
    model = RNNLanguageModel(V, H, H, tie_weights=True)
    assert model.fc.weight is model.embedding.weight
    assert len(list(model.parameters())) == 1 + 4 + 1
    assert model.embedding.weight.abs().max() <= 0.1 and not model.fc.bias.any()
    ids = torch.randint(V, (B, T))
    scores, _ = model(ids)
    (grad,) = torch.autograd.grad(scores.sum(), model.fc.weight)
    loose = RNNLanguageModel(V, H, H)
    loose.load_state_dict(model.state_dict())
    parts = torch.autograd.grad(loose(ids)[0].sum(), [loose.fc.weight, loose.embedding.weight])
    agree({"d weight": grad}, {"d weight": parts[0] + parts[1]}, 1e-5, "tied")
    with pytest.raises(ValueError, match="tie_weights: expected embed_dim = hidden_size, got 6 and 8"):
        RNNLanguageModel(V, E, H, tie_weights=True)


def test_locked_dropout_has_one_mask_for_all_steps() -> None:
    for batch_first in (True, False):
        x = torch.ones((50, T, 40) if batch_first else (T, 50, 40))
        dropout = LockedDropout(0.25, batch_first)
        y = dropout(x) if batch_first else dropout(x).transpose(0, 1)
        assert torch.equal(y, y[:, :1].expand_as(y))
        assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert (y[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
        assert torch.equal(dropout.eval()(x), x)
    with pytest.raises(ValueError, match="p: expected a probability, 0 <= p < 1, got 1"):
        LockedDropout(1)


def test_embedding_dropout_drops_whole_words() -> None:
    model = RNNLanguageModel(200, E, H, embedding_dropout=0.5)
    ids = torch.arange(200).repeat(2)[None]
    x = model._embed(ids)[0]
    assert torch.equal(x[:200], x[200:])
    kept = x[:200].any(1)
    assert 60 < kept.sum() < 140
    agree({"kept": x[:200][kept]}, {"kept": 2 * model.embedding.weight[kept]}, 1e-6, "embedding_dropout")
    assert torch.equal(model.eval()._embed(ids), model.embedding(ids))
    with pytest.raises(ValueError, match="embedding_dropout: expected a probability, 0 <= p < 1, got 1"):
        RNNLanguageModel(V, E, H, embedding_dropout=1)


def test_regularisers_are_seqkerns() -> None:
    model = word_language_model(V, 16, variational_dropout=0.3, weight_dropout=0.5)
    assert (model.rnn.variational_dropout, model.rnn.weight_dropout) == (0.3, 0.5)
    assert (model.rnn.num_layers, model.rnn.dropout, model.rnn.hidden_size) == (2, 0.5, 16)
    with pytest.raises(ValueError, match=r"weight_dropout: expected none with torch\.nn\.LSTM"):
        word_language_model(V, 16, weight_dropout=0.5, layers=nn)
    assert word_language_model(V).rnn.hidden_size == 650


@pytest.mark.parametrize("options", [{}, {"weight_dropout": 0.2, "variational_dropout": 0.2, "locked": True}])
@pytest.mark.parametrize("make", [char_language_model, word_language_model])
def test_training_in_windows(make, options: dict) -> None:
    """Truncated BPTT on a stream with a period of 7: the loss falls far below that of unrelated tokens."""
    stream = torch.tensor([1, 2, 3, 1, 4, 5, 2]).repeat(100)
    sizes = (6, 16, 24) if make is char_language_model else (6, 32)
    model = make(*sizes, dropout=0.1, **options)
    trainer = TruncatedBPTT(model, torch.optim.Adam(model.parameters(), 0.02))
    losses = list(trainer.train(Windows(stream, 4, 9), 60))
    assert losses[0] > 2.2 and sum(losses[-5:]) / 5 < 0.6, (losses[0], losses[-5:])
    reset = torch.zeros(9, 4, dtype=torch.bool)
    inputs, targets = Windows(stream, 4, 9)[0]
    assert math.isfinite(trainer.step(inputs, targets, reset=reset))


def test_reset_starts_a_row_again() -> None:
    model = RNNLanguageModel(V, E, H)
    ids, reset = torch.randint(V, (1, T)), torch.zeros(1, T, dtype=torch.bool)
    reset[0, 4] = True
    scores, _ = model(ids, reset=reset)
    agree({"scores": scores[:, 4:]}, {"scores": model(ids[:, 4:])[0]}, 1e-5, "reset")
    with pytest.raises(ValueError, match=r"reset: expected None with torch\.nn's GRU"):
        RNNLanguageModel(V, E, H, layers=nn)(ids, reset=reset)


def test_the_same_losses_on_real_text(data: Path) -> None:
    """The character model on tiny shakespeare: seqkern's losses follow torch.nn's, and fall."""
    file = data / "tinyshakespeare" / "train.txt.gz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    text = gzip.decompress(file.read_bytes()).decode()[:20_000]
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    windows = Windows(torch.tensor([letters[letter] for letter in text]), 16, 32)
    losses = []
    for layers in LAYERS:
        torch.manual_seed(0)
        model = char_language_model(len(letters), 32, 64, layers=layers)
        trainer = TruncatedBPTT(model, torch.optim.Adam(model.parameters(), 5e-3))
        losses.append(list(trainer.train(windows, 30)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0] - 1.5


# ---- ELMo --------------------------------------------------------------------------------------------------

C, LETTERS = 5, 12
LENGTHS = torch.tensor([7, 1, 4])
CHARS = CharacterOptions(LETTERS, embed_dim=4, encoder="cnn", filters=((1, 2), (3, 4)), highways=2)


class Twin(nn.Module):
    """Each sentence alone, on torch.nn; the words' encoder is the other's, copied."""

    def __init__(self, model: BidirectionalLanguageModel, hidden_size: int, proj_size: int) -> None:
        super().__init__()
        size = proj_size or hidden_size
        self.characters = type(model.characters)(model.characters.options, layers=nn)
        self.forward_layers, self.backward_layers = (
            nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True, proj_size=proj_size) for _ in range(2))
            for _ in range(2)
        )
        self.fc = nn.Linear(size, V)

    def sentence(self, chars):
        """chars [n, C] → each layer's vectors, [n, P], in both directions."""
        x = self.characters(chars[None])
        ahead, back = [x], [x.flip(1)]
        for k in range(2):
            for outputs, stack in ((ahead, self.forward_layers), (back, self.backward_layers)):
                y, _ = stack[k](outputs[-1])
                outputs.append(y if k == 0 else y + outputs[-1])
        return [y[0] for y in ahead], [y[0].flip(0) for y in back]


def sentences() -> tuple[Tensor, Tensor]:
    chars = torch.randint(1, LETTERS, (B, T, C))
    chars[:, :, 3:] *= torch.randint(2, (B, T, 1))
    chars[torch.arange(T) >= LENGTHS[:, None]] = 0
    return chars, torch.randint(V, (B, T))


@pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_bidirectional_language_model(proj_size: int, layers, backend: str) -> None:
    chars, words = sentences()
    ours = BidirectionalLanguageModel(V, CHARS, H, proj_size=proj_size, layers=layers).eval()
    theirs = Twin(ours, H, proj_size)
    P = proj_size or H

    def run(model: nn.Module, dtype: torch.dtype) -> tuple:
        if isinstance(model, BidirectionalLanguageModel):
            vectors = model.vectors(chars, LENGTHS)
            rows = [vectors[:, b, :n] for b, n in enumerate(LENGTHS)]
            logits = model(chars, LENGTHS)
            rows += [y[b, :n] for y in logits for b, n in enumerate(LENGTHS)]
            return (*rows, model.loss(chars, words, LENGTHS))
        each = [model.sentence(chars[b, :n]) for b, n in enumerate(LENGTHS)]
        rows = [torch.stack([torch.cat(pair, 1) for pair in zip(*both, strict=True)]) for both in each]
        ahead, back = ([model.fc(both[k][-1]) for both in each] for k in range(2))
        total = sum(
            nn.functional.cross_entropy(y[:-1], words[b, 1:n], reduction="sum")
            + nn.functional.cross_entropy(z[1:], words[b, : n - 1], reduction="sum")
            for b, (y, z, n) in enumerate(zip(ahead, back, LENGTHS, strict=True))
        )
        return (*rows, *ahead, *back, total / (2 * (LENGTHS - 1).sum()))

    check_modules(theirs, ours, run, "BidirectionalLanguageModel")
    vectors = ours.vectors(chars, LENGTHS)
    assert vectors.shape == (3, B, T, 2 * P) and ours.vector_size == 2 * P
    assert not vectors[:, torch.arange(T) >= LENGTHS[:, None]].any()
    whole = ours.vectors(chars[:1])  # no lengths
    agree({"vectors": whole[:, 0]}, {"vectors": vectors[:, 0]}, 1e-6, "whole")
    agree(
        {"loss": ours.loss(chars[:1], words[:1])},
        {"loss": ours.loss(chars[:1], words[:1], LENGTHS[:1])},
        1e-6,
        "",
    )


def test_each_direction_sees_its_side_only() -> None:
    model = BidirectionalLanguageModel(V, CHARS, H).eval()
    chars, _ = sentences()
    changed = chars.clone()
    changed[0, 3] = 1 + chars[0, 3] % (LETTERS - 1)
    before, after = model(chars, LENGTHS), model(changed, LENGTHS)
    differ = [(y[0] != y_[0]).any(1).tolist() for y, y_ in zip(before, after, strict=True)]
    assert differ[0] == [False] * 3 + [True] * 4
    assert differ[1] == [True] * 4 + [False] * 3


def test_bidirectional_language_model_learns() -> None:
    """Sentences of one cycle: each word tells its neighbours."""
    words = (torch.arange(6)[None] + torch.arange(5)[:, None]) % 5
    chars = words[:, :, None] + 1
    torch.manual_seed(0)
    model = BidirectionalLanguageModel(5, CharacterOptions(6, embed_dim=4), 12, num_layers=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        loss = model.loss(chars, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.eval().loss(chars, words).item() < 0.1
    assert model.loss(chars[:, :1], words[:, :1]).item() == 0  # one word predicts nothing


def test_scalar_mix() -> None:
    vectors = torch.randn(3, B, T, 4)
    mix = ScalarMix(3)
    assert list(mix.state_dict()) == ["weights", "gamma"]
    agree({"mean": mix(vectors)}, {"mean": vectors.mean(0)}, 1e-5, "at first")
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.0, math.log(2), math.log(5)]))
        mix.gamma.fill_(4.0)
    expected = 4 * (vectors[0] + 2 * vectors[1] + 5 * vectors[2]) / 8
    agree({"mixed": mix(vectors)}, {"mixed": expected}, 1e-5, "weighted")
    with pytest.raises(ValueError, match="vectors: expected 3 layers, got 2"):
        mix(vectors[:2])


def test_contextual_embedding_is_frozen_or_not() -> None:
    chars, _ = sentences()
    model = BidirectionalLanguageModel(V, CHARS, H, dropout=0.5)
    embedding = ContextualEmbedding(model, dropout=0.0).train()
    assert not model.training and embedding.output_size == 2 * H
    x = embedding(chars, LENGTHS)
    assert torch.equal(x, embedding(chars, LENGTHS)) and x.shape == (B, T, 2 * H)
    agree({"x": x}, {"x": model.vectors(chars, LENGTHS).mean(0)}, 1e-5, "at first")
    assert [name for name, p in embedding.named_parameters() if p.requires_grad] == [
        "mix.weights",
        "mix.gamma",
    ]
    x.sum().backward()
    assert embedding.mix.weights.grad.any() and embedding.mix.gamma.grad.any()
    # The same word has another vector elsewhere.
    chars[0, 0] = chars[0, 5]
    x = embedding(chars, LENGTHS)
    assert not torch.allclose(x[0, 0], x[0, 5])

    model = BidirectionalLanguageModel(V, CHARS, H)
    embedding = ContextualEmbedding(model, freeze=False).train()
    assert model.training
    embedding(chars, LENGTHS).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("fc."))


def test_elmo_refuses_another_projection() -> None:
    with pytest.raises(ValueError, match=r"chars\.projection: expected None or P = 8, got 4"):
        BidirectionalLanguageModel(V, CharacterOptions(LETTERS, projection=4), H)
