"""scaled_dot_product_attention and varlen_attention: torch's results, masks, padding, dropout, packing."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    PADDING,
    SIZES,
    Case,
    blocks,
    cleaned,
    doubled,
    errors_nearby,
    errors_nearby_named,
    evaluate,
    evaluate_named,
    in_memory,
    math_kernel,
    ours,
    poison,
    sample,
    torch_attention,
    wide,
)
from cases import DTYPES
from compare import ORACLES_AGREE, agree, poisoned, same_bits, within
from torch import Tensor

import seqkern
from seqkern import _extension
from seqkern.ops import _attention
from seqkern.ops.attention import attention
from seqkern.reference import attention as reference
from seqkern.reference._philox import philox
from seqkern.reference.attention import dropout_keep

attend = seqkern.scaled_dot_product_attention
NAN = math.nan


@pytest.fixture(params=["eager", "cpu"])
def backend(request):
    """Both are Python: none needs the compiled extension."""
    with seqkern.use_backend(request.param):
        yield request.param


def check(case: Case, backend: str) -> None:
    """Outputs and gradients obey the rule of compare.py beside torch's; padding holds NaN."""
    tensors, mask = case.tensors(), case.attn_mask()
    allowed, same = case.allowed(), dict(seed=1, rounded=case.dtype)

    def peer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch_attention(q, k, v, mask, allowed, case.scale)

    clean = [*cleaned(case, tensors), mask]
    expected = evaluate(peer, clean, **same)
    with math_kernel():
        second = evaluate(peer, doubled(clean), **same)
    with seqkern.use_backend("eager"):
        oracle = evaluate(ours(case), doubled(clean), **same)
    agree(oracle, second, ORACLES_AGREE, f"{case}: eager float64 (got) against torch float64 (expected)")
    with poisoned():
        got = evaluate(ours(case), [*poison(case, tensors), mask], **same)
    if case.dtype is torch.float64 and case.E >= 64:  # long sums, in which the oracle is rounded as well
        agree(got, second, ORACLES_AGREE, f"{case} {backend}: beside torch float64")
        return
    within(got, expected, oracle, f"{case} {backend}", lambda: errors_nearby(peer, clean))


@pytest.mark.parametrize("case", sample(), ids=str)
def test_parity(backend, case):
    check(case, backend)


@pytest.mark.parametrize("case", blocks(), ids=str)
def test_parity_in_several_blocks(case):
    with seqkern.use_backend("cpu"):
        check(case, "cpu")


def test_parity_finds_the_compiled_backward() -> None:
    """The test below is about gradients that the compiled kernels compute: here they do."""
    if not _extension.AVAILABLE:
        pytest.skip(f"{_extension.WHY_NOT}")
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(q, q, q, torch.randn(5, 5), return_lse=True, backend="cpu")[0].sum().backward()
    assert "seqkern::attention_pieces_backward" in {event.name for event in profile.events()}


@pytest.mark.parametrize("case", [c for c in sample() if c.dtype is not torch.float64], ids=str)
def test_parity_of_the_output_alone(case: Case) -> None:
    """With no gradient into lse and none for the mask, backward is the compiled kernels'."""
    tensors, mask = case.tensors(), case.attn_mask()
    allowed, same = case.allowed(), dict(seed=1, rounded=case.dtype)

    def of(call: Callable) -> Callable:
        def out(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
            wide = doubled([mask])[0] if leaves["q"].dtype is torch.float64 else mask
            return {"out": call(leaves["q"], leaves["k"], leaves["v"], wide)[0]}

        return out

    def peer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch_attention(q, k, v, mask, allowed, case.scale)

    def named(tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip("qkv", tensors, strict=True))

    clean = named(cleaned(case, tensors))
    expected = evaluate_named(of(peer), clean, **same)
    with seqkern.use_backend("eager"):
        oracle = evaluate_named(of(ours(case)), doubled(clean), **same)
    with poisoned(), seqkern.use_backend("cpu"):
        got = evaluate_named(of(ours(case)), named(poison(case, tensors)), **same)
    within(got, expected, oracle, f"{case} cpu", lambda: errors_nearby_named(of(peer), clean))


@pytest.mark.slow
@pytest.mark.parametrize("case", wide(), ids=str)
def test_parity_widely(backend, case):
    check(case, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", [1, 17, 129])
@pytest.mark.parametrize("right", [-1, 0])
def test_dense_on_torchs_fused_kernel(backend, L, right, dtype):
    check(Case(L=L, S=L, E=40, right=right, dtype=dtype), backend)


# ---- shapes ------------------------------------------------------------------------------------------------

MATH_SHAPES = [
    ((5, 4), (7, 4), (7, 3), None),
    ((3, 5, 4), (3, 7, 4), (3, 7, 3), (3, 1, 7)),
    ((3, 5, 4), (1, 7, 4), (3, 7, 4), (5, 7)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (3, 5, 1)),
    ((2, 3, 5, 4), (1, 3, 7, 4), (2, 1, 7, 6), (1,)),
    ((1, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (2, 1, 1, 7)),
    ((2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (7,)),
    ((2, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4), ()),
    ((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), (2, 3, 2, 7, 4), (5, 7)),
    ((2, 3, 2, 5, 4), (2, 1, 2, 7, 4), (1, 3, 2, 7, 4), (2, 3, 2, 5, 7)),
    ((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), (2, 3, 2, 7, 4), (2, 1, 2, 5, 7)),
    ((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), (2, 3, 2, 7, 4), (1, 3, 1, 5, 1)),
    ((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), (2, 3, 2, 7, 4), (3, 2, 5, 7)),
    ((2, 1, 3, 2, 5, 4), (2, 1, 3, 2, 7, 4), (2, 1, 3, 2, 7, 4), (1, 1, 3, 1, 1, 7)),
]


@pytest.mark.parametrize(("q", "k", "v", "mask"), MATH_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_dims_broadcast_as_torchs(backend, q, k, v, mask, kind):
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (q, k, v)]
    attn_mask = None if mask is None else torch.randn(mask, dtype=torch.float64)
    if mask is not None:
        attn_mask = attn_mask > -1 if kind == "bool" else attn_mask.requires_grad_()
    wanted = [t for t in (*tensors, attn_mask) if t is not None and t.requires_grad]
    with math_kernel():
        expected = F.scaled_dot_product_attention(*tensors, attn_mask)
    got = attend(*tensors, attn_mask)
    dout = torch.randn_like(expected)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, wanted, dout), torch.autograd.grad(expected, wanted, dout), strict=True
    ):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)
    out, lse = attend(*tensors, attn_mask, return_lse=True)
    torch.testing.assert_close(out, got)
    assert lse.shape == got.shape[:-1]


@pytest.mark.parametrize(
    ("q", "mask"),
    [
        ((2, 3, 2, 5, 4), (3, 2, 2, 5, 5)),
        ((2, 3, 2, 5, 4), (6, 2, 5, 5)),
        ((1, 3, 2, 5, 4), (3, 2, 2, 5, 5)),
        ((3, 5, 4), (2, 5, 5)),
        ((2, 3, 5, 4), (2, 3, 5, 4)),
        ((2, 3, 5, 4), (5, 2)),
        ((2, 3, 5, 4), (4, 5)),
    ],
    ids=str,
)
def test_a_mask_that_does_not_broadcast_is_refused(backend, q, mask):
    x = torch.randn(q)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(x, x, x, torch.zeros(mask))
    with pytest.raises(RuntimeError, match="attn_mask"):
        attend(x, x, x, torch.zeros(mask))


EMPTY = [
    (B, N, L, S, E, Ev)
    for B, N, L, S, E, Ev in [
        (0, 2, 3, 4, 5, 5),
        (2, 0, 3, 4, 5, 5),
        (2, 2, 0, 4, 5, 5),
        (2, 2, 3, 0, 5, 5),
        (2, 2, 3, 4, 5, 0),
        (2, 2, 0, 0, 5, 5),
        (2, 2, 3, 4, 0, 5),
    ]
]
EMPTY_OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.3},
    "window": {"window": (1, 1)},
    "lengths": {"lengths": True},
    "mask": {"attn_mask": True},
}


