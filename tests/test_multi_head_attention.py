"""MultiHeadAttention: torch.nn's module to every tool and in every result; padding; the key-value cache."""

import copy
import io
import itertools
import math
import pickle
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    doubled,
    errors_nearby_named,
    evaluate_named,
    floats,
    make_mask,
    math_kernel,
    normal,
    valid_places,
)
from cases import DTYPES, SHORT, pairwise, unique
from compare import ORACLES_AGREE, agree, poisoned, same_bits, within
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import seqkern
from seqkern import KeyValueCache, MultiHeadAttention
from seqkern.ops import attention_cpu
from seqkern.ops import multi_head_attention as operation

NAN = math.nan


@pytest.fixture(params=["eager", "cpu"])
def backend(request):
    """Both are Python: none needs the compiled extension."""
    with seqkern.use_backend(request.param):
        yield request.param


# ---- parity ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call. source: "self" (one tensor), "memory" (key is value) or "three" tensors."""

    B: int = 3
    N: int = 2
    Nk: int = 0  # 0: N
    L: int = 5
    S: int = 5
    Eh: int = 4
    source: str = "self"
    kdim: int = 0
    vdim: int = 0
    bias: bool = True
    bias_kv: bool = False
    zero_attn: bool = False
    batch_first: bool = False
    batched: bool = True
    keys: str = "all"
    queries: str = "all"
    mask: str = "no"
    is_causal: bool = False
    weights: str = "no"  # no, average, heads
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        words = [f"B{self.B}" if self.batched else "unbatched", f"N{self.N}.{self.Nk or self.N}"]
        words += [f"L{self.L}", f"S{self.S}", f"Eh{self.Eh}", self.source]
        words += [f"k{self.kdim}v{self.vdim}"] * bool(self.kdim) + ["nobias"] * (not self.bias)
        words += ["biaskv"] * self.bias_kv + ["zero"] * self.zero_attn + ["bf"] * self.batch_first
        words += [f"keys.{self.keys}"] * (self.keys != "all")
        words += [f"queries.{self.queries}"] * (self.queries != "all")
        words += [self.mask] * (self.mask != "no") + ["causal"] * self.is_causal
        words += [f"weights.{self.weights}"] * (self.weights != "no") + [SHORT[self.dtype]]
        return "-".join([*words, *([f"seed{self.seed}"] if self.seed else [])])

    @property
    def embed_dim(self) -> int:
        return self.N * self.Eh

    def generator(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self} {what}".encode()))

    def options(self) -> dict[str, Any]:
        return dict(
            bias=self.bias,
            add_bias_kv=self.bias_kv,
            add_zero_attn=self.zero_attn,
            kdim=self.kdim or None,
            vdim=self.vdim or None,
            batch_first=self.batch_first,
        )

    def valid(self, what: str) -> Tensor:
        """[B, S] of "keys", [B, L] of "queries"."""
        if what == "queries" and self.queries == "same":
            return self.valid("keys")
        size = self.S if what == "keys" else self.L
        kind = getattr(self, what)
        return valid_places("all" if kind == "float" else kind, self.B, size, self.generator(what))

    def inputs(self) -> dict[str, Tensor | None]:
        """Leaves: query, key, value (None: the one before), mask, padding, and parameters by name."""
        draw, E = self.generator("inputs"), self.embed_dim

        def rows(size: int, width: int) -> Tensor:
            x = normal((self.B, size, width), draw, self.dtype)
            x = x if self.batch_first else x.transpose(0, 1).contiguous()
            return x if self.batched else x.squeeze(0 if self.batch_first else 1)

        found: dict[str, Tensor | None] = {"query": rows(self.L, E), "key": None, "value": None, "mask": None}
        if self.source != "self":
            found["key"] = rows(self.S, self.kdim or E)
        if self.source == "three":
            found["value"] = rows(self.S, self.vdim or E)
        if self.mask != "no":
            kind, dims = self.mask[:-1], self.mask[-1]
            shape = (self.B, self.N, self.L, self.S) if dims == "3" else (1, 1, self.L, self.S)
            mask = make_mask(
                kind, "BNLS" if dims == "3" else "11LS", shape, self.generator("mask"), self.dtype
            )
            mask = ~mask if kind == "bool" else mask  # True blocks
            found["mask"] = mask.flatten(0, 1) if dims == "3" else mask[0, 0]
        found["padding"] = normal((self.B, self.S), draw, self.dtype) if self.keys == "float" else None
        weights = self.module().named_parameters()
        scale = E**-0.5
        found |= {
            name: normal(tuple(p.shape), draw, torch.float64).mul(scale).to(self.dtype) for name, p in weights
        }
        return found

    def module(self) -> MultiHeadAttention:
        return MultiHeadAttention(
            self.embed_dim, self.N, dtype=self.dtype, num_kv_heads=self.Nk or None, **self.options()
        )

    def allowed(self) -> Tensor:
        """[B, N, L, S] bool, pair by pair."""
        found = self.valid("keys")[:, None, None] & self.valid("queries")[:, None, :, None]
        found = found.expand(self.B, self.N, self.L, self.S)
        if self.is_causal:
            return found & (torch.arange(self.S) <= torch.arange(self.L)[:, None])
        mask = self.inputs()["mask"]
        if mask is None:
            return found
        keep = ~mask if mask.dtype is torch.bool else mask > -math.inf
        return found & (keep if keep.dim() == 2 else keep.view(self.B, self.N, self.L, self.S))


