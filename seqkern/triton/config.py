"""In what tiles each attention kernel works: a table per machine, and the search for better entries.

A call looks up (kernel, machine, head dim, bits of the dtype, kind of mask), in this order: `override`, what
`tune` has stored for this GPU's model, TABLE. Nothing is timed during a call.
"""

import contextlib
import functools
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from seqkern.triton.tiles import INTERPRET

KERNELS = ("forward", "weights", "delta", "dkdv", "dq", "dbias")
KINDS = ("plain", "padding", "scores")  # none, lengths or a window; a padding mask; a bias, dropout or dW
BUCKETS = (32, 64, 96, 128, 256)  # of head dims
AGREE = {16: 2e-2, 32: 1e-2}  # how far a candidate's values may be from the table's, relative to the largest


@dataclass(frozen=True)
class Config:
    """BLOCK_L queries by BLOCK_S keys per tile, and what the compiler is told."""

    BLOCK_L: int
    BLOCK_S: int
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        return asdict(self)


# In the interpreter tiles are small, so that small inputs have several.
INTERPRETER = Config(32, 32)

# (machine, bits): kernel or "kernel kind": largest head dim: Config. Chosen without a GPU: the largest tiles
# for which ptxas spills nothing, or next to nothing, and shared memory holds the stages; `tune` knows better.
Table = dict[tuple[int, int], dict[str, dict[int, Config]]]
TABLE: Table = {
    (80, 16): {
        "forward": {64: Config(128, 64, 8, 3), 128: Config(64, 64, 4, 2), 256: Config(64, 64, 8, 2)},
        "forward scores": {64: Config(128, 64, 8, 2), 128: Config(64, 32, 4, 2), 256: Config(64, 32, 8, 2)},
        "weights": {128: Config(64, 64, 4, 2), 256: Config(64, 64, 8, 2)},
        "delta": {128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        "dkdv": {64: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        "dkdv padding": {128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        "dkdv scores": {128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        "dq": {64: Config(128, 64, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 2)},
        "dq scores": {64: Config(64, 64, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 2)},
        "dbias": {64: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 2)},
    },
    (90, 16): {
        "forward": {64: Config(128, 128, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
        "forward padding": {128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
        "forward scores": {128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        "weights": {64: Config(128, 128, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 64, 4, 2)},
        "delta": {128: Config(128, 64, 8, 2), 256: Config(64, 64, 8, 2)},
        "dkdv": {96: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        "dkdv padding": {128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 2)},
        "dkdv scores": {64: Config(64, 64, 8, 2), 128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 2)},
        "dq": {96: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        "dq scores": {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        "dbias": {128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 2)},
    },
    (100, 16): {
        "forward": {64: Config(128, 128, 8, 3), 128: Config(128, 128, 8, 2), 256: Config(128, 32, 8, 2)},
        "forward padding": {128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
        "forward scores": {128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
        "weights": {128: Config(128, 64, 8, 2), 256: Config(64, 64, 4, 2)},
        "delta": {128: Config(128, 64, 8, 2), 256: Config(64, 64, 8, 2)},
        "dkdv": {128: Config(64, 128, 8, 2), 256: Config(32, 64, 8, 2)},
        "dkdv scores": {128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 2)},
        "dq": {128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
        "dbias": {128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 2)},
    },
    # Any other machine: within 99 KiB of shared memory.
    (0, 16): {
        "forward": {128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
        "weights": {128: Config(64, 64, 4, 2), 256: Config(32, 64, 8, 2)},
        "delta": {128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 2)},
        "dkdv": {128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        "dq": {128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 2)},
        "dbias": {64: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 2)},
    },
    # float32: the same everywhere. In ieee precision products are sums in registers, which bound the tiles.
    (0, 32): {
        "forward": {64: Config(64, 32, 8, 2), 256: Config(16, 32, 8, 2)},
        "weights": {64: Config(64, 32, 8, 2), 256: Config(32, 32, 4, 2)},
        "delta": {64: Config(32, 32, 8, 2), 256: Config(16, 32, 8, 2)},
        "dkdv": {64: Config(32, 32, 8, 2), 128: Config(16, 32, 8, 2), 256: Config(16, 32, 8, 1)},
        "dq": {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 32, 8, 2)},
        "dbias": {64: Config(32, 32, 8, 2), 256: Config(16, 32, 8, 2)},
    },
}

_overrides: dict[str, Config] = {}


@contextlib.contextmanager
def override(**configs: Config) -> Iterator[None]:
    """Within, the kernels named (forward=Config(...)) work as told, in every thread. For tests and `tune`."""
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def lookup(kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype, kind: str) -> Config:
    """The Config of one launch. head_dim: the larger of E and Ev."""
    if kernel in _overrides:
        return _overrides[kernel]
    if INTERPRET:
        return INTERPRETER
    bits = min(32, dtype.itemsize * 8)
    if device.type == "cuda" and (entries := _stored()):
        stored = entries.get(key(kernel, torch.cuda.get_device_name(device), head_dim, bits, kind))
        if stored is not None:
            return stored
    return from_table(kernel, machine(device), head_dim, bits, kind)


def from_table(kernel: str, arch: int, head_dim: int, bits: int, kind: str) -> Config:
    """TABLE's entry: the machine's or any machine's, the kind's or any kind's, the smallest that holds the
    head dim."""
    rows = TABLE.get((arch, bits)) or TABLE[0, bits]
    row = rows.get(f"{kernel} {kind}") or rows[kernel]
    return row[min(size for size in row if size >= head_dim)]


@functools.cache
def machine(device: torch.device) -> int:
    """80, 90 or 100, the machines with an own table; 0, any other."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): 80, (9, 0): 90}.get((major, minor), 100 if major == 10 else 0)


# ---- what tune found ---------------------------------------------------------------------------------------


def default_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "seqkern" / "attention.json"


_path: Path | None = None


def use_tuned(path: str | os.PathLike[str] | None) -> None:
    """Take tuned configs from `path` from now on; None: from the default file."""
    global _path
    _path = None if path is None else Path(path)
    _stored.cache_clear()


@functools.cache
def _stored() -> dict[str, Config]:
    path = _path or default_path()
    try:
        return {name: Config(**entry["config"]) for name, entry in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"tuned configs in {path} cannot be read, the table's are used: {error!r}", stacklevel=2
        )
        return {}


def key(kernel: str, gpu: str, head_dim: int, bits: int, kind: str) -> str:
    """One line of the file; other Triton versions compile otherwise, so theirs are other lines."""
    bucket = min(size for size in BUCKETS if size >= head_dim)
    return f"{gpu} | triton {triton.__version__} | {kernel} | E <= {bucket} | {bits} bit | {kind}"


def store(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Adds entries to the file, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(known | entries, indent=1, sort_keys=True) + "\n")
    beside.replace(path)


# ---- the search --------------------------------------------------------------------------------------------


def candidates(kernel: str, arch: int, head_dim: int, bits: int) -> list[Config]:
    """What is worth a try; those that do not fit fail to launch and fall out."""
    sizes = (16, 32, 64) if bits == 32 else (32, 64, 128)
    configs = [Config(*one) for one in itertools.product(sizes, sizes, (4, 8), (1, 2, 3, 4))]
    limit = 128 * 128 if bits == 16 else 64 * 64
    return [c for c in configs if 16 * 32 <= c.BLOCK_L * c.BLOCK_S <= limit]


def tune(
    B: int,
    N: int,
    L: int,
    E: int,
    *,
    Nk: int | None = None,
    S: int | None = None,
    Ev: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    padding: float | None = None,
    bias: bool = False,
    dropout_p: float = 0.0,
    weights: bool = False,
    kernels: tuple[str, ...] | None = None,
    path: str | os.PathLike[str] | None = None,
    verbose: bool = False,
) -> dict[str, Config]:
    """Search the fastest configs for one problem on the current GPU, and store them for later lookups.

    Each candidate's values are first compared with the table's config (compilers err), and a wrong one is
    dropped.

    Args:
        B, N, L, E, Nk, S, Ev, dtype, causal, bias, dropout_p: the problem; Nk, S, Ev: by default N, L, E
        padding: share of the keys and queries that are padding, by a mask with right padding; None: no mask
        weights: with averaged weights and their gradient
        kernels: which of KERNELS; by default those that the problem runs
        path: the JSON file, by default ~/.cache/seqkern/attention.json (XDG_CACHE_HOME is heeded). This
            process goes on with it; later ones find a file elsewhere through `use_tuned(path)`
    Returns:
        the winner per kernel
    Raises:
        RuntimeError: without a CUDA device
    """
    if not torch.cuda.is_available() or INTERPRET:
        raise RuntimeError("tune: needs a CUDA device; torch sees none, or Triton interprets")
    from seqkern.triton import attention

    weights_of: Callable[..., torch.Tensor] = attention.attention_weights
    backward_of: Callable[..., tuple[torch.Tensor, ...]] = attention.attention_backward
    device = torch.device("cuda", torch.cuda.current_device())
    problem = make_problem(
        B, N, L, E, Nk or N, S or L, Ev or E, dtype, causal, padding, bias, dropout_p, device
    )
    without_v = (*problem[:2], *problem[3:])
    out, lse = attention.attention_forward(*problem)
    w = weights_of(*without_v, lse, True) if weights else None
    generator = torch.Generator(device).manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, device=device).to(dtype)
    dw = None if w is None else torch.randn(w.shape, generator=generator, device=device).to(dtype)

    def backward() -> list[torch.Tensor]:
        return list(backward_of(dout, None, dw, True, out, lse, *problem, True, True, True, bias))

    runs: dict[str, Callable[[], list[torch.Tensor]]] = dict.fromkeys(("delta", "dkdv", "dq"), backward)
    runs["forward"] = lambda: list(attention.attention_forward(*problem))
    if bias:
        runs["dbias"] = backward
    if weights:
        runs["weights"] = lambda: [weights_of(*without_v, lse, True)]
    bits, head_dim = min(32, dtype.itemsize * 8), max(E, Ev or E)
    file = Path(path) if path is not None else default_path()
    found, entries = {}, {}
    for kernel in kernels or tuple(runs):
        scores = bias or dropout_p > 0 or (weights and runs[kernel] is backward)
        kind = "scores" if scores else "padding" if padding is not None else "plain"
        first = from_table(kernel, machine(device), head_dim, bits, kind)
        others = [c for c in candidates(kernel, machine(device), head_dim, bits) if c != first]
        winner, times = search(kernel, runs[kernel], first, others, AGREE[bits], _time, verbose)
        found[kernel] = winner
        entries[key(kernel, torch.cuda.get_device_name(device), head_dim, bits, kind)] = dict(
            config=asdict(winner), ms=times[winner], table_ms=times[first], B=B, N=N, L=L, E=E
        )
    store(file, entries)
    use_tuned(path)
    return found


def search(
    kernel: str,
    run: Callable[[], list[torch.Tensor]],
    first: Config,
    others: list[Config],
    agree: float,
    time: Callable[[Callable[..., Any]], float],
    verbose: bool = False,
) -> tuple[Config, dict[Config, float]]:
    """The fastest config whose values agree with those of `first`, and every time measured."""
    with override(**{kernel: first}):
        expected = [x.clone() for x in run()]
        times = {first: time(run)}
    for config in others:
        with override(**{kernel: config}):
            try:
                got = run()
            except Exception as error:  # does not compile, or wants more shared memory than there is
                if verbose:
                    print(f"{kernel} {config}: {type(error).__name__}")
                continue
            if not all(map(functools.partial(near, agree=agree), got, expected)):
                if verbose:
                    print(f"{kernel} {config}: wrong values")
                continue
            times[config] = time(run)
            if verbose:
                print(f"{kernel} {config}: {times[config]:.4f} ms")
    return min(times, key=times.__getitem__), times


def near(x: torch.Tensor, expected: torch.Tensor, agree: float) -> bool:
    """Equal infinities, no NaN, and no difference beyond `agree` of the largest value."""
    if x.numel() == 0:
        return True
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(x), finite) or not torch.equal(x[~finite], expected[~finite]):
        return False
    x, expected = torch.where(finite, x, 0).float(), torch.where(finite, expected, 0).float()
    return bool((x - expected).abs().max() <= agree * expected.abs().max())


def make_problem(
    B: int,
    N: int,
    L: int,
    E: int,
    Nk: int,
    S: int,
    Ev: int,
    dtype: torch.dtype,
    causal: bool,
    padding: float | None,
    bias: bool,
    dropout_p: float,
    device: torch.device,
) -> tuple[Any, ...]:
    """Random tensors in the operators' order."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def valid(rows: int) -> torch.Tensor | None:
        if padding is None:
            return None
        shares = torch.linspace(max(0.0, 1 - 2 * padding), 1, B, device=device)  # 1 - padding on average
        return torch.arange(rows, device=device) < (shares[:, None] * rows).clamp(min=1)

    q, k, v = (
        normal(B, rows, heads, dim).transpose(1, 2)
        for rows, heads, dim in ((L, N, E), (S, Nk, E), (S, Nk, Ev))
    )
    seed = torch.tensor([1], device=device) if dropout_p > 0 else None
    added = normal(1, N, L, S) if bias else None
    right = 0 if causal else -1
    return (
        q,
        k,
        v,
        added,
        valid(S),
        None,
        valid(L),
        *[None] * 3,
        0,
        0,
        seed,
        E**-0.5,
        -1,
        right,
        False,
        dropout_p,
    )


def _time(run: Callable[..., Any]) -> float:
    return triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median")
