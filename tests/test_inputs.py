"""What may come in: strided, expanded, overlapping, empty, huge, infinite; any subset wants gradients."""

import itertools

import pytest
import torch
from cases import DTYPES, KINDS, OURS, TORCH, Case, State, our_layer
from compare import agree, check_parity, evaluate, flat, packed_call, poisoned, same_bits
from torch import Tensor, nn


def repack(hx: State | None, change) -> State | None:
    states = tuple(change(state) for state in flat(hx))
    return None if hx is None else states[0] if isinstance(hx, Tensor) else states


LAYOUTS = {
    # name: dense x or state → that shape in another memory layout (expand and overlap change the values, too)
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "features inner of two": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "columns of a wider one": lambda t: torch.cat([t, t, t], dim=-1)[..., t.size(-1) : 2 * t.size(-1)],
    "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "not at the start": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "one row expanded": lambda t: t[:, :1].expand(t.shape),
    "one step expanded": lambda t: t[:1].expand(t.shape),
    "one value expanded": lambda t: t[:1, :1, :1].expand(t.shape),
    "one feature expanded": lambda t: t[..., :1].expand(t.shape),
}


def overlap(t: Tensor) -> Tensor:
    """Windows of one signal, one value apart, as `unfold` gives them."""
    T, B, I = t.shape  # noqa: E741
    signal = t.flatten()[: (T - 1) + (B - 1) + I].clone()
    return signal.as_strided((T, B, I), (1, 1, 1))


