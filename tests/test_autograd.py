"""Autograd: every gradient, of every order, through every way torch has of asking for one."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import seqkern

KINDS = ("rnn", "lstm", "gru")
TORCH = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
OURS = {"rnn": seqkern.RNN, "lstm": seqkern.LSTM, "gru": seqkern.GRU}
TORCH_CELL = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
OUR_CELL = {"rnn": seqkern.RNNCell, "lstm": seqkern.LSTMCell, "gru": seqkern.GRUCell}

LAYERS = [
    pytest.param(kind, options, id="-".join([kind, *(f"{k}={v}" for k, v in options.items())]))
    for kind, options in [
        ("rnn", {}),
        ("rnn", {"nonlinearity": "relu", "bias": False}),
        ("rnn", {"num_layers": 2, "bidirectional": True}),
        ("lstm", {}),
        ("lstm", {"bias": False, "proj_size": 2}),
        ("lstm", {"num_layers": 2, "bidirectional": True}),
        ("lstm", {"bidirectional": True, "proj_size": 2}),
        ("gru", {}),
        ("gru", {"bias": False}),
        ("gru", {"num_layers": 2, "bidirectional": True}),
    ]
]

T, B, I, H = 4, 3, 2, 3  # noqa: E741
LENGTHS = (4, 0, 2)
BATCH_SIZES = (3, 2, 2, 1)


def flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for part in outputs if part is not None for t in flatten(part)]


def pair(kind: str, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours with the same weights."""
    theirs = TORCH[kind](I, H, dtype=dtype, **options)
    ours = OURS[kind](I, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_for(layer: nn.RNNBase, requires_grad: bool = True) -> tuple[Tensor, Any]:
    """x [T, B, I] and hx of random numbers."""
    dtype = layer.weight_ih_l0.dtype
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=requires_grad)
    h = torch.randn(rows, B, layer.proj_size or H, dtype=dtype, requires_grad=requires_grad)
    if layer.mode != "LSTM":
        return x, h
    return x, (h, torch.randn(rows, B, H, dtype=dtype, requires_grad=requires_grad))


def leaves(tree: Any) -> Any:
    """A copy of tensors, as leaves of their own."""
    if isinstance(tree, Tensor):
        return tree.detach().clone().requires_grad_(tree.requires_grad)
    return None if tree is None else tuple(leaves(t) for t in tree)


def weighted_sum(outputs: Any) -> Tensor:
    """A scalar that weighs every element differently, the same in every call."""
    terms = []
    for t in flatten(outputs):
        weights = torch.linspace(-1, 2, t.numel(), dtype=torch.float64).view(t.shape).to(t.dtype)
        terms.append((t * weights).sum())
    return torch.stack([term.double() for term in terms]).sum()


def assert_same(got: Sequence[Tensor | None], expected: Sequence[Tensor | None], **tolerance) -> None:
    assert len(got) == len(expected)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), f"tensor {k}: got {a}, expected {b}"
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, k=k: f"tensor {k}: {m}")


def gradients(call: Callable, layer: nn.Module, *inputs: Any) -> list[Tensor | None]:
    tensors = [t for t in (*flatten(inputs), *layer.parameters()) if t.requires_grad]
    return list(torch.autograd.grad(weighted_sum(call(*inputs)), tensors, allow_unused=True))


def as_function(layer: nn.RNNBase, **keywords) -> Callable:
    """The layer as a function of x, states and parameters, for gradcheck."""
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *rest):
        states = rest[: len(rest) - len(names)]
        hx = states[0] if len(states) == 1 else states
        weights = dict(zip(names, rest[len(states) :], strict=True))
        outputs = torch.func.functional_call(layer, weights, (x, hx), keywords)
        return tuple(t for t in flatten(outputs) if t.is_floating_point())

    return function