def empty_call(backend: str, sizes: tuple[int, ...], options: str) -> str:
    """Code that runs attention on an empty problem, forward and backward, and checks what comes."""
    B, N, L, S, E, Ev = sizes
    return f"""
import torch, seqkern
shapes = ({B}, {N}, {L}, {E}), ({B}, {N}, {S}, {E}), ({B}, {N}, {S}, {Ev})
q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
options = dict({EMPTY_OPTIONS[options]!r})
if "lengths" in options:
    options["lengths"] = torch.full(({B},), {S})
if "attn_mask" in options:
    options["attn_mask"] = torch.ones({L}, {S}).bool()
out, lse = seqkern.scaled_dot_product_attention(q, k, v, return_lse=True, backend={backend!r}, **options)
assert out.shape == ({B}, {N}, {L}, {Ev}) and lse.shape == ({B}, {N}, {L})
assert {S} or (bool((out == 0).all()) and bool((lse == -torch.inf).all()))
grads = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
assert all(g.shape == t.shape and bool(g.isfinite().all()) for g, t in zip(grads, (q, k, v)))
"""


@pytest.mark.parametrize("sizes", [s for s in EMPTY if s[1]], ids=str)
@pytest.mark.parametrize("options", list(EMPTY_OPTIONS))
def test_empty_sizes(backend, sizes, options):
    with poisoned():
        exec(empty_call(backend, sizes, options), {})


@pytest.mark.parametrize("backend_name", ["eager", "cpu"])
def test_no_heads(backend_name):
    """In a process of its own: torch's fused kernel divides by the number of heads."""
    code = "".join(empty_call(backend_name, (2, 0, 3, 4, 5, 5), options) for options in EMPTY_OPTIONS)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr}"


