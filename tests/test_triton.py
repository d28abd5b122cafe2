"""The Triton attention kernels: values and every gradient against the eager formula in float64.

Without a CUDA device they run in Triton's interpreter, which must be chosen before Triton is first imported;
with one, the same tests run there, compiled (marker gpu). The rule is compare.py's, beside the eager formula
in the same dtype. Whatever is padding is NaN in every case.
"""

# ruff: noqa: E402 (the interpreter is chosen before what needs it is imported)

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and type(triton.language.sum).__name__ != "InterpretedFunction":
    why = "no CUDA device, and Triton was imported (by torch._dynamo?) before TRITON_INTERPRET=1 was set"
    pytest.skip(why, allow_module_level=True)

from cases import SHORT, pairwise
from compare import agree, poisoned, same_bits, within

import seqkern
from seqkern.reference.attention import attention, dropout_keep
from seqkern.triton import attention as triton_attention
from seqkern.triton import (
    attention_backward,
    attention_forward,
    attention_weights,
    backward,
    config,
    forward,
    tiles,
)
from seqkern.triton.config import Config

DEVICE = "cpu" if triton_attention.INTERPRET else "cuda"
KERNELS = ("forward", "weights", "delta", "dkdv", "dq", "dbias")
HALF = (torch.float16, torch.bfloat16)


# On a CUDA device the same tests run there, compiled.
interpreted = pytest.mark.skipif(False, reason="") if DEVICE == "cpu" else pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    """One attention problem. `window`: (left, right); `keys`, `queries`: what is padding; `bias`: 'add' or
    'bool' and
    the dimensions of B, N, L, S that it has in full; `weights`: of which a gradient comes in; `tile`: queries
    by keys."""

    B: int = 2
    N: int = 2
    Nk: int = 2
    L: int = 17
    S: int = 33
    E: int = 16
    Ev: int = 16
    dtype: torch.dtype = torch.float32
    window: tuple[int, int] = (-1, -1)
    bottom_right: bool = False
    keys: str = "all"
    queries: str = "all"
    bias: str = ""
    dropout: float = 0.0
    weights: str = ""
    dlse: bool = False
    strided: bool = False
    scale: float = 0.25
    tile: tuple[int, int] = (32, 32)
    seed: int = 0

    def __str__(self) -> str:
        words = [
            f"B{self.B}",
            f"N{self.N}",
            f"Nk{self.Nk}",
            f"L{self.L}",
            f"S{self.S}",
            f"E{self.E}",
            f"Ev{self.Ev}",
        ]
        words += [SHORT[self.dtype], f"window{self.window[0]}.{self.window[1]}"]
        words += ["br"] * self.bottom_right + [f"keys.{self.keys}"] * (self.keys != "all")
        words += [f"queries.{self.queries}"] * (self.queries != "all") + [f"bias.{self.bias}"] * bool(
            self.bias
        )
        words += [f"p{self.dropout}"] * (self.dropout > 0) + [f"weights.{self.weights}"] * bool(self.weights)
        words += ["dlse"] * self.dlse + ["strided"] * self.strided + [f"tile{self.tile[0]}x{self.tile[1]}"]
        words += [f"scale{self.scale}"] * (self.scale != 0.25)
        return "-".join(words)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1)


