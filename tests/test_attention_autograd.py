"""Attention under autograd of any order, torch.func, autocast, torch.compile, torch.export and opcheck."""

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seqkern
from seqkern import MultiHeadAttention
from seqkern.ops import _attention, _fake
from seqkern.ops._attention import AVERAGED, NO_WEIGHTS, PER_HEAD

attend = seqkern.scaled_dot_product_attention
B, N, L, S, E = 3, 2, 4, 5, 3


@pytest.fixture(params=["eager", "cpu"])
def backend(request):
    """Both are Python: none needs the compiled extension."""
    with seqkern.use_backend(request.param):
        yield request.param


# ---- what is asked -----------------------------------------------------------------------------------------


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def holes() -> Tensor:
    """[B, S], True is padding; row 1 has nothing else."""
    return torch.tensor([[0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)


def blocked() -> Tensor:
    """[N, L, S], False blocks; one query may attend to nothing."""
    mask = torch.ones(N, L, S, dtype=torch.bool)
    mask[0, 1] = mask[1, 0, :3] = False
    return mask


LENGTHS = (5, 0, 2)

FUNCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(is_causal=True),
    "bottom right": dict(is_causal=True, causal_alignment="bottom_right"),
    "window": dict(window=(1, 0), causal_alignment="bottom_right"),
    "bool mask": dict(attn_mask=blocked()),
    "float mask": dict(attn_mask="float"),
    "padding": dict(key_padding_mask=holes()),
    "float padding": dict(key_padding_mask="float"),
    "lengths": dict(lengths=torch.tensor(LENGTHS), is_causal=True),
    "queries": dict(query_padding_mask=holes()[:, :L], lengths=torch.tensor(LENGTHS)),
    "query lengths": dict(query_lengths=torch.tensor((0, 4, 2)), attn_mask=blocked()),
    "dropout": dict(dropout_p=0.4, key_padding_mask=holes()),
    "all": dict(attn_mask="float", key_padding_mask=holes(), window=(2, 1), dropout_p=0.2, scale=0.7),
}


def function(name: str, gqa: bool = False) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """attention as a function of tensors, with one seed in every call, and its arguments in float64.

    lse is part of it where every query has a key: elsewhere it is -inf, at which no difference can be taken.
    """
    options = dict(FUNCTIONS[name])
    heads = 2 * N if gqa else N
    arguments = [doubles(B, heads, L, E), doubles(B, N, S, E), doubles(B, N, S, 2)]
    last = None
    for key, shape in (("attn_mask", (1, 1, L, S)), ("key_padding_mask", (B, S))):
        if isinstance(options.get(key), str):
            last = key
            arguments.append(doubles(*shape))
    if gqa and isinstance(options.get("attn_mask"), Tensor):
        options["attn_mask"] = options["attn_mask"].repeat(2, 1, 1)

    def call(q, k, v, mask=None):
        torch.manual_seed(5)
        keywords = options | ({last: mask} if last else {})
        out, lse = attend(q, k, v, enable_gqa=gqa, return_lse=True, **keywords)
        return out, lse.masked_fill(lse == -math.inf, 0)

    return call, tuple(arguments)


def varlen(gqa: bool = False) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    cu_q, cu_k = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 3, 4, 6])

    def call(q, k, v):
        torch.manual_seed(5)
        return seqkern.varlen_attention(
            q, k, v, cu_q, cu_k, is_causal=True, dropout_p=0.2, enable_gqa=gqa, return_lse=True
        )

    return call, (doubles(5, 4 if gqa else 2, E), doubles(7, 2, E), doubles(7, 2, 2))


MODULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "averaged": ({}, dict(need_weights=True)),
    "per head": ({}, dict(need_weights=True, average_attn_weights=False, is_causal=True)),
    "padding": (dict(dropout=0.3), dict(key_padding_mask=holes())),
    "padding, weights": (dict(dropout=0.3), dict(key_padding_mask=holes(), need_weights=True)),
    "lengths": ({}, dict(lengths=torch.tensor(LENGTHS), query_lengths=torch.tensor(LENGTHS))),
    "extras": (dict(add_bias_kv=True, add_zero_attn=True, num_kv_heads=1), dict(is_causal=True)),
    "dims": (dict(kdim=3, vdim=2, bias=False), dict(attn_mask=torch.ones(S, S).bool().triu(1))),
}