@pytest.mark.parametrize("order", ["BLNE", "LBNE", "ELNB", "odd"])
def test_strides_of_everything(backend, order):
    """Masks, cotangents and lengths with strides of their own change no bit of the result's meaning."""
    case = Case(B=3, N=4, Nk=2, L=5, S=9, mask="float.BNLS", keys="holes")
    q, k, v = (t.requires_grad_() for t in case.tensors())
    mask = case.attn_mask()
    dout = torch.randn(3, 4, 5, 8)
    key_padding = ~case.valid("keys")
    results = []
    for strided in (False, True):
        m = in_memory(mask, order) if strided else mask
        pad = key_padding.T.contiguous().T if strided else key_padding
        g = in_memory(dout, order) if strided else dout
        out = attend(q, k, v, m, key_padding_mask=pad, enable_gqa=True)
        results.append([out, *torch.autograd.grad(out, [q, k, v], g)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_an_expanded_cotangent(backend, dtype, packed):
    """out.sum().backward() hands over one number with strides 0."""
    q, k, v = (torch.randn(17, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))

    def call():
        if packed:
            return seqkern.varlen_attention(q, k, v, torch.tensor([0, 3, 17]))
        return attend(q, k, v)

    out = call()
    full = torch.autograd.grad(out, [q, k, v], torch.ones_like(out).contiguous())
    same_bits(dict(enumerate(torch.autograd.grad(call().sum(), [q, k, v]))), dict(enumerate(full)), "sum")


@pytest.mark.parametrize("chosen", range(1, 15))
def test_gradients_of_any_subset(backend, chosen):
    """What is not asked for changes nothing, with and without gradients of lse."""
    for mask in ("no", "float.NLS"):
        case = Case(N=4, Nk=2, L=5, S=9, mask=mask, keys="right", right=1)
        tensors = [*case.tensors(), case.attn_mask()]
        full = evaluate(ours(case), tensors, 1, case.dtype)
        leaves = [t.detach() if t is not None else None for t in tensors]
        for k, t in enumerate(leaves):
            if t is not None:
                t.requires_grad_(bool(chosen >> k & 1))
        out, lse = ours(case)(*leaves)
        if not out.requires_grad:
            continue
        names = ["d q", "d k", "d v", "d mask"]
        wanted = {n: t for n, t in zip(names, leaves, strict=True) if t is not None and t.requires_grad}
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).float() for t in (out, lse)]
        grads[1] = grads[1].masked_fill(lse.isinf(), 0)
        outputs = [(t, g) for t, g in zip((out, lse), grads, strict=True) if t.requires_grad]
        outputs, cotangents = zip(*outputs, strict=True)
        got = torch.autograd.grad(outputs, list(wanted.values()), cotangents, materialize_grads=True)
        agree(
            dict(zip(wanted, got, strict=True)), {n: full[n] for n in wanted}, 1e-6, f"{case} {list(wanted)}"
        )


# ---- masks and padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "how", ["bool", "inf", "key_padding_mask", "lengths", "window", "query_padding_mask"]
)
def test_a_query_without_keys_gives_zeros(backend, how, dtype):
    """pytorch #160064: no NaN in outputs or gradients."""
    q, k, v = (torch.randn(2, 2, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    dead = torch.zeros(2, 4, dtype=torch.bool)
    options, bias = {}, None
    if how in ("bool", "inf"):
        dead[0, 1] = dead[1] = True
        keep = ~dead[:, None, :, None].expand(2, 1, 4, 4)
        options["attn_mask"] = keep
        if how == "inf":
            bias = torch.zeros(2, 1, 4, 4, dtype=dtype).masked_fill(~keep, -math.inf).requires_grad_()
            options["attn_mask"] = bias
    elif how == "window":
        options = dict(window=(-1, 0), causal_alignment="bottom_right", lengths=torch.tensor([2, 4]))
        dead[0, :2] = True
    elif how == "query_padding_mask":
        dead[1, 2:] = True
        options["query_padding_mask"] = dead
    else:
        dead[1] = True
        pad = torch.tensor([[False] * 4, [True] * 4])
        options[how] = torch.tensor([4, 0]) if how == "lengths" else pad
    with poisoned():
        out, lse = attend(q, k, v, return_lse=True, **options)
        wanted = [t for t in (q, k, v, bias) if t is not None]
        grads = torch.autograd.grad([out, lse], wanted, [torch.ones_like(out), torch.ones_like(lse)])
    rows = dead[:, None].expand(2, 2, 4)
    assert (out[rows] == 0).all() and (lse[rows] == -math.inf).all()
    assert (out[~rows] != 0).any() and lse[~rows].isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][rows] == 0).all()
    if bias is not None:
        assert (grads[3][dead[:, None].expand(2, 1, 4)] == 0).all()


def test_nan_in_the_gradient_of_an_empty_rows_lse(backend):
    """Merging partial results by their lse gives such gradients: -inf - -inf."""
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[1] = False
    _, lse = attend(q, k, v, keep, return_lse=True)
    dlse = torch.ones_like(lse)
    clean = torch.autograd.grad(lse, [q, k], dlse, retain_graph=True)
    dlse[:, :, 1] = NAN
    got = torch.autograd.grad(lse, [q, k], dlse)
    same_bits(dict(enumerate(got)), dict(enumerate(clean)), "NaN in dlse")


@pytest.mark.parametrize("queries", ["right", "left", "holes", "lengths"])
def test_a_padded_querys_gradient_is_not_read(backend, queries):
    case = Case(B=3, L=6, S=6, queries=queries, right=0, seed=2)
    q, k, v = (t.requires_grad_() for t in case.tensors())
    out, lse = ours(case)(q, k, v, None)
    valid = case.valid("queries")[:, None].expand(lse.shape)
    assert not valid.all() and (out[~valid] == 0).all()
    grads = []
    for junk in (0.0, NAN):
        dout = torch.where(valid[..., None], torch.ones(()), junk).expand(out.shape)
        dlse = torch.where(valid, torch.ones(()), junk)
        grads.append(torch.autograd.grad([out, lse], [q, k, v], [dout, dlse], retain_graph=True))
    same_bits(dict(enumerate(grads[1])), dict(enumerate(grads[0])), case)


@pytest.mark.parametrize("keys", PADDING[1:])
@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize("Ev", [0, 5])
def test_padding_reaches_nothing(backend, keys, right, Ev):
    """NaN in padded keys and values: the same bits as zeros there."""
    case = Case(B=4, N=4, Nk=2, L=9, S=9, Ev=Ev, keys=keys, right=right, seed=1)
    results = []
    for tensors in (cleaned(case, case.tensors()), poison(case, case.tensors())):
        with poisoned():
            results.append(evaluate(ours(case), [*tensors, None], 1, case.dtype))
    same_bits(results[1], results[0], case)
    padded = ~case.valid("keys")[:, None].expand(4, 2, 9)
    for name in ("d k", "d v"):
        assert (results[1][name][padded] == 0).all(), name