def padding(kind: str, B: int, rows: int, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """(valid, lengths), at most one of them; row 0 keeps something, the last row of 'lengths' and 'holes'
    nothing."""
    if kind == "all":
        return None, None
    lengths = torch.randint(0, rows + 1, (B,), generator=generator)
    lengths[0] = max(1, rows - 3)
    if kind == "lengths":
        lengths[-1] = 0 if B > 2 else lengths[-1]
        return None, lengths
    ahead = torch.arange(rows)[None] < lengths[:, None]
    if kind == "right":
        return ahead, None
    if kind == "left":
        return ahead.flip(1), None
    holes = torch.rand(B, rows, generator=generator) < 0.6
    holes[:, rows // 3 : rows // 3 + 16] = False  # with tiles of 16, sometimes a whole one
    holes[0, -1] = True
    if B > 2:
        holes[-1] = False
    return holes, None


@dataclass
class Problem:
    """Tensors of a case: arguments in the operators' order, cotangents, and the same with padding zeroed for
    the oracle."""

    case: Case
    args: tuple[Any, ...]
    key_valid: Tensor | None  # for the oracle: also from lengths
    query_valid: Tensor | None
    offset: Tensor | int
    dout: Tensor
    dlse: Tensor | None
    dw: Tensor | None


def spread(x: Tensor) -> Tensor:
    """The same values, every second row and head of a larger memory; the last dimension is left alone."""
    big = torch.full((*(2 * size for size in x.shape[:-1]), x.shape[-1] + 8), torch.nan).to(x)
    view = big[tuple(slice(None, None, 2) for _ in x.shape[:-1])][..., : x.shape[-1]]
    return view.copy_(x)


def make(case: Case, device: str = DEVICE) -> Problem:
    c, g = case, case.generator()

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64).to(c.dtype)
        return spread(x) if c.strided else x

    q, k, v = normal(c.B, c.N, c.L, c.E), normal(c.B, c.Nk, c.S, c.E), normal(c.B, c.Nk, c.S, c.Ev)
    if c.strided:  # and a last dimension that is not contiguous
        v = v.transpose(2, 3).contiguous().transpose(2, 3)
    key_valid, key_lengths = padding(c.keys, c.B, c.S, g)
    query_valid, query_lengths = padding(c.queries, c.B, c.L, g)
    key_real = key_valid if key_lengths is None else torch.arange(c.S) < key_lengths[:, None]
    query_real = query_valid if query_lengths is None else torch.arange(c.L) < query_lengths[:, None]
    bias = None
    if c.bias:
        kind, dims = c.bias.split(".")
        shape = [size if d in dims else 1 for d, size in zip("BNLS", (c.B, c.N, c.L, c.S), strict=True)]
        if kind == "bool":
            bias = torch.rand(shape, generator=g) < 0.7
        else:
            bias = torch.randn(shape, generator=g, dtype=torch.float64).to(c.dtype)
            bias = (
                torch.where(torch.rand(shape, generator=g) < 0.1, -torch.inf, bias).to(c.dtype)
                if "L" in dims
                else bias
            )
    dout = normal(c.B, c.N, c.L, c.Ev)
    accumulator = torch.float64 if c.dtype is torch.float64 else torch.float32
    dlse = torch.randn(c.B, c.N, c.L, generator=g).to(accumulator) if c.dlse else None
    dw = None
    if c.weights:
        dw = normal(*((c.B, c.L, c.S) if c.weights == "average" else (c.B, c.N, c.L, c.S)))
    if key_real is not None:
        for x in (k, v):
            x.masked_fill_(~key_real[:, None, :, None], torch.nan)
        if dw is not None:
            dw.masked_fill_(~(key_real[:, None] if dw.dim() == 3 else key_real[:, None, None]), torch.nan)
    if query_real is not None:
        for x in (q, dout):
            x.masked_fill_(~query_real[:, None, :, None], torch.nan)
        if dlse is not None:
            dlse.masked_fill_(~query_real[:, None], torch.nan)
        if dw is not None:
            dw.masked_fill_(
                ~(query_real[:, :, None] if dw.dim() == 3 else query_real[:, None, :, None]), torch.nan
            )
    offset: Tensor | int = 0
    if c.bottom_right:
        S = torch.full((c.B,), c.S) if key_lengths is None else key_lengths
        L = torch.full((c.B,), c.L) if query_lengths is None else query_lengths
        offset = S - L
    seed = torch.randint(-(2**62), 2**62, (1,), generator=g) if c.dropout else None
    moved = [
        None if x is None else x if device == "cpu" else x.to(device)
        for x in (q, k, v, bias, key_valid, key_lengths, query_valid, query_lengths, None, None)
    ]
    args = (
        *moved,
        0,
        0,
        None if seed is None else seed.to(device),
        c.scale,
        *c.window,
        c.bottom_right,
        c.dropout,
    )
    rest = [
        x if x is None or isinstance(x, int) else x.to(device)
        for x in (key_real, query_real, offset, dout, dlse, dw)
    ]
    return Problem(c, args, *rest)


def run_kernels(p: Problem) -> dict[str, Tensor]:
    """All that the launchers give, by name."""
    c, (q, k, _, bias, *_) = p.case, p.args
    tile = Config(*c.tile)
    with config.override(**(dict.fromkeys(KERNELS, tile) if DEVICE == "cpu" else {})), poisoned():
        out, lse = attention_forward(*p.args)
        results = {"out": out, "lse": lse}
        average = c.weights != "head"
        if c.weights:
            results["weights"] = attention_weights(q, k, *p.args[3:], lse, average)
        added = bias is not None and bias.dtype is not torch.bool
        grads = attention_backward(p.dout, p.dlse, p.dw, average, out, lse, *p.args, True, True, True, added)
    results |= dict(zip(("dq", "dk", "dv"), grads, strict=False))
    if added:
        results["dbias"] = grads[3]
    else:
        assert grads[3].shape == (0,)
    return results


def run_eager(
    p: Problem, dtype: torch.dtype, nudge: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The same by the eager formula in dtype and autograd."""
    c, (q, k, v, bias, *_) = p.case, p.args
    nudge = nudge or (lambda x: x)
    inputs = [nudge(x.detach()).to(dtype).requires_grad_() for x in (q, k, v)]
    if bias is not None and bias.dtype is not torch.bool:
        inputs.append(nudge(bias).to(dtype).requires_grad_())
        bias = inputs[3]
    out, lse, weights = attention(
        *inputs[:3], bias, p.key_valid, p.query_valid, scale=c.scale, left=c.window[0], right=c.window[1],
        offset=p.offset, dropout_p=c.dropout, seed=p.args[12],
    )  # fmt: skip
    results, cotangents = {"out": out, "lse": lse}, {"out": p.dout.to(dtype).nan_to_num(0)}
    if c.dlse:
        finite = torch.isfinite(lse)
        cotangents["lse"] = torch.where(finite, p.dlse.nan_to_num(0), 0).to(dtype)
    if c.weights:
        results["weights"] = weights.mean(1) if c.weights == "average" else weights
        cotangents["weights"] = p.dw.to(dtype).nan_to_num(0)
    grads = torch.autograd.grad([results[name] for name in cotangents], inputs, list(cotangents.values()))
    results |= dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False))
    if dtype is not torch.float64:
        results["lse"] = results["lse"].float()
    return {name: x.detach() for name, x in results.items()}


def errors_nearby(p: Problem) -> dict[str, float]:
    """The eager formula's largest errors at inputs an ulp away (compare.errors_nearby)."""
    dtype = p.case.dtype
    working = torch.float32 if dtype is torch.float64 else dtype
    eps = torch.finfo(working).eps
    largest: dict[str, float] = {}
    for seed in range(8):
        nudges = {}

        def nudge(x: Tensor, seed: int = seed, nudges: dict = nudges) -> Tensor:
            g = torch.Generator().manual_seed(100 * seed + len(nudges))
            signs = torch.randint(0, 2, x.shape, generator=g).to(x.device) * 2.0 - 1
            nudges[len(nudges)] = x
            return (x.double() * (1 + signs.double() * eps)).to(working)

        got = run_eager(p, working, nudge)
        nudges.clear()
        exact = run_eager(p, torch.float64, nudge)
        for name, x in got.items():
            error = (x.double() - exact[name]).nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0
            largest[name] = max(largest.get(name, 0.0), error * torch.finfo(dtype).eps / eps)
    return largest


def cancelling_terms(p: Problem) -> dict[str, float]:
    """How large the terms are that make up dq, dk and dbias, for where they add up to nothing."""
    c = p.case
    q, k, v, dout, dw = (0.0 if x is None or x.numel() == 0 else x.double().nan_to_num(0).abs().max().item()
                         for x in (*p.args[:3], p.dout, p.dw))  # fmt: skip
    dp = (dout * v * c.Ev**0.5 + dw) / (1 - c.dropout)
    return {"dq": abs(c.scale) * dp * k, "dk": abs(c.scale) * dp * q * c.L**0.5, "dbias": dp * c.L**0.5}


def check(case: Case) -> dict[str, Tensor]:
    if DEVICE != "cpu" and case.dtype is torch.float64:
        pytest.skip("float64 runs in the interpreter only")
    p = make(case)
    got = run_kernels(p)
    peer, oracle = run_eager(p, case.dtype), run_eager(p, torch.float64)
    empty = oracle["lse"] == -torch.inf
    assert torch.equal(got["lse"] == -torch.inf, empty), f"{case}: which rows are empty"
    for results in (got, peer, oracle):
        results["lse"] = torch.where(empty, 0, results["lse"])
    assert not got["out"].masked_select(empty[..., None]).any(), f"{case}: out of empty rows"
    assert not got["dq"].masked_select(empty[..., None]).any(), f"{case}: dq of empty rows"
    ulp = torch.finfo(case.dtype).eps * 4
    for name, terms in cancelling_terms(p).items():
        if (
            name in got and oracle[name].abs().max() < 1e-6 * terms
        ):  # a softmax of one score, a bias over all keys
            assert got[name].double().abs().max() <= ulp * terms, (
                f"{case}: {name} {got[name].abs().max()} of {terms}"
            )
            for results in (got, peer, oracle):
                results[name] = torch.zeros_like(results[name])
    if case.dtype is torch.float64:  # for gradcheck only: no peer is less exact than the oracle
        agree(got, oracle, 1e-13, case)
    else:
        within(got, peer, oracle, case, lambda: errors_nearby(p))
    return got


# ---- values ------------------------------------------------------------------------------------------------

ROWS = (1, 15, 17, 33, 47)
OPTIONS: dict[str, tuple[Any, ...]] = dict(
    dtype=(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    heads=((2, 2), (2, 1), (4, 2)),
    L=ROWS,
    S=ROWS,
    dims=((8, 8), (16, 16), (40, 16), (16, 72), (96, 20)),
    window=((-1, -1), (-1, 0), (3, -1), (9, 4)),
    bottom_right=(False, True),
    keys=("all", "lengths", "right", "left", "holes"),
    queries=("all", "lengths", "left", "holes"),
    bias=("", "bool.LS", "bool.BS", "add.BNLS", "add.NLS", "add.BS", "add.L"),
    dropout=(0.0, 0.25),
    weights=("", "average", "head"),
    dlse=(False, True),
    strided=(False, True),
    tile=((32, 32), (32, 16), (16, 32), (16, 64)),
)


def from_row(row: dict[str, Any], seed: int) -> Case:
    row = dict(row)
    (N, Nk), (E, Ev) = row.pop("heads"), row.pop("dims")
    if row["dtype"] is torch.float64:  # kernels take their scalars, here 1 / (1 - p), as float32
        row["dropout"] = 2 * row["dropout"]
    if row["S"] == 1:  # a gradient of lse would make all others a small rest of large terms
        row["dlse"] = False
    return Case(B=2, N=N, Nk=Nk, E=E, Ev=Ev, seed=seed, **row)


CASES = [from_row(row, i) for i, row in enumerate(pairwise(OPTIONS))]


@interpreted
@pytest.mark.parametrize("case", CASES[:20], ids=str)
def test_values(case: Case) -> None:
    """The first, richest rows of the pairs of options, at small sizes; the others are slow."""
    check(case)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    CASES[20:]
    + [from_row(row, 1000 * s + i) for s in range(1, 7) for i, row in enumerate(pairwise(OPTIONS, s))],
    ids=str,
)
def test_values_wide(case: Case) -> None:
    check(case)


DIMS = (
    (8, 8),
    (16, 40),
    (40, 16),
    (64, 64),
    (72, 8),
    (80, 80),
    (96, 64),
    (100, 16),
    (128, 128),
    (256, 256),
    (1, 3),
    (160, 192),
)


@interpreted
@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: f"E{dims[0]}-Ev{dims[1]}")
def test_head_dims(dims: tuple[int, int]) -> None:
    """Columns in one block or two, padded or not."""
    check(Case(B=1, L=17, S=19, N=2, Nk=1, E=dims[0], Ev=dims[1], weights="average"))


SIZES = ((1, 129), (129, 1), (63, 192), (129, 65), (192, 64))


@interpreted
@pytest.mark.parametrize("L, S", SIZES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_sizes(L: int, S: int, causal: bool) -> None:
    """Several tiles, with and without a tail; L % 128 == 64; L != S."""
    check(Case(B=1, N=1, Nk=1, L=L, S=S, E=16, Ev=16, window=(-1, 0 if causal else -1), tile=(64, 64)))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=SHORT.get)
@pytest.mark.parametrize("keys", ["all", "lengths", "left", "holes"])
@pytest.mark.parametrize("tile", [(64, 32), (32, 64), (128, 64)])
@pytest.mark.parametrize("L, S", SIZES)
def test_sizes_wide(L: int, S: int, tile: tuple[int, int], keys: str, dtype: torch.dtype) -> None:
    check(
        Case(
            N=1,
            Nk=1,
            L=L,
            S=S,
            E=16,
            Ev=16,
            window=(-1, 0),
            tile=tile,
            keys=keys,
            dtype=dtype,
            weights="average",
        )
    )


@interpreted
@pytest.mark.parametrize(
    "dims",
    ["".join(d for d, on in zip("BNLS", full, strict=True) if on) for full in product((0, 1), repeat=4)],
)
def test_dbias_broadcast(dims: str) -> None:
    """The bias' gradient, summed over every set of dimensions."""
    check(
        Case(
            L=17,
            S=19,
            bias=f"add.{dims}",
            E=8,
            Ev=8,
            N=2,
            Nk=1,
            tile=(16, 16) if "L" in dims and "S" in dims else (32, 32),
        )
    )


# ---- padding -----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("S", [1, 31, 64, 300])
def test_key_tiles(S: int, block: int) -> None:
    """The lists of tiles that hold some, only, or not only valid rows, and their running counts."""
    valid = torch.rand(3, S) < 0.97
    valid[0, : S // 2] = False
    valid[1] = False
    T = triton.cdiv(S, block)
    got = torch.full((3, 5, T + 1), -7, dtype=torch.int32, device=DEVICE)
    rows = valid.to(torch.uint8).to(DEVICE)
    tiles.key_tiles_kernel[(3,)](rows, got, S, T, BLOCK=block, CHUNK=4)
    for b in range(3):
        states = [valid[b, t * block : (t + 1) * block] for t in range(T)]
        some = [t for t in range(T) if states[t].any()]
        full = [t for t in range(T) if states[t].all() and len(states[t]) == block]
        part = [t for t in some if t not in full]
        counts = [[sum(t < end for t in chosen) for end in range(T + 1)] for chosen in (some, full)]
        assert got[b, :2].tolist() == counts
        for place, chosen in zip((2, 3, 4), (some, full, part), strict=True):
            assert got[b, place].tolist()[: len(chosen)] == chosen


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter calls")
def test_only_tiles_with_work_are_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, dq and dkdv visit a pair of tiles if the window lets it and each holds a valid row."""
    B, L, S, block = 2, 80, 96, 16
    key_valid, query_valid = torch.zeros(B, S, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)
    key_valid[0, 3:20], key_valid[0, 70:], key_valid[1, 32:48] = True, True, True
    query_valid[0, :50], query_valid[1, 64:] = True, True
    tile_pairs = {
        (b, l_0, s_0)
        for b, l_0, s_0 in product(range(B), range(0, L, block), range(0, S, block))
        if s_0 < l_0 + block
        and query_valid[b, l_0 : l_0 + block].any()
        and key_valid[b, s_0 : s_0 + block].any()
    }
    visits = 0
    pick_tile = tiles.pick_tile

    def counting(*args: Any) -> Any:
        nonlocal visits
        visits += 1
        return pick_tile(*args)

    for module in (forward, backward):
        monkeypatch.setattr(module, "pick_tile", counting)
    q, k = torch.randn(B, 1, L, 16), torch.randn(B, 1, S, 16)
    args = (
        q,
        k,
        k,
        None,
        key_valid,
        None,
        query_valid,
        None,
        None,
        None,
        0,
        0,
        None,
        0.25,
        -1,
        0,
        False,
        0.0,
    )
    with config.override(**dict.fromkeys(KERNELS, Config(block, block))):
        out, lse = attention_forward(*args)
        assert visits == len(tile_pairs)
        visits = 0
        attention_backward(out, None, None, False, out, lse, *args, True, False, False, False)
        assert visits == len(tile_pairs)
        visits = 0
        attention_backward(out, None, None, False, out, lse, *args, False, True, True, False)
        assert visits == len(tile_pairs)


@interpreted
@pytest.mark.parametrize("keys, queries", [("holes", "all"), ("lengths", "lengths"), ("left", "holes")])
def test_empty_rows(keys: str, queries: str) -> None:
    """A sequence without any key: zeros everywhere, and no NaN comes out of padding (check's cases are full
    of it)."""
    case = Case(
        B=3, N=1, Nk=1, L=9, S=21, keys=keys, queries=queries, weights="average", dlse=True, tile=(16, 16)
    )
    got = check(case)
    if keys != "left":
        for name in ("out", "weights", "dq", "dk", "dv"):
            assert not got[name][-1].any(), name


# ---- dropout -----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_eager_mask(p: float) -> None:
    B, N, L, S = 2, 2, 19, 45
    q, k = torch.zeros(B, N, L, 16, device=DEVICE), torch.zeros(B, N, S, 16, device=DEVICE)
    seed = torch.tensor([-(2**40) - 12345], device=DEVICE)
    args = (q, k, k, *[None] * 7, 0, 0, seed, 1.0, -1, -1, False, p)
    out, lse = attention_forward(*args)
    w = attention_weights(q, k, *args[3:], lse, False)
    keep = dropout_keep(seed, p, (B, N, L, S))
    factor = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(w, keep * factor / S, atol=0, rtol=1e-5)
    assert not out.any()


# ---- packed ------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    "window, bottom_right, dropout", [((-1, -1), False, 0.25), ((-1, 0), True, 0.0), ((5, 2), True, 0.25)]
)
def test_packed(window: tuple[int, int], bottom_right: bool, dropout: float) -> None:
    """Sequences end to end, some empty: as padded ones by lengths, with equal dropout, and rows that nobody
    owns zero."""
    lengths_q, lengths_k = [17, 0, 5, 33], [20, 7, 0, 35]
    base = Case(
        B=4, N=2, Nk=1, L=33, S=35, window=window, bottom_right=bottom_right, dropout=dropout, dlse=True
    )
    p = make(base)
    Lq, Lk = torch.tensor(lengths_q), torch.tensor(lengths_k)
    p.args = (*p.args[:5], Lk.to(DEVICE), None, Lq.to(DEVICE), *p.args[8:])
    q, k, v = p.args[:3]
    dout, dlse = p.dout, p.dlse
    expected = run_kernels(p)

    def pack(x: Tensor, lengths: list[int]) -> Tensor:
        rows = [x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]
        return torch.cat([*rows, x.new_full((3, *rows[0].shape[1:]), torch.nan)])

    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], device=DEVICE) for n in (lengths_q, lengths_k)
    )
    packed = (pack(q, lengths_q), pack(k, lengths_k), pack(v, lengths_k))
    args = (*packed, *[None] * 5, cu_q.int(), cu_k, 33, 35, *p.args[12:])
    flat_dlse = torch.cat([*(dlse[b, :, :n] for b, n in enumerate(lengths_q)), dlse.new_zeros(2, 3)], 1)
    with poisoned():
        out, lse = attention_forward(*args)
        grads = attention_backward(
            pack(dout, lengths_q), flat_dlse, None, False, out, lse, *args, True, True, True, False
        )
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse.transpose(0, 1), *grads), strict=False))
    for name, x in got.items():
        lengths = lengths_k if name in ("dk", "dv") else lengths_q
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        assert not x[starts[-1] :].nan_to_num(neginf=0).any(), f"{name}: rows beyond the last sequence"
        for b, n in enumerate(lengths):
            ours, theirs = x[starts[b] : starts[b] + n], expected[name][b, :, :n].transpose(0, 1)
            torch.testing.assert_close(
                ours, theirs, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


# ---- the rest ----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_same_bits(dtype: torch.dtype) -> None:
    case = Case(
        N=4, Nk=2, keys="holes", bias="add.LS", dropout=0.25, weights="average", dlse=True, dtype=dtype, B=1
    )
    p = make(case)
    same_bits(run_kernels(p), run_kernels(p), case)


@interpreted
def test_negative_scale() -> None:
    check(Case(scale=-0.5, window=(-1, 0)))


class Attention(torch.autograd.Function):
    """(q, k, v, bias) -> out, lse, averaged weights, on the kernels."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rest: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        out, lse = attention_forward(q, k, v, bias, *rest)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.rest = rest
        return out, lse, attention_weights(q, k, bias, *rest, lse, True)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        dout, dlse, dw = cotangents
        problem = (q, k, v, bias, *ctx.rest)
        return *attention_backward(dout, dlse, dw, True, out, lse, *problem, True, True, True, True), None


@interpreted
@pytest.mark.skipif(DEVICE != "cpu", reason="float64 runs in the interpreter only")
def test_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 3, 2), (1, 1, 5, 2), (1, 1, 5, 2), (1, 1, 3, 5))
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]
    valid = torch.tensor([[True, False, True, True, True]])
    rest = (valid, *[None] * 5, 0, 0, torch.tensor([5]), 0.5, -1, 1, False, 0.5)
    assert torch.autograd.gradcheck(lambda *x: Attention.apply(*x, rest), inputs, fast_mode=True)


