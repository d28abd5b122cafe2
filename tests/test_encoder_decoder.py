"""The attention modules of encoder-decoder models beside their formulas."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import PADDING, errors_nearby_named, evaluate_named, normal, valid_places
from cases import SHORT, pairwise, unique
from compare import ORACLES_AGREE, agree, poisoned, same_bits, within
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import seqkern
from seqkern import AdditiveAttention, AttentionPooling, DotProductAttention, LuongAttention, ProjectedKeys

Q, K, A, D = 6, 5, 9, 4
KINDS: dict[str, Callable[..., nn.Module]] = {
    "additive": lambda **options: AdditiveAttention(Q, K, A, **options),
    "additive.bias": lambda **options: AdditiveAttention(Q, K, A, bias=True, **options),
    "dot": lambda **options: LuongAttention(K, method="dot", **options),
    "general": lambda **options: LuongAttention(Q, K, **options),
    "concat": lambda **options: LuongAttention(Q, K, "concat", A, **options),
    "scaled": lambda **options: DotProductAttention(),
    "plain": lambda **options: DotProductAttention(scaled=False),
    "pooling": lambda **options: AttentionPooling(K, **options),
    "pooling.tanh": lambda **options: AttentionPooling(K, A, **options),
}
POOLING = ("pooling", "pooling.tanh")


def score(kind: str, module: nn.Module, query: Tensor | None, keys: Tensor) -> Tensor:
    """[B, L, S] by the papers' equations, from query [B, L, Q] and keys [B, S, K]."""
    B, S, _ = keys.shape
    p = dict(module.named_parameters())
    match kind:
        case "additive" | "additive.bias":
            b = p.get("key_projection.bias", 0)
            wq, uk = query @ p["query_projection.weight"].T, keys @ p["key_projection.weight"].T + b
            return torch.tanh(wq[:, :, None] + uk[:, None]) @ p["v"]
        case "dot" | "plain":
            return query @ keys.mT
        case "scaled":
            return query @ keys.mT / math.sqrt(query.shape[-1])
        case "general":
            return torch.einsum("blq,qk,bsk->bls", query, p["projection.weight"], keys)
        case "concat":
            L = query.shape[1]
            pairs = [query[:, :, None].expand(B, L, S, -1), keys[:, None].expand(B, L, S, -1)]
            return torch.tanh(torch.cat(pairs, -1) @ p["projection.weight"].T) @ p["v"]
        case "pooling":
            return (keys @ p["v"])[:, None]
        case "pooling.tanh":
            return (torch.tanh(keys @ p["projection.weight"].T + p["projection.bias"]) @ p["v"])[:, None]
    raise AssertionError(kind)


@dataclass(frozen=True)
class Case:
    kind: str
    B: int = 3
    L: int = 5
    S: int = 7
    keys: str = "all"
    values: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.kind, f"B{self.B}", f"L{self.L}", f"S{self.S}", self.keys, *["values"] * self.values]
        return "-".join([*words, SHORT[self.dtype]])

    def module(self) -> nn.Module:
        torch.manual_seed(5)
        return KINDS[self.kind](dtype=self.dtype)

    def valid(self) -> Tensor:
        return valid_places(self.keys, self.B, self.S, torch.Generator().manual_seed(6))

    def padding(self) -> dict[str, Tensor]:
        if self.keys == "all":
            return {}
        if self.keys == "lengths":
            return {"lengths": self.valid().sum(1)}
        return {"key_padding_mask": ~self.valid()}

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        query_dim = K if self.kind in ("dot", "plain", "scaled") else Q
        shapes = dict(query=(self.B, self.L, query_dim), keys=(self.B, self.S, K), values=(self.B, self.S, D))
        if self.kind in POOLING:
            del shapes["query"]
        if not self.values:
            del shapes["values"]
        found = {name: normal(shape, generator, self.dtype) for name, shape in shapes.items()}
        return found | {name: p.detach() for name, p in self.module().named_parameters()}