def test_padding_as_floating_mask(backend):
    """Added to the scores; -inf and 0 are a bool mask's other way to say it."""
    case = Case(B=3, L=5, S=9, keys="holes")
    tensors = case.tensors()
    bias = torch.zeros(3, 9).masked_fill(~case.valid("keys"), -math.inf)
    expected = ours(case)(*tensors, None)
    for got in (
        attend(*tensors, key_padding_mask=bias, return_lse=True),
        attend(*tensors, bias[:, None, None], return_lse=True),
    ):
        torch.testing.assert_close(got, expected)
    added = torch.randn(3, 9)
    both = attend(*tensors, bias[:, None, None], key_padding_mask=added)
    torch.testing.assert_close(both, attend(*tensors, (bias + added)[:, None, None]))
    keep = torch.rand(5, 9) < 0.5
    both = attend(*tensors, keep, key_padding_mask=added)
    merged = added[:, None, None].expand(3, 1, 5, 9).masked_fill(~keep, -math.inf)
    torch.testing.assert_close(both, attend(*tensors, merged))


def test_gradient_of_a_floating_padding_mask(backend):
    q, k, v = (torch.randn(3, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    added = torch.zeros(3, 5, dtype=torch.float64)
    added[1, 2] = -math.inf
    added.requires_grad_()
    (got,) = torch.autograd.grad(attend(q, k, v, key_padding_mask=added).pow(2).sum(), added)
    mask = added[:, None, None]
    (expected,) = torch.autograd.grad(attend(q, k, v, mask).pow(2).sum(), added)
    torch.testing.assert_close(got, expected)
    assert got.abs().sum() > 0


@pytest.mark.parametrize(
    "options",
    [
        dict(is_causal=True),
        dict(window=(-1, 0)),
        dict(window=(10**6, 0)),
        dict(window=[-1, 0]),
        dict(is_causal=True, window=(-1, 3)),
    ],
    ids=str,
)
def test_ways_to_say_causal(backend, options):
    q, k, v = (torch.randn(2, 2, size, 8) for size in (5, 9, 9))
    causal = torch.ones(5, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, **options), attend(q, k, v, causal))
    torch.testing.assert_close(
        attend(q, k, v, causal_alignment="bottom_right", **options),
        attend(q, k, v, causal.tril(-99) | ones_from(5, 9)),
    )


def ones_from(L: int, S: int) -> Tensor:
    """The causal mask whose last query sees the last key."""
    return torch.ones(L, S, dtype=torch.bool).tril(S - L)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_masks(backend, dtype, mask_dtype):
    """torch's rule: bool, the query's dtype, or float32 beside 16 bits; else a RuntimeError, by name."""
    x, mask = torch.randn(2, 3, 5, 8, dtype=dtype), torch.randn(5, 5, dtype=mask_dtype)
    try:
        expected = F.scaled_dot_product_attention(x, x, x, mask)
    except RuntimeError:
        with pytest.raises(RuntimeError, match=r"attn_mask.*expected"):
            attend(x, x, x, mask)
        return
    got = attend(x, x, x, mask)
    assert got.dtype is dtype
    torch.testing.assert_close(
        got, expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-2 if dtype.itemsize == 2 else 1e-6
    )


def test_ten_thousand_times_ten_thousand_pairs_of_a_window():
    """More keys than 65536, of which each query sees a few: right places, and quickly."""
    S, width = 70_001, 3
    k, v = torch.randn(1, 1, S, 4), torch.randn(1, 1, S, 4)
    q = torch.randn(1, 1, S, 4)
    out = attend(q, k, v, window=(width, 0), backend="cpu")
    for place in (0, 2, 65_535, 65_536, 65_537, 70_000):
        keys = slice(max(0, place - width), place + 1)
        alone = F.scaled_dot_product_attention(q[:, :, place : place + 1], k[:, :, keys], v[:, :, keys])
        torch.testing.assert_close(out[:, :, place : place + 1], alone)


def test_many_keys(backend):
    """S > 65536: values, gradients and dropout's positions."""
    S = 66_000
    q, k, v = (torch.randn(1, 2, size, 4, requires_grad=True) for size in (3, S, S))
    pad = torch.zeros(1, S, dtype=torch.bool)
    pad[:, 100:65_540] = True
    pad[:, -1] = True
    out = attend(q, k, v, key_padding_mask=pad)
    kept = (~pad[0]).nonzero().squeeze(1)
    expected = F.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept])
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), [q, k, v]),
        torch.autograd.grad(expected.square().sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def largest_allocation(call) -> int:
    """Bytes of the largest tensor that is made in between."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_the_measure_of_memory():
    assert largest_allocation(lambda: torch.empty(1000, 1000)) == 4_000_000


@pytest.mark.parametrize("way", ["causal", "lengths", "holes", "query padding", "float"])
@pytest.mark.parametrize("grad", [False, True])
def test_no_scores_of_all_pairs_in_memory(way, grad):
    B, N, L, E = 2, 8, 512, 8
    q, k, v = (torch.randn(B, N, L, E, requires_grad=grad) for _ in range(3))
    pad = torch.rand(B, L) < 0.5
    options = {
        "causal": dict(is_causal=True, key_padding_mask=pad),
        "lengths": dict(is_causal=True, lengths=torch.tensor([300, 400])),
        "holes": dict(key_padding_mask=pad),
        "query padding": dict(is_causal=True, query_padding_mask=pad, key_padding_mask=pad),
        "float": dict(key_padding_mask=torch.randn(B, L)),
    }[way]

    def call():
        out = attend(q, k, v, backend="cpu", **options)
        if grad:
            out.sum().backward()

    call()
    assert largest_allocation(call) <= B * L * L * 4 < B * N * L * L


# ---- dropout -----------------------------------------------------------------------------------------------


def word(hexadecimal: str) -> Tensor:
    return torch.tensor([int(hexadecimal, 16)])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "0" * 16, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "f" * 16, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "299f31d0a4093822", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Random123's own: 10 rounds of Philox4x32, the key's low word first."""
    seed = int(key, 16)
    seed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    got = philox([word(c) for c in counter.split()], seed)
    assert [f"{int(w):08x}" for w in got] == expected.split()


def test_which_half_of_which_word_decides():
    seed, p, B, N, L, S = torch.tensor([-(2**62) - 12345]), 0.3, 2, 3, 4, 21
    keep = dropout_keep(seed, p, (B, N, L, S))
    assert keep.shape == (B, N, L, S)
    for b, n, l, s in ((0, 0, 0, 0), (1, 2, 3, 20), (1, 0, 2, 15), (0, 2, 1, 9), (1, 1, 3, 8)):  # noqa: E741
        words = philox([torch.tensor([c]) for c in (s >> 3, l, b * N + n, 0)], seed)
        half = int(words[(s & 7) >> 1]) >> (16 if s & 1 else 0) & 0xFFFF
        assert bool(keep[b, n, l, s]) == (half >= round(p * 65536)), (b, n, l, s)
    part = dropout_keep(seed, p, (1, 2, 3, 13), (4, 1, 8))
    assert torch.equal(part, keep.view(1, B * N, L, S)[:, 4:6, 1:, 8:])


def weights_of(p: _attention.Problem, backend: str) -> Tensor:
    return attention(p, _attention.PER_HEAD, False, backend)[2]


def problem(case: Case, **more) -> _attention.Problem:
    q, k, v = case.tensors()
    return _attention.Problem(
        *(q, k, v),
        key_valid=None if case.keys == "all" else case.valid("keys"),
        query_valid=None if case.queries == "all" else case.valid("queries"),
        left=case.left,
        right=case.right,
        scale=case.E**-0.5,
        **more,
    )


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9999])
@pytest.mark.parametrize(
    "case",
    [
        Case(B=3, N=4, L=5, S=21, dtype=torch.float64),
        Case(B=3, N=4, Nk=2, L=17, S=33, keys="left", dtype=torch.float64),
        Case(B=4, N=2, L=17, S=21, queries="left", keys="left", dtype=torch.float64),
        Case(B=2, N=2, L=300, S=1100, left=37, right=20, keys="holes", dtype=torch.float64),
    ],
    ids=str,
)
def test_backends_drop_the_same_weights(case, p):
    """Bit by bit, whatever the blocks, the padding or the window."""
    seed = torch.tensor([-81985529216486896])
    kept = problem(case)
    dropped = problem(case, seed=seed, dropout_p=p)
    eager, cpu = (weights_of(dropped, backend) for backend in ("eager", "cpu"))
    full = weights_of(kept, "eager")
    keep = dropout_keep(seed, p, tuple(full.shape))
    assert torch.equal(eager != 0, keep & (full != 0))
    assert torch.equal(cpu != 0, keep & (full != 0))
    torch.testing.assert_close(cpu, eager)
    torch.testing.assert_close(eager, full * keep / (1 - p))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_backends_agree_under_dropout(p):
    """Outputs and gradients from one torch seed."""
    case = Case(B=2, N=4, Nk=2, L=9, S=21, E=8, Ev=5, mask="float.NLS", keys="right", dtype=torch.float64)
    results = []
    for backend in ("eager", "cpu"):
        torch.manual_seed(7)
        call = ours(case, dropout_p=p, backend=backend)
        results.append(evaluate(call, [*case.tensors(), case.attn_mask()], 1, case.dtype))
    agree(results[1], results[0], 1e-12, f"{case} p {p}")
    assert (results[0]["out"] == 0).all() == (p == 1)