def module(name: str) -> tuple[MultiHeadAttention, dict[str, Any], tuple[Tensor, ...]]:
    """A layer in float64, the keywords of a call, and query, key and value [B, S, .]."""
    options, keywords = MODULES[name]
    layer = MultiHeadAttention(4, 2, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in layer.parameters():  # biases begin at zero
            p.copy_(torch.randn_like(p))
    inputs = tuple(doubles(B, S, width) for width in (4, layer.kdim, layer.vdim))
    return layer, {"need_weights": False} | keywords, inputs


def module_function(name: str) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    layer, keywords, inputs = module(name)
    names = [n for n, _ in layer.named_parameters()]

    def call(*arguments):
        torch.manual_seed(5)
        weights = dict(zip(names, arguments[3:], strict=True))
        return tuple(
            t for t in torch.func.functional_call(layer, weights, arguments[:3], keywords) if t is not None
        )

    return call, (*inputs, *(p.detach().requires_grad_() for p in layer.parameters()))


def weighted_sum(outputs: Any) -> Tensor:
    """A scalar that weighs every element differently, the same in every call."""
    outputs = [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if t is not None]
    terms = [
        (t.double() * torch.linspace(-1, 2, t.numel(), dtype=torch.float64).view(t.shape)).sum()
        for t in outputs
    ]
    return torch.stack(terms).sum()


def assert_same(got: Any, expected: Any, **tolerance: float) -> None:
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), f"tensor {k}: got {a}, expected {b}"
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, k=k: f"tensor {k}: {m}")


# ---- first and second derivatives against finite differences -----------------------------------------------

CALLS = {f"{name}{' gqa' * gqa}": (function, name, gqa) for name in FUNCTIONS for gqa in (False, True)}
CALLS |= {f"module: {name}": (module_function, name) for name in MODULES}
CALLS |= {"varlen": (varlen, False), "varlen gqa": (varlen, True)}


def prepared(name: str) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    make, *arguments = CALLS[name]
    return make(*arguments)


@pytest.mark.parametrize("name", list(CALLS))
def test_gradcheck(backend, name):
    """The Jacobian's product with a random vector on either side."""
    call, arguments = prepared(name)
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize(
    "name",
    [name if name in ("causal", "varlen") else pytest.param(name, marks=pytest.mark.slow) for name in CALLS],
)
def test_gradcheck_of_every_element(backend, name):
    call, arguments = prepared(name)
    assert torch.autograd.gradcheck(call, arguments)


@pytest.mark.parametrize("name", list(CALLS))
def test_gradgradcheck(backend, name):
    call, arguments = prepared(name)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("name", list(CALLS))