@interpreted
def test_needed_gradients_only() -> None:
    p = make(Case(L=5, S=6, bias="add.LS"))
    out, lse = attention_forward(*p.args)
    whole = attention_backward(p.dout, None, None, False, out, lse, *p.args, True, True, True, True)
    for needs in (
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, False),
        (False, False, False, True),
    ):
        part = attention_backward(p.dout, None, None, False, out, lse, *p.args, *needs)
        for need, x, x_ in zip(needs, part, whole, strict=True):
            assert torch.equal(x, x_) if need else x.shape == (0,)


@interpreted
@pytest.mark.parametrize("B, L, S", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing(B: int, L: int, S: int) -> None:
    p = make(Case(B=2, L=L, S=S))
    args = (*(x[:B] for x in p.args[:3]), *p.args[3:])
    out, lse = attention_forward(*args)
    w = attention_weights(*args[:2], *args[3:], lse, True)
    assert out.shape == (B, 2, L, 16) and not out.any()
    assert lse.shape == (B, 2, L) and (lse == -torch.inf).all()
    assert w.shape == (B, L, S)
    for x, dx in zip(
        args, attention_backward(out, lse, w, True, out, lse, *args, True, True, True, False), strict=False
    ):
        assert dx.shape == (0,) if dx.dim() == 1 else dx.shape == x.shape and not dx.any()


def far_apart(shape: tuple[int, ...], stride: int, first: int, memory: Tensor) -> Tensor:
    """[..., rows, columns] random, in `memory` with rows `stride` elements apart."""
    view = memory.as_strided(shape, (*[shape[-1]] * (len(shape) - 2), stride, 1), first)
    return view.copy_(torch.randn(shape).to(memory.dtype))


@interpreted
def test_strides_beyond_int32() -> None:
    """Rows 2^30 elements apart: the third begins where int32 ends. The memory is reserved, hardly any is
    touched."""
    stride = 2**30
    memory = torch.empty(2 * stride + 4096, dtype=torch.float16, device=DEVICE)
    q, k, v, dout = (far_apart((1, 1, 3, 16), stride, 64 * i, memory) for i in range(4))
    bias = far_apart((1, 1, 3, 3), stride, 1024, memory)
    dw = far_apart((1, 3, 3), stride, 2048, memory)
    args = (q, k, v, bias, *[None] * 6, 0, 0, None, 0.25, -1, -1, False, 0.0)
    near = (*(x.contiguous() for x in args[:4]), *args[4:])
    results = []
    for problem, cotangents in ((args, (dout, None, dw)), (near, (dout.contiguous(), None, dw.contiguous()))):
        out, lse = attention_forward(*problem)
        w = attention_weights(*problem[:2], *problem[3:], lse, True)
        grads = attention_backward(*cotangents, True, out, lse, *problem, True, True, True, True)
        results.append(
            dict(zip(("out", "lse", "w", "dq", "dk", "dv", "dbias"), (out, lse, w, *grads), strict=True))
        )
    same_bits(*results, "far apart")


@interpreted
def test_more_keys_than_65536() -> None:
    S = 66000
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 1, S, 16), torch.randn(1, 1, S, 16)
    k, v = k.to(torch.float16).to(DEVICE), v.to(torch.float16).to(DEVICE)
    q = q.to(k)
    with config.override(forward=Config(16, 4096) if DEVICE == "cpu" else config.INTERPRETER):
        out, lse = attention_forward(q, k, v, *[None] * 7, 0, 0, None, 1.0, 65530, 65540, False, 0.0)
    expected, lse_, _ = attention(q.double(), k.double(), v.double(), scale=1.0, left=65530, right=65540)
    torch.testing.assert_close(out.double(), expected, atol=2e-4, rtol=1e-2)
    torch.testing.assert_close(lse.double(), lse_, atol=1e-4, rtol=1e-4)