def test_dropout_keeps_the_mean(backend):
    q, k, v = (torch.randn(4, 2, size, 8, dtype=torch.float64) for size in (3, 40, 40))
    exact = attend(q, k, v)
    draws = torch.stack([attend(q, k, v, dropout_p=0.3) for _ in range(300)])
    spread = draws.std(0) / math.sqrt(300)
    assert ((draws.mean(0) - exact).abs() < 5 * spread).all()
    assert draws[0].ne(draws[1]).all(), "each call draws anew"


def test_dropouts_share_of_zeros():
    keep = dropout_keep(torch.tensor([3]), 0.3, (4, 4, 64, 256))
    assert abs(keep.double().mean().item() - 0.7) < 4 * math.sqrt(0.21 / keep.numel()) + 1e-5
    for dim in range(4):  # no dim along which the masks repeat
        a, b = keep.narrow(dim, 0, 1).flatten(), keep.narrow(dim, 1, 1).flatten()
        assert abs((a == b).double().mean().item() - 0.58) < 0.05
    assert not torch.equal(keep, dropout_keep(torch.tensor([4]), 0.3, (4, 4, 64, 256)))


def test_one_torch_seed_one_mask(backend):
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(attend(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    state = torch.get_rng_state()
    attend(q, k, v)
    assert torch.equal(state, torch.get_rng_state()), "without dropout no number is drawn"


@pytest.mark.parametrize("p", [-0.1, 1.1, NAN])
def test_a_probability_outside_0_to_1_raises(backend, p):
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"dropout_p: expected .*0\.\.1, got"):
        attend(x, x, x, dropout_p=p)
    with pytest.raises(RuntimeError, match=r"dropout_p: expected .*0\.\.1, got"):
        seqkern.varlen_attention(x[0], x[0], x[0], torch.tensor([0, 1]), dropout_p=p)


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_packed_as_padded(backend, is_causal):
    lengths = [4, 0, 9, 1]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(sum(lengths), 2, 8, dtype=torch.float64) for _ in range(3))
    torch.manual_seed(1)
    packed = seqkern.varlen_attention(q, k, v, cu, dropout_p=0.4, is_causal=is_causal)
    padded = [
        torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2)
        for x in (q, k, v)
    ]
    torch.manual_seed(1)
    out = attend(*padded, lengths=torch.tensor(lengths), dropout_p=0.4, is_causal=is_causal).transpose(1, 2)
    torch.testing.assert_close(packed, torch.cat([out[b, :n] for b, n in enumerate(lengths)]))


