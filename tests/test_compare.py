"""The rule itself: it says no to what it should, with the tensor's name, the index and both values."""

import copy

import pytest
import torch
from cases import KINDS, Case, full_cross, our_layer, pairwise, sample
from compare import (
    FLOOR_ULPS,
    agree,
    doubled,
    errors_nearby,
    evaluate,
    packed_call,
    poisoned,
    same_bits,
    with_strides,
    within,
)
from torch import nn

EPS = torch.finfo(torch.float32).eps


def results(value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """y: [2, 3] of ones but for y[1, 2]."""
    y = torch.ones(2, 3, dtype=dtype)
    y[1, 2] = value
    return {"y": y}


def test_error_up_to_twice_torchs_and_the_floor() -> None:
    exact, peer = results(1.0, torch.float64), results(1 + 64 * EPS)
    within(results(1 + (2 * 64 + FLOOR_ULPS) * EPS), peer, exact, "here")
    with pytest.raises(
        AssertionError, match=r"case here\ny\[1, 2\]: got 1\.00001.*, expected 1\.0, torch\.nn"
    ):
        within(results(1 + (2 * 64 + FLOOR_ULPS + 2) * EPS), peer, exact, "here")


def test_errors_nearby_count_where_the_rule_says_no() -> None:
    exact, peer = results(1.0, torch.float64), results(1.0)
    got = results(1 + 20 * EPS)
    within(got, peer, exact, "here", lambda: {"y": 8 * EPS})
    with pytest.raises(AssertionError, match="1 of 6 beyond"):
        within(got, peer, exact, "here", lambda: {"y": 7 * EPS})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_nearby_are_torchs_error(kind: str, dtype: torch.dtype) -> None:
    """Some ulps of a well-conditioned result in every dtype, and of the size of the error here."""
    case = Case(kind, T=5, B=4, H=33, dtype=dtype)
    layer, (x, hx) = case.torch_layer(), case.inputs()
    nearby = errors_nearby(layer, x, hx, None)
    peer = evaluate(layer, x, hx)
    exact = evaluate(copy.deepcopy(layer).double(), doubled(x), doubled(hx), rounded=dtype)
    assert nearby.keys() == peer.keys()
    for name, y in peer.items():
        ulp = torch.finfo(dtype).eps * exact[name].abs().max().item()
        assert 0.1 * ulp < nearby[name] < 20 * ulp, name
        here = (y.double() - exact[name]).abs().max().item()
        assert dtype is torch.float64 or 0.2 * here < nearby[name] < 10 * here, name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_not_finite(value: float) -> None:
    exact = results(1.0, torch.float64)
    with pytest.raises(AssertionError, match=r"y\[1, 2\]: got -?(nan|inf)"):
        within(results(value), results(1.0), exact, "here")
    with pytest.raises(AssertionError, match=r"y\[1, 2\]: got -?(nan|inf)"):
        agree(results(value), results(1.0), 1e-3, "here")


def test_shape_dtype_and_names() -> None:
    exact = results(1.0, torch.float64)
    with pytest.raises(AssertionError, match=r"y: dtype: got torch\.float64, expected torch\.float32"):
        within(exact, results(1.0), exact, "here")
    with pytest.raises(AssertionError, match=r"y: shape: got .*\[3, 2\]"):
        within({"y": torch.ones(3, 2)}, results(1.0), exact, "here")
    for compare in (same_bits, lambda a, b, case: agree(a, b, 1.0, case)):
        with pytest.raises(AssertionError, match=r"here: \['y'\], \['y', 'h_n'\]"):
            compare(results(1.0), results(1.0) | {"h_n": torch.ones(1)}, "here")


def test_same_bits_tells_zeros_and_nans_apart() -> None:
    same_bits(results(float("nan")), results(float("nan")), "here")
    with pytest.raises(AssertionError, match=r"y\[1, 2\]: got -0\.0, expected 0\.0 \(1 of 6 differ\)"):
        same_bits(results(-0.0), results(0.0), "here")


def test_poison_shows_in_fresh_memory() -> None:
    with poisoned():
        assert torch.empty(3, 4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_with_strides() -> None:
    x = torch.randn(3, 4)
    for strides in ((1, 3), (8, 2), (4, 1)):
        y = with_strides(x, strides)
        assert y.stride() == strides
        assert torch.equal(y, x)
    repeated = with_strides(x[:1].expand(3, 4), (0, 1))
    assert repeated.stride() == (0, 1)
    assert torch.equal(repeated, x[:1].expand(3, 4))


def test_gradients_are_those_of_the_cotangents() -> None:
    """`evaluate` against finite differences of the function that it differentiates."""
    case = Case("lstm", T=2, B=2, I=3, H=4, proj_size=2, dtype=torch.float64)
    layer, (x, hx) = case.torch_layer(), case.inputs()
    found = evaluate(layer, x, hx, seed=5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        y, (h_n, c_n) = layer(x, hx)
        return sum(
            (t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in (y, h_n, c_n)
        )

    direction = torch.randn_like(x)
    slope = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((found["d x"] * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_packed_call_is_each_row_by_itself() -> None:
    """The peer of `lengths` against the plainest reading: every row alone, cut to its length."""
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    x, h0, c0 = torch.randn(6, 4, 3), torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    lengths = torch.tensor([2, 6, 0, 3])
    y, (h_n, c_n) = packed_call(lengths)(layer, x, (h0, c0))
    for b, n in enumerate(lengths.tolist()):
        assert (y[n:, b] == 0).all()
        if n == 0:
            assert torch.equal(h_n[:, b], h0[:, b]) and torch.equal(c_n[:, b], c0[:, b])
            continue
        y_, (h_n_, c_n_) = layer(x[:n, b], (h0[:, b].contiguous(), c0[:, b].contiguous()))
        torch.testing.assert_close(y[:n, b], y_)
        torch.testing.assert_close(h_n[:, b], h_n_)
        torch.testing.assert_close(c_n[:, b], c_n_)


def test_pairwise_has_every_pair() -> None:
    factors = {"a": (1, 2, 3), "b": (True, False), "c": "xyz", "d": (0, 1)}
    rows = pairwise(factors)
    assert len(rows) < 3 * 2 * 3 * 2
    for p in factors:
        for q in factors:
            if p != q:
                assert {(row[p], row[q]) for row in rows} == {(u, v) for u in factors[p] for v in factors[q]}
    assert rows == pairwise(factors)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_hold_what_they_promise(kind: str) -> None:
    cases = sample(kind)
    assert len({str(case) for case in cases}) == len(cases)
    assert {case.H for case in cases} >= {1, 15, 16, 17, 31, 33, 63, 65, 129}
    assert {case.dtype for case in cases} == {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    everything = full_cross(kind)
    assert len({str(case) for case in everything}) == len(everything)
    assert kind != "lstm" or {case.proj_size for case in cases} >= {0, 1, 8, 14}
    assert kind != "rnn" or {case.nonlinearity for case in cases} == {"tanh", "relu"}


@pytest.mark.parametrize("case", [case for case in sample("rnn") if case.away_from_kink], ids=str)
def test_steered_cases_stay_away_from_the_kink(case: Case) -> None:
    """A pre-activation that is negative, or positive and not small, everywhere; and both signs occur."""
    layer = case.torch_layer().double()
    x, hx = case.inputs()
    y, _ = layer(x.double(), None if hx is None else hx.double())
    assert not ((y > 0) & (y < 0.05)).any()
    assert (y > 0).any() or y.numel() < 9
    assert (y == 0).any() or y.numel() < 9
    assert our_layer(case.torch_layer()).nonlinearity == "relu"
