"""The sequence-to-sequence models beside the tutorials' own, written anew on torch.nn.

M PyTorch Masterclass (part 3), C CMSC 473/673, D deep learning for NLP.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compare import check_modules
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern import models
from seqkern.models.teacher_forcing import forced_runs

B, S, T, V, E, H = 4, 7, 6, 23, 5, 8
LENGTHS = torch.tensor([7, 3, 1, 5])
LAYERS = [seqkern.nn, nn]
both = pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])


def tokens(B: int = B, T: int = T, low: int = 4) -> Tensor:
    return torch.randint(low, V, (B, T))


def padded(value: int = 1) -> Tensor:
    return tokens(B, S).masked_fill(torch.arange(S) >= LENGTHS[:, None], value)


def keys_of(module: nn.Module) -> set[str]:
    return set(module.state_dict())


LSTM = {f"{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}


# ---- M: LSTM encoder and decoder ---------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, input_size, hidden_size, embed_size, num_layers=1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(input_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, num_layers, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(x), lengths, batch_first=True, enforce_sorted=False
        )
        _, (hidden, cell) = self.lstm(packed)
        return hidden, cell


class Decoder(nn.Module):
    def __init__(self, output_size, hidden_size, embed_size, num_layers=1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(output_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x, hidden, cell):
        output, (hidden, cell) = self.lstm(self.embedding(x.unsqueeze(1)), (hidden, cell))
        return self.fc(output.squeeze(1)), hidden, cell


class Seq2Seq(nn.Module):
    """forced: for each step after the first, is the target given?"""

    def __init__(self, encoder, decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, src, src_lengths, trg, forced):
        hidden, cell = self.encoder(src, src_lengths)
        outputs = [torch.zeros(trg.shape[0], self.decoder.fc.out_features, dtype=hidden.dtype)]
        x = trg[:, 0]
        for t in range(1, trg.shape[1]):
            output, hidden, cell = self.decoder(x, hidden, cell)
            outputs.append(output)
            x = trg[:, t] if forced[t - 1] else output.argmax(1)
        return torch.stack(outputs, 1)


def lstm_seq2seq(layers: ModuleType, num_layers: int = 2) -> models.LSTMSeq2Seq:
    sizes = (V, H, E, num_layers)
    return models.LSTMSeq2Seq(
        models.LSTMEncoder(*sizes, layers=layers), models.LSTMDecoder(*sizes, layers=layers)
    )


def coins(ratio: float, seed: int) -> list[bool]:
    """What forced_runs draws for T - 2 choices, and one for the choice that no step follows."""
    drawn = torch.rand(T - 2, generator=torch.Generator().manual_seed(seed)) < ratio
    return [*drawn.tolist(), True]


@both
@pytest.mark.parametrize("ratio", [1.0, 0.0, 0.5])
def test_lstm_seq2seq(layers: ModuleType, ratio: float) -> None:
    sizes = (V, H, E, 2)
    theirs, ours = Seq2Seq(Encoder(*sizes), Decoder(*sizes)), lstm_seq2seq(layers)
    src, trg, seed = padded(), tokens(), 1
    assert ratio != 0.5 or {*coins(ratio, seed)[:-1]} == {True, False}

    def run(module: nn.Module, dtype: torch.dtype) -> Tensor:
        if isinstance(module, Seq2Seq):
            return module(src, LENGTHS, trg, coins(ratio, seed))
        return module(src, LENGTHS, trg, ratio, generator=torch.Generator().manual_seed(seed))

    (logits,) = check_modules(theirs, ours, run, f"LSTMSeq2Seq {ratio}")
    assert logits.shape == (B, T, V)
    assert not logits[:, 0].any()


@both
def test_lstm_encoder_and_decoder_alone(layers: ModuleType) -> None:
    encoder, decoder = models.LSTMEncoder(V, H, E, layers=layers), models.LSTMDecoder(V, H, E, layers=layers)
    assert keys_of(encoder) == {"embedding.weight", *(f"lstm.{name}" for name in LSTM)}
    assert keys_of(decoder) == keys_of(encoder) | {"fc.weight", "fc.bias"}
    src, x = padded(), tokens()[:, 0]
    hidden, _ = check_modules(Encoder(V, H, E), encoder, lambda net, _: net(src, LENGTHS), "LSTMEncoder")
    assert hidden.shape == (1, B, H)
    h0, c0 = torch.randn(2, 1, B, H)
    logits, *_ = check_modules(
        *(Decoder(V, H, E), decoder, lambda net, d: net(x, h0.to(d), c0.to(d)), "LSTMDecoder")
    )
    assert logits.shape == (B, V)


@both
def test_padded_sources_equal_rows_one_by_one(layers: ModuleType) -> None:
    model, src, trg = lstm_seq2seq(layers), padded(), tokens()
    together = model(src, LENGTHS, trg, 1.0)
    for b, length in enumerate(LENGTHS):
        alone = model(src[b : b + 1, :length], None, trg[b : b + 1], 1.0)
        torch.testing.assert_close(together[b : b + 1], alone)


# ---- teacher forcing ---------------------------------------------------------------------------------------


def test_forced_runs() -> None:
    assert list(forced_runs(6, 1.0)) == [(0, 6)]
    assert list(forced_runs(3, 0.0)) == [(0, 1), (1, 2), (2, 3)]
    assert list(forced_runs(0, 0.5)) == []
    runs = list(forced_runs(1000, 0.7, torch.Generator().manual_seed(0)))
    assert [start for start, _ in runs[1:]] == [stop for _, stop in runs[:-1]]
    assert (runs[0][0], runs[-1][1]) == (0, 1000)
    assert abs(len(runs) - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5
    torch.manual_seed(1)
    first = list(forced_runs(50, 0.5))
    torch.manual_seed(1)
    assert list(forced_runs(50, 0.5)) == first
    with pytest.raises(ValueError, match=r"teacher_forcing_ratio: expected 0 to 1, got 1.5"):
        list(forced_runs(3, 1.5))


def test_scheduled_sampling() -> None:
    ratios = [models.scheduled_sampling(epoch, 10) for epoch in range(10)]
    assert ratios == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert models.scheduled_sampling(9, 10, minimum=0.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="epoch: expected 0 to total_epochs - 1 = 9, got 10"):
        models.scheduled_sampling(10, 10)
    with pytest.raises(ValueError, match="minimum: expected 0 to 1, got -1"):
        models.scheduled_sampling(0, 10, minimum=-1)


def test_a_target_of_no_steps_raises() -> None:
    empty = torch.zeros(B, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"trg: expected \[B, T\] with T > 0, got \(4, 0\)"):
        lstm_seq2seq(seqkern.nn)(padded(), None, empty)
    with pytest.raises(ValueError, match=r"trg: expected \[T, B\] with T > 0, got \(0, 4\)"):
        attn_seq2seq(seqkern.nn, 1)(padded().T, empty.T)
    with pytest.raises(ValueError, match=r"trg: expected \[B, T\] with T > 0, got \(4, 0\)"):
        models.DecoderRNN(H, V)(torch.zeros(B, S, H), torch.zeros(1, B, H), empty)


# ---- M: with attention, time first -------------------------------------------------------------------------


class BidirectionalEncoder(nn.Module):
    """M's with what it lacks: the other direction, and a bridge."""

    def __init__(self, input_dim, emb_dim, hid_dim, n_layers, dec_hid_dim) -> None:
        super().__init__()
        self.embedding = nn.Embedding(input_dim, emb_dim)
        self.rnn = nn.LSTM(emb_dim, hid_dim, n_layers, bidirectional=True)
        self.bridge_h = nn.Linear(2 * hid_dim, dec_hid_dim)
        self.bridge_c = nn.Linear(2 * hid_dim, dec_hid_dim)

    def forward(self, src, lengths=None):
        x = self.embedding(src)
        if lengths is not None:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        outputs, (h, c) = self.rnn(x)
        if lengths is not None:
            outputs, _ = nn.utils.rnn.pad_packed_sequence(outputs, total_length=len(src))
        h, c = (
            torch.stack([torch.cat([state[2 * i], state[2 * i + 1]], 1) for i in range(len(state) // 2)])
            for state in (h, c)
        )
        return outputs, (torch.tanh(self.bridge_h(h)), self.bridge_c(c))


class Attention(nn.Module):
    def __init__(self, enc_hid_dim, dec_hid_dim) -> None:
        super().__init__()
        self.attn = nn.Linear(enc_hid_dim * 2 + dec_hid_dim, dec_hid_dim)
        self.v = nn.Linear(dec_hid_dim, 1, bias=False)

    def forward(self, hidden, encoder_outputs, lengths=None):
        outputs = encoder_outputs.permute(1, 0, 2)
        hidden = hidden.unsqueeze(1).repeat(1, outputs.shape[1], 1)
        energy = self.v(torch.tanh(self.attn(torch.cat((hidden, outputs), dim=2)))).squeeze(2)
        if lengths is not None:
            beyond = torch.arange(energy.shape[1]) >= lengths[:, None]
            energy = energy.masked_fill(beyond, -torch.inf)
        return F.softmax(energy, dim=1)


class AttentionDecoder(nn.Module):
    def __init__(self, output_dim, emb_dim, enc_hid_dim, dec_hid_dim, n_layers, attention) -> None:
        super().__init__()
        self.attention = attention
        self.embedding = nn.Embedding(output_dim, emb_dim)
        self.rnn = nn.LSTM(enc_hid_dim * 2 + emb_dim, dec_hid_dim, n_layers)
        self.fc_out = nn.Linear(enc_hid_dim * 2 + dec_hid_dim + emb_dim, output_dim)

    def forward(self, input, hidden, cell, encoder_outputs, lengths=None):
        embedded = self.embedding(input.unsqueeze(0))
        a = self.attention(hidden[-1], encoder_outputs, lengths).unsqueeze(1)
        context = torch.bmm(a, encoder_outputs.permute(1, 0, 2)).permute(1, 0, 2)
        output, (hidden, cell) = self.rnn(torch.cat((embedded, context), dim=2), (hidden, cell))
        logits = self.fc_out(torch.cat((output.squeeze(0), context.squeeze(0), embedded.squeeze(0)), dim=1))
        return logits, hidden, cell


class AttentionSeq2Seq(nn.Module):
    def __init__(self, encoder, decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, src, trg, forced, lengths):
        encoder_outputs, (hidden, cell) = self.encoder(src, lengths)
        outputs = [torch.zeros(trg.shape[1], self.decoder.fc_out.out_features, dtype=hidden.dtype)]
        x = trg[0]
        for t in range(1, len(trg)):
            output, hidden, cell = self.decoder(x, hidden, cell, encoder_outputs, lengths)
            outputs.append(output)
            x = trg[t] if forced[t - 1] else output.argmax(1)
        return torch.stack(outputs)


DEC = 9  # unlike H, which the bridge is for


def attn_seq2seq(layers: ModuleType, n_layers: int, dropout: float = 0.0) -> models.AttnSeq2Seq:
    encoder = models.AttnEncoder(V, E, H, n_layers, dropout, dec_hid_dim=DEC, layers=layers)
    score = models.AttnScore(H, DEC, layers=layers)
    decoder = models.AttnDecoder(V, E, H, DEC, n_layers, dropout, score, layers=layers)
    return models.AttnSeq2Seq(encoder, decoder, "cpu")


@both
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_attn_seq2seq(layers: ModuleType, n_layers: int, ratio: float, lengths: Tensor | None) -> None:
    """One layer runs in one operator, two step by step: the same equations."""
    theirs = AttentionSeq2Seq(
        BidirectionalEncoder(V, E, H, n_layers, DEC),
        AttentionDecoder(V, E, H, DEC, n_layers, Attention(H, DEC)),
    )
    src, trg, seed = padded().T, tokens().T, 1

    def run(module: nn.Module, dtype: torch.dtype) -> Tensor:
        if isinstance(module, AttentionSeq2Seq):
            return module(src, trg, coins(ratio, seed), lengths)
        generator = torch.Generator().manual_seed(seed)
        return module(src, trg, ratio, src_lengths=lengths, generator=generator)

    (logits,) = check_modules(theirs, attn_seq2seq(layers, n_layers), run, f"AttnSeq2Seq {n_layers} {ratio}")
    assert logits.shape == (T, B, V)
    assert not logits[0].any()


@both
def test_attn_modules_alone(layers: ModuleType) -> None:
    model = attn_seq2seq(layers, 1)
    assert keys_of(model.encoder) == {
        *("embedding.weight", "bridge_h.weight", "bridge_h.bias", "bridge_c.weight", "bridge_c.bias"),
        *(f"rnn.{name}{direction}" for name in LSTM for direction in ("", "_reverse")),
    }
    assert keys_of(model.decoder) == {
        *("embedding.weight", "fc_out.weight", "fc_out.bias", *(f"rnn.{name}" for name in LSTM)),
        *("attention.attn.weight", "attention.attn.bias", "attention.v.weight"),
    }
    hidden, encoder_outputs = torch.randn(B, DEC), torch.randn(S, B, 2 * H)
    (weights,) = check_modules(
        *(Attention(H, DEC), model.decoder.attention),
        *(lambda net, d: net(hidden.to(d), encoder_outputs.to(d)), "AttnScore"),
    )
    assert weights.shape == (B, S)
    x, h0, c0 = tokens()[:, 0], torch.randn(1, B, DEC), torch.randn(1, B, DEC)
    logits, *_ = check_modules(
        *(AttentionDecoder(V, E, H, DEC, 1, Attention(H, DEC)), model.decoder),
        *(lambda net, d: net(x, h0.to(d), c0.to(d), encoder_outputs.to(d)), "AttnDecoder"),
    )
    assert logits.shape == (B, V)


def test_one_layer_of_attention_is_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = seqkern.ops.attention_decoder
    monkeypatch.setattr(
        seqkern.ops, "attention_decoder", lambda *a, **k: calls.append(a[0].shape) or fused(*a, **k)
    )
    src, trg = padded().T, tokens().T
    attn_seq2seq(seqkern.nn, 1)(src, trg, 1.0)
    assert calls == [(T - 1, B, E)]
    attn_seq2seq(seqkern.nn, 2)(src, trg, 1.0)
    attn_seq2seq(nn, 1)(src, trg, 1.0)
    assert len(calls) == 1


def test_dropout_in_training_alone() -> None:
    model = attn_seq2seq(seqkern.nn, 2, dropout=0.5)
    assert model.encoder.rnn.dropout == model.decoder.rnn.dropout == 0.5
    src, trg = padded().T, tokens().T
    assert not torch.equal(model(src, trg, 1.0), model(src, trg, 1.0))
    model.eval()
    assert torch.equal(model(src, trg, 1.0), model(src, trg, 1.0))


# ---- attention modules -------------------------------------------------------------------------------------


class Luong(nn.Module):
    def __init__(self, hidden_size, method="general") -> None:
        super().__init__()
        self.method = method
        if method == "general":
            self.W = nn.Linear(hidden_size, hidden_size, bias=False)
        if method == "concat":
            self.W = nn.Linear(hidden_size * 2, hidden_size, bias=False)
            self.v = nn.Parameter(torch.rand(hidden_size))

    def forward(self, decoder_hidden, encoder_outputs):
        query = decoder_hidden.unsqueeze(1)
        if self.method == "dot":
            scores = (query * encoder_outputs).sum(2)
        elif self.method == "general":
            scores = (query * self.W(encoder_outputs)).sum(2)
        else:
            both = torch.cat([query.expand(-1, encoder_outputs.shape[1], -1), encoder_outputs], 2)
            scores = torch.tanh(self.W(both)) @ self.v
        weights = F.softmax(scores, dim=1)
        return weights, torch.bmm(weights.unsqueeze(1), encoder_outputs).squeeze(1)


@both
@pytest.mark.parametrize("method", ["general", "concat"])
def test_luong_attention(layers: ModuleType, method: str) -> None:
    hidden, outputs = torch.randn(B, H), torch.randn(B, S, H)
    weights, context = check_modules(
        *(Luong(H, method), models.LuongAttention(H, method, layers=layers)),
        *(lambda net, d: net(hidden.to(d), outputs.to(d)), method),
    )
    assert weights.shape == (B, S) and context.shape == (B, H)
    keys = {"general": {"W.weight"}, "concat": {"W.weight", "v"}}
    assert keys_of(models.LuongAttention(H, method, layers=layers)) == keys[method]


@both
def test_luong_dot_and_errors(layers: ModuleType) -> None:
    hidden, outputs = torch.randn(B, H), torch.randn(B, S, H)
    ours = models.LuongAttention(H, "dot", layers=layers)
    for got, expected in zip(ours(hidden, outputs), Luong(H, "dot")(hidden, outputs), strict=True):
        torch.testing.assert_close(got, expected)
    assert not keys_of(ours)
    with pytest.raises(ValueError, match="method: expected 'dot', 'general' or 'concat', got 'cosine'"):
        models.LuongAttention(H, "cosine", layers=layers)


class Bahdanau(nn.Module):
    def __init__(self, hidden_size) -> None:
        super().__init__()
        self.Wa = nn.Linear(hidden_size, hidden_size)
        self.Ua = nn.Linear(hidden_size, hidden_size)
        self.Va = nn.Linear(hidden_size, 1)

    def forward(self, query, keys):
        scores = self.Va(torch.tanh(self.Wa(query) + self.Ua(keys))).squeeze(2).unsqueeze(1)
        weights = F.softmax(scores, dim=-1)
        return torch.bmm(weights, keys), weights


@both
def test_bahdanau_attention(layers: ModuleType) -> None:
    query, keys = torch.randn(B, 1, H), torch.randn(B, S, H)
    context, weights = check_modules(
        *(Bahdanau(H), models.BahdanauAttention(H, layers=layers)),
        *(lambda net, d: net(query.to(d), keys.to(d)), "BahdanauAttention", "Va.bias"),
    )
    assert context.shape == (B, 1, H) and weights.shape == (B, 1, S)


@both
@pytest.mark.parametrize("kind", ["dot", "general", "concat", "bahdanau"])
def test_attention_of_lengths_equals_rows_one_by_one(layers: ModuleType, kind: str) -> None:
    hidden, outputs = torch.randn(B, H), torch.randn(B, S, H)
    bahdanau = kind == "bahdanau"
    ours = (
        models.BahdanauAttention(H, layers=layers)
        if bahdanau
        else models.LuongAttention(H, kind, layers=layers)
    )
    query = hidden.unsqueeze(1) if bahdanau else hidden
    together = ours(query, outputs, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS):
        alone = ours(query[b : b + 1], outputs[b : b + 1, :length])
        for got, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(got[b : b + 1, ..., : expected.shape[-1]], expected)
            assert not got[b, ..., expected.shape[-1] :].any()


# ---- C -----------------------------------------------------------------------------------------------------


class CEncoder(nn.Module):
    def __init__(self, input_size, hidden_size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(input_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)

    def forward(self, input):
        return self.gru(self.embedding(input))


class CDecoder(nn.Module):
    SOS_TOKEN, MAX_LENGTH = 3, 5

    def __init__(self, hidden_size, output_size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(output_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.out = nn.Linear(hidden_size, output_size)

    def forward(self, encoder_outputs, encoder_hidden, target_tensor=None):
        decoder_input = torch.full((encoder_outputs.size(0), 1), self.SOS_TOKEN)
        decoder_hidden, outputs = encoder_hidden, []
        for i in range(self.MAX_LENGTH):
            output, decoder_hidden = self.forward_step(decoder_input, decoder_hidden)
            outputs.append(output)
            if target_tensor is not None:
                decoder_input = target_tensor[:, i].unsqueeze(1)
            else:
                decoder_input = output.topk(1).indices.squeeze(-1).detach()
        return F.log_softmax(torch.cat(outputs, dim=1), dim=-1), decoder_hidden, None

    def forward_step(self, input, hidden):
        output, hidden = self.gru(F.relu(self.embedding(input)), hidden)
        return self.out(output), hidden


@both
@pytest.mark.parametrize("forced", [True, False])
def test_encoder_and_decoder_rnn(layers: ModuleType, forced: bool) -> None:
    encoder = models.EncoderRNN(V, H, layers=layers)
    assert encoder.dropout.p == 0.1
    assert keys_of(encoder) == {"embedding.weight", *(f"gru.{name}" for name in LSTM)}
    decoder = models.DecoderRNN(H, V, sos_index=3, max_length=5, layers=layers)
    assert keys_of(decoder) == keys_of(encoder) | {"out.weight", "out.bias"}
    src = tokens(B, S)
    target = tokens(B, 5) if forced else None

    def run(net: nn.ModuleList, dtype: torch.dtype) -> tuple[Tensor, ...]:
        outputs, hidden = net[0](src)
        log_probs, last, none = net[1](outputs, hidden, target)
        assert none is None
        return outputs, hidden, log_probs, last

    theirs = nn.ModuleList([CEncoder(V, H), CDecoder(H, V)])
    found = check_modules(theirs, nn.ModuleList([encoder.eval(), decoder]), run, f"DecoderRNN {forced}")
    assert found[0].shape == (B, S, H) and found[1].shape == (1, B, H) and found[2].shape == (B, 5, V)


def test_c_decoder_searched_by_the_library() -> None:
    """Its greedy loop is greedy_search over forward_step; a beam finds nothing less likely."""
    encoder, decoder = models.EncoderRNN(V, H).eval(), models.DecoderRNN(H, V, sos_index=3, max_length=6)
    src = tokens(B, S)
    outputs, hidden = encoder(src, LENGTHS)

    def step(ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits, hidden = decoder.forward_step(ids.unsqueeze(1), hidden)
        return F.log_softmax(logits.squeeze(1), -1), hidden

    log_probs, *_ = decoder(outputs, hidden)
    start = torch.full((B,), 3)
    found = models.greedy_search(step, hidden, start, eos_index=None, max_len=6)
    assert torch.equal(found.ids, log_probs.argmax(2))
    torch.testing.assert_close(found.scores, log_probs.amax(2).sum(1).detach())
    beam = models.beam_search(
        *(step, hidden, start),
        **dict(eos_index=-1, max_len=6, beam_width=20, length_penalty=0.0),
        reorder=lambda state, index: models.reorder_state(state, index, dim=1),
    )
    assert (beam.best().scores >= found.scores - 1e-5).all()


def test_encoder_rnn_of_lengths() -> None:
    encoder, src = models.EncoderRNN(V, H).eval(), padded()
    outputs, hidden = encoder(src, LENGTHS)
    for b, length in enumerate(LENGTHS):
        y, h = encoder(src[b : b + 1, :length])
        torch.testing.assert_close(outputs[b : b + 1, :length], y)
        torch.testing.assert_close(hidden[:, b : b + 1], h)
        assert not outputs[b, length:].any()


# ---- D -----------------------------------------------------------------------------------------------------


class DEncoder(nn.Module):
    def __init__(self, input_size, hidden_size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(input_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size)

    def forward(self, input):
        return self.gru(self.embedding(input))


class DDecoder(nn.Module):
    """One step, with D's slips corrected: concatenated along features, softmax over time, a GRU of 2H."""

    def __init__(self, output_size, hidden_size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(output_size, hidden_size)
        self.gru = nn.GRU(2 * hidden_size, hidden_size)
        self.attention = nn.Linear(2 * hidden_size, 1)
        self.out = nn.Linear(hidden_size, output_size)

    def forward(self, input, hidden, encoder_outputs):
        query = hidden.expand(len(encoder_outputs), -1, -1)
        weights = F.softmax(self.attention(torch.cat([query, encoder_outputs], 2)), dim=0)
        context = (weights * encoder_outputs).sum(0, keepdim=True)
        output, hidden = self.gru(torch.cat([self.embedding(input).unsqueeze(0), context], 2), hidden)
        return self.out(output.squeeze(0)), hidden, weights.squeeze(2).T


@both
@pytest.mark.parametrize("batch_first", [False, True])
def test_char_encoder_and_decoder(layers: ModuleType, batch_first: bool) -> None:
    """All steps in one call equal D's, one by one: its attention does not depend on the step."""
    options = dict(batch_first=batch_first, layers=layers)
    ours = nn.ModuleList([models.CharEncoder(V, H, **options), models.CharDecoder(V, H, **options)])
    assert keys_of(ours[0]) == {"embedding.weight", *(f"gru.{name}" for name in LSTM)}
    assert keys_of(ours[1]) == keys_of(ours[0]) | {
        *("attention.weight", "attention.bias", "out.weight", "out.bias")
    }
    src, trg = tokens(B, S), tokens(B, T)

    def steps(net: nn.ModuleList, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(net[1], models.CharDecoder):
            outputs, hidden = net[0](src if batch_first else src.T)
            logits, hidden, weights = net[1](trg if batch_first else trg.T, hidden, outputs)
            return logits.transpose(0, 1) if batch_first else logits, hidden, weights
        outputs, hidden = net[0](src.T)
        found = []
        for x in trg.T:
            logits, hidden, weights = net[1](x, hidden, outputs)
            found.append(logits)
        return torch.stack(found), hidden, weights

    theirs = nn.ModuleList([DEncoder(V, H), DDecoder(V, H)])
    logits, _, weights = check_modules(theirs, ours, steps, "CharDecoder", "1.attention.bias")
    assert logits.shape == (T, B, V) and weights.shape == (B, S)


def test_char_decoder_one_step_and_lengths() -> None:
    encoder, decoder = models.CharEncoder(V, H), models.CharDecoder(V, H)
    src, x = padded().T, tokens()[:, 0]
    outputs, hidden = encoder(src, lengths=LENGTHS)
    logits, last, weights = decoder(x, hidden, outputs, lengths=LENGTHS)
    assert logits.shape == (B, V) and last.shape == (1, B, H)
    for b, length in enumerate(LENGTHS):
        y, h = encoder(src[:length, b : b + 1])
        alone, *_ = decoder(x[b : b + 1], h, y)
        torch.testing.assert_close(logits[b : b + 1], alone)
        assert not weights[b, length:].any()


# ---- decoding ----------------------------------------------------------------------------------------------


def seq2seqs() -> Iterator[tuple[str, models.DecodingModule]]:
    for layers in LAYERS:
        name = layers.__name__
        yield f"LSTMSeq2Seq {name}", lstm_seq2seq(layers)
        yield f"AttnSeq2Seq {name}", attn_seq2seq(layers, 2)
        yield f"AttnSeq2Seq one layer {name}", attn_seq2seq(layers, 1)
        sizes = dict(embed_dim=E, hidden_size=H, attention_dim=6, layers=layers)
        yield f"TranslationGRU {name}", models.TranslationGRU(V, V, **sizes)
        yield f"TranslationGRU concat {name}", models.TranslationGRU(V, V, **sizes, attention="concat")


@pytest.mark.parametrize(("name", "model"), [pytest.param(*pair, id=pair[0]) for pair in seq2seqs()])
def test_decoding(name: str, model: models.DecodingModule) -> None:
    """Greedy is the whole prefix's argmax, a beam's log p are the model's, and padding changes nothing."""
    model.train()
    src = padded()
    given = src.T if isinstance(model, models.AttnSeq2Seq) else src
    greedy = model.decode(given, LENGTHS, max_len=7, eos_index=5)
    assert model.training
    beam = model.decode(given, LENGTHS, max_len=7, eos_index=5, beam_width=3, n_best=2, length_penalty=0.5)
    assert greedy.ids.shape[0] == B and beam.ids.shape[:2] == (B, 2)
    model.eval()
    for b, length in enumerate(LENGTHS):
        row = src[b : b + 1, :length]
        n = int(greedy.lengths[b])
        log_p = teacher_forced(model, row, greedy.ids[b, :n])
        assert torch.equal(log_p.argmax(1), greedy.ids[b, :n])
        for i in range(2):
            ids = beam.ids[b, i, : beam.lengths[b, i]]
            total = teacher_forced(model, row, ids).gather(1, ids[:, None]).sum()
            torch.testing.assert_close(beam.log_probs[b, i], total)
            torch.testing.assert_close(beam.scores[b, i], total / len(ids) ** 0.5)


class Operators(TorchDispatchMode):
    """Counts the operators of seqkern's that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ours += function.namespace == "seqkern"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "model"), [pytest.param(*pair, id=pair[0]) for pair in seq2seqs()])
def test_the_twin_on_torch_runs_none_of_seqkerns_operators(name: str, model: models.DecodingModule) -> None:
    src = padded().T if isinstance(model, models.AttnSeq2Seq) else padded()
    with Operators() as operators:
        model.decode(src, LENGTHS, max_len=3, beam_width=2)
    if name.endswith("torch.nn"):
        assert not operators.ours
        assert not any(isinstance(module, (seqkern.GRUCell, seqkern.LSTM)) for module in model.modules())
    elif seqkern._extension.AVAILABLE:
        assert operators.ours


@torch.no_grad()
def teacher_forced(model: nn.Module, src: Tensor, ids: Tensor) -> Tensor:
    """One row: [T, V] log-probabilities of each of ids and its rivals, after <sos> and the ids before."""
    trg = torch.cat([torch.tensor([2]), ids]).unsqueeze(0)
    if isinstance(model, models.AttnSeq2Seq):
        logits = model(src.T, trg.T, 1.0)[1:, 0]
    elif isinstance(model, models.LSTMSeq2Seq):
        logits = model(src, None, trg, 1.0)[0, 1:]
    else:
        logits = model(src, trg[:, :-1])[0]
    return torch.log_softmax(logits, -1)


# ---- the GRU to train --------------------------------------------------------------------------------------


class RNNsearch(nn.Module):
    """TranslationGRU's docstring, one step after the other."""

    def __init__(self, embed_dim: int, hidden: int, attention_dim: int, tied: bool) -> None:
        super().__init__()
        enc = hidden // 2
        self.src_embedding = nn.Embedding(V, embed_dim, padding_idx=1)
        self.tgt_embedding = nn.Embedding(V, embed_dim, padding_idx=1)
        self.encoder = nn.GRU(embed_dim, enc, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * enc, hidden)
        self.decoder = nn.ModuleDict(
            {
                "cell": nn.GRUCell(embed_dim + 2 * enc, hidden),
                "attention": nn.ModuleDict(
                    {
                        "query_projection": nn.Linear(hidden, attention_dim, bias=False),
                        "key_projection": nn.Linear(2 * enc, attention_dim, bias=False),
                    }
                ),
            }
        )
        self.decoder["attention"].v = nn.Parameter(torch.rand(attention_dim))
        self.readout = nn.Linear(hidden + 2 * enc + embed_dim, embed_dim)
        self.out = nn.Linear(embed_dim, V)
        if tied:
            self.out.weight = self.tgt_embedding.weight

    def forward(self, src, tgt, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.src_embedding(src), lengths, batch_first=True, enforce_sorted=False
        )
        y, h = self.encoder(packed)
        y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=src.shape[1])
        h = torch.tanh(self.bridge(torch.cat([h[0], h[1]], 1)))
        attention, beyond = self.decoder["attention"], torch.arange(src.shape[1]) >= lengths[:, None]
        keys = attention["key_projection"](y)
        logits = []
        for x in self.tgt_embedding(tgt).unbind(1):
            scores = torch.tanh(attention["query_projection"](h)[:, None] + keys) @ attention.v
            weights = torch.softmax(scores.masked_fill(beyond, -torch.inf), 1)
            context = torch.bmm(weights.unsqueeze(1), y).squeeze(1)
            h = self.decoder["cell"](torch.cat([x, context], 1), h)
            logits.append(self.out(torch.tanh(self.readout(torch.cat([h, context, x], 1)))))
        return torch.stack(logits, 1)


@both
@pytest.mark.parametrize("tied", [True, False])
def test_translation_gru(layers: ModuleType, tied: bool) -> None:
    ours = models.TranslationGRU(V, V, E, H, attention_dim=6, tie_weights=tied, layers=layers).eval()
    src, tgt = padded(), tokens()
    (logits,) = check_modules(
        RNNsearch(E, H, 6, tied), ours, lambda net, _: net(src, tgt, LENGTHS), "TranslationGRU"
    )
    assert logits.shape == (B, T, V)
    assert torch.equal(ours(src, tgt), ours(src, tgt, LENGTHS))  # as pad_index says
    assert keys_of(ours) == {
        *("src_embedding.weight", "tgt_embedding.weight", "bridge.weight", "bridge.bias"),
        *(f"encoder.{name}{direction}" for name in LSTM for direction in ("", "_reverse")),
        *(f"decoder.cell.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *("decoder.attention.query_projection.weight", "decoder.attention.key_projection.weight"),
        *("decoder.attention.v", "readout.weight", "readout.bias", "out.weight", "out.bias"),
    }


@pytest.mark.parametrize("attention", ["dot", "general", "concat"])
def test_translation_gru_with_luongs_attention(attention: str) -> None:
    """The same on torch.nn's cell and the formulas as on the kernels; padded rows as one by one."""
    theirs, ours = (
        models.TranslationGRU(V, V, E, H, attention=attention, layers=layers).eval()
        for layers in (nn, seqkern.nn)
    )
    src, tgt = padded(), tokens()
    check_modules(theirs, ours, lambda net, _: net(src, tgt), attention)
    combine = {"decoder.combine.weight"}
    scorer = {"decoder.attention.projection.weight"} if attention != "dot" else set()
    assert keys_of(ours) >= combine | scorer
    together = ours(src, tgt)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(together[b : b + 1], ours(src[b : b + 1, :length], tgt[b : b + 1]))
    with pytest.raises(ValueError, match="attention: expected 'additive', 'dot', 'general', 'concat'"):
        models.TranslationGRU(V, V, E, H, attention="cosine")


def test_translation_gru_options() -> None:
    torch.manual_seed(0)
    ours = models.TranslationGRU(V, V, E, H, encoder_size=3, share_embeddings=True, pad_index=0)
    torch.manual_seed(0)
    twin = models.TranslationGRU(V, V, E, H, encoder_size=3, share_embeddings=True, pad_index=0, layers=nn)
    for (name, got), expected in zip(ours.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name  # the same seed gives the same weights
    assert ours.src_embedding is ours.tgt_embedding and ours.out.weight is ours.src_embedding.weight
    assert ours.encoder.hidden_size == 3
    src, tgt = padded(0), tokens()
    tgt[1, 2:], tgt[2, 4:] = 0, 0
    logits = ours.eval()(src, tgt)
    valid = tgt != 0
    torch.testing.assert_close(ours(src, tgt, valid_only=True), logits[valid])
    lengths = torch.tensor([1, 6, 0, 2])
    some = ours(src, tgt, tgt_lengths=lengths, valid_only=True)
    torch.testing.assert_close(some, torch.cat([logits[b, :n] for b, n in enumerate(lengths)]))
    weights = ours.attention_weights(src, tgt)
    assert weights.shape == (B, T, S)
    torch.testing.assert_close(weights.sum(2), torch.ones(B, T))
    assert not weights[torch.arange(S).expand(B, T, S) >= LENGTHS[:, None, None]].any()
    with pytest.raises(ValueError, match=r"share_embeddings: expected one vocabulary, so .* got 23 and 24"):
        models.TranslationGRU(V, V + 1, share_embeddings=True)


def test_translation_gru_learns_to_copy(data: Path) -> None:
    """Multi30k's first German sentences, copied: the same losses on both kinds of layers, and they fall."""
    path = data / "multi30k" / "raw" / "train.de.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [next(file).split()[:6] for _ in range(48)]
    ids = {word: 4 + i for i, word in enumerate(sorted({word for line in lines for word in line}))}
    rows = [torch.tensor([2, *(ids[word] for word in line), 3]) for line in lines]
    batch = nn.utils.rnn.pad_sequence(rows, True, 1)
    lengths = torch.tensor([len(row) - 1 for row in rows])
    targets = torch.cat([row[1:] for row in rows])
    traces = []
    for layers in LAYERS:
        torch.manual_seed(0)
        size = 4 + len(ids)
        model = models.TranslationGRU(size, size, 24, 32, dropout=0.0, share_embeddings=True, layers=layers)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        trace = []
        for _ in range(35):
            logits = model(batch[:, 1:], batch[:, :-1], lengths, lengths, valid_only=True)
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trace.append(loss.item())
        traces.append(trace)
    assert traces[0] == pytest.approx(traces[1], rel=1e-3)
    assert traces[0][-1] < traces[0][0] / 2