# ---- packed sequences --------------------------------------------------------------------------------------

VARLEN = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (2, 1), "causal_alignment": "bottom_right"},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("options", list(VARLEN))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_varlen_is_a_loop(backend, options, dtype, index, heads):
    """Empty sequences; rows of NaN before the first and after the last; more keys or fewer than queries."""
    lengths_q, lengths_k = (3, 0, 17, 1, 5), (4, 2, 9, 0, 5)
    before, after = 2, 3
    cu_q, cu_k = (torch.tensor([before, *n]).cumsum(0).to(index) for n in (lengths_q, lengths_k))
    Tq, Tk = (int(cu[-1]) + after for cu in (cu_q, cu_k))
    N, Nk = heads
    q, k, v = (torch.randn(T, n, E, dtype=dtype) for T, n, E in ((Tq, N, 8), (Tk, Nk, 8), (Tk, Nk, 6)))
    for t in (q, k, v):
        t[:before] = t[-after:] = NAN
        t.requires_grad_()
    with poisoned():
        out, lse = seqkern.varlen_attention(
            q, k, v, cu_q, cu_k, enable_gqa=Nk != N, return_lse=True, **VARLEN[options]
        )
        dout = torch.randn(Tq, N, 6).to(dtype)
        grads = torch.autograd.grad(out, [q, k, v], dout)
    assert out.shape == (Tq, N, 6) and lse.shape == (N, Tq)
    expected = [torch.zeros_like(t) for t in (out, q, k, v)]
    for b in range(5):
        rows_q, rows_k = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_q, cu_k))
        parts = [
            t[rows].detach().transpose(0, 1)[None].requires_grad_()
            for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k))
        ]
        one, one_lse = attend(*parts, enable_gqa=Nk != N, return_lse=True, backend="eager", **VARLEN[options])
        one_grads = torch.autograd.grad(
            one, parts, dout[rows_q].transpose(0, 1)[None], materialize_grads=True
        )
        for target, rows, value in zip(
            expected, (rows_q, rows_q, rows_k, rows_k), (one, *one_grads), strict=True
        ):
            target[rows] = value[0].transpose(0, 1)
        torch.testing.assert_close(lse[:, rows_q], one_lse[0], rtol=1e-5, atol=1e-5)
    close = dict(rtol=1e-9, atol=1e-9) if dtype is torch.float64 else dict(rtol=2e-2, atol=2e-2)
    for got, value in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(got, value, **close)


@pytest.mark.parametrize("gradient", ["lse", "both"])
def test_varlen_gradient_of_lse(backend, gradient):
    cu = torch.tensor([0, 3, 3, 9])
    x = torch.randn(9, 2, 8, dtype=torch.float64, requires_grad=True)

    def call(x, b0, b1):
        return attend(*(x[b0:b1].transpose(0, 1)[None],) * 3, return_lse=True, backend="eager")

    out, lse = seqkern.varlen_attention(x, x, x, cu, return_lse=True)
    loss = lse.pow(2).sum() + (out.pow(3).sum() if gradient == "both" else 0)
    expected = 0
    for b0, b1 in ((0, 3), (3, 9)):
        one, one_lse = call(x, b0, b1)
        expected = expected + one_lse.pow(2).sum() + (one.pow(3).sum() if gradient == "both" else 0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (loss, expected)))


def test_varlen_in_one_sequence_and_in_none(backend):
    q, k, v = (torch.randn(7, 2, 8, requires_grad=True) for _ in range(3))
    one = seqkern.varlen_attention(q, k, v, torch.tensor([0, 7]))
    expected = attend(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
    torch.testing.assert_close(one, expected)
    for cu in ([0], [3], [0, 0, 0], [7, 7]):
        out = seqkern.varlen_attention(q, k, v, torch.tensor(cu))
        assert (out == 0).all() and out.shape == (7, 2, 8)
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), [q, k, v]))
    nothing = torch.randn(0, 2, 8)
    assert seqkern.varlen_attention(nothing, nothing, nothing, torch.tensor([0, 0])).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "options", "says"),
    [
        ([0, 3, 2, 7], None, {}, r"cu_seqlens_q: expected non-decreasing .* 0\.\.7, got \[0, 3, 2, 7\]"),
        ([-1, 7], None, {}, "cu_seqlens_q: expected non-decreasing"),
        ([0, 8], None, {}, r"cu_seqlens_q: expected non-decreasing values in 0\.\.T = 0\.\.7, got"),
        ([0, 7], [0, 9], {}, "cu_seqlens_k: expected non-decreasing"),
        ([0, 7], [0, 3, 7], {}, r"cu_seqlens_k: expected the shape of cu_seqlens_q, \(2,\), got \(3,\)"),
        ([], None, {}, r"cu_seqlens_q: expected \[B \+ 1\]"),
        ([[0, 7]], None, {}, r"cu_seqlens_q: expected \[B \+ 1\] .* got \(1, 2\)"),
        ([0.0, 7.0], None, {}, "cu_seqlens_q: expected .* int32 or int64, got .*float32"),
        ([0, 7], None, {"max_seqlen_q": 6}, "max_seqlen_q: expected at least 7, .* got 6"),
        ([0, 7], [0, 7], {"max_seqlen_k": 6}, "max_seqlen_k: expected at least 7, .* got 6"),
        ([0, 7], None, {"max_seqlen_q": -1}, "max_seqlen_q: expected a length, got -1"),
        ([0, 7], None, {"window": (1, 2, 3)}, r"window: expected \(left, right\).* got \(1, 2, 3\)"),
        (
            [0, 7],
            None,
            {"causal_alignment": "middle"},
            "causal_alignment: .*top_left, bottom_right, got 'middle'",
        ),
    ],
)
def test_wrong_sequences_raise(backend, cu_q, cu_k, options, says):
    x = torch.randn(7, 2, 8)
    with pytest.raises(ValueError, match=says):
        seqkern.varlen_attention(
            x, x, x, torch.tensor(cu_q), None if cu_k is None else torch.tensor(cu_k), **options
        )


