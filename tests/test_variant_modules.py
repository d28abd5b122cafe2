"""The variants' modules: torch.nn.LSTM's manners for layers that torch.nn has not."""

import copy
import io
import pickle

import pytest
import torch
from compare import flat
from test_variants import backend  # noqa: F401 (a fixture)
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqkern
from seqkern.ops import CELLS

LAYERS = {
    "peephole_lstm": seqkern.PeepholeLSTM,
    "cifg_lstm": seqkern.CIFGLSTM,
    "mgu": seqkern.MGU,
    "indrnn_relu": seqkern.IndRNN,
    "nested_lstm": seqkern.NestedLSTM,
    "nested_gru": seqkern.NestedGRU,
    "slstm": seqkern.SLSTM,
    "layer_norm_lstm": seqkern.LayerNormLSTM,
    "layer_norm_gru": seqkern.LayerNormGRU,
}
STEPS = {cell: getattr(seqkern, f"{layer.__name__}Cell") for cell, layer in LAYERS.items()}
each_layer = pytest.mark.parametrize("cell", LAYERS)

# Parameters beyond weight_ih, weight_hh, bias_ih, bias_hh, in their order.
INNER = ["inner_weight_ih", "inner_weight_hh", "inner_bias_ih", "inner_bias_hh"]
NAMES = {cell: ["weight_ih", "weight_hh", "bias_ih", "bias_hh"] for cell in LAYERS}
NAMES["peephole_lstm"].append("weight_peep")
NAMES["nested_lstm"] += INNER
NAMES["nested_gru"] += INNER
NAMES["layer_norm_gru"] = ["weight_ih", "weight_hh", "bias", "ln_i.", "ln_h."]
NAMES["layer_norm_lstm"] = [*NAMES["layer_norm_gru"], "ln_c."]


def state_dict_names(cell: str, suffixes: list[str]) -> set[str]:
    """ln_i with the suffix _l0 is ln_i_l0.weight and ln_i_l0.bias."""
    names = set()
    for suffix in suffixes:
        for name in NAMES[cell]:
            leaves = (".weight", ".bias") if name.endswith(".") else ("",)
            names |= {f"{name.rstrip('.')}{suffix}{leaf}" for leaf in leaves}
    return names


@each_layer
def test_construction(cell: str) -> None:
    """Names, shapes, repr, attributes and initial values."""
    cls = LAYERS[cell]
    layer = cls(5, 6, 2, True, True, 0.5, True, dtype=torch.float64)
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert set(layer.state_dict()) == state_dict_names(cell, suffixes)
    assert repr(layer).split("\n")[0].startswith(cls.__name__ + "(")
    assert "5, 6, num_layers=2, batch_first=True, dropout=0.5, bidirectional=True" in repr(layer)
    assert repr(cls(5, 6)).replace("\n", "").replace(" ", "").startswith(f"{cls.__name__}(5,6")
    assert layer.weight_ih_l1.shape == (CELLS[cell].gates * 6, 12) and layer.weight_ih_l0.shape[1] == 5
    assert (layer.input_size, layer.hidden_size, layer.num_layers) == (5, 6, 2)
    assert layer.bias is True and layer.batch_first and layer.bidirectional and layer.dropout == 0.5
    assert all(w.dtype is torch.float64 for w in layer.parameters())
    assert [w for row in layer.all_weights for w in row] and len(layer.all_weights) == 4
    assert sum(len(row) for row in layer.all_weights) == len(list(layer.parameters()))
    assert layer.flatten_parameters() is None
    assert layer.weight_ih_l0.abs().max() <= 6**-0.5
    assert not any("bias" in name for name in cls(5, 6, bias=False).state_dict())
    step = STEPS[cell](5, 6)
    assert set(step.state_dict()) == state_dict_names(cell, [""])
    assert not any("bias" in name for name in STEPS[cell](5, 6, bias=False).state_dict())
    assert "bias=False" in repr(STEPS[cell](5, 6, bias=False)) and "bias" not in repr(step).split("(")[1]
    assert cls(5, 6, device="meta").weight_ih_l0.is_meta
    assert getattr(seqkern.nn, cls.__name__) is cls