def triple(leaves: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    query = leaves["query"]
    key = query if leaves["key"] is None else leaves["key"]
    return query, key, key if leaves["value"] is None else leaves["value"]


def parameters(leaves: dict[str, Any]) -> dict[str, Tensor]:
    return {n: t for n, t in leaves.items() if n not in ("query", "key", "value", "mask", "padding")}


def named(output: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    return {"output": output} if weights is None else {"output": output, "weights": weights}


def ours(case: Case, **more: Any) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """seqkern's module called on leaves."""
    layer = case.module()
    options: dict[str, Any] = dict(
        need_weights=case.weights != "no",
        average_attn_weights=case.weights != "heads",
        is_causal=case.is_causal,
    )
    if case.keys == "lengths":
        options["lengths"] = case.valid("keys").sum(1)
    elif case.keys not in ("all", "float"):
        options["key_padding_mask"] = ~case.valid("keys")
    if case.queries == "lengths":
        options["query_lengths"] = case.valid("queries").sum(1)
    elif case.queries != "all":
        options["query_padding_mask"] = ~case.valid("queries")
    options |= more

    def call(leaves: dict[str, Any]) -> dict[str, Tensor]:
        padding = options.get("key_padding_mask") if leaves["padding"] is None else leaves["padding"]
        if padding is not None and not case.batched:
            padding = padding.squeeze(0)
        keywords = options | {"attn_mask": leaves["mask"], "key_padding_mask": padding}
        layer.to(leaves["query"].dtype)
        return named(*torch.func.functional_call(layer, parameters(leaves), triple(leaves), keywords))

    return call


def torchs(case: Case) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """torch.nn's module on the same leaves: key heads repeated, all masks merged into one.

    Where a query may attend to nothing, torch.nn's module gives NaN; there its formula in single steps.
    """
    layer = nn.MultiheadAttention(case.embed_dim, case.N, **case.options())
    allowed, queries = case.allowed(), case.valid("queries")
    B, N, Nk, L, S, Eh = case.B, case.N, case.Nk or case.N, case.L, case.S, case.Eh

    def repeated(p: Tensor, dim: int) -> Tensor:
        return (
            p.unflatten(dim, (Nk, Eh))
            .repeat_interleave(N // Nk, dim % p.dim())
            .flatten(dim % p.dim(), dim % p.dim() + 1)
        )

    def weights_of(leaves: dict[str, Any]) -> dict[str, Tensor]:
        found = dict(parameters(leaves))
        for name in ("in_proj_weight", "in_proj_bias"):
            if name in found and Nk != N:
                q, k, v = found[name].split([N * Eh, Nk * Eh, Nk * Eh])
                found[name] = torch.cat([q, repeated(k, 0), repeated(v, 0)])
        for name in ("k_proj_weight", "v_proj_weight"):
            if name in found and Nk != N:
                found[name] = repeated(found[name], 0)
        for name in ("bias_k", "bias_v"):
            if name in found and Nk != N:
                found[name] = repeated(found[name], -1)
        return found

    def batch(x: Tensor) -> Tensor:
        """[B, L, E]."""
        x = x if case.batched else x.unsqueeze(0 if case.batch_first else 1)
        return x if case.batch_first else x.transpose(0, 1)

    def unbatch(x: Tensor) -> Tensor:
        x = x if case.batch_first else x.transpose(0, 1)
        return x if case.batched else x.squeeze(0 if case.batch_first else 1)

    def call(leaves: dict[str, Any]) -> dict[str, Tensor]:
        query, key, value = triple(leaves)
        dtype = query.dtype
        places = [case.valid(what).unsqueeze(-1) for what in ("queries", "keys", "keys")]
        if case.source == "self":
            places[0] = places[1]
        q, k, v = (torch.where(p, batch(x), 0) for p, x in zip(places, (query, key, value), strict=True))
        mask, padding, weights = leaves["mask"], leaves["padding"], weights_of(leaves)
        bias = torch.zeros((), dtype=dtype)
        if floats(mask) and not case.is_causal:
            bias = mask if mask.dim() == 2 else mask.view(B, N, L, S)
        if padding is not None:
            bias = bias + padding[:, None, None]
        merged = torch.where(allowed, bias, -math.inf)
        if allowed.any(-1).all():
            layer.to(dtype).batch_first = True
            options = dict(attn_mask=merged.flatten(0, 1), need_weights=case.weights != "no")
            options["average_attn_weights"] = case.weights != "heads"
            if q.shape == k.shape and case.source == "self" and torch.equal(q, k):
                k = v = q
            output, found = torch.func.functional_call(layer, weights, (q, k, v), options)
        else:
            output, found = formula(q, k, v, weights, merged)
        output = torch.where(queries.unsqueeze(-1), output, 0)
        if found is not None:
            found = torch.where(
                queries[:, :, None] if case.weights == "average" else queries[:, None, :, None], found, 0
            )
            found = found if case.batched else found.squeeze(0)
        return named(unbatch(output), found)

    def formula(
        q: Tensor, k: Tensor, v: Tensor, w: dict[str, Tensor], merged: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        b_q, b_k, b_v = w["in_proj_bias"].chunk(3) if case.bias else (None, None, None)
        if "in_proj_weight" in w:
            w_q, w_k, w_v = w["in_proj_weight"].chunk(3)
        else:
            w_q, w_k, w_v = (w[f"{name}_proj_weight"] for name in "qkv")
        q, k, v = F.linear(q, w_q, b_q), F.linear(k, w_k, b_k), F.linear(v, w_v, b_v)
        extra = 0
        if case.bias_kv:
            k = torch.cat([k, w["bias_k"].expand(B, -1, -1)], 1)
            v = torch.cat([v, w["bias_v"].expand(B, -1, -1)], 1)
            extra += 1
        if case.zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        q, k, v = (x.unflatten(-1, (N, Eh)).transpose(1, 2) for x in (q, k, v))
        merged = F.pad(merged, (0, extra))
        some = (merged > -math.inf).any(-1, keepdim=True)
        if case.weights == "no":
            out, found = F.scaled_dot_product_attention(q, k, v, merged), None
        else:
            score = (q * Eh**-0.5) @ k.transpose(-2, -1) + torch.where(some, merged, 0)
            found = torch.where(some, score.softmax(-1), 0)
            out = found @ v
        out = torch.where(some, out, 0).transpose(1, 2).flatten(2)
        out = F.linear(out, w["out_proj.weight"], w.get("out_proj.bias"))
        return out, None if found is None else found if case.weights == "heads" else found.mean(1)

    return call


def with_junk(case: Case, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """NaN and infinities in padded rows of query, key and value."""
    found = dict(tensors)
    for name, what in (("query", "queries"), ("key", "keys"), ("value", "keys")):
        x = found[name]
        if x is None:
            continue
        valid = case.valid("keys" if case.source == "self" else what)
        valid = valid if case.batch_first else valid.T
        valid = (valid if case.batched else valid.squeeze(0 if case.batch_first else 1)).unsqueeze(-1)
        junk = torch.tensor([NAN, math.inf, -math.inf, NAN], dtype=x.dtype)[torch.arange(x.shape[-1]) % 4]
        found[name] = torch.where(valid, x, junk)
    return found


def check(case: Case) -> None:
    tensors, same = case.inputs(), dict(seed=1, rounded=case.dtype)
    expected = evaluate_named(torchs(case), tensors, **same)
    with math_kernel():
        second = evaluate_named(torchs(case), doubled(tensors), **same)
    with seqkern.use_backend("eager"):
        oracle = evaluate_named(ours(case), doubled(with_junk(case, tensors)), **same)
    agree(oracle, second, ORACLES_AGREE, f"{case}: eager float64 (got) against torch.nn float64 (expected)")
    with poisoned():
        got = evaluate_named(ours(case), with_junk(case, tensors), **same)
    within(got, expected, oracle, case, lambda: errors_nearby_named(torchs(case), tensors))


FACTORS: dict[str, tuple] = dict(
    heads=((2, 0), (4, 2), (3, 1), (1, 0)),
    source=("self", "memory", "three"),
    dims=(False, True),
    bias=(True, False),
    bias_kv=(False, True),
    zero_attn=(False, True),
    batch_first=(False, True),
    batched=(True, True, False),
    keys=("all", "right", "left", "holes", "none", "lengths", "float"),
    queries=("all", "same", "lengths", "holes"),
    mask=("no", "no", "bool2", "bool3", "float2", "float3", "inf2", "inf3"),
    is_causal=(False, True),
    weights=("no", "average", "heads"),
)


def legal(row: dict[str, Any]) -> Case:
    row = dict(row)
    (N, Nk), dims = row.pop("heads"), row.pop("dims")
    if row["source"] == "self":
        row["S"] = row["L"]
        row["queries"] = "all" if row["queries"] == "all" else "same"
    elif row["queries"] == "same":
        row["queries"] = "right"
    elif dims:
        row |= dict(kdim=5, vdim=6 if row["source"] == "three" else 5)
    if row["is_causal"]:
        row["mask"] = "no"  # it would not be read
    if not row["batched"]:
        row |= dict(B=1, queries="all", keys="right" if row["keys"] == "lengths" else row["keys"])
    return Case(N=N, Nk=Nk, **row)


SMALL = dict(B=(1, 2, 4), L=(1, 5, 17), S=(1, 6, 17), Eh=(1, 4, 8), dtype=DTYPES)


def sample() -> list[Case]:
    return unique(legal(row) for row in pairwise(FACTORS | SMALL))


def wide() -> list[Case]:
    sizes = dict(B=(1, 3, 5), L=(1, 15, 33, 65), S=(1, 16, 63, 129), Eh=(1, 8, 40, 64), dtype=DTYPES)
    return unique(
        replace(legal(row), seed=seed) for seed in range(1, 5) for row in pairwise(FACTORS | sizes, seed)
    )


@pytest.mark.parametrize("case", sample(), ids=str)
def test_parity(backend, case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", wide(), ids=str)
def test_parity_widely(backend, case):
    check(case)


PACKING = [
    pytest.param(
        keys,
        queries,
        is_causal,
        weights,
        id=f"{keys}-{queries}-{'causal' if is_causal else 'full'}-{weights}",
    )
    for keys, queries, is_causal, weights in itertools.product(
        ("right", "left", "holes", "none", "lengths"),
        ("all", "same", "lengths"),
        (False, True),
        ("no", "average"),
    )
]


@pytest.mark.parametrize(("keys", "queries", "is_causal", "weights"), PACKING)
@pytest.mark.parametrize("source", ["self", "memory"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_and_padded_paths(monkeypatch, keys, queries, is_causal, weights, source, batch_first):
    """The gathered rows give what the padded ones give, with NaN in the padding, gradients included."""
    if source == "memory" and queries == "same":
        queries = "right"
    if source == "self" and queries == "lengths":
        queries = "same"
    case = Case(
        B=5, L=9, S=9, keys=keys, queries=queries, is_causal=is_causal, weights=weights, source=source,
        batch_first=batch_first, dtype=torch.float64,
    )  # fmt: skip
    results = []
    for part in (2.0, -1.0):
        monkeypatch.setattr(operation, "WORTH_PACKING", part)
        with seqkern.use_backend("cpu"), poisoned():
            results.append(evaluate_named(ours(case), with_junk(case, case.inputs()), 1, case.dtype))
    agree(results[0], results[1], 1e-12, case)
    assert all(t.isfinite().all() for t in results[0].values())


def test_packing_is_what_runs(monkeypatch):
    """Half of the keys padded: their projections are left out; nearly none: they are not."""
    seen = []
    real = operation._packed
    monkeypatch.setattr(operation, "_packed", lambda *args: seen.append(True) or real(*args))
    layer, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 20, 8)
    for length, packs in ((10, True), (19, False)):
        seen.clear()
        layer(x, x, x, lengths=torch.tensor([length, length]))
        assert bool(seen) == packs
    for options in (dict(add_bias_kv=True), dict(add_zero_attn=True)):
        seen.clear()
        MultiHeadAttention(8, 2, batch_first=True, **options)(x, x, x, lengths=torch.tensor([5, 5]))
        assert not seen


# ---- torch's known defects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_row_without_keys_is_the_bias(backend, need_weights, average, train):
    """pytorch #160064: torch.nn gives NaN there; and the gradients are finite."""
    layer = MultiHeadAttention(8, 2, batch_first=True).train(train)
    with torch.no_grad():
        layer.out_proj.bias.copy_(torch.randn(8))
    x = torch.randn(3, 5, 8, requires_grad=True)
    pad = torch.zeros(3, 5, dtype=torch.bool)
    pad[1] = True
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2] = True
    out, weights = layer(x, x, x, pad, need_weights, mask, average)
    for row in (out[1], out[:, 2]):
        assert torch.equal(row, layer.out_proj.bias.expand_as(row))
    loss = out.square().sum()
    if need_weights:
        assert (weights[1] == 0).all() and (weights[..., 2, :] == 0).all() and weights.isfinite().all()
        loss = loss + weights.square().sum()
    grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_causal_without_a_mask(backend, need_weights, padded, train):
    """pytorch #172338."""
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).train(train)
    layer = twin(theirs)
    x = torch.randn(3, 5, 8)
    pad = torch.arange(5) >= torch.tensor([5, 3, 1])[:, None] if padded else None
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, pad, need_weights, mask)
    for given in (None, mask):
        got = layer(x, x, x, pad, need_weights, given, is_causal=True)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bias_kv", [False, True])
@pytest.mark.parametrize("source", ["self", "memory", "three"])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"need_weights": True}, {"attn_mask": True}], ids=str
)
def test_nan_in_padding_reaches_nothing(backend, side, bias_kv, source, options):
    """pytorch #101967, in the parameters' gradients too: the bits of zeros there."""
    layer = MultiHeadAttention(8, 2, add_bias_kv=bias_kv, batch_first=True)
    pad = torch.arange(12) >= torch.tensor([12, 4, 1])[:, None]
    pad = pad.flip(1) if side == "left" else pad
    options = {"need_weights": False} | options
    if options.get("attn_mask"):
        options["attn_mask"] = torch.randn(12, 12)
    x, y = torch.randn(3, 12, 8), torch.randn(3, 12, 8)
    query = x if source == "self" else torch.randn(3, 12, 8)
    value = {"self": x, "memory": x, "three": y}[source]
    results = []
    for junk in (0.0, NAN):
        k = x.masked_fill(pad[..., None], junk).requires_grad_()
        v = k if value is x else value.masked_fill(pad[..., None], junk).requires_grad_()
        q = k if source == "self" else query.clone().requires_grad_()
        out, weights = layer(q, k, v, pad, **options)
        valid = out if source != "self" else out[~pad]
        outputs = [valid]
        if weights is not None:
            outputs.append(weights[~pad] if source == "self" else weights)
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in outputs)
        leaves = list({id(t): t for t in (q, k, v)}.values())
        grads = torch.autograd.grad(loss, [*leaves, *layer.parameters()])
        results.append(dict(enumerate([*outputs, *grads])))
    agree({k: t.detach() for k, t in results[1].items()}, results[0], 1e-5, f"{side} {source} {options}")
    assert all(t.isfinite().all() for t in results[1].values())