def split(case: Case, leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, parameters)"""
    inputs = {n: t for n, t in leaves.items() if n in ("query", "keys", "values")}
    return inputs, {n: t for n, t in leaves.items() if n not in inputs}


def ours(case: Case):
    def call(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs, parameters = split(case, leaves)
        module = case.module().to(inputs["keys"].dtype)
        found = torch.func.functional_call(module, parameters, kwargs=inputs | case.padding())
        return dict(zip(("context", "weights"), found, strict=True))

    return call


def literal(case: Case):
    def call(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs, parameters = split(case, leaves)
        module = case.module().to(inputs["keys"].dtype)
        keys, valid = inputs["keys"], case.valid()[:, None]
        e = _with(module, parameters, lambda m: score(case.kind, m, inputs.get("query"), keys))
        some = valid.any(-1, keepdim=True)
        weights = torch.softmax(torch.where(some, e.masked_fill(~valid, -math.inf), 0), -1)
        weights = torch.where(valid, weights, 0)
        context = weights @ inputs.get("values", keys)
        if case.kind in POOLING:
            context, weights = context.squeeze(1), weights.squeeze(1)
        return dict(context=context, weights=weights)

    return call


def _with(module: nn.Module, parameters: dict[str, Tensor], f: Callable[[nn.Module], Tensor]) -> Tensor:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self) -> Tensor:
            return f(self.inner)

    return torch.func.functional_call(Holder(), {f"inner.{n}": p for n, p in parameters.items()}, ())


SAMPLE = unique(
    Case(**row)
    for row in pairwise(
        dict(
            kind=tuple(KINDS), keys=PADDING, values=(True, False), dtype=tuple(SHORT), L=(1, 5), S=(1, 7, 17),
            B=(1, 3),
        )
    )
)  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_parity(case, backend):
    tensors, same = case.tensors(), dict(seed=3, rounded=case.dtype)
    with poisoned():
        got = evaluate_named(ours(case), tensors, **same)
    peer = evaluate_named(literal(case), tensors, **same)
    in_double = {name: t.double() for name, t in tensors.items()}
    oracle = evaluate_named(literal(case), in_double, **same)
    with seqkern.use_backend("eager"):
        agree(evaluate_named(ours(case), in_double, **same), oracle, ORACLES_AGREE, case)
    within(got, peer, oracle, case, lambda: errors_nearby_named(literal(case), tensors))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in POOLING])
def test_shapes(kind, backend):
    """One step and unbatched input are rows of the batched call."""
    case = Case(kind, keys="holes")
    module, inputs = case.module(), split(case, case.tensors())[0]
    query, keys, values = inputs.values()
    mask = ~case.valid()
    context, weights = module(query, keys, values, mask)
    assert context.shape == (3, 5, D) and weights.shape == (3, 5, 7)
    one = module(query[:, 2], keys, values, mask)
    torch.testing.assert_close(one, (context[:, 2], weights[:, 2]))
    unbatched = module(query[1], keys[1], values[1], mask[1])
    torch.testing.assert_close(unbatched, (context[1], weights[1]))
    single = module(query[1, 2], keys[1], values[1], mask[1])
    torch.testing.assert_close(single, (context[1, 2], weights[1, 2]))


@pytest.mark.parametrize("kind", POOLING)
def test_pooling_shapes(kind, backend):
    case = Case(kind, keys="lengths")
    module, inputs = case.module(), split(case, case.tensors())[0]
    context, weights = module(**inputs, **case.padding())
    assert context.shape == (3, D) and weights.shape == (3, 7)
    n = int(case.padding()["lengths"][1])
    alone = module(inputs["keys"][1, :n], inputs["values"][1, :n])
    torch.testing.assert_close(alone, (context[1], weights[1, :n]))


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("keys", ["lengths", "holes"])
def test_padding_is_not_read(kind, keys, backend):
    """NaN in padded keys and values reaches nothing, the parameters' gradients included."""
    case = Case(kind, B=4, keys=keys)
    tensors = case.tensors()
    want = evaluate_named(ours(case), tensors, 0, torch.float32)
    for name in ("keys", "values"):
        tensors[name] = torch.where(case.valid()[..., None], tensors[name], math.nan)
    got = evaluate_named(ours(case), tensors, 0, torch.float32)
    agree(got, want, 1e-6, case)


@pytest.mark.parametrize("kind", [*KINDS])
def test_gradients_of_both_orders(kind, backend):
    case = Case(kind, B=2, L=2, S=3, keys="lengths", dtype=torch.float64)
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}

    def call(*leaves: Tensor):
        return tuple(ours(case)(dict(zip(tensors, leaves, strict=True))).values())

    assert gradcheck(call, tuple(tensors.values()))
    assert gradgradcheck(call, tuple(tensors.values()))


