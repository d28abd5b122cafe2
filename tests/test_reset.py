"""Resets inside sequences: documents in one row are as if each ran alone."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import OURS
from compare import agree
from conftest import why_no_cpu_backend
from recurrent_cases import CELL_NAMES, PLAIN, Case, check_parity, evaluate_case
from test_variants import regularised
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern
from seqkern.ops import _segments

each_cell = pytest.mark.parametrize("cell", CELL_NAMES)
each_kind = pytest.mark.parametrize("kind", ("rnn", "lstm", "gru"))


@pytest.fixture(params=["eager", "cpu"])
def plain_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """For RNN, LSTM and GRU without regularisers, which have kernels of their own."""
    if request.param == "cpu" and (why := why_no_cpu_backend()):
        pytest.skip(why)
    with seqkern.use_backend(request.param):
        yield request.param


def reset_cases(cell: str) -> list[Case]:
    return [
        Case(cell, T=9, B=4, reset=True),
        Case(cell, T=9, B=4, reset=True, bidirectional=True, num_layers=2, form="lengths"),
        Case(cell, T=9, B=4, reset=True, bidirectional=True, form="packed", hx=False),
        Case(cell, T=9, B=4, reset=True, bidirectional=True, form="lengths", options=regularised(cell)[-1]),
        Case(cell, T=9, B=4, reset=True, form="packed", options=regularised(cell)[-1]),
    ]


@pytest.mark.parametrize("case", [case for cell in CELL_NAMES for case in reset_cases(cell)], ids=str)
def test_equations(case: Case) -> None:
    """A loop that zeroes the state where a document starts: all results, all gradients; with masks, which
    are drawn by the positions in the uncut batch."""
    tensors = case.tensors()
    agree(evaluate_case(case, tensors, "eager"), evaluate_case(case, tensors, "twin"), 1e-11, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_cell
def test_kernels(cell: str, dtype: torch.dtype) -> None:
    if why := why_no_cpu_backend():
        pytest.skip(why)
    for form in ("padded", "lengths", "packed"):
        case = Case(cell, T=17, B=5, H=17, reset=True, bidirectional=True, form=form, dtype=dtype)
        check_parity(case, "cpu")


@each_kind
def test_documents_one_by_one(kind: str, plain_backend: str) -> None:
    """Each document alone through torch.nn's own layer, both directions, from zero states."""
    layer = OURS[kind](3, 5, bidirectional=True, dtype=torch.float64)
    theirs = getattr(torch.nn, type(layer).__name__)(3, 5, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(12, 2, 3, dtype=torch.float64)
    reset = torch.zeros(12, 2, dtype=torch.bool)
    cuts = ([0, 4, 5, 12], [0, 7, 12])
    for b, ends in enumerate(cuts):
        reset[ends[1:-1], b] = True
    y, state = layer(x, reset=reset)
    for b, ends in enumerate(cuts):
        states = []
        for start, end in itertools.pairwise(ends):
            expected, last = theirs(x[start:end, b])
            torch.testing.assert_close(y[start:end, b], expected)
            states.append(last if isinstance(last, tuple) else (last,))
        got = state if isinstance(state, tuple) else (state,)
        for k, s in enumerate(got):  # forward: the last document's; reverse: the first one's
            torch.testing.assert_close(s[0, b], states[-1][k][0])
            torch.testing.assert_close(s[1, b], states[0][k][1])


@each_cell
def test_gradients_stop(cell: str) -> None:
    """What a document computes has gradients of exactly zero for the others and for the states they enter."""
    case = Case(cell, T=6, B=2, bidirectional=True, num_layers=2)
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[2] = reset[4] = True
    states = [tensors[f"{name}0"] for name in seqkern.ops.CELLS[cell].states]
    y, _ = seqkern.ops.recurrent(
        *(cell, tensors["x"], states, case.flat_params(tensors)),
        reset=reset,
        num_layers=2,
        bidirectional=True,
    )
    dx, *dstates = torch.autograd.grad(y[2:4].square().sum(), [tensors["x"], *states], materialize_grads=True)
    assert (dx[2:4] != 0).any() and (dx[:2] == 0).all() and (dx[4:] == 0).all()
    assert all((d == 0).all() for d in dstates)
    dh = torch.autograd.grad(
        seqkern.ops.recurrent(
            *(cell, tensors["x"], states, case.flat_params(tensors)),
            reset=reset,
            num_layers=2,
            bidirectional=True,
        )[0][:2]
        .square()
        .sum(),
        states[0],
    )[0]
    assert (dh[0] != 0).any() and (dh[1] == 0).all(), "the first document sees h_0 of the forward direction"


@each_kind
def test_what_resets_mean_at_the_ends(kind: str, plain_backend: str) -> None:
    """None anywhere: no reset at all. At the first step: the forward direction's initial state is shut out.
    At every step: every step alone."""
    layer = OURS[kind](3, 5, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    h0 = torch.randn(2, 2, 5, dtype=torch.float64)
    hx = (h0, torch.randn(2, 2, 5, dtype=torch.float64)) if kind == "lstm" else h0
    reset = torch.zeros(4, 2, dtype=torch.bool)
    torch.testing.assert_close(layer(x, hx, reset=reset), layer(x, hx))
    reset[0, 1] = True
    y, _ = layer(x, hx, reset=reset)
    forward, reverse = layer(x)[0][:, 1, :5], layer(x, hx)[0][:, 1, 5:]
    torch.testing.assert_close(y[:, 1], torch.cat([forward, reverse], dim=-1))
    torch.testing.assert_close(y[:, 0], layer(x, hx)[0][:, 0])
    y, _ = layer(x, reset=torch.ones(4, 2, dtype=torch.bool))
    for t in range(4):
        torch.testing.assert_close(y[t], layer(x[t : t + 1])[0][0])


@each_kind
def test_layouts(kind: str, plain_backend: str) -> None:
    """batch_first, unbatched, packed, lengths and non-contiguous input are the time-first batch's numbers."""
    layer = OURS[kind](3, 5, num_layers=2, bidirectional=True)
    batch_first = OURS[kind](3, 5, num_layers=2, bidirectional=True, batch_first=True)
    batch_first.load_state_dict(layer.state_dict())
    x, reset = torch.randn(8, 3, 3), torch.rand(8, 3) < 0.3
    y, state = layer(x, reset=reset)
    h_n = state[0] if kind == "lstm" else state
    y_, state_ = batch_first(x.transpose(0, 1), reset=reset.t())
    torch.testing.assert_close((y_.transpose(0, 1), state_), (y, state))
    torch.testing.assert_close(layer(x[:, 1], reset=reset[:, 1])[0], y[:, 1])
    wide = torch.cat([x, x], dim=-1)[..., 3:]
    torch.testing.assert_close(layer(wide, reset=reset), (y, state))

    lengths = torch.tensor([3, 8, 5])
    y, state = layer(x, lengths=lengths, reset=reset)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    packed_reset = pack_padded_sequence(reset, lengths, enforce_sorted=False)
    for given in (packed_reset, packed_reset.data):
        out, state_ = layer(packed, reset=given)
        assert isinstance(out, PackedSequence)
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(out, total_length=8)
        torch.testing.assert_close((padded, state_), (y, state))
    assert h_n.shape == (4, 3, 5)


@each_kind
def test_empty_rows(kind: str, plain_backend: str) -> None:
    """A row of length 0 keeps its state, gradients too; a batch of such rows; B = 0. NaN in padding reaches
    nothing."""
    layer = OURS[kind](3, 5, bidirectional=True)
    x = torch.randn(4, 3, 3)
    lengths = torch.tensor([2, 0, 4])
    x[2:, 0], x[:, 1] = torch.nan, torch.nan
    x.requires_grad_()
    h0 = torch.randn(2, 3, 5, requires_grad=True)
    hx = (h0, torch.randn(2, 3, 5)) if kind == "lstm" else h0
    reset = torch.rand(4, 3) < 0.5
    y, state = layer(x, hx, lengths=lengths, reset=reset)
    h_n = state[0] if kind == "lstm" else state
    assert (y[2:, 0] == 0).all() and (y[:, 1] == 0).all() and torch.equal(h_n[:, 1], h0[:, 1])
    grads = torch.autograd.grad(y.sum() + h_n.sum(), [x, h0, *layer.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][2:, 0] == 0).all() and (grads[0][:, 1] == 0).all() and (grads[1][:, 1] == 1).all()

    y, state = layer(x, hx, lengths=torch.zeros(3, dtype=torch.int64), reset=reset)
    assert (y == 0).all() and torch.equal(state[0] if kind == "lstm" else state, h0)
    y, state = layer(torch.zeros(4, 0, 3), reset=torch.zeros(4, 0, dtype=torch.bool))
    assert y.shape == (4, 0, 10) and (state[0] if kind == "lstm" else state).shape == (2, 0, 5)


def test_double_backward() -> None:
    case = Case("lstm", T=5, B=2, I=2, H=3)
    tensors = case.tensors()
    reset = torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 1]], dtype=torch.bool)
    x, h0, c0, *params = (t.requires_grad_() for t in tensors.values())

    def call(x: Tensor, h0: Tensor, c0: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        y, finals = seqkern.ops.recurrent("lstm", x, (h0, c0), [*params, None], reset=reset)
        return (y, *finals)

    assert torch.autograd.gradcheck(call, (x, h0, c0, *params))
    assert torch.autograd.gradgradcheck(call, (x, h0, c0, *params))


def test_segments() -> None:
    """The documents by hand: the longest first, in one row one after the other."""
    reset = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1], [0, 0]], dtype=torch.bool)
    cut = _segments.cut(reset, torch.tensor([5, 4]), 2, torch.device("cpu"))
    assert cut.batch_sizes.tolist() == [4, 3, 2]
    documents = list(zip(cut.row.tolist(), cut.t[:4].tolist(), strict=True))
    assert documents == [(0, 2), (1, 0), (0, 0), (1, 3)]
    assert cut.t.tolist() == [2, 0, 0, 3, 3, 1, 1, 4, 2]
    assert cut.b.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 1]
    assert cut.starts.tolist() == [[False, False, True, False], [True, False, False, True]]
    assert cut.ends.tolist() == [[0, 3], [2, 1]]
    assert _segments.cut(reset, torch.tensor([0, 0]), 1, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("reset", "error", "message"),
    [
        (torch.zeros(4, 2), ValueError, r"reset: expected a bool tensor, got torch.float32"),
        (torch.zeros(2, 4).bool(), ValueError, r"reset: expected \[T, B\] = \(4, 2\), got \(2, 4\)"),
        (torch.zeros(4).bool(), ValueError, r"reset: expected \[T, B\], got \(4,\)"),
        ([True], TypeError, "reset: expected a bool tensor, got list"),
    ],
    ids=["dtype", "shape", "dim", "type"],
)
def test_errors(reset: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        seqkern.GRU(3, 5)(torch.zeros(4, 2, 3), reset=reset)


def test_errors_of_a_packed_reset() -> None:
    x = pack_padded_sequence(torch.zeros(4, 2, 3), torch.tensor([4, 2]))
    with pytest.raises(ValueError, match=r"reset: expected the batch_sizes of input, \[2, 2, 1, 1\], got"):
        other = pack_padded_sequence(torch.zeros(4, 2, dtype=torch.bool), torch.tensor([4, 3]))
        seqkern.GRU(3, 5)(x, reset=other)
    with pytest.raises(ValueError, match=r"reset: expected \[N\] = \(6,\), got \(4, 2\)"):
        seqkern.GRU(3, 5)(x, reset=torch.zeros(4, 2, dtype=torch.bool))


def test_plain_kernels_serve_resets() -> None:
    """Resets act outside the recurrence: the layers that have kernels keep them."""
    if why := why_no_cpu_backend():
        pytest.skip(why)
    x, reset = torch.randn(4, 2, 3, requires_grad=True), torch.zeros(4, 2, dtype=torch.bool)
    for cell in PLAIN:
        kind = cell.split("_")[0]
        layer = OURS[kind](3, 5)
        with torch.profiler.profile() as profile, seqkern.use_backend("cpu"):
            layer(x, reset=reset)
        assert any(event.key == f"seqkern::{kind}_forward" for event in profile.key_averages()), cell


def test_compiles_around_a_reset() -> None:
    """Not in one graph, as the documents' number depends on values, but rightly."""
    layer = seqkern.GRU(3, 5)
    x, reset = torch.randn(6, 2, 3), torch.rand(6, 2) < 0.4
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, backend="aot_eager")
        torch.testing.assert_close(compiled(x, reset=reset), layer(x, reset=reset))
    torch._dynamo.reset()
