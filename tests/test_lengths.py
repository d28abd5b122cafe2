"""The keyword `lengths`: padded input, results as of pack → torch.nn → unpack, padding that never matters."""

import random

import pytest
import torch
from cases import DTYPES, KINDS, SIZES, Case, State, legal, option_factors, our_layer, pairwise, unique
from compare import check_parity, evaluate, flat, packed_call, same_bits
from torch import Tensor, nn

import seqkern
from seqkern import _extension

PATTERNS = ("ragged", "descending", "zeros among", "all T", "all shorter", "all 0")


def make_lengths(pattern: str, T: int, B: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """[B] lengths of a named pattern; ragged ones take in 1 and T where B allows."""
    rng = random.Random(f"{pattern} {T} {B}")
    ragged = [rng.randint(1, T) for _ in range(B)]
    ragged[0] = T
    ragged[-1] = 1 if B > 1 else ragged[-1]
    rng.shuffle(ragged)
    lengths = {
        "ragged": ragged,
        "descending": sorted(ragged, reverse=True),
        "zeros among": [0 if b % 3 == 1 else n for b, n in enumerate(ragged)],
        "all T": [T] * B,
        "all shorter": [max(1, n - 2) for n in ragged],
        "all 0": [0] * B,
    }[pattern]
    return torch.tensor(lengths, dtype=dtype)


def padding(case: Case, lengths: Tensor) -> Tensor:
    """True beyond each row's length: [T, B], or [B, T] if the case is batch first."""
    mask = torch.arange(case.T)[:, None] >= lengths
    return mask.T if case.batch_first else mask


def with_lengths(lengths: Tensor):
    return lambda layer, x, hx: layer(x, hx, lengths=lengths)


def pattern_cases(kind: str) -> list[tuple[Case, str]]:
    options = option_factors(kind) | {"pattern": PATTERNS, "batched": (True,)}
    sizes = dict(T=(1, 2, 7, 33), B=(1, 2, 3, 5, 8, 9, 17, 33), I=SIZES, H=SIZES)
    small = dict(T=(2, 7), B=(3, 9), I=(1, 17), H=(15, 33), dtype=DTYPES)
    rows = pairwise(options | sizes) + pairwise(options | small)
    chosen = [(row.pop("pattern"), row) for row in rows]
    return unique((legal(Case(kind, **row)), pattern) for pattern, row in chosen)


ALL = [(case, pattern) for kind in KINDS for case, pattern in pattern_cases(kind)]


@pytest.mark.parametrize(("case", "pattern"), ALL, ids=[f"{c}-{p.replace(' ', '_')}" for c, p in ALL])
def test_parity_with_packing(case: Case, pattern: str, backend: str) -> None:
    layer = case.torch_layer()
    lengths = make_lengths(pattern, case.T, case.B)
    call, their_call = with_lengths(lengths), packed_call(lengths)
    got = check_parity(layer, our_layer(layer), *case.inputs(), f"{case} {pattern}", call, their_call)
    beyond = padding(case, lengths)
    assert (got["y"][beyond] == 0).all(), "output beyond a length is not zero"
    assert (got["d x"][beyond] == 0).all(), "gradient of padded input is not zero"


# Long enough that the kernels go through backward in two or three chunks (csrc/cpu/backward.h: 8 MiB, at
# least 512 rows each), of which the middle one meets the same rows in both directions.
CHUNKED = (
    Case("lstm", T=300, B=8, H=256, bidirectional=True),
    Case("lstm", T=201, B=8, H=256, bidirectional=True),
    Case("gru", T=201, B=8, H=256, bidirectional=True),
    Case("lstm", T=300, B=8, H=512, bidirectional=True, dtype=torch.bfloat16),
    Case("lstm", T=300, B=8, H=256, bidirectional=True, proj_size=17),
    Case("gru", T=600, B=8, H=256),
    Case("gru", T=400, B=8, H=256, bidirectional=True),
    Case("rnn", T=300, B=8, H=1024, bidirectional=True),
)


@pytest.mark.skipif(not _extension.AVAILABLE, reason=f"cpu backend: {_extension.WHY_NOT}")
@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_parity_where_backward_goes_in_chunks(case: Case) -> None:
    layer = case.torch_layer()
    lengths = make_lengths("ragged", case.T, case.B)
    with seqkern.use_backend("cpu"):
        check_parity(
            layer, our_layer(layer), *case.inputs(), case, with_lengths(lengths), packed_call(lengths)
        )


def some_cases() -> list[Case]:
    """Every family, both directions, two layers, both layouts, every dtype, sizes around a vector's width."""
    cases = []
    for kind in KINDS:
        for dtype in DTYPES:
            cases.append(Case(kind, T=9, B=5, I=17, H=33, num_layers=2, bidirectional=True, dtype=dtype))
            cases.append(Case(kind, T=5, B=9, I=16, H=15, batch_first=True, hx=False, dtype=dtype))
    cases.append(Case("lstm", T=9, B=5, I=17, H=33, num_layers=2, bidirectional=True, proj_size=7))
    return cases


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "largest"])
@pytest.mark.parametrize("case", some_cases(), ids=str)
def test_padding_never_leaks(case: Case, value: str, backend: str) -> None:
    """Whatever the padding holds, every output and gradient keeps its bits."""
    layer = our_layer(case.torch_layer())
    lengths = make_lengths("zeros among", case.T, case.B)
    x, hx = case.inputs()
    beyond = padding(case, lengths)
    number = torch.finfo(x.dtype).max if value == "largest" else float(value)
    clean, dirty = (x.masked_fill(beyond[..., None], v) for v in (0.0, number))
    expected = evaluate(layer, clean, hx, call=with_lengths(lengths))
    got = evaluate(layer, dirty, hx, call=with_lengths(lengths))
    assert all(tensor.isfinite().all() for tensor in expected.values())
    same_bits(got, expected, f"{case} padding {value}")


