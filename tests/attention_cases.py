"""Attention's cases, and torch's answers to them.

Letters: B batch, N query heads, Nk key and value heads, L queries, S keys, E head dim of q and k, Ev of v.

Which query may attend to which key is worked out here anew, pair by pair, and handed to torch as one mask.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from cases import SHORT, pairwise, unique
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import seqkern

Results = dict[str, Tensor]
NEARBY = 16

SIZES = (1, 15, 17, 63, 65, 129)
PATTERNS = ("LS", "NLS", "BNLS", "B1LS", "B11S", "11L1", "1N11", "S")
PADDING = ("all", "lengths", "right", "left", "holes", "none")


@dataclass(frozen=True)
class Case:
    """One call of scaled_dot_product_attention. keys, queries: which are real; mask: kind and pattern."""

    B: int = 2
    N: int = 2
    Nk: int = 0  # 0: N
    L: int = 5
    S: int = 7
    E: int = 8
    Ev: int = 0  # 0: E
    mask: str = "no"
    right: int = -1  # 0: causal
    left: int = -1
    alignment: str = "top_left"
    keys: str = "all"
    queries: str = "all"
    strides: str = "BNLE"  # order of the dims in memory; 0: expanded over the batch
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        heads = f"N{self.N}" + (f".{self.Nk}" if self.Nk else "")
        words = [f"B{self.B}", heads, f"L{self.L}", f"S{self.S}", f"E{self.E}"]
        words += [f"Ev{self.Ev}"] * bool(self.Ev) + [self.mask] * (self.mask != "no")
        words += [f"window{self.left}.{self.right}"] * (max(self.left, self.right) >= 0)
        words += ["br"] * (self.alignment == "bottom_right") + [f"keys.{self.keys}"] * (self.keys != "all")
        words += [f"queries.{self.queries}"] * (self.queries != "all")
        words += [self.strides] * (self.strides != "BNLE") + ["scale"] * (self.scale is not None)
        return "-".join([*words, SHORT[self.dtype], *([f"seed{self.seed}"] if self.seed else [])])

    def generator(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self} {what}".encode()))

    def valid(self, what: str) -> Tensor:
        """[B, S] of "keys" or [B, L] of "queries" bool."""
        return valid_places(
            getattr(self, what), self.B, self.S if what == "keys" else self.L, self.generator(what)
        )

    def attn_mask(self) -> Tensor | None:
        if self.mask == "no":
            return None
        kind, pattern = self.mask.split(".")
        return make_mask(kind, pattern, (self.B, self.N, self.L, self.S), self.generator("mask"), self.dtype)

    def offset(self) -> Tensor:
        """[B] the diagonal's shift."""
        if self.alignment == "top_left":
            return torch.zeros(self.B, dtype=torch.int64)
        S = self.valid("keys").sum(1) if self.keys == "lengths" else torch.full((self.B,), self.S)
        L = self.valid("queries").sum(1) if self.queries == "lengths" else torch.full((self.B,), self.L)
        return S - L

    def allowed(self) -> Tensor:
        """[B, N, L, S] bool: pair by pair."""
        s, l = torch.arange(self.S), torch.arange(self.L)[:, None]  # noqa: E741
        distance = s - l - self.offset().view(-1, 1, 1, 1)
        found = self.valid("keys")[:, None, None] & self.valid("queries")[:, None, :, None]
        if self.left >= 0:
            found = found & (distance >= -self.left)
        if self.right >= 0:
            found = found & (distance <= self.right)
        mask = self.attn_mask()
        if mask is not None:
            found = found & (mask if mask.dtype is torch.bool else mask > -math.inf)
        return found.expand(self.B, self.N, self.L, self.S)

    def tensors(self) -> list[Tensor]:
        """q, k, v: padding holds random numbers, too."""
        Nk, Ev, generator = self.Nk or self.N, self.Ev or self.E, self.generator("inputs")
        shapes = [(self.B, self.N, self.L, self.E), (self.B, Nk, self.S, self.E), (self.B, Nk, self.S, Ev)]
        return [in_memory(normal(shape, generator, self.dtype), self.strides) for shape in shapes]

    def options(self) -> dict[str, Any]:
        """seqkern's keywords, but for attn_mask."""
        found: dict[str, Any] = dict(enable_gqa=bool(self.Nk), scale=self.scale)
        found["causal_alignment"] = self.alignment
        if self.left >= 0 or self.right > 0 or (self.right == 0 and self.mask != "no"):
            found["window"] = (self.left, self.right)
        elif self.right == 0:
            found["is_causal"] = True
        if self.keys == "lengths":
            found["lengths"] = self.valid("keys").sum(1)
        elif self.keys != "all":
            found["key_padding_mask"] = ~self.valid("keys")
        if self.queries == "lengths":
            found["query_lengths"] = self.valid("queries").sum(1)
        elif self.queries != "all":
            found["query_padding_mask"] = ~self.valid("queries")
        return found


def normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def in_memory(x: Tensor, order: str) -> Tensor:
    """x [B, N, L, E] with its dims in memory in this order, or, "0", one row expanded over the batch."""
    if order == "0":
        return x[:1].expand(x.shape) if x.shape[0] else x
    if order == "odd":  # every second row and column of a larger tensor
        memory = x.new_zeros((*x.shape[:2], 2 * x.shape[2] + 1, 2 * x.shape[3] + 1))
        view = memory[:, :, 1::2, 1::2]
        return view.copy_(x)
    dims = ["BNLE".index(letter) for letter in order]
    return x.permute(dims).contiguous().permute([dims.index(k) for k in range(4)])


def valid_places(kind: str, B: int, size: int, generator: torch.Generator) -> Tensor:
    """[B, size] bool. Row 0 keeps all, but with "none": then it keeps nothing."""
    steps = torch.arange(size)
    lengths = torch.randint(0, size + 1, (B,), generator=generator)
    lengths[0] = size if kind != "none" else 0
    if kind == "all":
        return torch.ones((B, size), dtype=torch.bool)
    if kind == "left":
        return steps >= size - lengths[:, None]
    if kind == "holes":
        return torch.rand((B, size), generator=generator) < 0.6
    return steps < lengths[:, None]


def make_mask(
    kind: str, pattern: str, full: tuple[int, int, int, int], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """A mask of the pattern's shape: "bool", "float", or "inf": floating with blocked pairs."""
    sizes = dict(zip("BNLS", full, strict=True))
    shape = tuple(sizes.get(letter, 1) for letter in pattern)
    keep = torch.rand(shape, generator=generator) < 0.7
    if kind == "bool":
        return keep
    mask = normal(shape, generator, dtype)
    return mask.masked_fill(~keep, -math.inf) if kind == "inf" else mask


# ---- the answers -------------------------------------------------------------------------------------------


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, allowed: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by torch's scaled_dot_product_attention, all masks merged into one."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    bias = mask if floats(mask) else torch.zeros((), dtype=q.dtype)
    mask = torch.where(allowed, bias, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    some = allowed.any(-1)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    score = factor * (q.to(wide) @ k.to(wide).transpose(-2, -1)) + mask.to(wide)
    score = torch.where(some[..., None], score, 0)
    lse = torch.where(some, score.logsumexp(-1), 0)
    if q.dtype.itemsize == 2 and lse.numel():  # the value of torch's fused kernel, which rounds more
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        value = fused(q.detach(), k.detach(), k.detach(), attn_mask=mask.detach(), scale=scale)[1]
        lse = lse + (torch.where(some, value, 0) - lse).detach()
    # torch's own gradients of rows without keys may be NaN
    return torch.where(some[..., None], out, 0), lse


def evaluate(
    call: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor | None], seed: int, rounded: torch.dtype
) -> Results:
    """out, lse (0 for -inf), and every gradient of a random linear function of both."""
    named = dict(zip(("q", "k", "v", "mask"), tensors, strict=True))
    return evaluate_named(
        lambda leaves: dict(zip(("out", "lse"), call(**leaves), strict=True)), named, seed, rounded
    )


def evaluate_named(
    call: Callable[[dict[str, Any]], dict[str, Tensor]],
    tensors: dict[str, Tensor | None],
    seed: int,
    rounded: torch.dtype,
) -> Results:
    """The outputs of call(leaves), by name, and the gradients of a random linear function of all of them."""
    leaves = {n: t.detach().requires_grad_() if floats(t) else t for n, t in tensors.items()}
    outputs = call(leaves)
    generator = torch.Generator().manual_seed(seed)
    cotangents = []
    for y in outputs.values():
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(rounded).to(y.dtype)
        cotangents.append(dy.masked_fill(y.isinf(), 0))
    wanted = {n: t for n, t in leaves.items() if floats(t)}
    grads = torch.autograd.grad(
        list(outputs.values()), list(wanted.values()), cotangents, materialize_grads=True
    )
    found = {name: y.detach().masked_fill(y == -math.inf, 0) for name, y in outputs.items()}
    return found | {f"d {name}": g for name, g in zip(wanted, grads, strict=True)}


def floats(t: Tensor | None) -> bool:
    return t is not None and t.dtype.is_floating_point


def doubled(tensors: Any) -> Any:
    """In float64, of a list or a dict."""
    if isinstance(tensors, dict):
        return {name: doubled([t])[0] for name, t in tensors.items()}
    return [t.detach().double() if floats(t) else t for t in tensors]


def errors_nearby(
    call: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor | None]
) -> dict[str, float]:
    named = dict(zip(("q", "k", "v", "mask"), tensors, strict=True))
    return errors_nearby_named(lambda leaves: dict(zip(("out", "lse"), call(**leaves), strict=True)), named)