def test_varlen_asks_for_keys_sequences_where_they_differ(backend):
    q, k = torch.randn(7, 2, 8), torch.randn(9, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: expected, as key has 9 rows and query 7"):
        seqkern.varlen_attention(q, k, k, torch.tensor([0, 7]))


def jagged(lengths, heads=2, E=8, dtype=torch.float32, grad=True) -> Tensor:
    """[B, N, *, E], a leaf [B, *, N, E] transposed."""
    rows = [torch.randn(n, heads, E, dtype=dtype) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_nested_is_per_sequence_and_torchs(backend, is_causal, heads):
    lengths_q, lengths_k = (3, 5, 1), ((3, 5, 1) if is_causal else (4, 2, 6))
    x, y, z = jagged(lengths_q, heads), jagged(lengths_k), jagged(lengths_k)
    q, k, v = (t.transpose(1, 2) for t in (x, y, z))
    out = attend(q, k, v, is_causal=is_causal, enable_gqa=heads != 2)
    assert out.is_nested and out.shape[0] == 3 and out.shape[1] == heads
    loss = out.transpose(1, 2).values().square().sum()
    grads = torch.autograd.grad(loss, [x, y, z])
    parts = [[t.detach().transpose(0, 1)[None].requires_grad_() for t in n.unbind()] for n in (x, y, z)]
    for b in range(3):
        one = [p[b] for p in parts]
        expected = attend(*one, is_causal=is_causal, enable_gqa=heads != 2, backend="eager")
        torch.testing.assert_close(out.unbind()[b], expected[0])
        ones = torch.autograd.grad(expected.square().sum(), one)
        for g, one_g in zip(grads, ones, strict=True):
            torch.testing.assert_close(g.unbind()[b], one_g[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
    if heads == 2 and not is_causal:
        torchs = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out.transpose(1, 2).values(), torchs.transpose(1, 2).contiguous().values())
    torch.testing.assert_close((out + q).transpose(1, 2).values(), out.transpose(1, 2).values() + x.values())


@pytest.mark.filterwarnings("ignore")
def test_nested_with_gaps_is_right_or_refused(backend):
    """A nested view whose rows do not touch: its lengths are not its offsets' differences."""
    full = torch.randn(3, 6, 2, 8)
    lengths = torch.tensor([6, 2, 4])
    x = torch.nested.narrow(full, 1, torch.zeros(3, dtype=torch.int64), lengths, layout=torch.jagged)
    q = x.transpose(1, 2)
    try:
        out = attend(q, q, q)
    except (RuntimeError, ValueError) as error:
        assert "nested" in str(error) or "jagged" in str(error), error
        return
    for b, n in enumerate(lengths.tolist()):
        one = full[b, :n].transpose(0, 1)
        torch.testing.assert_close(out.unbind()[b], attend(one, one, one))


@pytest.mark.parametrize(
    "make",
    [
        lambda q: attend(q, q, q, torch.ones(5, 5).bool()),
        lambda q: attend(q, q, q, lengths=torch.tensor([1, 2])),
        lambda q: attend(q, q, torch.randn(2, 2, 5, 8)),
        lambda q: attend(q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2)),
        lambda q: attend(q, q, q, return_lse=True),
    ],
    ids=["mask", "lengths", "one of three", "not transposed", "lse"],
)
def test_nested_mistakes(backend, make):
    with pytest.raises(ValueError, match="nested"):
        make(jagged((3, 5)).transpose(1, 2))


# ---- mistakes ----------------------------------------------------------------------------------------------

X = torch.randn(2, 4, 5, 8)


def torch_refuses(call) -> type[Exception]:
    with pytest.raises(Exception) as caught:
        call(F.scaled_dot_product_attention)
    return caught.type


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda f: f(X, X[..., :7], X), ("query, key, value", r"\(2, 4, 5, 7\)")),
        (lambda f: f(X, X[:, :3], X[:, :3]), ("key", "heads", r"\b4\b", r"\b3\b")),
        (lambda f: f(X, X[:, :2], X[:, :2]), ("key", "enable_gqa", r"\b4\b", r"\b2\b")),
        (lambda f: f(X, X[:, :3], X[:, :3], enable_gqa=True), ("key", "divisor", r"\b3\b")),
        (lambda f: f(X, X.double(), X), ("key", "float32", "float64")),
        (lambda f: f(X, X, X.half()), ("value", "float32", "float16")),
        (lambda f: f(X[0, 0, 0], X, X), ("query, key, value", r"\(8,\)")),
        (lambda f: f(X[0, 0, 0], X[0, 0, 0], X[0, 0, 0]), ("query, key, value", r"\(8,\)")),
        (lambda f: f(torch.randn(3, 4, 5, 8), X, X), ("broadcast", r"\(3, 4, 5, 8\)", r"\(2, 4, 5, 8\)")),
        (lambda f: f(X.long(), X.long(), X.long()), ("query", "floating", "int64")),
        (lambda f: f(X, X, X, torch.zeros(5, 5, dtype=torch.int64)), ("attn_mask", "bool", "int64")),
        (lambda f: f(X, X, X, torch.zeros(5, 6)), ("attn_mask", r"\(2, 4, 5, 5\)", r"\(5, 6\)")),
        (lambda f: f(X, X, X, dropout_p=1.5), ("dropout_p", r"1\.5")),
        (lambda f: f(X, X.to("meta"), X), ("key", "cpu", "meta")),
    ],
)
def test_mistakes_raise_what_torch_raises(backend, call, says):
    expected = torch_refuses(call)
    with pytest.raises(expected) as caught:
        call(attend)
    assert not isinstance(caught.value, (AttributeError, TypeError, IndexError))
    for words in says:
        caught.match(words)