def largest_allocation(call) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"lengths": True}, {"lengths": True, "is_causal": True}], ids=str
)
@pytest.mark.parametrize(("grad", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_averaged_weights_need_no_memory_per_head(monkeypatch, options, grad, dropout):
    monkeypatch.setattr(attention_cpu, "BLOCK", 1 << 15)  # dropout's counters are int64, eight to a weight
    B, N, L = 2, 8, 160
    layer = MultiHeadAttention(16, N, dropout=dropout, batch_first=True).train()
    x = torch.randn(B, L, 16, requires_grad=grad)
    options = dict(options)
    if options.get("lengths"):
        options["lengths"] = torch.tensor([140, 70])

    def call():
        with seqkern.use_backend("cpu"), torch.set_grad_enabled(grad):
            out, weights = layer(x, x, x, **options)
            if grad:
                (out.sum() + weights.square().sum()).backward()

    call()
    averaged = B * L * L * 4
    assert largest_allocation(call) <= (2 * averaged if dropout else averaged) < N * averaged


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias_kv", [False, True])
def test_padding_and_causal_need_no_mask_in_memory(grad, bias_kv):
    B, N, L = 2, 16, 512
    layer = MultiHeadAttention(64, N, add_bias_kv=bias_kv, batch_first=True)
    x = torch.randn(B, L, 64, requires_grad=grad)
    pad = torch.rand(B, L) < 0.3

    def call():
        with seqkern.use_backend("cpu"), torch.set_grad_enabled(grad):
            out, _ = layer(x, x, x, pad, need_weights=False, is_causal=True)
            if grad:
                out.sum().backward()

    call()
    assert largest_allocation(call) <= 1 << 21 < B * N * L * L * 4


def test_torchs_fast_path_is_never_taken(monkeypatch, backend):
    """In eval mode under no_grad torch.nn's module leaves its own forward for a fused operator."""

    def refuse(*args, **keywords):
        raise AssertionError("the fast path was taken")

    monkeypatch.setattr(torch, "_native_multi_head_attention", refuse)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    layer = twin(theirs)
    pad = torch.arange(5) >= torch.tensor([5, 3, 1])[:, None]
    with torch.no_grad():
        with pytest.raises(AssertionError, match="fast path"):
            theirs(x, x, x)
        for options in ({}, {"key_padding_mask": pad}, {"need_weights": False}, {"is_causal": True}):
            assert layer(x, x, x, **options)[0].shape == x.shape
        assert torch.equal(layer(x, x, x)[0], layer.train()(x, x, x)[0])


# ---- the module --------------------------------------------------------------------------------------------


def twin(theirs: nn.MultiheadAttention, cls: type = MultiHeadAttention) -> Any:
    """A module of the class with the options, parameters and mode of another."""
    layer = cls(
        theirs.embed_dim,
        theirs.num_heads,
        theirs.dropout,
        theirs.in_proj_bias is not None,
        theirs.bias_k is not None,
        theirs.add_zero_attn,
        theirs.kdim,
        theirs.vdim,
        theirs.batch_first,
        dtype=theirs.out_proj.weight.dtype,
    )
    layer.load_state_dict(theirs.state_dict())
    return layer.train(theirs.training)


CONSTRUCTIONS = [
    dict(zip(("bias", "add_bias_kv", "add_zero_attn", "batch_first", "kdim", "dtype"), values, strict=True))
    for values in itertools.product(
        (True, False), (False, True), (False, True), (False, True), (None, 5), (None, torch.float64)
    )
]


def test_is_one():
    assert issubclass(MultiHeadAttention, nn.MultiheadAttention)
    assert seqkern.MultiheadAttention is MultiHeadAttention is seqkern.nn.MultiHeadAttention
    assert seqkern.nn.MultiheadAttention is MultiHeadAttention


@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
def test_construction(options):
    """From one seed the same parameters bit for bit, the generator left alike; names, repr, state."""
    layers = []
    for cls in (nn.MultiheadAttention, MultiHeadAttention):
        torch.manual_seed(3)
        layers += [cls(8, 2, **options), torch.rand(1).item()]
    its, its_next, mine, my_next = layers
    assert my_next == its_next
    assert list(mine.state_dict()) == list(its.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in its.named_parameters()]
    same_bits(dict(mine.state_dict()), dict(its.state_dict()), options)
    assert repr(mine).replace("MultiHeadAttention", "MultiheadAttention") == repr(its)
    assert mine.state_dict()._metadata == its.state_dict()._metadata
    for name in (
        "embed_dim",
        "num_heads",
        "head_dim",
        "kdim",
        "vdim",
        "dropout",
        "batch_first",
        "add_zero_attn",
    ):
        assert getattr(mine, name) == getattr(its, name)
    fresh = nn.MultiheadAttention(8, 2, **options)
    fresh.load_state_dict(mine.state_dict())
    same_bits(dict(fresh.state_dict()), dict(mine.state_dict()), options)
    back = MultiHeadAttention(8, 2, **options)
    back.load_state_dict(fresh.state_dict(), assign=True)
    same_bits(dict(back.state_dict()), dict(mine.state_dict()), options)


def test_positional_arguments():
    arguments = (8, 2, 0.1, False, True, True, 5, 6, True, None, torch.float64)
    mine, its = MultiHeadAttention(*arguments), nn.MultiheadAttention(*arguments)
    assert [p.shape for p in mine.parameters()] == [p.shape for p in its.parameters()]
    assert mine.batch_first and mine.dropout == 0.1 and mine.add_zero_attn


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 5, "vdim": 6}, {"add_bias_kv": True}, {"bias": False}], ids=str
)
def test_fewer_key_heads(backend, num_kv_heads, options):
    """Against torch.nn's module with each key head's rows repeated for its group."""
    layer = MultiHeadAttention(16, 4, num_kv_heads=num_kv_heads, **options)
    theirs = nn.MultiheadAttention(16, 4, **options)
    Eh, group = 4, 4 // num_kv_heads

    def spread(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (num_kv_heads, Eh)).repeat_interleave(group, 0).flatten(0, 1)

    state = layer.state_dict()
    for name, p in state.items():
        if name.startswith("in_proj"):
            q, k, v = p.split([16, num_kv_heads * Eh, num_kv_heads * Eh])
            state[name] = torch.cat([q, spread(k), spread(v)])
        elif name in ("k_proj_weight", "v_proj_weight"):
            assert p.shape[0] == num_kv_heads * Eh
            state[name] = spread(p)
        elif name in ("bias_k", "bias_v"):
            assert p.shape == (1, 1, num_kv_heads * Eh)
            state[name] = spread(p.flatten()).view(1, 1, -1)
    theirs.load_state_dict(state)
    x, k, v = torch.randn(5, 2, 16), torch.randn(7, 2, layer.kdim), torch.randn(7, 2, layer.vdim)
    torch.testing.assert_close(layer(x, k, v), theirs(x, k, v))
    assert (f"num_kv_heads={num_kv_heads}" in repr(layer)) == (num_kv_heads != 4)


