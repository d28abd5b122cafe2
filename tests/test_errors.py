"""Every mistake that torch.nn refuses is refused with the same exception class, and the message says why.

Each mistake is made twice, on torch.nn and on seqkern: torch.nn says which class. `says` are the words that
seqkern's message has to hold: the argument's name and the values.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import KINDS, OUR_CELL, OURS, TORCH, TORCH_CELL
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern


@dataclass(frozen=True)
class Mistake:
    name: str
    make: Callable[
        ..., Any
    ]  # (new, kind) → anything, raising; `new` constructs the layer or cell of that kind
    says: tuple[str, ...]  # regular expressions, each found in seqkern's message
    kinds: tuple[str, ...] = KINDS

    def __str__(self) -> str:
        return self.name


def zeros(kind: str, *shape: int, **options: Any) -> Any:
    """A state of zeros, or two of them for an LSTM."""
    h0 = torch.zeros(*shape, **options)
    return (h0, h0.clone()) if kind == "lstm" else h0


X = torch.zeros(5, 2, 3)
PACKED = pack_padded_sequence(torch.zeros(5, 2, 3), [5, 2])
NOT_LSTM = ("rnn", "gru")
LSTM = ("lstm",)

CONSTRUCTOR = [
    Mistake("dropout 2", lambda new, kind: new(3, 4, dropout=2.0), ("dropout", r"\[0, 1\]")),
    Mistake("dropout -0.1", lambda new, kind: new(3, 4, dropout=-0.1), ("dropout", r"\[0, 1\]")),
    Mistake("dropout True", lambda new, kind: new(3, 4, dropout=True), ("dropout", "number")),
    Mistake("dropout text", lambda new, kind: new(3, 4, dropout="half"), ("half|dropout",)),
    Mistake("bias 1", lambda new, kind: new(3, 4, bias=1), ("bias", "bool", "int")),
    Mistake("batch_first 1", lambda new, kind: new(3, 4, batch_first=1), ("batch_first", "bool", "int")),
    Mistake("input_size 3.0", lambda new, kind: new(3.0, 4), ("input_size", "float")),
    Mistake("input_size 0", lambda new, kind: new(0, 4), ("input_size", "greater than zero")),
    Mistake("hidden_size 4.0", lambda new, kind: new(3, 4.0), ("hidden_size", "float")),
    Mistake("hidden_size 0", lambda new, kind: new(3, 0), ("hidden_size", "greater than zero")),
    Mistake("num_layers 0", lambda new, kind: new(3, 4, 0), ("num_layers", "greater than zero")),
    Mistake("proj_size -1", lambda new, kind: new(3, 4, proj_size=-1), ("proj_size",), LSTM),
    Mistake("proj_size = hidden_size", lambda new, kind: new(3, 4, proj_size=4), ("proj_size",), LSTM),
    Mistake(
        "proj_size of no LSTM", lambda new, kind: new(3, 4, proj_size=2), ("proj_size", "LSTM"), NOT_LSTM
    ),
    Mistake("no such option", lambda new, kind: new(3, 4, depth=2), ("depth",)),
    Mistake("no sizes", lambda new, kind: new(), ("input_size",)),
    Mistake("nonlinearity sine", lambda new, kind: new(3, 4, nonlinearity="sine"), ("sine",), ("rnn",)),
    Mistake(
        "nonlinearity of no RNN",
        lambda new, kind: new(3, 4, nonlinearity="relu"),
        ("nonlin",),
        (*LSTM, "gru"),
    ),
]


def strict_load(layer: nn.Module, **shapes: tuple[int, ...]) -> None:
    state = layer.state_dict() | {name: torch.zeros(shape) for name, shape in shapes.items()}
    layer.load_state_dict(state)


FORWARD = [
    Mistake("input 1-D", lambda new, kind: new(3, 4)(torch.zeros(3)), ("input", "2D or 3D", "1D")),
    Mistake("input 4-D", lambda new, kind: new(3, 4)(torch.zeros(1, 5, 2, 3)), ("input", "2D or 3D", "4D")),
    Mistake("input size", lambda new, kind: new(3, 4)(torch.zeros(5, 2, 7)), ("input", r"\b3\b", r"\b7\b")),
    Mistake(
        "unbatched input size", lambda new, kind: new(3, 4)(torch.zeros(5, 7)), ("input", r"\b3\b", r"\b7\b")
    ),
    Mistake("double input", lambda new, kind: new(3, 4)(X.double()), ("input", "float32", "float64")),
    Mistake("integer input", lambda new, kind: new(3, 4)(X.long()), ("input", "float32", "int64")),
    Mistake(
        "bfloat16 layer",
        lambda new, kind: new(3, 4, dtype=torch.bfloat16)(X),
        ("input", "bfloat16", "float32"),
    ),
    Mistake("no steps", lambda new, kind: new(3, 4)(torch.zeros(0, 2, 3)), ("larger than 0", "input|T = 0")),
    Mistake("hx 2-D", lambda new, kind: new(3, 4)(X, zeros(kind, 2, 4)), ("hx", "3-D", "2-D")),
    Mistake(
        "hx 3-D, unbatched", lambda new, kind: new(3, 4)(X[:, 0], zeros(kind, 1, 1, 4)), ("hx", "2-D", "3-D")
    ),
    Mistake(
        "hx batch",
        lambda new, kind: new(3, 4)(X, zeros(kind, 1, 6, 4)),
        ("hx|hidden", r"\(1, 2, 4\)", r"[(\[]1, 6, 4[)\]]"),
    ),
    Mistake(
        "hx size",
        lambda new, kind: new(3, 4)(X, zeros(kind, 1, 2, 9)),
        ("hx|hidden", r"\(1, 2, 4\)", r"[(\[]1, 2, 9[)\]]"),
    ),
    Mistake(
        "hx layers",
        lambda new, kind: new(3, 4, 2, bidirectional=True)(X, zeros(kind, 2, 2, 4)),
        ("hx|hidden", r"\(4, 2, 4\)", r"[(\[]2, 2, 4[)\]]"),
    ),
    Mistake(
        "hx batch first",
        lambda new, kind: new(3, 4, batch_first=True)(X, zeros(kind, 1, 2, 4)),
        ("hx|hidden", r"\(1, 5, 4\)", r"[(\[]1, 2, 4[)\]]"),
    ),
    Mistake(
        "hx unbatched size",
        lambda new, kind: new(3, 4)(X[:, 0], zeros(kind, 1, 5)),
        ("hx|hidden", r"\b4\b", r"\b5\b"),
    ),
    Mistake(
        "hx double",
        lambda new, kind: new(3, 4)(X, zeros(kind, 1, 2, 4).double()),
        ("hx", "float64"),
        NOT_LSTM,
    ),
    Mistake(
        "h0 double",
        lambda new, kind: new(3, 4)(X, (torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4))),
        ("hx", "float32", "float64"),
        LSTM,
    ),
    Mistake(
        "c0 double",
        lambda new, kind: new(3, 4)(X, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).double())),
        ("hx", "float32", "float64"),
        LSTM,
    ),
    Mistake(
        "c0 batch",
        lambda new, kind: new(3, 4)(X, (torch.zeros(1, 2, 4), torch.zeros(1, 6, 4))),
        ("hx|hidden", r"\(1, 2, 4\)", r"[(\[]1, 6, 4[)\]]"),
        LSTM,
    ),
    Mistake(
        "h0 not projected",
        lambda new, kind: new(3, 4, proj_size=2)(X, zeros(kind, 1, 2, 4)),
        ("hx|hidden", r"\(1, 2, 2\)", r"[(\[]1, 2, 4[)\]]"),
        LSTM,
    ),
    Mistake(
        "c0 projected",
        lambda new, kind: new(3, 4, proj_size=2)(X, zeros(kind, 1, 2, 2)),
        ("hx|hidden", r"\(1, 2, 4\)", r"[(\[]1, 2, 2[)\]]"),
        LSTM,
    ),
    Mistake("hx a tensor", lambda new, kind: new(3, 4)(X, torch.zeros(1, 2, 4)), ("hx",), LSTM),
    Mistake("hx one state", lambda new, kind: new(3, 4)(X, (torch.zeros(1, 2, 4),)), ("hx",), LSTM),
    Mistake(
        "hx three states", lambda new, kind: new(3, 4)(X, (torch.zeros(1, 2, 4),) * 3), ("hx|states",), LSTM
    ),
    Mistake(
        "hx a tuple", lambda new, kind: new(3, 4)(X, (torch.zeros(1, 2, 4),) * 2), ("hx", "tuple"), NOT_LSTM
    ),
    Mistake("input None", lambda new, kind: new(3, 4)(None), ("NoneType",)),
    Mistake("input a list", lambda new, kind: new(3, 4)([[1.0, 2.0, 3.0]]), ("list",)),
    Mistake("input numpy", lambda new, kind: new(3, 4)(X.numpy()), ("ndarray",)),
    Mistake("no such keyword", lambda new, kind: new(3, 4)(X, hidden=None), ("hidden",)),
    Mistake("no input", lambda new, kind: new(3, 4)(), ("input",)),
    Mistake("input on meta", lambda new, kind: new(3, 4)(X.to("meta")), ("input", "meta", "cpu")),
    Mistake("layer on meta", lambda new, kind: new(3, 4, device="meta")(X), ("input|weight", "meta", "cpu")),
    Mistake(
        "hx on meta",
        lambda new, kind: new(3, 4)(X, zeros(kind, 1, 2, 4, device="meta")),
        ("hx|hidden", "meta", "cpu"),
    ),
    Mistake(
        "packed input size",
        lambda new, kind: new(3, 4)(pack_padded_sequence(torch.zeros(5, 2, 7), [5, 2])),
        ("input", r"\b3\b", r"\b7\b"),
    ),
    Mistake(
        "packed double",
        lambda new, kind: new(3, 4)(PACKED.to(torch.float64)),
        ("input", "float32", "float64"),
    ),
    Mistake(
        "packed data 3-D",
        lambda new, kind: new(3, 4)(pack_padded_sequence(torch.zeros(5, 2, 6, 3), [5, 2])),
        ("input", r"\b2\b"),
    ),
    Mistake(
        "packed hx batch",
        lambda new, kind: new(3, 4)(PACKED, zeros(kind, 1, 3, 4)),
        ("hx|hidden", r"\(1, 2, 4\)", r"[(\[]1, 3, 4[)\]]"),
    ),
    Mistake(
        "packed hx 2-D",
        lambda new, kind: new(3, 4)(PACKED, zeros(kind, 2, 4)),
        ("hx|hidden", r"\b2, 4\b"),
        NOT_LSTM,
    ),
    Mistake(
        "state_dict shape",
        lambda new, kind: strict_load(new(3, 4), weight_ih_l0=(1, 3)),
        ("weight_ih_l0", "size mismatch", r"\[1, 3\]"),
    ),
    Mistake(
        "state_dict of the cell",
        lambda new, kind: new(3, 4).load_state_dict(TORCH_CELL[kind](3, 4).state_dict()),
        ("weight_ih_l0", "weight_ih"),
    ),
]

CELL = [
    Mistake("input 3-D", lambda new, kind: new(3, 4)(torch.zeros(1, 2, 3)), ("input", "1D or 2D", "3D")),
    Mistake("input 0-D", lambda new, kind: new(3, 4)(torch.zeros(())), ("input", "1D or 2D", "0D")),
    Mistake("input size", lambda new, kind: new(3, 4)(torch.zeros(2, 7)), ("input", r"\b3\b", r"\b7\b")),
    Mistake(
        "input size, unbatched", lambda new, kind: new(3, 4)(torch.zeros(7)), ("input", r"\b3\b", r"\b7\b")
    ),
    Mistake(
        "hx 3-D", lambda new, kind: new(3, 4)(X[0], zeros(kind, 1, 2, 4)), ("hx|hidden", "1D or 2D", "3D")
    ),
    Mistake(
        "hx batch", lambda new, kind: new(3, 4)(X[0], zeros(kind, 6, 4)), ("hx|hidden", r"\b2\b", r"\b6\b")
    ),
    Mistake(
        "hx of one row",
        lambda new, kind: new(3, 4)(X[0], zeros(kind, 1, 4)),
        ("hx|hidden", r"\b2\b", r"\b1\b"),
    ),
    Mistake(
        "hx size", lambda new, kind: new(3, 4)(X[0], zeros(kind, 2, 9)), ("hx|hidden", r"\b4\b", r"\b9\b")
    ),
    Mistake("hx 1-D for a batch", lambda new, kind: new(3, 4)(X[0], zeros(kind, 4)), ("hx|hidden", r"\b4\b")),
    Mistake(
        "hx 2-D for one row", lambda new, kind: new(3, 4)(X[0, 0], zeros(kind, 1, 4)), ("hx|hidden", r"\b4\b")
    ),
    Mistake(
        "double input",
        lambda new, kind: new(3, 4)(X[0].double()),
        ("input|dtype", "[Ff]loat", "float64|Double"),
    ),
    Mistake("hx a tuple", lambda new, kind: new(3, 4)(X[0], zeros("lstm", 2, 4)), ("hx", "tuple"), NOT_LSTM),
    Mistake("hx a tensor", lambda new, kind: new(3, 4)(X[0], torch.zeros(2, 4)), ("hx",), LSTM),
    Mistake("hx one state", lambda new, kind: new(3, 4)(X[0], (torch.zeros(2, 4),)), ("hx|states",), LSTM),
    Mistake("input None", lambda new, kind: new(3, 4)(None), ("NoneType",)),
    Mistake("input on meta", lambda new, kind: new(3, 4)(X[0].to("meta")), ("meta", "cpu")),
    Mistake("input_size text", lambda new, kind: new("3", 4), ("str|int",)),
    Mistake("input_size negative", lambda new, kind: new(-3, 4), ("-3|negative|invalid",)),
]


def refused(make: Callable[..., Any], new: Callable[..., Any], kind: str) -> Exception:
    try:
        make(new, kind)
    except Exception as error:
        return error
    raise AssertionError("torch.nn accepts this: not a mistake")


def check(mistake: Mistake, theirs: Callable[..., Any], ours: Callable[..., Any], kind: str) -> None:
    expected = refused(mistake.make, theirs, kind)
    with pytest.raises(type(expected)) as info:
        mistake.make(ours, kind)
    message = str(info.value)
    for words in mistake.says:
        assert re.search(words, message), f"{words!r} is not in the message: {message!r}"


def each(mistakes: list[Mistake]) -> Any:
    pairs = [(mistake, kind) for mistake in mistakes for kind in mistake.kinds]
    ids = [f"{kind}-{mistake.name.replace(' ', '_')}" for mistake, kind in pairs]
    return pytest.mark.parametrize(("mistake", "kind"), pairs, ids=ids)


@each(CONSTRUCTOR)
def test_constructor(mistake: Mistake, kind: str) -> None:
    check(mistake, TORCH[kind], OURS[kind], kind)


@each(FORWARD)
def test_forward(mistake: Mistake, kind: str, backend: str) -> None:
    check(mistake, TORCH[kind], OURS[kind], kind)


@each(CELL)
def test_cell(mistake: Mistake, kind: str, backend: str) -> None:
    check(mistake, TORCH_CELL[kind], OUR_CELL[kind], kind)


def test_rnn_cell_nonlinearity(backend: str) -> None:
    """Refused by the forward, as in torch.nn."""
    nonlinear = Mistake("", lambda new, kind: new(3, 4, nonlinearity="sine")(X[0]), ("sine",))
    check(nonlinear, nn.RNNCell, OUR_CELL["rnn"], "rnn")


@pytest.mark.parametrize("kind", KINDS)
def test_the_designs_example(kind: str, backend: str) -> None:
    """hx: expected [D*num_layers, B, H] = (2, 8, 64), got (2, 8, 32)"""
    layer = OURS[kind](16, 64, bidirectional=True)
    expected = r"hx(\[0\])?: expected \[D\*num_layers, B, H\] = \(2, 8, 64\), got \(2, 8, 32\)"
    with pytest.raises(RuntimeError, match=expected):
        layer(torch.zeros(5, 8, 16), zeros(kind, 2, 8, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_refused_before_any_work(kind: str, backend: str) -> None:
    """A refusal leaves the layer as it was: the next, right call works and nothing has been written."""
    layer = OURS[kind](3, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected = layer(X)[0]
    for mistake in FORWARD:
        if kind in mistake.kinds:
            refused(
                mistake.make,
                lambda *sizes, **options: layer if not options else OURS[kind](*sizes, **options),
                kind,
            )
    assert torch.equal(layer(X)[0], expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_weight_of_a_wrong_shape(kind: str, backend: str) -> None:
    """A weight replaced by one of another shape is refused, named, and never read out of bounds."""
    for name, change in (
        ("weight_hh_l0", lambda w: w[:, :-1]),
        ("weight_ih_l0", lambda w: w[:-1]),
        ("bias_ih_l0", lambda w: w[:-1]),
        ("bias_hh_l0_reverse", lambda w: w[None]),
        ("weight_hh_l0_reverse", lambda w: w[:-1]),
        ("weight_ih_l1", lambda w: w[:, :-3]),
    ):
        layer = OURS[kind](3, 4, num_layers=2, bidirectional=True)
        setattr(layer, name, nn.Parameter(change(getattr(layer, name).detach())))
        with pytest.raises(RuntimeError, match=r"expected .* got "):
            layer(X)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_of_another_dtype(kind: str, backend: str) -> None:
    for name in ("weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        layer = OURS[kind](3, 4)
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach().double()))
        with pytest.raises(RuntimeError, match=rf"{name}.*float32.*float64"):
            layer(X)


@pytest.mark.parametrize(
    ("batch_sizes", "error"),
    [
        ([3, 2], "batch_sizes"),  # 5 rows said, 7 there
        ([3, 2, 1, 2], "batch_sizes"),  # 8
        ([1, 2, 4], "batch_sizes"),  # increasing
        ([8, 0, -1], "batch_sizes"),
        ([], "batch_sizes|larger than 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_packed_sequences(kind: str, batch_sizes: list[int], error: str, backend: str) -> None:
    """torch.nn reads past the end or crashes on some of these; seqkern says what is wrong with them."""
    packed = PackedSequence(torch.zeros(7, 3), torch.tensor(batch_sizes, dtype=torch.int64))
    with pytest.raises((ValueError, RuntimeError), match=error):
        OURS[kind](3, 4)(packed)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"eager.*quantum"), seqkern.use_backend("quantum"):
        pass


def test_permutations_of_a_wrong_length(backend: str) -> None:
    indices: Tensor = torch.tensor([0, 7])
    packed = PackedSequence(PACKED.data, PACKED.batch_sizes, indices, indices)
    for kind in KINDS:
        with pytest.raises((IndexError, RuntimeError)):
            OURS[kind](3, 4)(packed, zeros(kind, 1, 2, 4))