def test_head_dim_too_large() -> None:
    x = torch.zeros(1, 1, 2, 257)
    with pytest.raises(ValueError, match="head_dim <= 256, got 257"):
        attention_forward(x, x, x, *[None] * 7, 0, 0, None, 1.0, -1, -1, False, 0.0)


# ---- config ------------------------------------------------------------------------------------------------


def test_every_lookup_has_an_answer() -> None:
    for arch, kernel, kind, bits in product((80, 90, 100, 0), config.KERNELS, config.KINDS, (16, 32)):
        for head_dim in (1, 16, 33, 64, 65, 96, 100, 128, 129, 256):
            found = config.from_table(kernel, arch, head_dim, bits, kind)
            assert found.BLOCK_L >= 16 and found.BLOCK_S >= 16, (arch, kernel, kind, bits, head_dim)


def test_stored_configs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tune stores, later lookups on the same GPU find, and on no other; a broken file only warns."""
    path, found = tmp_path / "below" / "attention.json", Config(32, 128, 8, 4)
    gpu, device = torch.cuda, torch.device("cuda", 0)
    monkeypatch.setattr(config, "INTERPRET", False)
    monkeypatch.setattr(config, "machine", lambda device: 90)
    monkeypatch.setattr(gpu, "get_device_name", lambda device: "Some GPU")
    line = config.key("dq", "Some GPU", 64, 16, "plain")
    config.store(path, {line: dict(config=vars(found), ms=1.0)})
    config.store(path, {config.key("dq", "Other GPU", 64, 16, "plain"): dict(config=vars(Config(16, 16)))})
    try:
        config.use_tuned(path)
        assert config.lookup("dq", device, 48, torch.bfloat16, "plain") == found
        table = config.TABLE[90, 16]
        assert config.lookup("dq", device, 128, torch.bfloat16, "plain") == table["dq"][128]
        assert config.lookup("forward", device, 48, torch.bfloat16, "plain") == table["forward"][64]
        with config.override(dq=Config(16, 32)):
            assert config.lookup("dq", device, 48, torch.bfloat16, "plain") == Config(16, 32)
        path.write_text("{]")
        config.use_tuned(path)
        with pytest.warns(UserWarning, match="cannot be read"):
            assert config.lookup("dq", device, 48, torch.bfloat16, "plain") == table["dq"][96]
    finally:
        config.use_tuned(None)


def test_search_drops_wrong_values() -> None:
    """The fastest config is one whose values agree with the table's; those that raise fall out."""
    first, fast, wrong, broken = (Config(16, 16, 4, stages) for stages in (1, 2, 3, 4))
    milliseconds = {first: 3.0, fast: 2.0, wrong: 1.0, broken: 0.5}

    def now() -> Config:
        return config.lookup("dq", torch.device("cpu"), 64, torch.float32, "plain")

    def run() -> list[Tensor]:
        if now() == broken:
            raise RuntimeError("out of resource: shared memory")
        return [torch.tensor([1.0, -torch.inf, 1.5 if now() == wrong else 2.0])]

    winner, times = config.search(
        "dq", run, first, [fast, wrong, broken], 1e-2, lambda run: milliseconds[now()]
    )
    assert winner == fast and set(times) == {first, fast}