def test_each_output_alone(backend, name):
    """And create_graph's gradients are those without."""
    call, arguments = prepared(name)
    for k in range(len(call(*arguments))):
        plain = torch.autograd.grad(weighted_sum(call(*arguments)[k]), arguments, allow_unused=True)
        graph = torch.autograd.grad(
            weighted_sum(call(*arguments)[k]), arguments, allow_unused=True, create_graph=True
        )
        for a, b in zip(plain, graph, strict=True):
            a, b = (torch.zeros(()) if t is None else t for t in (a, b))
            torch.testing.assert_close(a + torch.zeros_like(b), b + torch.zeros_like(a))
        with seqkern.use_backend("eager"):
            eager = torch.autograd.grad(
                weighted_sum(call(*arguments)[k]), arguments, allow_unused=True, materialize_grads=True
            )
        for a, b in zip(plain, eager, strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize("name", ["plain", "all", "module: padding, weights", "module: extras"])
def test_third_order(name):
    results = []
    for backend in ("eager", "cpu"):
        torch.manual_seed(1)
        call, arguments = prepared(name)
        with seqkern.use_backend(backend):
            g, y = arguments[0], weighted_sum(call(*arguments))
            for _ in range(3):
                (g,) = torch.autograd.grad(y, arguments[0], create_graph=True)
                y = weighted_sum(g.pow(2))
        results.append(g)
    torch.testing.assert_close(*results)


# ---- what is kept ------------------------------------------------------------------------------------------


def test_retain_graph(backend):
    call, arguments = prepared("all")
    loss = weighted_sum(call(*arguments))
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in arguments]
    loss.backward()
    assert_same([t.grad for t in arguments], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("name", ["all", "lengths", "varlen", "module: averaged", "module: lengths"])
def test_saved_tensors_hooks(backend, name):
    call, arguments = prepared(name)
    expected = torch.autograd.grad(weighted_sum(call(*arguments)), arguments)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        loss = weighted_sum(call(*arguments))
    assert_same(torch.autograd.grad(loss, arguments), expected)


def test_nothing_is_kept_without_need(backend):
    layer, keywords, inputs = module("padding, weights")
    inputs = [t.detach() for t in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            layer(*inputs, **keywords)
        with torch.inference_mode():
            assert layer(*inputs, **keywords)[0].is_inference()
        layer.requires_grad_(False)
        assert not layer(*inputs, **keywords)[0].requires_grad
    assert kept == []


@pytest.mark.parametrize("changed", range(4))
def test_an_input_changed_in_place_is_detected(backend, changed):
    call, arguments = prepared("float mask")
    arguments = [t * 1 for t in arguments]  # not leaves: those cannot change in place
    loss = weighted_sum(call(*arguments))
    with torch.no_grad():
        arguments[changed].mul_(2)
    if changed == 3 and backend == "eager":  # a sum's terms need not be kept
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("what", ["lengths", "key_padding_mask", "query_lengths", "attn_mask"])
def test_a_changed_mask_changes_no_gradient_in_silence(what):
    """Either it was copied, or backward says that it was modified."""
    q, k, v = doubles(B, N, L, E), doubles(B, N, S, E), doubles(B, N, S, E)
    mask = {
        "lengths": torch.tensor(LENGTHS),
        "query_lengths": torch.tensor((1, 2, 3)),
        "key_padding_mask": holes(),
        "attn_mask": blocked(),
    }[what]
    expected = torch.autograd.grad(
        weighted_sum(attend(q, k, v, **{what: mask.clone()}, backend="cpu")), [q, k, v]
    )
    loss = weighted_sum(attend(q, k, v, **{what: mask}, backend="cpu"))
    mask.fill_(1)
    try:
        got = torch.autograd.grad(loss, [q, k, v])
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    assert_same(got, expected)


@pytest.mark.parametrize("name", ["dropout", "varlen", "module: padding", "module: padding, weights"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_mask(backend, name, use_reentrant):
    make, *what = CALLS[name]
    if make is module_function:
        layer, keywords, arguments = module(*what)

        def call(*inputs):
            return tuple(t for t in layer(*inputs, **keywords) if t is not None)
    elif make is varlen:
        _, arguments = make(*what)

        def call(q, k, v):
            return seqkern.varlen_attention(
                q, k, v, torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7]), dropout_p=0.5
            )
    else:
        _, arguments = make(*what)

        def call(q, k, v):
            return attend(q, k, v, dropout_p=0.5)

    results = []
    for run in (call, lambda *inputs: checkpoint(call, *inputs, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        loss = weighted_sum(run(*arguments))
        for t in arguments:
            t.grad = None
        loss.backward()
        results.append([t.grad for t in arguments])
    assert_same(results[1], results[0])


def test_one_tensor_three_times(backend):
    """query is key is value: gradients add up."""
    x = doubles(B, N, L, E)
    three = [x.detach().clone().requires_grad_() for _ in range(3)]
    got = torch.autograd.grad(weighted_sum(attend(x, x, x, is_causal=True)), x)[0]
    parts = torch.autograd.grad(weighted_sum(attend(*three, is_causal=True)), three)
    torch.testing.assert_close(got, sum(parts))


def test_gradients_batched(backend):
    """torch.autograd.functional.jacobian(vectorize=True) runs backward under vmap."""
    call, arguments = function("causal")
    arguments = [t.detach() for t in arguments]
    plain, fast = (
        torch.autograd.functional.jacobian(lambda q: call(q, *arguments[1:])[0], arguments[0], vectorize=v)
        for v in (False, True)
    )
    torch.testing.assert_close(fast, plain)


def test_same_inputs_same_bits():
    """Whatever the number of threads; forward, backward, dropout."""
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(2)
            q, k, v = (torch.randn(2, 4, 130, 16, requires_grad=True) for _ in range(3))
            out = attend(
                q, k, v, lengths=torch.tensor([130, 77]), dropout_p=0.1, is_causal=True, backend="cpu"
            )
            results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    assert_same(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_many_threads_at_once(backend):
    """Calls share no scratch memory."""
    layer = MultiHeadAttention(8, 2, batch_first=True).requires_grad_(False)
    inputs = [torch.randn(2, n, 8) for n in (5, 40, 17, 33)]
    expected = [layer(x, x, x, is_causal=True) for x in inputs]
    wrong: list[Any] = []

    def work(k: int) -> None:
        with seqkern.use_backend(backend):
            for _ in range(10):
                x = inputs[k].clone().requires_grad_()
                output, weights = layer(x, x, x, is_causal=True)
                output.sum().backward()
                if not (torch.equal(output, expected[k][0]) and torch.equal(weights, expected[k][1])):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


# ---- torch.func and forward mode: on the eager formula, unasked --------------------------------------------

TRANSFORMED = [
    "plain",
    "all",
    "lengths",
    "queries gqa",
    "varlen",
    "module: averaged",
    "module: padding",
    "module: extras",
]


@pytest.mark.parametrize("name", TRANSFORMED)
def test_func_grad(name):
    call, arguments = prepared(name)
    expected = torch.autograd.grad(weighted_sum(call(*arguments)), arguments)
    detached = tuple(t.detach() for t in arguments)
    if "dropout" in str(CALLS[name]):
        return
    got = torch.func.grad(lambda *a: weighted_sum(call(*a)), argnums=tuple(range(len(detached))))(*detached)
    assert_same(got, expected)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_forward_mode(name):
    """Tangents of all arguments, and of each alone, against reverse mode."""
    call, arguments = prepared(name)
    values = [t.detach() for t in arguments]
    outputs = call(*arguments)
    cotangents = [torch.randn_like(t) for t in outputs]
    grads = torch.autograd.grad(outputs, arguments, cotangents, materialize_grads=True)
    for chosen in (range(len(values)), *((k,) for k in range(len(values)))):
        tangents = {k: torch.randn_like(values[k]) for k in chosen}
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t, tangents[k]) if k in tangents else t for k, t in enumerate(values)
            ]
            found = [forward_ad.unpack_dual(t) for t in call(*duals)]
        assert_same([t.primal for t in found], [t.detach() for t in outputs])
        got = sum(
            (t.tangent * c).sum() for t, c in zip(found, cotangents, strict=True) if t.tangent is not None
        )
        expected = sum((grads[k] * t).sum() for k, t in tangents.items())
        torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64), expected)


@pytest.mark.parametrize("name", ["plain", "bool mask", "lengths", "queries"])
def test_jacobians(name):
    call, arguments = function(name)
    values = [t.detach() for t in arguments]

    def of_key(k):
        return call(values[0], k, *values[2:])[0]

    rows = torch.autograd.functional.jacobian(of_key, values[1])
    torch.testing.assert_close(torch.func.jacrev(of_key)(values[1]), rows)
    torch.testing.assert_close(torch.func.jacfwd(of_key)(values[1]), rows)


def test_hessian():
    call, arguments = function("causal")
    values = [t.detach()[:1, :, :2] for t in arguments]

    def scalar(q):
        return weighted_sum(call(q, *values[1:]))

    expected = torch.autograd.functional.hessian(scalar, values[0])
    torch.testing.assert_close(torch.func.hessian(scalar)(values[0]), expected)


@pytest.mark.parametrize("ragged", ["no", "lengths", "padding"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients_per_sample(ragged, need_weights):
    """vmap over grad, masks included: as one sample after the other."""
    layer = MultiHeadAttention(4, 2, batch_first=True, dtype=torch.float64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([[5, 0], [1, 2], [3, 5]])

    def loss(weights, x, lengths):
        masks = {"lengths": lengths} if ragged == "lengths" else {}
        if ragged == "padding":
            masks = {"key_padding_mask": torch.arange(5) >= lengths[:, None]}
        keywords = masks | {"need_weights": need_weights}
        return weighted_sum(torch.func.functional_call(layer, weights, (x, x, x), keywords))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, lengths)
    for k in range(3):
        alone = torch.func.grad(loss)(weights, x[k], lengths[k])
        assert_same([per_sample[name][k] for name in weights], alone.values())


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 1)])
def test_vmap(in_dims):
    shapes = [(3, 2, L, E), (3, 2, S, E), (3, 2, S, E)]
    tensors = [
        torch.randn(s).movedim(0, d or 0) if d is not None else torch.randn(s[1:])
        for s, d in zip(shapes, in_dims, strict=True)
    ]
    got = torch.func.vmap(attend, in_dims)(*tensors)
    for k in range(3):
        one = [t if d is None else t.select(d, k) for t, d in zip(tensors, in_dims, strict=True)]
        torch.testing.assert_close(got[k], attend(*one))