# ---- first and second derivatives against finite differences -----------------------------------------------


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("batch", ["padded", "lengths"])
def test_gradcheck(backend, kind, options, batch):
    layer = OURS[kind](I, H, dtype=torch.float64, **options)
    x, hx = inputs_for(layer)
    keywords = {"lengths": torch.tensor(LENGTHS)} if batch == "lengths" else {}
    arguments = (x, *flatten(hx), *(p.detach().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(as_function(layer, **keywords), arguments)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("batch", ["padded", "lengths"])
def test_gradgradcheck(backend, kind, options, batch):
    layer = OURS[kind](I, H, dtype=torch.float64, **options)
    x, hx = inputs_for(layer)
    keywords = {"lengths": torch.tensor(LENGTHS)} if batch == "lengths" else {}
    arguments = (x, *flatten(hx), *(p.detach().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradgradcheck(as_function(layer, **keywords), arguments, fast_mode=True)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_gradcheck_packed(backend, kind, options):
    layer = OURS[kind](I, H, dtype=torch.float64, **options)
    _, hx = inputs_for(layer)
    data = torch.randn(sum(BATCH_SIZES), I, dtype=torch.float64, requires_grad=True)
    inner = as_function(layer)

    def function(data, *rest):
        return inner(PackedSequence(data, torch.tensor(BATCH_SIZES)), *rest)

    arguments = (data, *flatten(hx), *(p.detach().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


# ---- higher orders against torch.nn ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_create_graph(backend, kind, options):
    """The gradient of a gradient penalty."""
    theirs, ours = pair(kind, **options)
    x, hx = inputs_for(theirs)
    results = []
    for layer in (theirs, ours):
        x_, hx_ = leaves(x), leaves(hx)
        tensors = [x_, *flatten(hx_), *layer.parameters()]
        first = torch.autograd.grad(weighted_sum(layer(x_, hx_)), tensors, create_graph=True)
        penalty = sum(g.pow(2).sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, tensors, allow_unused=True)])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_third_order(backend, kind):
    theirs, ours = pair(kind)
    x, _ = inputs_for(theirs)
    results = []
    for layer in (theirs, ours):
        g = x_ = leaves(x)
        y = weighted_sum(layer(x_))
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x_, create_graph=True)
            y = weighted_sum(g.pow(2))
        results.append(g)
    assert_same([results[1]], [results[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_create_graph_with_states_computed_from_the_input(backend, kind):
    """One input computed from another: its path must be counted once."""
    theirs, ours = pair(kind)
    x, _ = inputs_for(theirs)
    results = []
    for layer in (theirs, ours):
        x_ = leaves(x)
        h = x_.sum(0, keepdim=True).sum(-1, keepdim=True).expand(1, B, H).tanh()
        hx = (h, h * x_[0, 0, 0]) if kind == "lstm" else h
        (first,) = torch.autograd.grad(weighted_sum(layer(x_, hx)), x_, create_graph=True)
        results.append([first, *torch.autograd.grad(first.pow(2).sum(), [x_, *layer.parameters()])])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_create_graph_through_each_output_alone(backend, kind):
    theirs, ours = pair(kind)
    x, hx = inputs_for(theirs)
    for k in range(3 if kind == "lstm" else 2):
        results = []
        for layer in (theirs, ours):
            x_, hx_ = leaves(x), leaves(hx)
            output = flatten(layer(x_, hx_))[k]
            (first,) = torch.autograd.grad(weighted_sum(output), x_, create_graph=True)
            results.append([first, *torch.autograd.grad(first.pow(2).sum(), [x_, *flatten(hx_)])])
        assert_same(results[1], results[0])


# ---- what is asked for, and what is kept -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, -1], ids=["only one", "all but one"])
def test_requires_grad_on_any_subset(backend, kind, keep):
    theirs, ours = pair(kind, num_layers=2, bidirectional=True)
    x, hx = inputs_for(theirs)
    count = len([x, *flatten(hx), *theirs.parameters()])
    for chosen in range(count):
        results = []
        for layer in (theirs, ours):
            x_, hx_ = leaves(x), leaves(hx)
            tensors = [x_, *flatten(hx_), *layer.parameters()]
            for k, t in enumerate(tensors):
                t.grad = None
                t.requires_grad_((k == chosen) if keep == 1 else (k != chosen))
            weighted_sum(layer(x_, hx_)).backward()
            results.append([t.grad for t in tensors])
        assert_same(results[1], results[0])


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_each_output_alone(backend, kind, options):
    theirs, ours = pair(kind, **options)
    x, hx = inputs_for(theirs)
    for k in range(3 if kind == "lstm" else 2):
        results = []
        for layer in (theirs, ours):
            x_, hx_ = leaves(x), leaves(hx)
            tensors = [x_, *flatten(hx_), *layer.parameters()]
            output = flatten(layer(x_, hx_))[k]
            results.append(
                torch.autograd.grad(weighted_sum(output), tensors, allow_unused=True, materialize_grads=True)
            )
        assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_backward_in_eval_mode(backend, kind):
    theirs, ours = pair(kind, num_layers=2, dropout=0.5)
    theirs.eval(), ours.eval()
    x, hx = inputs_for(theirs)
    results = []
    for layer in (theirs, ours):
        x_, hx_ = leaves(x), leaves(hx)
        results.append(gradients(layer, layer, x_, hx_))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_retain_graph(backend, kind):
    layer = OURS[kind](I, H, dtype=torch.float64)
    x, hx = inputs_for(layer)
    loss = weighted_sum(layer(x, hx))
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_without_need(backend, kind):
    layer = OURS[kind](I, H, num_layers=2)
    x, hx = inputs_for(layer, requires_grad=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not any(t.requires_grad for t in flatten(layer(x, hx)))
        with torch.inference_mode():
            layer(x, hx)
        layer.requires_grad_(False)
        assert not any(t.requires_grad for t in flatten(layer(x, hx)))
    assert kept == []


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_hooks(backend, kind):
    """What backward needs can be packed and unpacked, as activation offloading does."""
    layer = OURS[kind](I, H, dtype=torch.float64)
    x, hx = inputs_for(layer)
    expected = gradients(layer, layer, x, hx)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        loss = weighted_sum(layer(x, hx))
    tensors = [x, *flatten(hx), *layer.parameters()]
    assert_same(torch.autograd.grad(loss, tensors), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks(backend, kind):
    theirs, ours = pair(kind)
    x, hx = inputs_for(theirs)
    results = []
    for layer in (theirs, ours):
        seen = []
        x_, hx_ = leaves(x), leaves(hx)
        layer.register_full_backward_hook(
            lambda module, dx, dy, seen=seen: seen.extend([*flatten(dx), *flatten(dy)])
        )
        layer.weight_hh_l0.register_hook(lambda g: g * 2)
        outputs = layer(x_, hx_)
        outputs[0].register_hook(lambda g: g * 3)
        weighted_sum(outputs).backward()
        results.append(
            [*seen, x_.grad, *(t.grad for t in flatten(hx_)), *(p.grad for p in layer.parameters())]
        )
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", ["x", "hx", "weight_ih_l0", "weight_hh_l0"])
def test_a_saved_tensor_changed_in_place_is_detected(backend, kind, changed):
    layer = OURS[kind](I, H, dtype=torch.float64)
    x, hx = inputs_for(layer)
    x_, hx_ = x * 1, tuple(t * 1 for t in flatten(hx))  # not leaves: those cannot change in place
    loss = weighted_sum(layer(x_, hx_ if kind == "lstm" else hx_[0]))
    with torch.no_grad():
        {"x": x_, "hx": hx_[0]}.get(changed, getattr(layer, changed, None)).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_changed_lengths_are_detected(cpu_backend, kind):
    layer = OURS[kind](I, H, dtype=torch.float64)
    x, hx = inputs_for(layer)
    lengths = torch.tensor(LENGTHS)
    loss = weighted_sum(layer(x, hx, lengths=lengths))
    lengths.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def identity(t: Tensor) -> Tensor:
    return t.detach().clone()


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("offload", [False, True], ids=["", "saved_tensors_hooks"])
def test_outputs_may_change_in_place(backend, kind, options, offload):
    """torch.nn's GRU and RNN allow it, its LSTM with two directions too: `y *= mask`, ReLU(inplace=True)."""
    layer = OURS[kind](I, H, dtype=torch.float64, **options)
    x, hx = inputs_for(layer)
    tensors = [x, *flatten(hx), *layer.parameters()]
    y, states = layer(x, hx)
    expected = [y * 2, *(t * 3 for t in flatten(states))]
    hooks = (identity, identity) if offload else (lambda t: t, lambda t: t)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        y, states = layer(x, hx)
        got = [y.mul_(2), *(t.mul_(3) for t in flatten(states))]
    assert_same(got, expected)
    grads = torch.autograd.grad(weighted_sum(got), tensors, retain_graph=True)
    assert_same(grads, torch.autograd.grad(weighted_sum(expected), tensors))
    with torch.no_grad():
        y.fill_(float("nan"))  # once more, after a first backward
    got = torch.autograd.grad(got, tensors, [torch.ones_like(t) for t in got])
    assert_same(got, torch.autograd.grad(layer(x, hx)[0].sum() * 2 + final_sum(layer(x, hx)[1]) * 3, tensors))


def final_sum(states: Any) -> Tensor:
    return sum(t.sum() for t in flatten(states))


@pytest.mark.parametrize("kind", KINDS)
def test_watching_the_output_holds_no_memory(cpu_backend, kind):
    """What tells that the output was changed shares its version counter, not its memory."""
    y, _ = OURS[kind](I, H)(torch.randn(T, B, I))
    counter = y.grad_fn.output_counter
    assert counter.untyped_storage().nbytes() == 0
    before = counter._version
    y.detach().add_(1)
    assert counter._version == before + 1


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_autograd(backend, kind):
    """An eager forward, its backward compiled; the output changed in place or not."""
    layer, x = OURS[kind](I, H), torch.randn(T, B, I)

    def grads(in_place):
        layer.zero_grad()
        y, _ = layer(x)
        (y.mul_(2) if in_place else y * 2).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    expected = grads(False)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        for in_place in (False, True, False):
            assert_same(grads(in_place), expected)
    torch._dynamo.reset()


# ---- cells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells_of_any_order(backend, kind, bias):
    theirs = TORCH_CELL[kind](I, H, bias=bias, dtype=torch.float64)
    ours = OUR_CELL[kind](I, H, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, B, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, B, H, dtype=torch.float64, requires_grad=True)
    results = []
    for cell in (theirs, ours):
        state = (h[0], h[1]) if kind == "lstm" else h[0]
        for step in x:
            state = cell(step, state)
        tensors = [x, h, *cell.parameters()]
        first = torch.autograd.grad(weighted_sum(state), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors, allow_unused=True)
        results.append([*flatten(state), *first, *second])
    assert_same(results[1], results[0])


# ---- weights that come from elsewhere ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(backend, kind):
    theirs, ours = pair(kind, num_layers=2)
    x, hx = inputs_for(theirs)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in theirs.named_parameters()}
    results = []
    for layer in (theirs, ours):
        outputs = torch.func.functional_call(layer, weights, (x, hx))
        grads = torch.autograd.grad(weighted_sum(outputs), [x, *weights.values()])
        results.append([*flatten(outputs), *grads])
        results.append(flatten(layer(x, hx)))  # and its own weights again
    assert_same(results[2], results[0])
    assert_same(results[3], results[1])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["parametrize", "spectral_norm", "weight_norm", "prune", "setattr", "data"])
def test_weights_replaced(backend, kind, way):
    theirs, ours = pair(kind)
    x, hx = inputs_for(theirs)
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(5)
        layer(x, hx)  # whatever is cached is cached now
        if way == "parametrize":
            nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
        elif way == "spectral_norm":
            nn.utils.parametrizations.spectral_norm(layer, "weight_hh_l0")
        elif way == "weight_norm":
            nn.utils.parametrizations.weight_norm(layer, "weight_ih_l0")
        elif way == "prune":
            nn.utils.prune.l1_unstructured(layer, "weight_ih_l0", amount=2)
        elif way == "setattr":
            layer.weight_hh_l0 = nn.Parameter(torch.ones_like(layer.weight_hh_l0))
        else:
            layer.weight_hh_l0.data = torch.ones_like(layer.weight_hh_l0)
        layer.eval()
        tensors = [x, *(p for _, p in sorted(layer.named_parameters()))]
        outputs = layer(x, hx)
        results.append([*flatten(outputs), *torch.autograd.grad(weighted_sum(outputs), tensors)])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_in_two_places(backend, kind):
    """Tied weights, and one tensor as h_0 and c_0: gradients add up."""
    theirs, ours = TORCH[kind](H, H, dtype=torch.float64), OURS[kind](H, H, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, H, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, B, H, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (theirs, ours):
        layer.weight_hh_l0, layer.bias_hh_l0 = layer.weight_ih_l0, layer.bias_ih_l0
        outputs = layer(x, (h, h) if kind == "lstm" else h)
        results.append(torch.autograd.grad(weighted_sum(outputs), [x, h, *layer.parameters()]))
    assert_same(results[1], results[0])


# ---- checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend, kind, use_reentrant):
    layer = OURS[kind](I, H, num_layers=2, dropout=0.5, dtype=torch.float64)
    x, _ = inputs_for(layer)

    def plain(x):
        return tuple(flatten(layer(x)))

    results = []
    for call in (plain, lambda x: checkpoint(plain, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        torch.manual_seed(3)  # of dropout between the layers
        x_ = leaves(x)
        weighted_sum(call(x_)).backward()
        results.append([x_.grad, *(p.grad for p in layer.parameters())])
    assert_same(results[1], results[0])


# ---- torch.func and forward mode: on the eager formula, unasked --------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_func_grad(kind):
    theirs, ours = pair(kind, num_layers=2, bidirectional=True)
    x, hx = inputs_for(theirs, requires_grad=False)
    results = []
    for layer in (theirs, ours):
        weights = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(weights, x, layer=layer):
            return weighted_sum(torch.func.functional_call(layer, weights, (x, hx)))

        dweights, dx = torch.func.grad(loss, argnums=(0, 1))(weights, x)
        results.append([dx, *(dweights[name] for name in weights)])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_jacobians(kind):
    layer = OURS[kind](I, H, dtype=torch.float64)
    x, hx = inputs_for(layer, requires_grad=False)

    def outputs(x):
        return layer(x, hx)[0]

    rows = torch.autograd.functional.jacobian(outputs, x)
    torch.testing.assert_close(torch.func.jacrev(outputs)(x), rows)
    torch.testing.assert_close(torch.func.jacfwd(outputs)(x), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_hessian(kind):
    layer = OURS[kind](I, H, dtype=torch.float64)
    x, hx = inputs_for(layer, requires_grad=False)

    def scalar(x):
        return weighted_sum(layer(x, hx))

    expected = torch.autograd.functional.hessian(scalar, x)
    torch.testing.assert_close(torch.func.hessian(scalar)(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_per_sample(kind, ragged):
    """vmap over grad, lengths included: as one sample after the other."""
    layer = OURS[kind](I, H, bidirectional=True, dtype=torch.float64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(5, T, 2, I, dtype=torch.float64)
    lengths = torch.randint(0, T + 1, (5, 2))

    def loss(weights, x, lengths):
        keywords = {"lengths": lengths} if ragged else {}
        return weighted_sum(torch.func.functional_call(layer, weights, (x,), keywords))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, lengths)
    for k in range(5):
        alone = torch.func.grad(loss)(weights, x[k], lengths[k])
        assert_same([per_sample[name][k] for name in weights], list(alone.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", ["padded", "lengths", "packed"])
def test_forward_mode(kind, batch):
    """Tangents of x, states and weights against the product with reverse mode's Jacobian."""
    layer = OURS[kind](I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, hx = inputs_for(layer)
    arguments = [x, *flatten(hx), *layer.parameters()]
    if batch == "packed":
        inner = as_function(layer)
        arguments[0] = torch.randn(sum(BATCH_SIZES), I, dtype=torch.float64, requires_grad=True)

        def function(data, *rest):
            return inner(PackedSequence(data, torch.tensor(BATCH_SIZES)), *rest)[0]
    else:
        inner = as_function(layer, **({"lengths": torch.tensor(LENGTHS)} if batch == "lengths" else {}))

        def function(*arguments):
            return inner(*arguments)[0]

    arguments = [t.detach() for t in arguments]
    tangents = [torch.randn_like(t) for t in arguments]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(arguments, tangents, strict=True)]
        y, tangent = forward_ad.unpack_dual(function(*duals))
    torch.testing.assert_close(y, function(*arguments))
    cotangent = torch.randn_like(y)
    leaf = [t.requires_grad_() for t in arguments]
    grads = torch.autograd.grad(function(*leaf), leaf, cotangent)
    expected = sum((g * v).sum() for g, v in zip(grads, tangents, strict=True))
    torch.testing.assert_close((tangent * cotangent).sum(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dual_level_without_duals_keeps_the_kernels(cpu_backend, kind):
    """Only inputs that carry tangents need the formula; a named backend refuses those."""
    layer = OURS[kind](I, H)
    x, _ = inputs_for(layer, requires_grad=False)
    with forward_ad.dual_level():
        layer(x)
        with pytest.raises(RuntimeError, match="forward-mode"):
            layer(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_cells_under_transforms(kind):
    theirs, ours = TORCH_CELL[kind](I, H), OUR_CELL[kind](I, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, I)
    results = []
    for cell in (theirs, ours):

        def loss(x, cell=cell):
            return weighted_sum(cell(x)).float()

        results.append(
            [torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (x,))[1], torch.func.hessian(loss)(x)]
        )
    assert_same(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.vmap(ours)(x[None])[0], ours(x)) if kind != "lstm" else None


# ---- autocast ----------------------------------------------------------------------------------------------


def dtypes(outputs: Any) -> list[torch.dtype]:
    return [t.dtype for t in flatten(outputs)]


AUTOCAST = [
    pytest.param(*combination, id="-".join(str(part).removeprefix("torch.") for part in combination))
    for combination in itertools.product(
        [torch.bfloat16, torch.float16],
        [torch.float32, torch.float64, torch.bfloat16, torch.float16],
        [True, False],
    )
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lower", "dtype", "with_hx"), AUTOCAST)
def test_autocast_dtypes_of_layers(kind, lower, dtype, with_hx):
    theirs, ours = pair(kind, dtype=dtype, num_layers=2, bidirectional=True)
    x, hx = inputs_for(theirs, requires_grad=False)
    hx = hx if with_hx else None
    with torch.autocast("cpu", dtype=lower):
        got = dtypes(ours(x, hx))
        try:
            expected = dtypes(theirs(x, hx))
        except RuntimeError as error:  # oneDNN's LSTM in float16, which not every CPU has
            assert kind == "lstm" and lower is torch.float16 and "primitive descriptor" in str(error)
            expected = [torch.float16] * 3
    assert got == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lower", "dtype", "with_hx"), AUTOCAST)
def test_autocast_dtypes_of_cells(kind, lower, dtype, with_hx):
    x, h = torch.randn(B, I, dtype=dtype), torch.randn(B, H, dtype=dtype)
    hx = None if not with_hx else (h, h) if kind == "lstm" else h
    with torch.autocast("cpu", dtype=lower):
        expected = dtypes(TORCH_CELL[kind](I, H, dtype=dtype)(x, hx))
        assert dtypes(OUR_CELL[kind](I, H, dtype=dtype)(x, hx)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_mixed_dtypes(kind, state, dtype):
    """Under autocast torch.nn takes input and states of other dtypes than the weights'."""
    theirs, ours = pair(kind, dtype=torch.float32)
    x, hx = inputs_for(theirs, requires_grad=False)
    hx = tuple(t.to(state) for t in hx) if kind == "lstm" else hx.to(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dtypes(ours(x.to(dtype), hx)) == dtypes(theirs(x.to(dtype), hx))


@pytest.mark.parametrize(("kind", "options"), [(kind, {}) for kind in KINDS] + [("lstm", {"proj_size": 2})])
@pytest.mark.parametrize("batch", ["padded", "packed"])
def test_autocast_dtypes_of_packed_and_projected(kind, options, batch):
    theirs, ours = pair(kind, dtype=torch.float32, **options)
    x, hx = inputs_for(theirs, requires_grad=False)
    if batch == "packed":
        x = PackedSequence(torch.randn(sum(BATCH_SIZES), I), torch.tensor(BATCH_SIZES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = ours(x, hx), theirs(x, hx)
    if batch == "packed":
        got, expected = (got[0].data, got[1]), (expected[0].data, expected[1])
    assert dtypes(got) == dtypes(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_float64_and_refuses_a_mixture(kind):
    layer = OURS[kind](I, H, dtype=torch.float32)
    x, _ = inputs_for(layer, requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=r"torch\.float64"):
        layer(x.double())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_values_and_gradients(backend, kind):
    """Gradients come back in the dtypes of what they belong to, and near the exact ones."""
    _, ours = pair(kind, dtype=torch.float32)
    x, hx = inputs_for(ours)
    exact = gradients(ours, ours, x, hx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = ours(x, hx)
    tensors = [x, *flatten(hx), *ours.parameters()]
    grads = torch.autograd.grad(weighted_sum(outputs), tensors)
    assert all(g.dtype is torch.float32 for g in grads)
    for g, e in zip(grads, exact, strict=True):
        assert (g - e).abs().max() <= 0.03 * e.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_under_autocast(backend, kind):
    """A backward pass run inside the autocast region, create_graph included, is not itself cast."""
    layer = OURS[kind](I, H, dtype=torch.float64)
    x, hx = inputs_for(layer)
    tensors = [x, *layer.parameters()]
    expected = torch.autograd.grad(weighted_sum(layer(x, hx)), tensors, create_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(weighted_sum(layer(x, hx)), tensors, create_graph=True)
    assert_same(got, expected)