@interpreted
@pytest.mark.parametrize("padding, bias, dropout_p", [(None, False, 0.0), (0.5, True, 0.1)])
def test_tuned_problems_run(padding: float | None, bias: bool, dropout_p: float) -> None:
    device = torch.device(DEVICE)
    problem = config.make_problem(
        2, 2, 9, 16, 1, 11, 8, torch.float32, True, padding, bias, dropout_p, device
    )
    out, lse = attention_forward(*problem)
    assert torch.isfinite(out).all() and torch.isfinite(lse).any()


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a CUDA device")
def test_tune_needs_a_device() -> None:
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        config.tune(2, 4, 128, 64)


# ---- on a CUDA device --------------------------------------------------------------------------------------

LARGE = (
    Case(B=2, N=8, Nk=2, L=1000, S=1000, E=64, Ev=64, window=(-1, 0), keys="right", queries="right"),
    Case(B=3, N=4, Nk=4, L=513, S=1025, E=128, Ev=128, keys="holes", weights="average", dlse=True),
    Case(B=2, N=4, Nk=1, L=320, S=2048, E=96, Ev=80, window=(200, 100), bottom_right=True, bias="add.NLS"),
    Case(B=2, N=2, Nk=2, L=700, S=448, E=256, Ev=256, keys="lengths", queries="lengths", dropout=0.25),
    Case(B=2, N=4, Nk=4, L=576, S=576, E=72, Ev=40, bias="bool.LS", dropout=0.25, weights="head"),
)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, dtype: torch.dtype) -> None:
    """The table's configs, at sizes of many tiles; and the same bits again."""
    case = replace(case, dtype=dtype)
    got = check(case)
    p = make(case)
    again = run_kernels(p)
    again["lse"] = torch.where(again["lse"] == -torch.inf, 0, again["lse"])
    same_bits(again, {name: got[name] for name in again}, case)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")