LAYOUTS["overlapping"] = overlap


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: str, layout: str, ragged: bool, backend: str) -> None:
    """x and hx in any layout; `leaf` keeps it, so that the layer sees exactly these strides."""
    lengths = torch.tensor([3, 6, 0, 1, 5])
    calls = (lambda layer, x, hx: layer(x, hx, lengths=lengths), packed_call(lengths)) if ragged else ()
    for batch_first in (False, True):
        case = Case(kind, T=6, B=5, I=17, H=33, num_layers=2, bidirectional=True, batch_first=batch_first)
        layer = case.torch_layer()
        x, hx = case.inputs()
        x, hx = LAYOUTS[layout](x), repack(hx, LAYOUTS[layout])
        assert layout == "not at the start" or not x.is_contiguous()
        check_parity(layer, our_layer(layer), x, hx, f"{case} {layout}", *calls)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone(kind: str, backend: str) -> None:
    """No input, state, length or weight is written to, by the forward or the backward."""
    case = Case(kind, T=6, B=5, H=33, num_layers=2, bidirectional=True)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    lengths = torch.tensor([3, 6, 0, 1, 5])
    watched = [x, *flat(hx), lengths, *(weight.data for weight in layer.parameters())]
    before = [tensor.clone() for tensor in watched]
    evaluate(layer, x, hx, call=lambda layer, x, hx: layer(x, hx, lengths=lengths))
    evaluate(layer, x, hx)
    assert all(torch.equal(a, b) for a, b in zip(watched, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_results_own_their_memory(kind: str, backend: str) -> None:
    """Writing to one result changes neither another, nor an input, nor a later call's results."""
    case = Case(kind, T=3, B=2, H=16)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    with torch.no_grad():
        expected = [tensor.clone() for tensor in flat(layer(x, hx))]
        for i in range(len(expected)):
            results = flat(layer(x, hx))
            results[i].fill_(7.0)
            others = [a for j, a in enumerate(results) if j != i]
            assert all(
                torch.equal(a, expected[j]) for a, j in zip(others, others_of(i, len(expected)), strict=True)
            )
    assert torch.equal(x, case.inputs()[0])


def others_of(i: int, n: int) -> list[int]:
    return [j for j in range(n) if j != i]


@pytest.mark.parametrize("kind", KINDS)
def test_output_layout(kind: str, backend: str) -> None:
    """Outputs are contiguous wherever torch.nn's are: a program's `view` works where it did."""
    for batch_first, batched in itertools.product((False, True), (False, True)):
        case = Case(kind, T=6, B=5, batch_first=batch_first, bidirectional=True, batched=batched)
        layer = case.torch_layer()
        for mine, its in zip(
            flat(our_layer(layer)(*case.inputs())), flat(layer(*case.inputs())), strict=True
        ):
            assert mine.is_contiguous() or not its.is_contiguous(), f"{case}: {mine.stride()}, {its.stride()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str, options: dict, dtype: torch.dtype, backend: str) -> None:
    case = Case(kind, T=5, B=0, dtype=dtype, **options)
    layer = case.torch_layer()
    got = check_parity(layer, our_layer(layer), *case.inputs(), case)
    assert all((grad == 0).all() for name, grad in got.items() if name.startswith("d "))
    y, state = our_layer(layer)(case.inputs()[0])
    y_, state_ = layer(case.inputs()[0])
    assert [t.shape for t in flat((y, state))] == [t.shape for t in flat((y_, state_))]
    with_lengths = our_layer(layer)(case.inputs()[0], lengths=torch.zeros(0, dtype=torch.int64))
    assert [t.shape for t in flat(with_lengths)] == [t.shape for t in flat((y_, state_))]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_steps(kind: str, batched: bool, backend: str) -> None:
    """T = 0 raises what torch.nn raises."""
    x = torch.zeros(0, 2, 3) if batched else torch.zeros(0, 3)
    with pytest.raises(RuntimeError) as theirs:
        TORCH[kind](3, 4)(x)
    with pytest.raises(RuntimeError) as ours:
        OURS[kind](3, 4)(x)
    assert "larger than 0" in str(theirs.value) and "larger than 0" in str(ours.value)


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Nothing, each alone, each pair, all but one, all."""
    sizes = {0, 1, 2, len(names) - 1, len(names)}
    return [subset for n in sorted(sizes) for subset in itertools.combinations(names, n)]


NAMES = ("x", "hx", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_ih_l1_reverse")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_requires_grad_subsets(kind: str, mode: str, backend: str) -> None:
    case = Case(kind, T=4, B=3, I=17, H=15, num_layers=2, bidirectional=True, mode=mode)
    layer = case.torch_layer()
    full = evaluate(layer, *case.inputs())
    for subset in subsets(NAMES):
        ours = our_layer(layer).requires_grad_(False)
        x, hx = case.inputs()
        named = {"d x": x} | dict(zip(("d h0", "d c0"), flat(hx), strict=False))
        named |= {f"d {name}": weight for name, weight in ours.named_parameters()}
        for name in subset:
            for tensor in flat(hx) if name == "hx" else [named[f"d {name}"]]:
                tensor.requires_grad_()
        outputs = flat(ours(x, hx))
        assert all(y.requires_grad == bool(subset) for y in outputs), (
            f"{subset}: requires_grad of the outputs"
        )
        if not subset:
            continue
        generator = torch.Generator().manual_seed(0)
        dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
        torch.autograd.backward(outputs, dys)
        asked = {name: tensor.grad for name, tensor in named.items() if tensor.requires_grad}
        assert all(tensor.grad is None for tensor in named.values() if not tensor.requires_grad), subset
        assert all(grad is not None for grad in asked.values()), f"{subset}: a gradient is missing"
        agree(asked, {name: full[name] for name in asked}, 1e-5, f"{case} {subset}")


@pytest.mark.parametrize("used", [("y",), ("h_n",), ("c_n",), ("y", "c_n")], ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_some_outputs_unused(kind: str, used: tuple[str, ...], backend: str) -> None:
    """Cotangents of the other outputs are not given at all, rather than zero."""
    if kind != "lstm" and "c_n" in used:
        return
    case = Case(kind, T=4, B=3, I=17, H=15, num_layers=2, bidirectional=True)
    layer = case.torch_layer()
    results = []
    for module in (layer, our_layer(layer)):
        x, hx = case.inputs()
        x.requires_grad_()
        outputs = dict(zip(("y", "h_n", "c_n"), flat(module(x, hx)), strict=False))
        loss = sum((outputs[name] * outputs[name].detach().sin()).sum() for name in used)
        wanted = [x, *module.parameters()]
        grads = torch.autograd.grad(loss, wanted, materialize_grads=True)
        names = ["d x", *(f"d {name}" for name, _ in module.named_parameters())]
        results.append(dict(zip(names, grads, strict=True)))
    agree(results[1], results[0], 1e-5, f"{case} {used}")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_grad_mode_does_not_matter(kind: str, grad: bool, backend: str) -> None:
    """The values with and without a graph are the same bits: no_grad, inference_mode, frozen."""
    case = Case(kind, T=9, B=5, I=17, H=33, num_layers=2, bidirectional=True)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    names = ("y", "h_n", "c_n")
    expected = dict(zip(names, (t.detach() for t in flat(layer(x, hx))), strict=False))
    with torch.no_grad() if grad else torch.inference_mode():
        got = dict(zip(names, flat(layer(x, hx)), strict=False))
    same_bits({name: tensor.clone() for name, tensor in got.items()}, expected, case)


EXTREMES = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-42]


@pytest.mark.parametrize("value", EXTREMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values(kind: str, dtype: torch.dtype, value: float, backend: str) -> None:
    """One extreme number in one row: torch.nn's value or NaN there, and the other rows' bits untouched."""
    case = Case(kind, T=5, B=9, I=17, H=33, dtype=dtype, bidirectional=True)
    layer = case.torch_layer()
    x, hx = case.inputs()
    spoilt = x.clone()
    spoilt[2, 4, 3] = value
    ours = our_layer(layer)
    with torch.no_grad(), poisoned():
        clean, _ = ours(x, hx)
        got, state = ours(spoilt, hx)
        expected, state_ = layer.double()(spoilt.double(), repack(hx, Tensor.double))
    others = [b for b in range(9) if b != 4]
    assert torch.equal(got[:, others], clean[:, others])
    for name, y, y_ in zip(("y", "h_n", "c_n"), flat((got, state)), flat((expected, state_)), strict=False):
        y = y.double()
        assert torch.equal(y.isnan(), y_.isnan()), f"{name}: NaN in other places than torch.nn's"
        tolerance = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, y_, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_scales(kind: str, scale: float, backend: str) -> None:
    """Gates shut or wide open, and inputs that vanish."""
    case = Case(kind, T=7, B=5, I=17, H=33, num_layers=2)
    layer = case.torch_layer()
    x, hx = case.inputs()
    check_parity(
        layer, our_layer(layer), x * scale, repack(hx, lambda t: t.clamp(-1, 1)), f"{case} x * {scale}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_be_strided_and_shared(kind: str, backend: str) -> None:
    """A transposed weight, one weight for both directions, and a slice of a larger one."""
    case = Case(kind, T=4, B=3, I=15, H=15, bidirectional=True)
    layer = case.torch_layer()
    runs = []
    for module in (layer, our_layer(layer)):
        module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach().t().contiguous().t())
        module.weight_ih_l0_reverse = module.weight_ih_l0
        bias = module.bias_hh_l0.detach()
        module.bias_hh_l0 = nn.Parameter(torch.stack([bias, bias], dim=1)[:, 0])
        assert not module.weight_ih_l0.is_contiguous() and not module.bias_hh_l0.is_contiguous()
        runs.append(evaluate(module, *case.inputs()))
    agree(runs[1], runs[0], 1e-5, case)


@pytest.mark.parametrize("kind", KINDS)
def test_same_inputs_same_bits(kind: str, backend: str) -> None:
    case = Case(kind, T=17, B=9, I=33, H=65, num_layers=2, bidirectional=True)
    layer = our_layer(case.torch_layer())
    runs = [evaluate(layer, *case.inputs()) for _ in range(3)]
    same_bits(runs[1], runs[0], case)
    same_bits(runs[2], runs[0], case)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind: str) -> None:
    """Shapes without memory, as torch.nn gives them."""
    options = dict(num_layers=2, bidirectional=True, batch_first=True, device="meta")
    x = torch.zeros(3, 5, 7, device="meta")
    for mine, its in zip(
        flat(OURS[kind](7, 9, **options)(x)), flat(TORCH[kind](7, 9, **options)(x)), strict=True
    ):
        assert mine.shape == its.shape and mine.dtype == its.dtype and mine.device == its.device