def test_mistakes_that_torch_lets_pass_here():
    """torch's fused CPU kernel reads on; its math kernel raises."""
    with pytest.raises(RuntimeError, match=r"one number of keys.*\(2, 4, 3, 8\)"):
        attend(X, X[:, :, :3], X)
    with pytest.raises(RuntimeError, match="attn_mask: expected None with is_causal"):
        attend(X, X, X, torch.ones(5, 5).bool(), is_causal=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            dict(key_padding_mask=torch.zeros(2, 6).bool()),
            r"key_padding_mask: expected \[B, S\] = \(2, 5\), got \(2, 6\)",
        ),
        (
            dict(key_padding_mask=torch.zeros(2, 5).long()),
            "key_padding_mask: expected bool or a floating.*int64",
        ),
        (
            dict(query_padding_mask=torch.zeros(5, 2).bool()),
            r"query_padding_mask: expected \[B, L\] = \(2, 5\)",
        ),
        (dict(query_padding_mask=torch.zeros(2, 5)), "query_padding_mask: expected bool, got torch.float32"),
        (
            dict(lengths=torch.tensor([1, 6])),
            r"lengths: expected values in 0\.\.T = 0\.\.5, got lengths\[1\] = 6",
        ),
        (dict(lengths=torch.tensor([-1, 5])), r"lengths\[0\] = -1"),
        (dict(lengths=torch.tensor([1, 2, 3])), r"lengths: expected \[B\] = \(2,\), got \(3,\)"),
        (dict(lengths=torch.tensor([1.0, 2.0])), "lengths: expected an integer dtype, got torch.float32"),
        (dict(query_lengths=torch.tensor([0, 9])), r"query_lengths\[1\] = 9"),
        (
            dict(lengths=torch.tensor([1, 2]), key_padding_mask=torch.zeros(2, 5).bool()),
            "lengths: expected None with key_padding_mask",
        ),
        (
            dict(query_lengths=torch.tensor([1, 2]), query_padding_mask=torch.zeros(2, 5).bool()),
            "query_lengths: expected None with query_padding_mask",
        ),
        (dict(window=3), "window: expected .* got 3"),
        (dict(window=(1.0, 2)), "window: expected"),
        (dict(causal_alignment="bottom-right"), "causal_alignment: expected one of top_left, bottom_right"),
        (dict(backend="flash"), "backend: expected one of eager, cpu, cuda, triton or None, got 'flash'"),
    ],
)
def test_mistakes_with_what_torch_has_not(options, says):
    with pytest.raises(ValueError, match=says):
        attend(X, X, X, **options)


def test_triton_is_refused_on_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for"):
        attend(X, X, X, backend="triton")


def test_lengths_of_any_integer_dtype(backend):
    expected = attend(X, X, X, lengths=torch.tensor([2, 5]))
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(attend(X, X, X, lengths=torch.tensor([2, 5], dtype=dtype)), expected)


# ---- the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("L", SIZES[:3])
def test_the_reference_against_a_loop_over_pairs(L):
    """In plain Python numbers, one query at a time."""
    case = Case(
        B=2, N=4, Nk=2, L=L, S=6, E=3, Ev=2, mask="inf.B1LS", keys="holes", right=2, dtype=torch.float64
    )
    q, k, v = case.tensors()
    mask, allowed = case.attn_mask(), case.allowed()
    out, lse, weights = reference(q, k, v, mask, case.valid("keys"), scale=0.5, right=2)
    for b in range(2):
        for n in range(4):
            for l in range(L):  # noqa: E741
                found = {}
                for s in range(6):
                    if allowed[b, n, l, s]:
                        dot = sum(float(q[b, n, l, e]) * float(k[b, n // 2, s, e]) for e in range(3))
                        found[s] = math.exp(0.5 * dot + float(mask[b, 0, l, s]))
                total = sum(found.values())
                assert float(lse[b, n, l]) == pytest.approx(math.log(total) if found else -math.inf)
                for s in range(6):
                    assert float(weights[b, n, l, s]) == pytest.approx(found.get(s, 0.0) / (total or 1))
                for e in range(2):
                    value = sum(p / total * float(v[b, n // 2, s, e]) for s, p in found.items())
                    assert float(out[b, n, l, e]) == pytest.approx(value)