@pytest.mark.parametrize("how", ["vmap", "grad", "dual"])
def test_a_named_backend_does_not_fall_back_under_a_transform(how):
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(
        RuntimeError, match=r"backend 'cpu' was asked for: cpu has no rule for torch\.func transforms"
    ):
        if how == "vmap":
            torch.func.vmap(lambda x: attend(x, x, x, backend="cpu"))(x)
        elif how == "grad":
            torch.func.grad(lambda x: attend(x, x, x, backend="cpu").sum())(x)
        else:
            with forward_ad.dual_level():
                attend(x, forward_ad.make_dual(x, x), x, backend="cpu")


# ---- autocast ----------------------------------------------------------------------------------------------

AUTOCAST = [
    pytest.param(*c, id="-".join(str(part).removeprefix("torch.") for part in c))
    for c in itertools.product(
        [torch.bfloat16, torch.float16],
        [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    )
]


@pytest.mark.parametrize(("lower", "dtype"), AUTOCAST)
@pytest.mark.parametrize("weights", ["no", "averaged", "heads"])
def test_autocast_dtypes(backend, lower, dtype, weights):
    """torch.nn's, of outputs and weights; torch's, of the function."""
    theirs = nn.MultiheadAttention(8, 2, dtype=dtype)
    ours = MultiHeadAttention(8, 2, dtype=dtype)
    x = torch.randn(5, 2, 8, dtype=dtype)
    options = dict(need_weights=weights != "no", average_attn_weights=weights != "heads")
    with torch.autocast("cpu", dtype=lower):
        results = [layer(x, x, x, **options) for layer in (theirs, ours)]
        functions = [f(x, x, x) for f in (F.scaled_dot_product_attention, attend)]
    dtypes = [[None if t is None else t.dtype for t in result] for result in results]
    assert dtypes[1] == dtypes[0]
    assert functions[1].dtype is functions[0].dtype


@pytest.mark.parametrize("mask", ["no", "float", "padding", "causal", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_inside(backend, mask, dtype):
    """Of inputs in autocast's own dtype the products are no coarser than without it: the same bits."""
    q, k, v = (torch.randn(2, 2, 40, 16).to(dtype).requires_grad_() for _ in range(3))
    options: dict[str, Any] = {
        "no": {},
        "float": dict(attn_mask=torch.randn(40, 40)),
        "padding": dict(key_padding_mask=torch.rand(2, 40) < 0.4),
        "causal": dict(is_causal=True, causal_alignment="bottom_right", window=(5, 0)),
        "dropout": dict(dropout_p=0.2),
    }[mask]
    results = []
    for enabled in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out, lse = attend(q, k, v, return_lse=True, **options)
        results.append([out, lse, *torch.autograd.grad(weighted_sum([out, lse]), [q, k, v])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_autocast_values_and_gradients(backend):
    """Gradients come back in the dtypes of what they belong to, and near the exact ones."""
    layer = MultiHeadAttention(16, 2, batch_first=True)
    x = torch.randn(3, 9, 16, requires_grad=True)
    pad = torch.arange(9) >= torch.tensor([9, 3, 5])[:, None]
    leaves = [x, *layer.parameters()]
    exact = torch.autograd.grad(weighted_sum(layer(x, x, x, pad)), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = layer(x, x, x, pad)
    grads = torch.autograd.grad(weighted_sum(outputs), leaves)
    assert all(g.dtype is torch.float32 for g in grads)
    for g, e in zip(grads[:2], exact[:2], strict=True):
        assert (g - e).abs().max() <= 0.05 * e.abs().max()


def test_backward_under_autocast(backend):
    """A backward pass inside the autocast region, create_graph included, is not itself cast."""
    call, arguments = prepared("all")
    expected = torch.autograd.grad(weighted_sum(call(*arguments)), arguments, create_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(weighted_sum(call(*arguments)), arguments, create_graph=True)
    assert_same(got, expected)


# ---- torch.compile -----------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random_options(kind: str, B: int, L: int, S: int) -> dict[str, Any]:
    pad = torch.rand(B, S) < 0.4
    return {
        "plain": {},
        "causal": dict(is_causal=True),
        "bottom right": dict(is_causal=True, causal_alignment="bottom_right"),
        "window": dict(window=(2, 1)),
        "bool mask": dict(attn_mask=torch.rand(B, 1, L, S) < 0.7),
        "float mask": dict(attn_mask=torch.randn(L, S)),
        "padding": dict(key_padding_mask=pad),
        "float padding": dict(key_padding_mask=torch.randn(B, S)),
        "inf padding": dict(key_padding_mask=torch.zeros(B, S).masked_fill(pad, -math.inf)),
        "lengths": dict(lengths=torch.randint(0, S + 1, (B,)), is_causal=True),
        "queries": dict(query_padding_mask=torch.rand(B, L) < 0.4),
        "query lengths": dict(query_lengths=torch.randint(0, L + 1, (B,))),
    }[kind]


KINDS = ["plain", "causal", "bottom right", "window", "bool mask", "float mask", "padding", "float padding"]
KINDS += ["inf padding", "lengths", "queries", "query lengths"]


def nodes(counter: torch._dynamo.testing.CompileCounterWithBackend) -> list[str]:
    """The names of everything called in the graphs that Dynamo captured."""
    return [
        str(node.target)
        for graph in counter.graphs
        for inner in graph.modules()
        if isinstance(inner, torch.fx.GraphModule)
        for node in inner.graph.nodes
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_graph_for_all_sizes(dynamo, kind, train):
    """fullgraph, batch, queries and keys dynamic: after the first recompilation nothing compiles again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for sizes in ((2, 5, 7), (3, 6, 9), (4, 8, 12), (5, 9, 11)):
        b, l, s = sizes  # noqa: E741
        q, k, v = (torch.randn(b, 4, n, 8, requires_grad=train) for n in (l, s, s))
        options = random_options(kind, *sizes)
        got, expected = (f(q, k, v, return_lse=True, **options) for f in (compiled, attend))
        assert_same(got, expected)
        if train:
            grads = [torch.autograd.grad(y[0].square().sum(), [q, k, v]) for y in (got, expected)]
            assert_same(*grads, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2
    assert any("seqkern.attention_forward" in name for name in nodes(counter))


MODULE_GRAPHS = [
    pytest.param(
        *(kind, weights, train),
        id=f"{kind}-{weights}-{'training' if train else 'inference'}",
        marks=[] if (weights == "averaged" and train) or kind == "padding" else pytest.mark.slow,
    )
    for kind in ("plain", "causal", "padding", "lengths", "float mask", "queries")
    for weights in ("no", "averaged", "heads")
    for train in (False, True)
]


@pytest.mark.parametrize(("kind", "weights", "train"), MODULE_GRAPHS)
def test_module_in_one_graph(dynamo, kind, weights, train):
    layer = MultiHeadAttention(8, 2, batch_first=True).train(train)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    options = dict(need_weights=weights != "no", average_attn_weights=weights != "heads")
    for b, l in ((2, 5), (3, 7), (4, 11)):  # noqa: E741
        x = torch.randn(b, l, 8, requires_grad=train)
        keywords = options | random_options(kind, b, l, l)
        with torch.set_grad_enabled(train):
            got, expected = compiled(x, x, x, **keywords), layer(x, x, x, **keywords)
        assert_same(got, expected)
        if train:
            leaves = [x, *layer.parameters()]
            assert_same(
                *(torch.autograd.grad(weighted_sum(y), leaves) for y in (got, expected)), rtol=1e-4, atol=1e-4
            )
    assert counter.frame_count == 2
    assert any("seqkern.attention_forward" in name for name in nodes(counter))


@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"num_kv_heads": 1}, {"kdim": 3, "vdim": 5}],
    ids=str,
)
@pytest.mark.parametrize("batched", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_modules_of_all_kinds_compile(dynamo, options, batched):
    layer = MultiHeadAttention(8, 2, batch_first=True, **options)
    inputs = [
        torch.randn(*([2] * batched), n, width) for n, width in ((3, 8), (4, layer.kdim), (4, layer.vdim))
    ]
    pad = torch.tensor([[False, False, True, True], [False] * 4])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    pad = pad if batched else pad[0]
    for is_causal in (False, True):
        got, expected = (f(*inputs, pad, is_causal=is_causal) for f in (compiled, layer))
        assert_same(got, expected)


def test_nan_in_padding_under_compile(dynamo):
    layer = MultiHeadAttention(8, 2, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    pad = torch.arange(6) >= torch.tensor([6, 2])[:, None]
    x = torch.randn(2, 6, 8).masked_fill(pad[..., None], math.nan).requires_grad_()
    out, _ = compiled(x, x, x, pad)
    grads = torch.autograd.grad(out[~pad].sum(), [x, *layer.parameters()])
    assert out[~pad].isfinite().all() and all(g.isfinite().all() for g in grads)


def test_compiled_dropout_draws_anew(dynamo):
    layer = MultiHeadAttention(8, 2, dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(20, 2, 8, requires_grad=True)
    first, second = (compiled(x, x, x)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    compiled_out = compiled(x, x, x)
    torch.manual_seed(3)
    assert_same(compiled(x, x, x), compiled_out)
    compiled_out[0].sum().backward()
    assert torch.equal(compiled(x, x, x)[1] == 0, compiled(x, x, x)[1] == 0) is False
    layer.eval()
    assert_same(compiled(x, x, x), layer(x, x, x))


def test_compiled_code_follows_the_wish(dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    x = torch.randn(1, 2, 3, 4)
    for backend, runs in (("eager", False), ("cpu", True), (None, True)):
        counter.graphs.clear()
        with seqkern.use_backend(backend):
            torch.testing.assert_close(compiled(x, x, x), attend(x, x, x))
        assert (
            any("seqkern.attention_forward" in name for name in nodes(counter)) == runs or not counter.graphs
        )


def test_compiled_varlen(dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(seqkern.varlen_attention, fullgraph=True, backend=counter)
    for lengths in ((3, 4), (2, 0, 9), (1, 1, 1, 8)):
        cu = torch.tensor([0, *lengths]).cumsum(0)
        x = torch.randn(int(cu[-1]), 2, 8, requires_grad=True)
        got, expected = (
            f(x, x, x, cu, max_seqlen_q=9, is_causal=True) for f in (compiled, seqkern.varlen_attention)
        )
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="max_seqlen_q"):
        compiled(x, x, x, cu)


def test_wrong_lengths_under_compile(dynamo):
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"lengths: expected values in 0\.\.T"):
        compiled(x, x, x, lengths=torch.tensor([1, 4]))


@pytest.mark.parametrize("kind", ["plain", "lengths", "padding"])
def test_checkpoint_under_compile(dynamo, kind):
    q, k, v = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3))
    options = random_options(kind, 2, 6, 6)

    def call(q, k, v):
        return checkpoint(lambda *a: attend(*a, **options), q, k, v, use_reentrant=False)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(q, k, v).square().sum(), [q, k, v]) for f in (compiled, call)]
    assert_same(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [False, True])
def test_inductor(dynamo, weights):
    """Forward and backward through generated code, with the layer in the middle of a model."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.layer = MultiHeadAttention(8, 2, batch_first=True)

        def forward(self, x, lengths):
            x = self.embed(x).relu()
            y, w = self.layer(x, x, x, lengths=lengths, need_weights=weights)
            return (y + x).tanh().mean(1), w

    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    for T, b in ((5, 3), (7, 4)):
        x, lengths = torch.randn(b, T, 3, requires_grad=True), torch.randint(0, T + 1, (b,))
        got, expected = compiled(x, lengths), model(x, lengths)
        assert_same(got, expected)
        leaves = [x, *model.parameters()]
        assert_same(
            *(torch.autograd.grad(weighted_sum(y), leaves) for y in (got, expected)), rtol=1e-3, atol=1e-4
        )


# ---- torch.export ------------------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.layer = MultiHeadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x, lengths=None, pad=None):
        return self.layer(x, x, x, pad, lengths=lengths, need_weights=self.need_weights, is_causal=True)


@pytest.mark.parametrize("masks", ["no", "lengths", "padding"])
@pytest.mark.parametrize(
    ("need_weights", "strict"),
    [
        (True, False),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in ((False, False), (False, True), (True, True))
        ),
    ],
)
def test_export_with_dynamic_shapes(masks, need_weights, strict):
    model = Outer(need_weights)
    T, batch = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)

    def inputs(b, t):
        lengths = torch.randint(0, t + 1, (b,))
        pad = torch.arange(t) >= lengths[:, None]
        return (
            torch.randn(b, t, 8),
            lengths if masks == "lengths" else None,
            pad if masks == "padding" else None,
        )

    shapes = {"x": {0: batch, 1: T}}
    shapes["lengths"] = {0: batch} if masks == "lengths" else None
    shapes["pad"] = {0: batch, 1: T} if masks == "padding" else None
    with torch.no_grad():
        program = torch.export.export(model, inputs(3, 5), dynamic_shapes=shapes, strict=strict)
        assert any("attention_forward" in str(node.target) for node in program.graph.nodes)
        for b, t in ((3, 5), (4, 9)):
            arguments = inputs(b, t)
            expected = [t for t in model(*arguments) if t is not None]
            assert_same([t for t in program.module()(*arguments) if t is not None], expected)
            again = program.run_decompositions().module()(*arguments)
            assert_same([t for t in again if t is not None], expected)


def test_export_of_the_eager_backend():
    """Only core operators: runs where seqkern is not installed."""
    model, x = Outer(True), torch.randn(2, 5, 8)
    with seqkern.use_backend("eager"):
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("B")}})
    assert not any("seqkern" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(3, 5, 8)
    assert_same(program.module()(x), model(x))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = MultiHeadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x)[0]


def test_jit_trace_records_torch_nns_layer():
    layer, x = SelfAttention(), torch.randn(2, 5, 8)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert "seqkern::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), layer(x))


# ---- the operators -----------------------------------------------------------------------------------------


def problem(kind: str, dtype: torch.dtype = torch.float32) -> _attention.Problem:
    def x(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    q, k, v = x(3, 4, 5, 8), x(3, 2, 6, 8), x(3, 2, 6, 7)
    p = _attention.Problem(q, k, v, scale=0.3)
    return {
        "plain": _attention.Problem(x(3, 2, 5, 8), x(3, 2, 6, 8), x(3, 2, 6, 8), scale=0.3),
        "gqa causal": p._replace(right=0, bottom_right=True),
        "bool bias": p._replace(bias=torch.rand(1, 4, 5, 1) < 0.8),
        "float bias": p._replace(bias=torch.randn(3, 1, 5, 6).to(dtype), left=2),
        "holes": p._replace(key_valid=torch.rand(3, 6) < 0.6, query_valid=torch.rand(3, 5) < 0.6),
        "lengths": p._replace(key_lengths=torch.tensor([6, 0, 3]), query_lengths=torch.tensor([5, 5, 2])),
        "dropout": p._replace(dropout_p=0.3, seed=torch.tensor([-7])),
        "strided": p._replace(
            q=x(8, 5, 3, 4).permute(2, 3, 1, 0),
            k=x(6, 3, 2, 8).permute(1, 2, 0, 3),
            v=x(1, 2, 6, 7).expand(3, -1, -1, -1),
        ),
        "packed": _attention.Problem(
            *(x(9, 4, 8), x(11, 2, 8), x(11, 2, 7)),
            cu_q=torch.tensor([0, 4, 4, 9]),
            cu_k=torch.tensor([1, 3, 8, 10]),
            max_q=5,
            max_k=5,
            right=0,
            scale=0.3,
        ),
        "no keys": p._replace(k=x(3, 2, 0, 8), v=x(3, 2, 0, 7)),
    }[kind]


PROBLEMS = [
    "plain",
    "gqa causal",
    "bool bias",
    "float bias",
    "holes",
    "lengths",
    "dropout",
    "strided",
    "packed",
    "no keys",
]
forward_operator = torch.ops.seqkern.attention_forward
backward_operator = torch.ops.seqkern.attention_backward


def backward_arguments(p, weights, partial: bool, needs: tuple[bool, ...]) -> tuple:
    out, lse, w = forward_operator(*p, weights, True)
    dout = None if partial else torch.randn_like(out)
    dlse = None if partial or weights == PER_HEAD else torch.randn_like(lse)
    dw = torch.randn_like(w) if weights != NO_WEIGHTS else None
    biased = p.bias is not None and p.bias.is_floating_point()
    return (dout, dlse, dw, weights, out, lse, *p, *needs[:3], needs[3] and biased)


OPERATOR_CASES = [
    pytest.param(
        *(kind, weights),
        id=f"{kind}-{weights}",
        marks=[] if weights == NO_WEIGHTS or kind in ("lengths", "dropout") else pytest.mark.slow,
    )
    for kind in PROBLEMS
    for weights in (NO_WEIGHTS, AVERAGED, PER_HEAD)
]


@pytest.mark.parametrize(("kind", "weights"), OPERATOR_CASES)
def test_opcheck(kind, weights):
    """Schema, fake kernel, autograd registration and AOTAutograd, forward and backward."""
    p = problem(kind)
    torch.library.opcheck(forward_operator.default, (*p, weights, True))
    torch.library.opcheck(forward_operator.default, (*p, weights, False))
    for needs in ((True,) * 4, (False, True, False, True)):
        torch.library.opcheck(backward_operator.default, backward_arguments(p, weights, False, needs))


def described(outputs: Any) -> list[tuple]:
    return [(tuple(t.shape), t.stride(), t.dtype) for t in outputs]


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fake_kernels_say_what_the_kernels_give(kind, dtype):
    for weights, need_lse in itertools.product((NO_WEIGHTS, AVERAGED, PER_HEAD), (True, False)):
        p = problem(kind, dtype)
        assert described(_fake.attention_forward(*p, weights, need_lse)) == described(
            forward_operator(*p, weights, need_lse)
        )
        for needs in ((True,) * 4, (False,) * 4, (True, False, False, False), (False, True, True, True)):
            for partial in (False, True):
                arguments = backward_arguments(p, weights, partial, needs)
                got, expected = (
                    described(_fake.attention_backward(*arguments)),
                    described(backward_operator(*arguments)),
                )
                assert got == expected, (needs, partial)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind):
    options = {
        k: v.to("meta") if isinstance(v, Tensor) else v for k, v in random_options(kind, 2, 5, 7).items()
    }
    q, k, v = (torch.empty(2, 4, n, E, device="meta") for n, E in ((5, 8), (7, 8), (7, 6)))
    out, lse = attend(q, k, v, return_lse=True, **options)
    assert out.is_meta and out.shape == (2, 4, 5, 6) and lse.shape == (2, 4, 5)
    layer = MultiHeadAttention(8, 2, batch_first=True, dropout=0.1, device="meta")
    x = torch.empty(2, 7, 8, device="meta")
    if kind in ("plain", "padding", "lengths", "causal"):
        output, weights = layer(x, x, x, **options)
        assert output.shape == (2, 7, 8) and weights.shape == (2, 7, 7)


def test_the_operators_need_no_extension():
    """Defined in Python: an install without a compiler has them, on a CPU."""
    for name in ("attention_forward", "attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"seqkern::{name}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"seqkern::{name}", "CUDA")
