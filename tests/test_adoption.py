"""Existing models taken over: replaced and restored in place, and what patch() constructs."""

import copy
import io
import pickle
import threading

import pytest
import torch
from compare import flat
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import seqkern

EVERY = [
    (nn.RNN, (6, 8, 2), seqkern.RNN),
    (nn.LSTM, (6, 8, 2), seqkern.LSTM),
    (nn.GRU, (6, 8, 2), seqkern.GRU),
    (nn.RNNCell, (6, 8), seqkern.RNNCell),
    (nn.LSTMCell, (6, 8), seqkern.LSTMCell),
    (nn.GRUCell, (6, 8), seqkern.GRUCell),
    (nn.MultiheadAttention, (8, 2), seqkern.MultiHeadAttention),
    (nn.TransformerEncoderLayer, (8, 2, 16, 0.0), seqkern.TransformerEncoderLayer),
    (nn.TransformerDecoderLayer, (8, 2, 16, 0.0), seqkern.TransformerDecoderLayer),
    (nn.Transformer, (8, 2, 1, 1, 16, 0.0), seqkern.Transformer),
]
each = pytest.mark.parametrize(
    ("theirs", "arguments", "ours"), EVERY, ids=[theirs.__name__ for theirs, _, _ in EVERY]
)


def call(module: nn.Module) -> list[Tensor]:
    """The module's results, and its gradients by every input and parameter, always from the same numbers."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    if isinstance(module, nn.MultiheadAttention):
        inputs = [draw(5, 3, 8), draw(7, 3, 8), draw(7, 3, 8)]
    elif isinstance(module, nn.Transformer | nn.TransformerDecoderLayer):
        inputs = [draw(5, 3, 8), draw(7, 3, 8)]
    elif isinstance(module, nn.TransformerEncoderLayer):
        inputs = [draw(5, 3, 8)]
    else:
        inputs = [draw(3, 6) if isinstance(module, nn.RNNCellBase) else draw(5, 3, 6)]
    results = flat(module(*inputs))
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    return [*results, *torch.autograd.grad(sum(r.square().sum() for r in results), wanted)]


def assert_close(results: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


class Acoustic(nn.Module):
    """An encoder such as speech recognisers have: convolution over time, recurrent layers, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.encoder = nn.LSTM(8, 8, 2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.classifier = nn.Linear(16, 5)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        x = self.conv(features.transpose(1, 2)).transpose(1, 2).relu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True)
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        x = x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.classifier(x).log_softmax(-1)


# ---- replace -----------------------------------------------------------------------------------------------


@each
def test_replace_and_restore(theirs: type, arguments: tuple, ours: type) -> None:
    """The same object with the same parameters gives the same results; afterwards it is as it was."""
    module = theirs(*arguments)
    expected, text = call(module), repr(module)
    parameters, state = list(module.parameters()), module.__dict__.copy()
    seqkern.replace(module)
    assert type(module) is ours
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert_close(call(module), expected)
    seqkern.restore(module)
    assert type(module) is theirs and repr(module) == text
    assert module.__dict__.keys() == state.keys()
    same_bits(call(module), expected)


def test_whole_model() -> None:
    torch.manual_seed(0)
    model = Acoustic()
    batch = torch.randn(3, 9, 8), torch.tensor([9, 4, 7])
    expected = model(*batch)
    keys = list(model.state_dict())
    report = seqkern.replace(model)
    assert report.changed == [
        ("encoder", "torch.nn.LSTM", "seqkern.LSTM"),
        ("attention", "torch.nn.MultiheadAttention", "seqkern.MultiHeadAttention"),
    ]
    assert report.skipped == []
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(*batch), expected)


def test_report_can_be_read() -> None:
    model = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4), type("Own", (nn.GRU,), {})(4, 4))
    text = str(seqkern.replace(model))
    assert text.splitlines() == [
        "0  torch.nn.LSTM      -> seqkern.LSTM",
        "2  test_adoption.Own  left: a subclass of torch.nn.GRU, whose forward may be its own",
    ]
    assert str(seqkern.replace(nn.Linear(2, 2))) == "nothing to change"
    assert seqkern.replace(nn.LSTM(2, 2)).changed[0][0] == "(model)"


def test_what_is_left_says_why() -> None:
    own = type("Own", (nn.MultiheadAttention,), {})(4, 2)
    wrapped = nn.GRU(4, 4)
    wrapped.forward = wrapped.forward
    script = torch.jit.script(nn.LSTM(4, 4))
    model = nn.ModuleDict(dict(own=own, wrapped=wrapped, ours=seqkern.LSTM(4, 4), script=script))
    report = seqkern.replace(model)
    assert report.changed == []
    assert {name: why for name, _, why in report.skipped} == {
        "own": "a subclass of torch.nn.MultiheadAttention, whose forward may be its own",
        "wrapped": "its forward was replaced on the instance",
        "ours": "already seqkern's",
        "script": "compiled by TorchScript",
    }