@pytest.mark.parametrize("num_kv_heads", [0, 3, 5, -1])
def test_a_wrong_number_of_key_heads(num_kv_heads):
    with pytest.raises(
        ValueError, match=rf"num_kv_heads: expected a divisor of num_heads = 4, got {num_kv_heads}"
    ):
        MultiHeadAttention(16, 4, num_kv_heads=num_kv_heads)


def test_copies_and_pickles(backend):
    layer = MultiHeadAttention(8, 4, num_kv_heads=2, batch_first=True, dropout=0.5).eval()
    x = torch.randn(2, 3, 8)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x, x, x)[0], layer(x, x, x)[0])
        assert other.num_kv_heads == 2 and other.training is False


def test_a_module_of_before_num_kv_heads(backend):
    """torch.nn's module turned into ours, and a state without the attribute."""
    theirs = nn.MultiheadAttention(8, 2)
    layer = copy.deepcopy(theirs)
    layer.__class__ = MultiHeadAttention
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(layer(x, x, x), theirs(x, x, x))
    mine = MultiHeadAttention(8, 2)
    del mine.__dict__["num_kv_heads"]
    again = pickle.loads(pickle.dumps(mine))
    assert torch.equal(again(x, x, x)[0], mine(x, x, x)[0])
    assert "num_kv_heads" not in repr(again)
    del layer.__dict__["_qkv_same_embed_dim"]  # torch.nn's own older pickles
    old = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(old(x, x, x), theirs(x, x, x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "way", ["parametrize", "weight_norm", "spectral_norm", "prune", "setattr", "data", "tied"]
)
def test_weights_replaced(backend, way):
    theirs = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    mine = twin(theirs)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    results = []
    for layer in (theirs, mine):
        torch.manual_seed(5)
        layer(x, x, x)  # whatever is cached is cached now
        if way == "parametrize":
            parametrize.register_parametrization(layer, "in_proj_weight", Doubled())
        elif way == "weight_norm":
            parametrizations.weight_norm(layer, "in_proj_weight")
        elif way == "spectral_norm":
            parametrizations.spectral_norm(layer.out_proj, "weight")
        elif way == "prune":
            prune.l1_unstructured(layer, "in_proj_weight", amount=20)
        elif way == "setattr":
            layer.in_proj_weight = nn.Parameter(torch.ones_like(layer.in_proj_weight))
        elif way == "tied":
            layer.in_proj_bias = nn.Parameter(torch.cat([layer.out_proj.bias.detach()] * 3))
        else:
            layer.in_proj_weight.data = torch.ones_like(layer.in_proj_weight)
        output, weights = layer(x, x, x)
        params = [p for _, p in sorted(layer.named_parameters())]
        results.append([output, weights, *torch.autograd.grad(output.square().sum(), params)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)


def test_module_options_are_read_at_the_call(backend):
    layer = MultiHeadAttention(8, 2, dropout=0.0)
    x = torch.randn(3, 2, 8)
    plain = layer(x, x, x)[0]
    layer.dropout = 0.5
    assert not torch.equal(layer(x, x, x)[0], plain)
    assert torch.equal(layer.eval()(x, x, x)[0], plain)


@pytest.mark.parametrize("train", [True, False])
def test_dropout_only_in_training(backend, train):
    layer = MultiHeadAttention(8, 2, dropout=0.6, batch_first=True).train(train)
    x = torch.randn(2, 30, 8)
    _, weights = layer(x, x, x, average_attn_weights=False)
    assert ((weights == 0).float().mean() > 0.4) == train


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("average", [True, False])
def test_weights_are_after_dropout(padding, average):
    """One seed, one mask, whichever backend and path: per head, averaged, or not asked for."""
    layer = MultiHeadAttention(8, 2, dropout=0.5, batch_first=True, dtype=torch.float64).train()
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    pad = torch.arange(20) >= torch.tensor([20, 9, 3])[:, None]
    pad = {"none": None, "right": pad, "left": pad.flip(1), "holes": torch.rand(3, 20) < 0.5}[padding]
    results = []
    for backend, need_weights in itertools.product(("eager", "cpu"), (True, False)):
        torch.manual_seed(11)
        with seqkern.use_backend(backend):
            results.append(layer(x, x, x, pad, need_weights, average_attn_weights=average))
    for output, weights in results[1:]:
        torch.testing.assert_close(output, results[0][0])
        if weights is not None:
            torch.testing.assert_close(weights, results[0][1])
            if not average:
                assert torch.equal(weights != 0, results[0][1] != 0)
    if not average:
        v = F.linear(x, layer.in_proj_weight[16:], layer.in_proj_bias[16:]).unflatten(-1, (2, 4))
        heads = torch.einsum("bnls,bsne->blne", results[0][1], v).flatten(2)
        torch.testing.assert_close(layer.out_proj(heads), results[0][0])


@pytest.mark.parametrize("subset", range(1, 32))
def test_requires_grad_on_any_subset(backend, subset):
    """Query, key, value, the projections' weight and the output's: those asked for, as with all."""
    layer = MultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
    tensors = [torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(3)]
    pad = torch.tensor([[False] * 5, [False, False, True, True, True]])
    weights = torch.randn(5, 5, dtype=torch.float64)

    def grads(chosen: int) -> list[Tensor | None]:
        leaves = [*(t.detach().clone() for t in tensors), layer.in_proj_weight, layer.out_proj.weight]
        layer.requires_grad_(False)
        layer.zero_grad()
        for k, t in enumerate(leaves):
            t.requires_grad_(bool(chosen >> k & 1))
        out, w = layer(*leaves[:3], pad)
        (out.pow(2).sum() + (w * weights).sum()).backward()
        return [t.grad for t in leaves]

    full = grads(31)
    for k, (got, expected) in enumerate(zip(grads(subset), full, strict=True)):
        if subset >> k & 1:
            torch.testing.assert_close(got, expected)
        else:
            assert got is None


EMPTY = [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0), (2, 0, 0)]


@pytest.mark.parametrize(("B", "L", "S"), EMPTY)
@pytest.mark.parametrize(
    "options", [{}, {"need_weights": False}, {"is_causal": True}, {"lengths": True}, {"pad": True}], ids=str
)
@pytest.mark.parametrize(
    "constructor", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"dropout": 0.5}], ids=str
)
def test_empty_sizes(backend, B, L, S, options, constructor):
    layer = MultiHeadAttention(8, 2, batch_first=True, **constructor)
    q, m = torch.randn(B, L, 8, requires_grad=True), torch.randn(B, S, 8, requires_grad=True)
    options = dict(options)
    if options.pop("lengths", None):
        options["lengths"] = torch.full((B,), S)
    if options.pop("pad", None):
        options["key_padding_mask"] = torch.ones(B, S, dtype=torch.bool)
    with poisoned():
        out, weights = layer(q, m, m, **options)
        grads = torch.autograd.grad(out.sum(), [q, m, *layer.parameters()], allow_unused=True)
    assert out.shape == (B, L, 8) and out.isfinite().all()
    if weights is not None:
        assert weights.shape == (B, L, S + 2 * ("add_bias_kv" in constructor))
    assert all(g is None or g.isfinite().all() for g in grads)