def test_the_tutorials_cell() -> None:
    """LayerNormLSTMCell has exactly the parameters that are loaded into it."""
    step = seqkern.LayerNormLSTMCell(5, 6)
    shapes = {name: tuple(w.shape) for name, w in step.state_dict().items()}
    assert shapes == {
        **{"weight_ih": (24, 5), "weight_hh": (24, 6), "bias": (24,)},
        **{f"ln_{k}.{leaf}": (24,) for k in "ih" for leaf in ("weight", "bias")},
        **{"ln_c.weight": (6,), "ln_c.bias": (6,)},
    }
    assert isinstance(step.ln_i, nn.LayerNorm)


def test_initial_values() -> None:
    """IndRNN's recurrent weights in 0..1; sLSTM's biases 0 but the forget gate's, 3 to 6 in each head; layer
    norms 1 and 0."""
    u = seqkern.IndRNN(5, 64).weight_hh_l0
    assert (u >= 0).all() and (u <= 1).all() and u.max() > 0.5
    layer = seqkern.SLSTM(5, 12, num_heads=3)
    assert layer.weight_hh_l0.shape == (3, 16, 4) and "num_heads=3" in repr(layer)
    b = layer.bias_ih_l0.unflatten(0, (4, 12))
    assert (b[[0, 2, 3]] == 0).all() and (layer.bias_hh_l0 == 0).all()
    assert torch.allclose(b[1].view(3, 4), torch.tensor([3.0, 4.0, 5.0, 6.0]))
    normed = seqkern.LayerNormGRU(5, 6)
    assert (normed.ln_i_l0.weight == 1).all() and (normed.ln_h_l0.bias == 0).all()
    assert seqkern.IndRNN(5, 6, nonlinearity="tanh").weight_hh_l0.shape == (6,)
    assert "nonlinearity=tanh" in repr(seqkern.IndRNNCell(5, 6, nonlinearity="tanh"))


@each_layer
def test_copies(cell: str, backend: str) -> None:  # noqa: F811
    layer = LAYERS[cell](5, 6, 2, bidirectional=True, zoneout=0.2, weight_dropout=0.1)
    x = torch.randn(4, 3, 5)
    torch.manual_seed(0)
    y = layer(x)[0]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twin = LAYERS[cell](5, 6, 2, bidirectional=True, zoneout=0.2, weight_dropout=0.1)
    twin.load_state_dict(layer.state_dict())
    copies = (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        twin,
    )
    for other in copies:
        torch.manual_seed(0)
        assert torch.equal(other(x)[0], y) and repr(other) == repr(layer)
        with torch.no_grad():
            other.weight_ih_l0.add_(1.0)
        torch.manual_seed(0)
        assert not torch.equal(other(x)[0], y)
    torch.manual_seed(0)
    assert torch.equal(layer(x)[0], y)