def test_quantized_layers_are_left() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 4)), {nn.LSTM})
    ((name, _, why),) = seqkern.replace(model).skipped
    assert name == "0" and why.startswith("not torch.nn's, but torch.ao.nn.quantized")


def test_training_goes_on() -> None:
    """The optimizer's state, tied weights and hooks are those of before; the steps those of torch.nn."""

    def steps(swap: bool) -> tuple[list[float], int]:
        torch.manual_seed(0)
        first, second = nn.LSTM(6, 6), nn.LSTM(6, 6)
        second.weight_hh_l0 = first.weight_hh_l0
        model = nn.Sequential(first)
        model.second = second
        calls = []
        second.register_forward_hook(lambda *_: calls.append(1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        x, losses = torch.randn(5, 3, 6), []
        for step in range(6):
            if swap and step == 3:
                model.eval()
                seqkern.replace(model)
                assert not model.second.training
                assert first.weight_hh_l0 is second.weight_hh_l0
                model.train()
            loss = second(first(x)[0])[0].square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses, len(calls)

    losses, calls = steps(swap=True)
    expected, expected_calls = steps(swap=False)
    assert calls == expected_calls == 6
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def test_parametrized_weights() -> None:
    """Weight norm stays, and can be taken off a replaced and a restored layer."""
    module, other = nn.LSTM(6, 8), nn.LSTM(6, 8)
    for m in (module, other):
        parametrizations.weight_norm(m, "weight_hh_l0")
    expected = call(module)
    for m in (module, other):
        seqkern.replace(m)
        assert isinstance(m, seqkern.LSTM) and parametrize.is_parametrized(m, "weight_hh_l0")
    assert_close(call(module), expected)
    parametrize.remove_parametrizations(other, "weight_hh_l0")
    assert type(other) is seqkern.LSTM
    seqkern.restore(module)
    assert not isinstance(module, seqkern.LSTM) and parametrize.is_parametrized(module)
    same_bits(call(module), expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is nn.LSTM


def test_pruned_weights() -> None:
    module = nn.GRU(6, 8)
    prune.random_unstructured(module, "weight_ih_l0", 0.5)
    expected = call(module)
    seqkern.replace(module)
    assert_close(call(module), expected)


def test_copies_and_pickles() -> None:
    """A copy, or what was saved, is ours, loads, and can be restored."""
    module = nn.Sequential(nn.LSTM(6, 8))
    seqkern.replace(module)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other[0]) is seqkern.LSTM
        same_bits(call(other[0]), call(module[0]))
        assert seqkern.restore(other).changed == [("0", "seqkern.LSTM", "torch.nn.LSTM")]
        assert type(other[0]) is nn.LSTM


def test_restore_leaves_what_torch_lacks() -> None:
    model = nn.ModuleList([nn.LSTM(4, 4), nn.GRU(4, 4), nn.RNN(4, 4)])
    seqkern.replace(model)
    model[0].zoneout = 0.1
    model[1].reset_after = False
    report = seqkern.restore(model)
    assert report.skipped == [
        ("0", "seqkern.LSTM", "torch.nn.LSTM has no zoneout=0.1"),
        ("1", "seqkern.GRU", "torch.nn.GRU has no reset_after=False"),
    ]
    assert report.changed == [("2", "seqkern.RNN", "torch.nn.RNN")]


def test_restore_leaves_what_was_ours_before() -> None:
    model = nn.Sequential(seqkern.LSTM(4, 4))
    assert seqkern.restore(model).changed == [] and type(model[0]) is seqkern.LSTM


def test_replace_twice() -> None:
    model = nn.Sequential(nn.LSTM(4, 4))
    seqkern.replace(model)
    report = seqkern.replace(model)
    assert report.changed == [] and report.skipped == [("0", "seqkern.LSTM", "already seqkern's")]
    seqkern.restore(model)
    assert type(model[0]) is nn.LSTM


@pytest.mark.parametrize("norm_first", (False, True))
def test_transformer_stacks(norm_first: bool) -> None:
    """The stack with torch's nested fast path, layers with their own forward among it, padded batches."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    own = type("Own", (nn.TransformerEncoderLayer,), {})
    stack.layers[1].__class__ = own
    x, padding = torch.randn(3, 6, 8), torch.arange(6) >= torch.tensor([[6], [2], [4]])
    expected = stack(x, src_key_padding_mask=padding)
    report = seqkern.replace(stack)
    assert [name for name, _, _ in report.changed] == [
        *("(model)", "layers.0", "layers.0.self_attn", "layers.1.self_attn")
    ]
    for mode in (stack.train(), stack.eval()):
        y = mode(x, src_key_padding_mask=padding)
        torch.testing.assert_close(y[~padding], expected[~padding])


def test_functional_call_and_ema() -> None:
    model = nn.Sequential(nn.LSTM(6, 8))
    average = torch.optim.swa_utils.AveragedModel(model)
    seqkern.replace(average)
    average.update_parameters(model)
    weights = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    x = torch.randn(4, 2, 6)
    expected, _ = torch.func.functional_call(model, weights, (x,))
    result, _ = torch.func.functional_call(average.module, weights, (x,))
    torch.testing.assert_close(result, expected)
    assert type(model[0]) is nn.LSTM


@pytest.mark.parametrize("function", (seqkern.replace, seqkern.restore))
def test_only_modules(function) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        function({})


# ---- patch -------------------------------------------------------------------------------------------------


@each
def test_patch(theirs: type, arguments: tuple, ours: type) -> None:
    torch.manual_seed(5)
    expected = theirs(*arguments)
    torch.manual_seed(5)
    with seqkern.patch():
        module = theirs(*arguments)
    assert type(module) is ours and type(theirs(*arguments)) is theirs
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_close(call(module), call(expected))


def test_patch_reaches_models_and_leaves_subclasses() -> None:
    class Own(nn.LSTM):
        def __init__(self, size: int, *, extra: int) -> None:
            super().__init__(size, size)
            self.extra = extra

    with seqkern.patch():
        model, own, layer = Acoustic(), Own(3, extra=1), seqkern.LSTM(3, 4)
    assert type(model.encoder) is seqkern.LSTM and type(model.attention) is seqkern.MultiHeadAttention
    assert type(own) is Own and own.extra == 1
    assert type(layer) is seqkern.LSTM
    assert not seqkern.restore(model).changed  # made as ours, so that there is no former class


def test_patch_ends() -> None:
    """With an exception, too; an inner one does not end the outer."""
    with pytest.raises(ZeroDivisionError), seqkern.patch():
        raise ZeroDivisionError
    assert type(nn.LSTM(2, 2)) is nn.LSTM
    with seqkern.patch():
        with seqkern.patch():
            pass
        assert type(nn.LSTM(2, 2)) is seqkern.LSTM


def test_patch_as_decorator() -> None:
    @seqkern.patch()
    def build() -> nn.Module:
        return nn.GRU(2, 2)

    assert type(build()) is seqkern.GRU and type(build()) is seqkern.GRU
    assert type(nn.GRU(2, 2)) is nn.GRU


def test_patch_is_of_this_thread() -> None:
    made = []
    with seqkern.patch():
        other = threading.Thread(target=lambda: made.append(nn.LSTM(2, 2)))
        other.start()
        other.join()
    assert type(made[0]) is nn.LSTM


# ---- other people's models ---------------------------------------------------------------------------------


def test_pytorch_crf() -> None:
    torchcrf = pytest.importorskip("torchcrf", reason="needs pytorch-crf")
    torch.manual_seed(0)
    crf = torchcrf.CRF(5, batch_first=True)
    model = nn.ModuleDict(dict(crf=crf))
    emissions, tags = torch.randn(3, 7, 5, requires_grad=True), torch.randint(5, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])

    def results() -> list[Tensor]:
        score = crf(emissions, tags, mask)
        return [score, *torch.autograd.grad(score, [emissions, *crf.parameters()])]

    expected, best = results(), crf.decode(emissions, mask)
    assert seqkern.replace(model).changed == [("crf", "torchcrf.CRF", "seqkern.CRF")]
    assert_close(results(), expected)
    assert crf.decode(emissions, mask) == best
    seqkern.restore(model)
    assert type(crf) is torchcrf.CRF
    with seqkern.patch():
        assert type(torchcrf.CRF(5)) is seqkern.CRF


def test_encodec() -> None:
    """A codec with an LSTM in its encoder and its decoder."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=16, upsampling_ratios=[4, 2]
    )
    torch.manual_seed(0)
    model = transformers.EncodecModel(config).eval()
    audio = torch.randn(2, 1, 64)
    expected = model(audio).audio_values
    report = seqkern.replace(model)
    assert len(report.changed) == 2 and {now for _, _, now in report.changed} == {"seqkern.LSTM"}
    torch.testing.assert_close(model(audio).audio_values, expected, rtol=1e-4, atol=1e-5)


def test_lightning_module() -> None:
    """Its trainer, checkpoint and hooks with replaced layers."""
    lightning = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")

    class Tagger(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 8, batch_first=True)
            self.head = nn.Linear(8, 3)
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.head(self.rnn(x)[0]).flatten(0, 1), y.flatten())
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

    def fit(swap: bool) -> list[float]:
        torch.manual_seed(0)
        model = Tagger()
        if swap:
            assert seqkern.replace(model).changed == [("rnn", "torch.nn.GRU", "seqkern.GRU")]
        data = torch.utils.data.TensorDataset(torch.randn(12, 5, 4), torch.randint(3, (12, 5)))
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
        return model.losses

    assert fit(swap=True) == pytest.approx(fit(swap=False), rel=1e-4)
