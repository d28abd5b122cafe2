"""The C++ kernels below the layers: activations, bits, memory checks."""

import math

import pytest
import torch

from seqkern import _extension

pytestmark = pytest.mark.skipif(not _extension.AVAILABLE, reason=f"cpu backend: {_extension.WHY_NOT}")

INSTRUCTION_SETS = _extension._C.instruction_sets() if _extension.AVAILABLE else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    before = _extension._C.instruction_set()
    _extension._C.set_instruction_set(request.param)
    yield request.param
    _extension._C.set_instruction_set(before)


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_extension._C.activation(name, x.tolist()), dtype=torch.float32)


def ulps(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """The error of float32 `got` in units of the last place of float64 `want` rounded to float32."""
    near = want.float()
    spacing = torch.nextafter(near.abs(), torch.tensor(math.inf)) - near.abs()
    return (got.double() - want).abs() / spacing.double()


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activation_is_within_two_ulp(instruction_set, name):
    dense = torch.linspace(-110, 110, 200_001)
    small = torch.logspace(-44, 0, 20_001, dtype=torch.float64).float()  # subnormals too
    x = torch.cat([dense, small, -small, torch.linspace(-1, 1, 50_001)])
    want = getattr(torch, name)(x.double())
    # torch.sigmoid in float64 loses nothing that float32 could show
    error = ulps(activation(name, x), want)
    worst = int(error.argmax())
    assert error[worst] <= 2, f"{name}({x[worst]}): {error[worst]} ulp"


@pytest.mark.parametrize(("name", "low"), [("sigmoid", 0.0), ("tanh", -1.0)])
def test_activation_of_special_values(instruction_set, name, low):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38, -3e38])
    got = activation(name, x)
    zero = 0.5 if name == "sigmoid" else 0.0
    assert got[[0, 1, 3, 4, 5, 6]].tolist() == [1.0, low, zero, zero, 1.0, low]
    assert got[2].isnan()
    if name == "tanh":
        assert math.copysign(1, got[4]) == -1, "tanh(-0.0) is -0.0"


def lstm_arguments(T=5, B=3, input_size=4, H=6, D=1):
    shapes = [(4 * H, input_size), (4 * H, H), (4 * H,), (4 * H,)] * D
    params = [torch.randn(shape) / H**0.5 for shape in shapes]  # as wide as torch.nn initialises, about
    return {
        "x": torch.randn(T, B, input_size),
        "h0": torch.randn(D, B, H),
        "c0": torch.randn(D, B, H),
        "params": params,
        "lengths": None,
        "batch_sizes": None,
        "save": True,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(5, 3)}, RuntimeError, r"x: expected \[T, B, I\], got \[5, 3\]"),
        ({"x": torch.ones(5, 3, 4, dtype=torch.int32)}, RuntimeError, "h0: expected Int as x, got Float"),
        ({"h0": torch.randn(1, 4, 6)}, RuntimeError, r"h0: expected shape \[1, 3, 6\], got \[1, 4, 6\]"),
        ({"h0": torch.randn(3, 3, 6)}, RuntimeError, r"h0: expected \[1 or 2, B, P\], got \[3, 3, 6\]"),
        ({"c0": torch.randn(1, 3, 5)}, RuntimeError, r"c0: expected shape \[1, 3, 6\], got \[1, 3, 5\]"),
        (
            {"params": [torch.randn(24, 5)] * 4},
            RuntimeError,
            r"w_ih: expected shape \[24, 4\], got \[24, 5\]",
        ),
        (
            {"params": [torch.randn(24, 4)]},
            RuntimeError,
            "params: expected 2 to 5 per direction, got 1 for 1",
        ),
        ({"lengths": torch.tensor([5, 6, 1])}, ValueError, "lengths: expected 0 to T = 5, got 6 at 1"),
        ({"lengths": torch.tensor([5, 1])}, RuntimeError, r"lengths: expected \[B\] = \[3\] int64"),
        ({"x": torch.randn(6, 4), "batch_sizes": torch.tensor([3, 2, 2])}, RuntimeError, "their sum is 7"),
        ({"x": torch.randn(6, 4), "batch_sizes": torch.tensor([1, 3, 2])}, RuntimeError, "got 3 at step 1"),
    ],
)
def test_operator_refuses_memory_that_does_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        torch.ops.seqkern.lstm_forward(**(lstm_arguments() | change))


def test_backward_refuses_a_reserve_of_another_call():
    arguments = lstm_arguments()
    y, _, _, reserve = torch.ops.seqkern.lstm_forward(**arguments)
    del arguments["save"]
    with pytest.raises(RuntimeError, match=r"reserve: expected shape \[15, 80\], got \[14, 80\]"):
        torch.ops.seqkern.lstm_backward(
            y, None, None, **arguments, y=y, reserve=reserve[:14], need_dx=True, need_dparams=True
        )


@pytest.mark.parametrize(("T", "B", "D"), [(9, 1, 1), (9, 17, 1), (9, 17, 2), (600, 4, 1)])
def test_threads_agree_and_repeat_bit_for_bit(instruction_set, T, B, D):
    """One number of threads: the same bits. Another number: other tiles, so other roundings, nothing more."""
    arguments = lstm_arguments(T, B, input_size=33, H=140, D=D)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        try:
            y, h_n, c_n, reserve = torch.ops.seqkern.lstm_forward(**arguments)
            inputs = {name: value for name, value in arguments.items() if name != "save"}
            gradients = torch.ops.seqkern.lstm_backward(
                y, h_n, c_n, **inputs, y=y, reserve=reserve, need_dx=True, need_dparams=True
            )
        finally:
            torch.set_num_threads(2)
        results.append([y, h_n, c_n, *gradients[:3], *gradients[3]])
    for repeated, first in zip(results[3], results[1], strict=True):
        assert torch.equal(repeated, first), "two calls alike"
    for got, want in zip(results[1] + results[2], results[0] * 2, strict=True):
        scale = want.abs().max()
        assert (got - want).abs().max() <= 2e-5 * scale


def test_measured_limits_are_rates(instruction_set):
    assert _extension._C.fma_peak(2, 0.01) > 0
    for size in (1 << 12, 1_500_000, 3 << 20):  # memory that malloc aligns in different ways
        assert _extension._C.read_bandwidth(2, size, 0.01) > 0


def test_instruction_set_must_be_known():
    with pytest.raises(ValueError, match=r"instruction set: expected one of baseline.*, got mmx"):
        _extension._C.set_instruction_set("mmx")