@each_layer
def test_calls(cell: str, backend: str) -> None:  # noqa: F811
    """Zeros for no state, batch_first, unbatched, lengths and packed input, a loop over the cell."""
    layer = LAYERS[cell](5, 6, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    count = len(CELLS[cell].states)
    y, state = layer(x)
    assert y.shape == (7, 3, 12) and isinstance(state, torch.Tensor) == (count == 1)
    assert all(s.shape == (4, 3, 6) for s in flat(state)) and len(flat(state)) == count
    zeros = torch.zeros(4, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x, (zeros,) * count if count > 1 else zeros), (y, state))

    layer.batch_first = True
    torch.testing.assert_close(layer(x.transpose(0, 1))[0].transpose(0, 1), y)
    layer.batch_first = False
    one, alone = layer(x[:, 1])
    torch.testing.assert_close(one, y[:, 1])
    for s, s_ in zip(flat(alone), flat(state), strict=True):
        torch.testing.assert_close(s, s_[:, 1])
    torch.testing.assert_close(layer(x[:, 1], alone)[0], layer(x[:, 1:2], _unsqueezed(alone))[0][:, 0])

    lengths = torch.tensor([3, 7, 5])
    y, state = layer(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    out, last = layer(packed)
    assert isinstance(out, PackedSequence)
    torch.testing.assert_close((pad_packed_sequence(out)[0], last), (y, state))
    given = tuple(torch.randn(4, 3, 6, dtype=torch.float64).abs() for _ in range(count))
    hx = given if count > 1 else given[0]
    torch.testing.assert_close(layer(packed, hx)[1], layer(x, hx, lengths=lengths)[1])

    single = LAYERS[cell](5, 6, dtype=torch.float64)
    step = STEPS[cell](5, 6, dtype=torch.float64)
    step.load_state_dict({name.replace("_l0", ""): w for name, w in single.state_dict().items()})
    y, last = single(x)
    state = None
    for t in range(7):
        state = step(x[t], state)
        torch.testing.assert_close(flat(state)[0], y[t])
    for s, s_ in zip(flat(state), flat(last), strict=True):
        torch.testing.assert_close(s, s_[0])
    one = step(x[0, 1], tuple(s[1] for s in flat(state)) if count > 1 else state[1])
    torch.testing.assert_close(flat(one)[0], flat(step(x[0], state))[0][1])


def _unsqueezed(state: object) -> object:
    return tuple(s.unsqueeze(1) for s in state) if isinstance(state, tuple) else state.unsqueeze(1)


@each_layer
def test_tools(cell: str, backend: str) -> None:  # noqa: F811
    """functional_call, weight_norm, hooks, dropout between the layers, training."""
    layer = LAYERS[cell](5, 6, 2, dropout=0.5)
    x = torch.randn(4, 3, 5)
    given = {name: torch.randn_like(w).requires_grad_() for name, w in layer.named_parameters()}
    torch.func.functional_call(layer, given, (x,))[0].sum().backward()
    assert all(w.grad is not None for w in given.values())
    assert all(w.grad is None for w in layer.parameters())
    torch.manual_seed(0)
    y = layer(x)[0]
    torch.manual_seed(1)
    assert not torch.equal(layer(x)[0], y) and torch.equal(layer.eval()(x)[0], layer(x)[0])
    layer.train().dropout = 0.0
    y = layer(x)[0]
    parametrizations.weight_norm(layer, "weight_hh_l0", dim=0)
    torch.testing.assert_close(layer(x)[0], y)
    layer(x)[0].sum().backward()
    assert layer.parametrizations.weight_hh_l0.original1.grad is not None

    layer = LAYERS[cell](5, 6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    target, losses = torch.rand(4, 3, 6), []
    for _ in range(20):
        loss = (layer(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=[] if cell in ("mgu", "slstm", "layer_norm_lstm") else pytest.mark.slow)
        for cell in LAYERS
    ],
)
def test_compiles_in_one_graph(cell: str, backend: str) -> None:  # noqa: F811
    """fullgraph, with lengths and masks, forward and backward; the same numbers."""
    torch._dynamo.reset()
    zoneout = (0.3, 0.2) if len(CELLS[cell].states) > 1 else 0.3
    layer = LAYERS[cell](5, 6, zoneout=zoneout, variational_dropout=0.2, weight_dropout=0.1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, lengths = torch.randn(2, 4, 5), torch.tensor([2, 1, 0, 2])
    runs = []
    for call in (layer, compiled):
        torch.manual_seed(0)
        y, state = call(x, lengths=lengths)
        loss = y.square().sum() + sum(s.square().sum() for s in flat(state))
        runs.append([y, *flat(state), *torch.autograd.grad(loss, list(layer.parameters()))])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@each_layer
def test_dtypes_and_autocast(cell: str, backend: str) -> None:  # noqa: F811
    """16-bit layers are near the float32 ones; under autocast on a CPU the states' dtype counts."""
    layer = LAYERS[cell](5, 6)
    x = torch.randn(4, 3, 5)
    y, _ = layer(x)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        low, low_state = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert low.dtype is dtype and all(s.dtype is dtype for s in flat(low_state))
        torch.testing.assert_close(low.float(), y, rtol=tolerance, atol=tolerance)
    for dtype in (torch.float32, torch.bfloat16):  # as torch.nn.GRU
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast, cast_state = layer(x.to(dtype))
        assert all(s.dtype is dtype for s in (cast, *flat(cast_state)))
        torch.testing.assert_close(cast.float(), y, rtol=0.05, atol=0.05)


X = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: seqkern.MGU(3, 0), ValueError, "hidden_size: expected a number above 0, got 0"),
        (lambda: seqkern.MGU(3, 5.0), TypeError, "hidden_size: expected an int, got float"),
        (lambda: seqkern.MGU(3, 5, 0), ValueError, "num_layers: expected a number above 0, got 0"),
        (lambda: seqkern.MGU(3, 5, bias=1), TypeError, "bias: expected a bool, got int"),
        (lambda: seqkern.MGU(3, 5, dropout=2.0), ValueError, "dropout: expected a probability"),
        (lambda: seqkern.MGU(3, 5, proj_size=2), TypeError, "MGU: expected no argument proj_size"),
        (lambda: seqkern.SLSTM(3, 5, num_heads=2), ValueError, "a divisor of hidden_size = 5, got 2"),
        (lambda: seqkern.SLSTM(3, 5, num_heads=0), ValueError, "num_heads: expected a number above 0, got 0"),
        (lambda: seqkern.IndRNN(3, 5, nonlinearity="elu"), ValueError, "expected 'tanh' or 'relu'"),
        (lambda: seqkern.MGUCell(3, 5, cell_clip=1.0), ValueError, "cell_clip: expected None for mgu"),
        (lambda: seqkern.MGU(3, 5)(torch.zeros(3)), ValueError, "MGU: Expected input to be 2D or 3D, got 1D"),
        (lambda: seqkern.MGU(3, 5)(torch.zeros(0, 2, 3)), RuntimeError, "larger than 0 in RNN, got T = 0"),
        (lambda: seqkern.MGU(3, 5)(torch.zeros(4, 2, 4)), RuntimeError, "with I = input_size = 3"),
        (lambda: seqkern.MGU(3, 5)(X, torch.zeros(1, 2, 4)), RuntimeError, r"hx: expected \[D"),
        (lambda: seqkern.MGU(3, 5)(X, (torch.zeros(1),)), AttributeError, "hx: expected a tensor"),
        (lambda: seqkern.MGU(3, 5)(torch.zeros(4, 3), lengths=torch.ones(1)), ValueError, "unbatched input"),
        (
            lambda: seqkern.SLSTM(3, 5)(X, (torch.zeros(1, 2, 5),) * 3),
            RuntimeError,
            r"slstm expects 4 hidden states \(h_0, c_0, n_0, m_0\), got 3",
        ),
        (
            lambda: seqkern.SLSTM(3, 5)(X, torch.zeros(2, 2, 5)),
            RuntimeError,
            "hx: expected a tuple .*, got one tensor",
        ),
        (
            lambda: seqkern.PeepholeLSTM(3, 5)(X, (torch.zeros(2, 5),) * 2),
            RuntimeError,
            r"hx and cx should also be 3-D but got \(2-D, 2-D\)",
        ),
        (lambda: seqkern.MGUCell(3, 5)(X), ValueError, "Expected input to be 1D or 2D"),
        (lambda: seqkern.SLSTMCell(3, 5)(X[0], torch.zeros(2, 5)), TypeError, "a tuple of 4 tensors"),
    ],
)
def test_errors(make: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_dropout_with_one_layer_warns() -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        seqkern.MGU(3, 4, dropout=0.5)