def test_tune(tmp_path: Any) -> None:
    try:
        found = config.tune(2, 4, 512, 64, causal=True, kernels=("delta",), path=tmp_path / "tuned.json")
        assert set(found) == {"delta"}
        assert config.lookup("delta", torch.device("cuda", 0), 64, torch.bfloat16, "plain") == found["delta"]
    finally:
        config.use_tuned(None)


# ---- through seqkern's functions and modules ---------------------------------------------------------------


def module_results(layer: torch.nn.Module, x: Tensor, call: Callable) -> list[Tensor]:
    """Outputs, and gradients of x and of every parameter for a fixed cotangent."""
    x = x.detach().requires_grad_()
    outputs = [y for y in call(layer, x) if y is not None]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    grads = torch.autograd.grad(outputs, [x, *layer.parameters()], cotangents)
    return [t.detach() for t in (*outputs, *grads)]


@interpreted
@pytest.mark.parametrize("weights", [None, "average", "head"])
@pytest.mark.parametrize("causal", [False, True])
def test_module(weights: str | None, causal: bool) -> None:
    """MultiHeadAttention on this backend obeys the rule beside torch.nn's, with padding and a causal mask."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True, device=DEVICE)
    ours = seqkern.MultiHeadAttention(24, 3, batch_first=True, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 37, 24, device=DEVICE)
    padding = torch.arange(37, device=DEVICE) >= torch.tensor([37, 1, 20], device=DEVICE)[:, None]
    mask = torch.ones(37, 37, dtype=torch.bool, device=DEVICE).triu(1) if causal else None
    options = {"need_weights": weights is not None, "average_attn_weights": weights == "average"}

    def call_theirs(layer: torch.nn.Module, x: Tensor) -> tuple:
        return layer(x, x, x, key_padding_mask=padding, attn_mask=mask, **options)

    def call_ours(layer: torch.nn.Module, x: Tensor) -> tuple:
        with seqkern.use_backend("triton"):
            return layer(x, x, x, key_padding_mask=padding, is_causal=causal, **options)

    expected = module_results(copy.deepcopy(theirs).double(), x.double(), call_theirs)
    peer = module_results(theirs, x, call_theirs)
    for got, right, their in zip(module_results(ours, x, call_ours), expected, peer, strict=True):
        bound = 2 * (their - right).abs().max() + 4 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (got - right).abs().max() <= bound


@interpreted
def test_dropout_is_that_of_the_other_backends() -> None:
    q, k, v = (torch.randn(2, 2, 19, 16, device=DEVICE) for _ in range(3))

    def attend(backend: str) -> Tensor:
        torch.manual_seed(5)
        return seqkern.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=True, backend=backend)

    torch.testing.assert_close(attend("triton"), attend("eager"))


@interpreted
def test_packed_function() -> None:
    cu = torch.tensor([0, 5, 5, 40], device=DEVICE)
    q, k, v = (torch.randn(40, 2, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    found = []
    for backend in ("triton", "eager"):
        out, lse = seqkern.varlen_attention(q, k, v, cu, is_causal=True, return_lse=True, backend=backend)
        found.append([out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tune_wants_a_device() -> None:
    with pytest.raises(RuntimeError, match="tune: needs a CUDA device"):
        seqkern.tune(1, 1, 16, 16)