def errors_nearby_named(
    call: Callable[[dict[str, Any]], dict[str, Tensor]], tensors: dict[str, Tensor | None]
) -> dict[str, float]:
    """torch's largest error in each result of NEARBY draws in which the inputs move by an ulp."""
    dtype = next(t.dtype for t in tensors.values() if floats(t))
    working = torch.float32 if dtype is torch.float64 else dtype
    eps = torch.finfo(working).eps
    generator = torch.Generator().manual_seed(2)
    largest: dict[str, float] = {}

    def nudged(t: Tensor | None) -> Tensor | None:
        if not floats(t):
            return t
        signs = torch.randint(0, 2, t.shape, generator=generator) * 2.0 - 1
        return (t.detach().double() * (1 + signs.double() * eps)).to(working)

    for seed in range(NEARBY):
        moved = {name: nudged(t) for name, t in tensors.items()}
        exact = evaluate_named(call, doubled(moved), seed, working)
        for name, y in evaluate_named(call, moved, seed, working).items():
            error = (y.double() - exact[name]).abs().max().item() if y.numel() else 0.0
            largest[name] = max(largest.get(name, 0.0), error * torch.finfo(dtype).eps / eps)
    return largest


@contextlib.contextmanager
def math_kernel() -> Iterator[None]:
    """torch's literal formula."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


# ---- which cases -------------------------------------------------------------------------------------------

MASKS = ("no", "no", *(f"{kind}.{pattern}" for kind in ("bool", "float", "inf") for pattern in PATTERNS))
FACTORS: dict[str, tuple] = dict(
    heads=((1, 0), (2, 0), (4, 2), (6, 1)),
    mask=MASKS,
    right=(-1, 0, 3),
    left=(-1, 0, 5),
    alignment=("top_left", "bottom_right"),
    keys=PADDING,
    queries=PADDING,
    strides=("BNLE", "BLNE", "LBNE", "BNEL", "odd", "0"),
    scale=(None, 1.0, 0.1),
    B=(1, 3, 5),
)


def legal(row: dict[str, Any]) -> Case:
    """The nearest case that means something."""
    row = dict(row)
    N, Nk = row.pop("heads", (2, 0))
    if row.get("strides") == "0":  # one row's values for all, padding included
        row |= dict(keys="all", queries="all")
    if row.get("scale") == 1.0 and row["dtype"] in (torch.float16, torch.bfloat16):
        row["scale"] = None
    return Case(N=N, Nk=Nk, **row)


def sample() -> list[Case]:
    """The default run: in small sizes each pair of options or dtypes; in float32 each pair of sizes."""
    small = dict(L=(1, 5, 17), S=(1, 7, 17), E=(1, 8, 40), Ev=(0, 3), dtype=tuple(SHORT))
    sizes = dict(L=SIZES, S=SIZES, E=(1, 8, 40, 64, 100, 256), Ev=(0, 24))
    some = {name: FACTORS[name] for name in ("heads", "right", "keys", "strides")}
    rows = pairwise(FACTORS | small) + pairwise(sizes | some | dict(dtype=(torch.float32, torch.bfloat16)))
    return unique(legal(row) for row in rows)


def wide() -> list[Case]:
    """Slow: more draws of the same."""
    large = dict(L=SIZES, S=SIZES, E=(1, 8, 40, 64, 100, 256), Ev=(0, 24), dtype=tuple(SHORT))
    return unique(
        replace(legal(row), seed=seed) for seed in range(1, 5) for row in pairwise(FACTORS | large, seed)
    )


def blocks() -> list[Case]:
    """Several blocks of scores to a piece, and pieces of several rows."""
    base = dict(B=2, N=2, E=16)
    return [
        Case(**base, L=300, S=1100, keys="holes"),
        Case(**base, L=300, S=1100, left=64, right=64),
        Case(**base, L=300, S=1100, left=100, right=0, alignment="bottom_right", mask="float.LS"),
        Case(**base, L=300, S=1100, mask="inf.BNLS", Ev=8),
        Case(**base, L=1100, S=300, right=0, mask="bool.NLS"),
        Case(**base, L=1100, S=300, right=0, alignment="bottom_right"),
        Case(B=2, N=6, Nk=2, L=130, S=1100, E=8, mask="float.B11S"),
        Case(B=2, N=6, Nk=1, L=33, S=1100, E=8, right=0, alignment="bottom_right", keys="lengths"),
        Case(B=6, N=2, L=40, S=50, E=8, keys="lengths", queries="lengths", right=0, seed=3),
        Case(**base, L=300, S=1100, keys="left", queries="right", left=70, right=9, dtype=torch.bfloat16),
    ]


def poison(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """NaN and infinities in padded queries, keys and values, which nothing may read."""
    if case.strides == "0":
        return tensors
    found = []
    for t, what in zip(tensors, ("queries", "keys", "keys"), strict=True):
        t = t.clone() if not t.is_contiguous() and t.numel() == 0 else t
        valid = case.valid(what)[:, None, :, None].expand(t.shape)
        junk = torch.tensor([math.nan, math.inf, -math.inf], dtype=t.dtype)[torch.arange(t.shape[-1]) % 3]
        with torch.no_grad():
            t.copy_(torch.where(valid, t, junk))
        found.append(t)
    return found


def cleaned(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """Zeros in padding: for torch."""
    return [
        torch.where(case.valid(what)[:, None, :, None], t, 0)
        for t, what in zip(tensors, ("queries", "keys", "keys"), strict=True)
    ]


def ours(case: Case, **more: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """seqkern's call of q, k, v and attn_mask."""
    options = case.options() | more

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return seqkern.scaled_dot_product_attention(q, k, v, mask, return_lse=True, **options)

    return call