@pytest.mark.parametrize("case", some_cases(), ids=str)
def test_cotangents_of_padding_never_leak(case: Case, backend: str) -> None:
    """The output is a constant 0 in the padding: what a loss sends back there goes nowhere, NaN included."""
    layer = our_layer(case.torch_layer())
    lengths = make_lengths("zeros among", case.T, case.B)
    x, hx = case.inputs()
    x.requires_grad_()
    y, _ = layer(x, hx, lengths=lengths)
    dy = torch.randn(y.shape).to(y.dtype)
    beyond = padding(case, lengths)[..., None]
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(y, wanted, dy.masked_fill(beyond, 0), retain_graph=True)
    got = torch.autograd.grad(y, wanted, dy.masked_fill(beyond, float("nan")))
    names = ["d x", *(name for name, _ in layer.named_parameters())]
    same_bits(dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)), case)


@pytest.mark.parametrize("kind", KINDS)
def test_length_zero_returns_the_initial_state(kind: str, backend: str) -> None:
    case = Case(kind, T=4, B=3, num_layers=2, bidirectional=True)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    lengths = torch.tensor([0, 4, 0])
    results = evaluate(layer, x, hx, call=with_lengths(lengths))
    for last, first in zip(("h_n", "c_n"), flat(hx), strict=False):
        assert torch.equal(results[last][:, ::2], first[:, ::2])
        assert not torch.isclose(results[last][:, 1], first[:, 1]).any()
    assert (results["y"][:, ::2] == 0).all()
    assert (results["y"][:, 1] != 0).all()
    without, state = layer(x, lengths=lengths)
    assert (without[:, ::2] == 0).all()
    assert all((last[:, ::2] == 0).all() for last in flat(state))


@pytest.mark.parametrize("kind", KINDS)
def test_full_lengths_are_no_lengths(kind: str, backend: str) -> None:
    case = Case(kind, T=7, B=9, I=17, H=33, num_layers=2, bidirectional=True)
    layer = case.torch_layer()
    full = with_lengths(torch.full((case.B,), case.T))
    check_parity(layer, our_layer(layer), *case.inputs(), case, call=full)