# ---- keys projected once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in POOLING])
@pytest.mark.parametrize("keys", ["all", "lengths", "holes"])
def test_projected_keys_serve_every_step(kind, keys, backend):
    """As many steps, each with the same projected keys, as one call: outputs and all gradients."""
    case = Case(kind, keys=keys, dtype=torch.float64)

    def in_steps(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs, parameters = split(case, leaves)

        def run(module: nn.Module) -> Tensor:
            projected = module.project_keys(inputs["keys"], inputs["values"], **case.padding())
            steps = [module(q, projected) for q in inputs["query"].unbind(1)]
            return torch.cat([torch.stack([part[i] for part in steps], 1) for i in (0, 1)], -1)

        both = _with(case.module(), parameters, run)
        return dict(context=both[..., :D], weights=both[..., D:])

    got = evaluate_named(in_steps, case.tensors(), 0, torch.float64)
    agree(got, evaluate_named(ours(case), case.tensors(), 0, torch.float64), 1e-12, case)


def test_projection_runs_once():
    module = AdditiveAttention(Q, K, A)
    calls = []
    module.key_projection.register_forward_hook(lambda *_: calls.append(1))
    projected = module.project_keys(torch.randn(2, 7, K), lengths=torch.tensor([7, 3]))
    assert isinstance(projected, ProjectedKeys) and projected.key.shape == (2, 7, A)
    for _ in range(3):
        module(torch.randn(2, Q), projected)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["additive", "dot"])
def test_reordered_keys(kind):
    case = Case(kind, keys="lengths")
    module, inputs = case.module(), split(case, case.tensors())[0]
    projected = module.project_keys(inputs["keys"], lengths=case.padding()["lengths"])
    index = torch.tensor([2, 2, 0, 1])
    got = module(inputs["query"][index], projected.reorder(index))
    want = module(inputs["query"], projected)
    torch.testing.assert_close(got, tuple(x[index] for x in want))
    with pytest.raises(ValueError, match=r"index: expected \[B\] int64, got \(2,\) torch.float32"):
        projected.reorder(torch.zeros(2))


# ---- hard attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", PADDING)
@pytest.mark.parametrize("scaled", [True, False])
def test_hard_attention_goes_straight_through(keys, scaled, backend):
    case = Case("scaled", keys=keys, dtype=torch.float64)
    inputs = {n: t.requires_grad_() for n, t in split(case, case.tensors())[0].items()}
    query, key, value = inputs.values()
    context, weights = DotProductAttention(scaled, hard=True)(*inputs.values(), **case.padding())
    valid = case.valid()[:, None]
    scores = query @ key.mT / (math.sqrt(K) if scaled else 1)
    some = valid.any(-1, keepdim=True)
    best = torch.where(valid, scores, -math.inf).argmax(-1)
    one_hot = nn.functional.one_hot(best, 7).double() * some
    assert torch.equal(weights, one_hot), "weights are exactly 0 and 1"
    torch.testing.assert_close(context, one_hot @ value)
    # Gradients: those of the soft weights where the hard ones stood.
    soft = torch.softmax(torch.where(some, scores.masked_fill(~valid, -math.inf), 0), -1)
    soft = torch.where(valid, soft, 0)
    through = one_hot + soft - soft.detach()
    cotangents = [torch.randn_like(context), torch.randn_like(weights)]
    got = torch.autograd.grad((context, weights), tuple(inputs.values()), cotangents)
    want = torch.autograd.grad((through @ value, through), tuple(inputs.values()), cotangents)
    torch.testing.assert_close(got, want)


def test_hard_attention_of_no_keys_and_of_nan_padding(backend):
    hard = DotProductAttention(hard=True)
    context, weights = hard(torch.randn(2, 3, 4), torch.randn(2, 0, 4))
    assert context.shape == (2, 3, 4) and weights.shape == (2, 3, 0) and not context.any()
    keys = torch.randn(2, 3, 4)
    keys[:, 2] = math.nan
    keys.requires_grad_()
    context, _ = hard(torch.randn(2, 3, 4), keys, lengths=torch.tensor([2, 0]))
    (grad,) = torch.autograd.grad(context.sum(), keys)
    assert context.isfinite().all() and not context[1].any() and grad.isfinite().all()