# ---- mistakes ----------------------------------------------------------------------------------------------

X = torch.randn(5, 2, 8)


@dataclass(frozen=True)
class Mistake:
    name: str
    make: Callable[[type], Any]
    says: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def bools(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


MISTAKES = [
    Mistake("heads do not divide", lambda M: M(10, 3), ("embed_dim", "num_heads")),
    Mistake("embed_dim 0", lambda M: M(0, 1), ("embed_dim", "0")),
    Mistake("num_heads 0", lambda M: M(8, 0), ("num_heads", "0")),
    Mistake("num_heads -2", lambda M: M(8, -2), ("num_heads", "-2")),
    Mistake("no such option", lambda M: M(8, 2, depth=2), ("depth",)),
    Mistake("no such argument", lambda M: M(8, 2)(X, X, X, maks=None), ("maks",)),
    Mistake("no key", lambda M: M(8, 2)(X), ("key",)),
    Mistake("dropout 2", lambda M: M(8, 2, dropout=2.0)(X, X, X, need_weights=False), ("dropout", "2")),
    Mistake("dropout 2, weights", lambda M: M(8, 2, dropout=2.0)(X, X, X), ("dropout", "2")),
    Mistake("query 4-D", lambda M: M(8, 2)(X[None], X, X), ("query", r"\(1, 5, 2, 8\)")),
    Mistake("query 1-D", lambda M: M(8, 2)(X[0, 0], X, X), ("query", r"\(8,\)")),
    Mistake("key 2-D", lambda M: M(8, 2)(X, X[:, 0], X), ("key", "3-D", r"\(5, 8\)")),
    Mistake("value 2-D", lambda M: M(8, 2)(X, X, X[:, 0]), ("value", "3-D", r"\(5, 8\)")),
    Mistake("key 3-D, unbatched", lambda M: M(8, 2)(X[:, 0], X, X), ("key", "2-D", r"\(5, 2, 8\)")),
    Mistake("query width", lambda M: M(8, 2)(X[..., :7], X, X), ("query", r"\b8\b", r"\(5, 2, 7\)")),
    Mistake("key width", lambda M: M(8, 2)(X, X[..., :7], X), ("key", r"\b8\b", r"\(5, 2, 7\)")),
    Mistake("value width", lambda M: M(8, 2)(X, X, X[..., :7]), ("value", r"\b8\b", r"\(5, 2, 7\)")),
    Mistake("both widths", lambda M: M(8, 2)(X, X[..., :7], X[..., :7]), (r"\b8\b", r"\b7\b")),
    Mistake("kdim", lambda M: M(8, 2, kdim=5, vdim=6)(X, X, X), ("key", r"\b5\b", r"\(5, 2, 8\)")),
    Mistake("vdim", lambda M: M(8, 2, kdim=8, vdim=6)(X, X, X), ("value", r"\b6\b", r"\(5, 2, 8\)")),
    Mistake(
        "key's batch",
        lambda M: M(8, 2)(X, torch.randn(5, 3, 8), torch.randn(5, 3, 8)),
        ("key", r"\(5, 3, 8\)"),
    ),
    Mistake("value's steps", lambda M: M(8, 2)(X, X, X[:3]), ("value", r"\(5, 2, 8\)", r"\(3, 2, 8\)")),
    Mistake("value's batch", lambda M: M(8, 2)(X, X, X[:, :1]), ("value", r"\(5, 1, 8\)")),
    Mistake("vdim's steps", lambda M: M(8, 2, kdim=8, vdim=6)(X, X, X[:3, :, :6]), ("value", r"\(3, 2, 6\)")),
    Mistake(
        "padding's steps",
        lambda M: M(8, 2)(X, X, X, bools(2, 6)),
        ("key_padding_mask", r"\(2, 5\)", r"\(2, 6\)"),
    ),
    Mistake("padding transposed", lambda M: M(8, 2)(X, X, X, bools(5, 2)), ("key_padding_mask", r"\(5, 2\)")),
    Mistake("padding 1-D", lambda M: M(8, 2)(X, X, X, bools(5)), ("key_padding_mask", "2-D", r"\(5,\)")),
    Mistake(
        "padding 2-D, unbatched", lambda M: M(8, 2)(*[X[:, 0]] * 3, bools(1, 5)), ("key_padding_mask", "1-D")
    ),
    Mistake(
        "padding of integers", lambda M: M(8, 2)(X, X, X, bools(2, 5).long()), ("key_padding_mask", "int64")
    ),
    Mistake(
        "padding float64", lambda M: M(8, 2)(X, X, X, bools(2, 5).double()), ("key_padding_mask", "float64")
    ),
    Mistake(
        "mask's shape",
        lambda M: M(8, 2)(X, X, X, attn_mask=bools(5, 6)),
        ("attn_mask", r"\(5, 5\)", r"\(5, 6\)"),
    ),
    Mistake(
        "mask of a batch",
        lambda M: M(8, 2)(X, X, X, attn_mask=bools(2, 5, 5)),
        ("attn_mask", r"\(4, 5, 5\)", r"\(2, 5, 5\)"),
    ),
    Mistake("mask 1-D", lambda M: M(8, 2)(X, X, X, attn_mask=bools(5)), ("attn_mask", r"\(5,\)")),
    Mistake(
        "mask 4-D", lambda M: M(8, 2)(X, X, X, attn_mask=bools(2, 2, 5, 5)), ("attn_mask", r"\(2, 2, 5, 5\)")
    ),
    Mistake(
        "mask of integers", lambda M: M(8, 2)(X, X, X, attn_mask=bools(5, 5).int()), ("attn_mask", "int32")
    ),
    Mistake(
        "mask 3-D, unbatched",
        lambda M: M(8, 2)(*[X[:, 0]] * 3, attn_mask=bools(4, 5, 5)),
        ("attn_mask", r"\(2, 5, 5\)", r"\(4, 5, 5\)"),
    ),
    Mistake(
        "mask float64", lambda M: M(8, 2)(X, X, X, attn_mask=bools(5, 5).double()), ("attn_mask", "float64")
    ),
    Mistake("query float64", lambda M: M(8, 2)(X.double(), X, X), ("ouble|float64",)),
    Mistake("all float64", lambda M: M(8, 2)(*[X.double()] * 3), ("ouble|float64",)),
    Mistake("integers", lambda M: M(8, 2)(*[X.long()] * 3), ("ong|int64",)),
    Mistake("query elsewhere", lambda M: M(8, 2)(X.to("meta"), X, X), ("meta",)),
    Mistake("another's state", lambda M: M(8, 2).load_state_dict(M(12, 2).state_dict()), ("in_proj_weight",)),
    Mistake(
        "a state without bias",
        lambda M: M(8, 2).load_state_dict(M(8, 2, bias=False).state_dict()),
        ("in_proj_bias",),
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistakes_raise_what_torch_nn_raises(mistake):
    with pytest.raises(Exception) as expected:
        mistake.make(nn.MultiheadAttention)
    with pytest.raises(expected.type) as caught:
        mistake.make(MultiHeadAttention)
    assert caught.type is expected.type
    for words in mistake.says:
        assert re.search(words, str(caught.value)), f"{words!r} not in {caught.value}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            dict(lengths=torch.tensor([1, 6])),
            r"lengths: expected values in 0\.\.T = 0\.\.5, got lengths\[1\] = 6",
        ),
        (dict(lengths=torch.tensor([1, 2, 3])), r"lengths: expected \[B\] = \(2,\), got \(3,\)"),
        (
            dict(lengths=torch.tensor([1, 2]), key_padding_mask=bools(2, 5)),
            "lengths: expected None with key_",
        ),
        (dict(query_lengths=torch.tensor([1, 6])), r"query_lengths\[1\] = 6"),
        (
            dict(query_padding_mask=bools(5, 2)),
            r"query_padding_mask: expected \[B, L\] = \(2, 5\), got \(5, 2\)",
        ),
        (
            dict(query_padding_mask=torch.zeros(2, 5)),
            r"query_padding_mask: expected bool, got torch\.float32",
        ),
        (dict(cu_seqlens_q=torch.tensor([0, 5])), "packed and nested input: expected .* need_weights=False"),
        (
            dict(cu_seqlens_q=torch.tensor([0, 5]), need_weights=False, key_padding_mask=bools(2, 5)),
            "packed and nested input: expected no masks",
        ),
    ],
)
def test_mistakes_with_what_torch_nn_has_not(options, says):
    with pytest.raises(ValueError, match=says):
        MultiHeadAttention(8, 2)(X, X, X, **options)