@pytest.mark.parametrize("kind", KINDS)
def test_one_length_changes_only_its_row(kind: str, backend: str) -> None:
    case = Case(kind, T=7, B=9, I=17, H=33, num_layers=2, bidirectional=True)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    with torch.no_grad():
        y, state = layer(x, hx, lengths=torch.full((9,), 5))
        y_, state_ = layer(x, hx, lengths=torch.tensor([5, 5, 5, 5, 2, 5, 5, 5, 5]))
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    for a, b in zip(flat((y, state)), flat((y_, state_)), strict=True):
        torch.testing.assert_close(a[:, others], b[:, others], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(a[:, 4], b[:, 4])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_integer_types(kind: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(kind, T=7, B=5)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    lengths = make_lengths("ragged", 7, 5)
    expected = evaluate(layer, x, hx, call=with_lengths(lengths))
    same_bits(evaluate(layer, x, hx, call=with_lengths(lengths.to(dtype))), expected, case)
    strided = torch.stack([lengths, -lengths], dim=1).to(dtype)[:, 0]
    assert not strided.is_contiguous()
    same_bits(evaluate(layer, x, hx, call=with_lengths(strided)), expected, f"{case} strided lengths")


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_lengths(kind: str, backend: str) -> None:
    case = Case(kind, T=7, B=5)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    expanded = torch.tensor([3]).expand(5)
    expected = evaluate(layer, x, hx, call=with_lengths(torch.full((5,), 3)))
    same_bits(evaluate(layer, x, hx, call=with_lengths(expanded)), expected, case)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_changed_after_the_forward(kind: str, backend: str) -> None:
    """The backward sees the lengths of the forward, or says that they were modified."""
    case = Case(kind, T=7, B=5)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    lengths = make_lengths("ragged", 7, 5)
    weights = list(layer.parameters())
    expected = torch.autograd.grad(layer(x, hx, lengths=lengths.clone())[0].sum(), weights)
    y, _ = layer(x, hx, lengths=lengths)
    lengths.fill_(0)
    try:
        got = torch.autograd.grad(y.sum(), weights)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Dropout: torch.nn's distribution, with the probability of its elements and the scale 1 / (1 - p).

ROWS = 4096


def dropout_samples(layer: nn.RNNBase, x: Tensor, hx: State, call, seed: int) -> dict[str, Tensor]:
    """Outputs and input gradients of ROWS equal rows, each under its own mask, rows first."""
    torch.manual_seed(seed)
    x = x.expand(-1, ROWS, -1).clone().requires_grad_()
    y, state = call(layer, x, hx)
    (dx,) = torch.autograd.grad([y, *flat(state)], [x], [torch.ones_like(t) for t in (y, *flat(state))])
    return {name: t.detach().transpose(0, 1).reshape(ROWS, -1) for name, t in (("y", y), ("d x", dx))}


def assert_same_distribution(
    got: dict[str, Tensor], expected: dict[str, Tensor], sigmas: float = 6.0
) -> None:
    """Mean and variance of each column agree within `sigmas` standard errors."""
    for name, a in got.items():
        b = expected[name]
        for what, power in (("mean", 1), ("variance", 2)):
            u, v = ((t - t.mean(0) if power == 2 else t).double() ** power for t in (a, b))
            error = ((u.var(0) + v.var(0)) / ROWS).sqrt()
            z = (u.mean(0) - v.mean(0)).abs() / error.clamp_min(1e-9)
            assert z.max() < sigmas, (
                f"{name}: the {what} of column {int(z.argmax())} is {z.max():.1f} sigmas away"
            )


@pytest.mark.parametrize("pattern", [None, "ragged"], ids=["full", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_distribution(kind: str, pattern: str | None, backend: str) -> None:
    theirs = Case(kind, I=5, H=6, num_layers=2, bidirectional=True).torch_layer()
    theirs.dropout = 0.4
    ours = our_layer(theirs)
    x = torch.randn(4, 1, 5)
    lengths = None if pattern is None else torch.full((ROWS,), 3)
    call = (lambda layer, x, hx: layer(x, hx)) if lengths is None else with_lengths(lengths)
    their_call = (lambda layer, x, hx: layer(x, hx)) if lengths is None else packed_call(lengths)
    got = dropout_samples(ours, x, None, call, seed=1)
    expected = dropout_samples(theirs, x, None, their_call, seed=2)
    assert_same_distribution(got, expected)
    drops = got["y"][:, :12].unique(dim=0)
    assert len(drops) > ROWS // 10, "rows share their masks"
    another = dropout_samples(ours, x, None, call, seed=3)
    assert not torch.equal(got["y"], another["y"]), "two calls share their masks"
    with pytest.raises(AssertionError, match="sigmas away"):  # the statistics see a scale forgotten
        theirs.dropout = 0.3
        assert_same_distribution(got, dropout_samples(theirs, x, None, their_call, seed=4))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_the_seed(kind: str, backend: str) -> None:
    layer = our_layer(Case(kind, num_layers=3).torch_layer())
    layer.dropout = 0.5
    x, hx = Case(kind, num_layers=3).inputs()
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(evaluate(layer, x, hx))
    same_bits(*runs, "two runs from one seed")


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_everything(kind: str, backend: str) -> None:
    """p = 1: the upper layers see zeros, and no gradient passes them."""
    case = Case(kind, num_layers=3, bidirectional=True)
    layer = case.torch_layer()
    layer.dropout = 1.0
    got = check_parity(layer, our_layer(layer), *case.inputs(), case)
    assert (got["d x"] != 0).any() is not None
    assert (got["d weight_ih_l1"] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_eval(kind: str, backend: str) -> None:
    case = Case(kind, num_layers=3, mode="eval")
    layer = case.torch_layer()
    layer.dropout = 0.9
    check_parity(layer, our_layer(layer), *case.inputs(), case)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_gradient_uses_the_forwards_mask(kind: str, backend: str) -> None:
    """A directional derivative, by finite differences under one seed, equals the gradient."""
    case = Case(kind, num_layers=2, dtype=torch.float64, T=3)
    layer = our_layer(case.torch_layer())
    layer.dropout = 0.5
    x, hx = case.inputs()
    direction = torch.randn_like(x)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        return layer(x, hx)[0].square().sum()

    x.requires_grad_()
    (dx,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        numeric = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((dx * direction).sum(), numeric, rtol=1e-6, atol=1e-8)


# What is refused.


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lengths", "mentions"),
    [
        (torch.tensor([4, -1, 2]), "-1"),
        (torch.tensor([4, 5, 2]), "5"),
        (torch.tensor([2**40, 1, 2]), str(2**40)),
        (torch.tensor([-(2**31), 1, 2], dtype=torch.int32), str(-(2**31))),
        (torch.tensor([4, 1]), "2"),
        (torch.tensor([4, 1, 1, 1]), "4"),
        (torch.tensor([[4, 1, 1]]), "1, 3"),
        (torch.tensor(4), "3"),
        (torch.tensor([], dtype=torch.int64), "0"),
        (torch.tensor([4, 1, 1], device="meta"), "meta"),
    ],
    ids=[
        "negative",
        "beyond T",
        "huge",
        "int32 minimum",
        "too few",
        "too many",
        "2-D",
        "0-D",
        "empty",
        "on meta",
    ],
)
def test_bad_values_and_shapes(
    kind: str, lengths: Tensor, mentions: str, batch_first: bool, backend: str
) -> None:
    case = Case(kind, T=4, B=3, batch_first=batch_first)
    layer = our_layer(case.torch_layer())
    with pytest.raises(ValueError, match="lengths") as info:
        layer(*case.inputs(), lengths=lengths)
    assert mentions in str(info.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_lengths_must_be_integers(kind: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(kind, T=4, B=3)
    with pytest.raises(ValueError, match="lengths") as info:
        our_layer(case.torch_layer())(*case.inputs(), lengths=torch.ones(3, dtype=dtype))
    assert str(dtype) in str(info.value)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_do_not_go_with_packed_input(kind: str, backend: str) -> None:
    case = Case(kind, T=4, B=3)
    x, hx = case.inputs()
    packed = nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1])
    with pytest.raises(ValueError, match=r"lengths.*PackedSequence"):
        our_layer(case.torch_layer())(packed, hx, lengths=torch.tensor([4, 2, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_by_keyword_only(kind: str, backend: str) -> None:
    case = Case(kind, T=4, B=3)
    with pytest.raises(TypeError, match="positional"):
        our_layer(case.torch_layer())(*case.inputs(), torch.tensor([4, 2, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_do_not_go_with_unbatched_input(kind: str, backend: str) -> None:
    case = Case(kind, T=4, batched=False)
    for lengths in (torch.tensor([4]), torch.tensor(4)):
        with pytest.raises(ValueError, match=r"lengths.*unbatched"):
            our_layer(case.torch_layer())(*case.inputs(), lengths=lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_must_be_a_tensor(kind: str, backend: str) -> None:
    case = Case(kind, T=4, B=3)
    with pytest.raises(TypeError, match=r"lengths: .*list"):
        our_layer(case.torch_layer())(*case.inputs(), lengths=[4, 2, 1])