# ---- the modules as modules --------------------------------------------------------------------------------


def test_state_dicts():
    shapes = {
        "additive.bias": {"query_projection.weight": (A, Q), "key_projection.weight": (A, K), "v": (A,)}
        | {"key_projection.bias": (A,)},
        "dot": {},
        "general": {"projection.weight": (Q, K)},
        "concat": {"projection.weight": (A, Q + K), "v": (A,)},
        "scaled": {},
        "pooling": {"v": (K,)},
        "pooling.tanh": {"projection.weight": (A, K), "projection.bias": (A,), "v": (A,)},
    }
    for kind, expected in shapes.items():
        module = KINDS[kind](dtype=torch.float64)
        found = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        assert found == expected, kind
        twin = KINDS[kind]()
        twin.load_state_dict(copy.deepcopy(module.state_dict()))
        assert all(p.dtype is torch.float64 for p in module.parameters())
        module.reset_parameters() if found else None
        assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", ["additive", "general", "concat", "scaled", "pooling.tanh"])
def test_compiles_whole(kind, cpu_backend):
    case = Case(kind, keys="lengths")
    module, inputs = case.module(), split(case, case.tensors())[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(**inputs, **case.padding())
    want = module(**inputs, **case.padding())
    for y, y_ in zip(got, want, strict=True):
        torch.testing.assert_close(y, y_)
    if parameters := list(module.parameters()):
        for g, g_ in zip(*(torch.autograd.grad(y[0].sum(), parameters) for y in (got, want)), strict=True):
            torch.testing.assert_close(g, g_)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LuongAttention(4, method="sum"), ValueError, "method: expected 'dot', 'general' or 'c"),
        (lambda: LuongAttention(4, 5, "dot"), ValueError, "key_dim: expected query_dim = 4 for method 'dot'"),
        (lambda: LuongAttention(4, attention_dim=3), ValueError, "attention_dim: expected None for method"),
        (
            lambda: AdditiveAttention(4)(torch.randn(2, 1, 3, 4), torch.randn(2, 5, 4)),
            RuntimeError,
            r"query: expected \[B, L, Q\] or \[B, Q\] of batched keys, got \(2, 1, 3, 4\)",
        ),
        (
            lambda: DotProductAttention()(torch.randn(2, 3, 4), torch.randn(5, 4)),
            RuntimeError,
            r"query: expected \[L, Q\] or \[Q\] of unbatched keys, got \(2, 3, 4\)",
        ),
        (
            lambda: AdditiveAttention(4)(torch.randn(4), torch.randn(4)),
            RuntimeError,
            r"keys: expected \[B, S, K\] or \[S, K\], got \(4,\)",
        ),
        (
            lambda: AdditiveAttention(4)(torch.randn(4), torch.randn(5, 4), torch.randn(1, 5, 4)),
            RuntimeError,
            "values: expected as many dims as keys, 2, got",
        ),
        (
            lambda: AdditiveAttention(4)(torch.randn(4), torch.randn(5, 4), lengths=torch.tensor(5)),
            ValueError,
            "lengths: expected none with unbatched keys",
        ),
        (
            lambda: AdditiveAttention(4)(torch.randn(2, 3, 4), torch.randn(3, 5, 4)),
            RuntimeError,
            r"key: expected \[B, S, H\] = \(2, 5, 4\), got \(3, 5, 4\)",
        ),
        (
            lambda: DotProductAttention()(torch.randn(2, 3, 4), torch.randn(2, 5, 3)),
            RuntimeError,
            r"key: expected \[B, S, E\] = \(2, 5, 4\), got \(2, 5, 3\)",
        ),
        (
            lambda: DotProductAttention()(
                torch.ones(2, 4), DotProductAttention().project_keys(torch.ones(2, 5, 4)), torch.ones(2, 5, 4)
            ),
            ValueError,
            "keys: what project_keys returned carries values",
        ),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_equal_calls_give_equal_bits(backend):
    case = Case("additive", B=5, L=9, S=33, keys="lengths")
    first = evaluate_named(ours(case), case.tensors(), 0, torch.float32)
    same_bits(evaluate_named(ours(replace(case)), case.tensors(), 0, torch.float32), first, case)