def test_unbatched_input_takes_no_lengths():
    with pytest.raises(ValueError, match="unbatched input: expected no lengths"):
        MultiHeadAttention(8, 2)(*[X[:, 0]] * 3, lengths=torch.tensor([1]))


# ---- packed and nested -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(backend, num_kv_heads, is_causal):
    layer = MultiHeadAttention(16, 4, num_kv_heads=num_kv_heads, dtype=torch.float64)
    lengths_q, lengths_k = [3, 0, 5, 1], [4, 2, 6, 0]
    q = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    k = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k))
    out, none = layer(q, k, k, need_weights=False, is_causal=is_causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert none is None
    parts = [
        layer(a, b, b, need_weights=False, is_causal=is_causal)[0]
        for a, b in zip(q.split(lengths_q), k.split(lengths_k), strict=True)
    ]
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected)
    leaves = [q, k, *layer.parameters()]
    dout = torch.randn_like(out)
    grads = [torch.autograd.grad(y, leaves, dout) for y in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    alone, _ = layer(q, q, q, need_weights=False, is_causal=is_causal, cu_seqlens_q=cu_q)
    parts = [layer(a, a, a, need_weights=False, is_causal=is_causal)[0] for a in q.split(lengths_q)]
    torch.testing.assert_close(alone, torch.cat(parts))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensors(backend, is_causal):
    layer = MultiHeadAttention(16, 4, batch_first=True)
    rows = [torch.randn(n, 16) for n in (3, 5, 1)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    out, _ = layer(x, x, x, need_weights=False, is_causal=is_causal)
    assert out.is_nested and (out + x).is_nested
    grads = torch.autograd.grad(out.values().square().sum(), [x, *layer.parameters()])
    leaves = [r.clone().requires_grad_() for r in rows]
    parts = [layer(r, r, r, need_weights=False, is_causal=is_causal)[0] for r in leaves]
    for a, b in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(a, b)
    expected = torch.autograd.grad(sum(p.square().sum() for p in parts), [*leaves, *layer.parameters()])
    torch.testing.assert_close(grads[0].values(), torch.cat(expected[:3]), rtol=1e-4, atol=1e-5)
    for a, b in zip(grads[1:], expected[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- the cache ---------------------------------------------------------------------------------------------

LAYERS = [
    {},
    {"num_kv_heads": 1},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"bias": False, "kdim": 8, "vdim": 8},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 3, 2), (9,), (1, 0, 8)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_stepwise_is_full(backend, options, chunks, grad, batch_first):
    """Outputs, weights and gradients of a causal pass, in pieces through a cache."""
    layer = MultiHeadAttention(8, 2, batch_first=batch_first, dtype=torch.float64, **options)
    dim = 1 if batch_first else 0
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    x = (x if batch_first else x.transpose(0, 1)).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        full, full_weights = layer(x, x, x, is_causal=True)
        cache, outputs, done = KeyValueCache(), [], 0
        for part in x.split(list(chunks), dim):
            output, weights, returned = layer(part, part, part, is_causal=True, cache=cache)
            assert returned is cache
            size = part.shape[dim]
            seen = done + size
            extra = weights.shape[-1] - seen
            torch.testing.assert_close(weights[..., :seen], full_weights[:, done:seen, :seen])
            assert extra == ("add_bias_kv" in options) + ("add_zero_attn" in options)
            outputs.append(output)
            done = seen
        assert cache.length == 9
        joined = torch.cat(outputs, dim)
        torch.testing.assert_close(joined, full)
    if grad:
        leaves = [x, *layer.parameters()]
        got, expected = (torch.autograd.grad(y.square().sum(), leaves) for y in (joined, full))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_long_run_through_the_cache(backend):
    """Past the buffer's first room, twice."""
    layer = MultiHeadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 300, 8)
    cache = KeyValueCache()
    with torch.no_grad():
        full = layer(x, x, x, is_causal=True)[0]
        parts = []
        for k in range(0, 300, 3):
            part = x[:, k : k + 3]
            parts.append(layer(part, part, part, need_weights=False, is_causal=True, cache=cache)[0])
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)
    assert cache.key.shape == cache.value.shape == (2, 2, 300, 4)


@pytest.mark.parametrize("padding", ["left", "holes", "lengths"])
def test_masks_over_all_that_a_cache_holds(backend, padding):
    layer = MultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    pad = torch.arange(6) < torch.tensor([0, 2, 4])[:, None]
    pad = torch.tensor([[0, 1, 0, 0, 1, 0]] * 3).bool() if padding == "holes" else pad
    full = layer(x, x, x, pad if padding != "lengths" else None, is_causal=True)[0]
    cache, parts = KeyValueCache(), []
    for k in range(6):
        part = x[:, k : k + 1]
        options = dict(key_padding_mask=pad[:, : k + 1])
        if padding == "lengths":
            options = dict(lengths=torch.full((3,), k + 1))
        parts.append(layer(part, part, part, is_causal=True, cache=cache, **options)[0])
    torch.testing.assert_close(torch.cat(parts, 1), full)


@pytest.mark.parametrize("index", [[1, 0, 2], [2, 2, 2], [0], [0, 0, 1, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_beams_reorder(backend, index, grad):
    """As if each chosen row had been fed from the start, to another batch size too."""
    layer = MultiHeadAttention(8, 2, batch_first=True).requires_grad_(grad)
    x, more = torch.randn(3, 4, 8), torch.randn(len(index), 2, 8)
    cache = KeyValueCache()
    layer(x, x, x, is_causal=True, cache=cache)
    cache.reorder(torch.tensor(index))
    got = layer(more, more, more, is_causal=True, cache=cache)[0]
    whole = torch.cat([x[index], more], 1)
    torch.testing.assert_close(got, layer(whole, whole, whole, is_causal=True)[0][:, 4:])
    assert cache.key.shape[0] == len(index) and cache.length == 6


def test_reordering_leaves_earlier_results(backend):
    """The buffer that an earlier step read is not written to, for backward and for the caller."""
    layer = MultiHeadAttention(8, 2, batch_first=True).requires_grad_(False)
    x = torch.randn(2, 4, 8)
    cache = KeyValueCache()
    layer(x, x, x, cache=cache)
    other = copy.deepcopy(cache)
    key = cache.key.clone()
    cache.reorder(torch.tensor([1, 1]))
    layer(x, x, x, cache=cache)
    assert torch.equal(other.key, key) and other.length == 4


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("given", ["memory", "None"])
def test_a_fixed_cache(backend, grad, given):
    """Filled by the first call; later ones read it, whatever key is."""
    layer = MultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64).requires_grad_(grad)
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64)
    pad = torch.arange(6) >= torch.tensor([6, 2])[:, None]
    full, weights = layer(x, memory, memory, pad)
    cache = KeyValueCache(fixed=True)
    assert not cache.complete
    steps = []
    for k in range(3):
        later = (memory, memory) if given == "memory" or k == 0 else (None, None)
        steps.append(layer(x[:, k : k + 1], *later, pad, cache=cache)[:2])
        assert cache.complete and cache.length == 6
    torch.testing.assert_close(torch.cat([s[0] for s in steps], 1), full)
    torch.testing.assert_close(torch.cat([s[1] for s in steps], 1), weights)
    if grad:
        got, expected = (
            torch.autograd.grad(y.square().sum(), list(layer.parameters()))
            for y in (torch.cat([s[0] for s in steps], 1), full)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_fixed_cache_takes_keys_once(backend):
    layer, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    cache = KeyValueCache(fixed=True)
    first = layer(x, x, x, cache=cache)[0]
    again = layer(x, x, x, cache=cache)[0]
    assert cache.length == 3
    torch.testing.assert_close(again, first)


def test_gradients_of_queries_alone_through_a_cache(backend):
    """Nothing that an earlier step saved for backward is overwritten when keys are appended."""
    layer = MultiHeadAttention(8, 2, batch_first=True).requires_grad_(False)
    x, q = torch.randn(2, 4, 8), torch.randn(2, 4, 8, requires_grad=True)
    cache = KeyValueCache()
    steps = [
        layer(q[:, k : k + 1], x[:, k : k + 1], x[:, k : k + 1], is_causal=True, cache=cache)[0]
        for k in range(4)
    ]
    (got,) = torch.autograd.grad(torch.cat(steps, 1).square().sum(), q)
    (expected,) = torch.autograd.grad(layer(q, x, x, is_causal=True)[0].square().sum(), q)
    torch.testing.assert_close(got, expected)


def test_prefill_without_and_steps_with_gradients(backend):
    layer = MultiHeadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    cache = KeyValueCache()
    with torch.no_grad():
        layer(x[:, :2], x[:, :2], x[:, :2], is_causal=True, cache=cache)
    first = layer(x[:, 2:3], x[:, 2:3], x[:, 2:3], is_causal=True, cache=cache)[0]
    with torch.no_grad():
        second = layer(x[:, 3:4], x[:, 3:4], x[:, 3:4], is_causal=True, cache=cache)[0]
    third = layer(x[:, 4:], x[:, 4:], x[:, 4:], is_causal=True, cache=cache)[0]
    full = layer(x, x, x, is_causal=True)[0]
    torch.testing.assert_close(torch.cat([first, second, third], 1), full[:, 2:])
    (first.sum() + third.sum()).backward()
    assert layer.in_proj_weight.grad.isfinite().all()


def test_inference_mode_and_then_not(backend):
    layer, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)
    cache = KeyValueCache()
    with torch.inference_mode():
        layer(x[:, :2], x[:, :2], x[:, :2], is_causal=True, cache=cache)
        layer(x[:, 2:3], x[:, 2:3], x[:, 2:3], is_causal=True, cache=cache)
    with torch.no_grad():
        got = layer(x[:, 3:], x[:, 3:], x[:, 3:], is_causal=True, cache=cache)[0]
    torch.testing.assert_close(got, layer(x, x, x, is_causal=True)[0][:, 3:])


def test_nan_in_a_fixed_caches_padding(backend):
    layer = MultiHeadAttention(8, 2, batch_first=True)
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    pad = torch.arange(6) >= torch.tensor([6, 2])[:, None]
    memory[pad] = NAN
    out = layer(x, memory, memory, pad, cache=KeyValueCache(fixed=True))[0]
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        (3, {}),
        (1, {}),
        (2, {"num_heads": 4}),
        (2, {"num_heads": 1}),
        (2, {"num_kv_heads": 1}),
        (2, {"embed_dim": 16}),
    ],
    ids=str,
)
def test_a_cache_that_does_not_fit(backend, fixed, other):
    """Of another batch, number of heads or head dim."""
    B, options = other
    options = dict(embed_dim=8, num_heads=2) | options
    cache = KeyValueCache(fixed)
    first, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    memory = torch.randn(2, 6, 8)
    first(x, memory, memory, cache=cache)
    layer = MultiHeadAttention(**options, batch_first=True)
    x = torch.randn(B, 3, layer.embed_dim)
    with pytest.raises(ValueError, match="cache: expected"):
        layer(x, x, x.clone(), cache=cache)
    assert cache.length == 6, "nothing was appended"


def test_an_empty_cache_and_no_key(backend):
    with pytest.raises((ValueError, AssertionError), match=r"cache|key"):
        MultiHeadAttention(8, 2)(X, None, None, cache=KeyValueCache(fixed=True))
    with pytest.raises((ValueError, AssertionError), match=r"cache|key"):
        MultiHeadAttention(8, 2)(X, None, None, cache=KeyValueCache())


@pytest.mark.parametrize("index", [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor(0)])
def test_a_wrong_order_of_beams(index):
    cache = KeyValueCache()
    cache.update(torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4))
    with pytest.raises(ValueError, match="index: expected"):
        cache.reorder(index)


def test_repr_and_properties_of_a_cache():
    cache = KeyValueCache()
    assert cache.key is None and cache.value is None and cache.length == 0
    assert repr(cache) == "KeyValueCache(fixed=False, key=None)"
    cache.reorder(torch.tensor([0]))  # of nothing: nothing
    cache.update(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    assert repr(cache) == "KeyValueCache(fixed=False, key=(2, 1, 3, 4))"
