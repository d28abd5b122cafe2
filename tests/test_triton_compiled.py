"""The Triton attention kernels compiled ahead of time, without a GPU: registers, spills and shared memory.

Every kernel that a specialisation launches is compiled by Triton and its ptxas with the table's configs, in a
process
without the interpreter, and held to the figures recorded for this Triton version in
tests/triton_resources.json.
After a change that is meant:

    python tests/test_triton_compiled.py --record          all figures of the installed Triton version, some
    10 minutes
    python tests/test_triton_compiled.py --record --only "sm_90 E64"      those whose names begin so

Run as a program with other arguments it compiles what they name and prints the figures as JSON.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

RECORDED = Path(__file__).with_name("triton_resources.json")
SHARED_KIB = {
    80: 163,
    86: 99,
    90: 227,
    100: 227,
}  # of one block; 86 stands for machines without a table of their own
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
KERNELS = ("forward", "weights", "delta", "dkdv", "dq", "dbias", "key_tiles")


@dataclass(frozen=True)
class Spec:
    """One specialisation. `what`: plain, causal, window, lengths, mask (of keys and queries, causal), add or
    bool (bias),
    dropout, weights (averaged, with their gradient, causal), packed (causal); additive (attention; E is H;
    keys masked)."""

    arch: int
    E: int
    what: str
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"sm_{self.arch} E{self.E} {self.what} {self.dtype}"


WHATS = ("plain", "causal", "window", "lengths", "mask", "add", "bool", "dropout", "weights", "packed")
FEWER = ("causal", "mask", "add", "dropout", "weights")
SAMPLE = [
    Spec(80, 128, "causal"),
    Spec(90, 64, "causal"),
    Spec(90, 64, "mask"),
    Spec(90, 128, "causal"),
    Spec(90, 128, "weights"),
    Spec(100, 64, "causal"),
    Spec(90, 512, "additive"),
]
EVERY = list(
    dict.fromkeys(
        [
            *SAMPLE,
            *itertools.starmap(Spec, itertools.product((90,), (64, 96, 128, 256), WHATS)),
            *itertools.starmap(Spec, itertools.product((80, 100), (64, 96, 128, 256), FEWER)),
            *(
                Spec(86, E, what)
                for E, what in itertools.product((64, 128, 256), ("causal", "weights", "add"))
            ),
            *(Spec(90, E, "causal", "fp16") for E in (64, 128)),
            *(Spec(90, E, "weights", "fp32") for E in (64, 128, 256)),
            *(Spec(arch, 128, "add", "fp32") for arch in (80, 86)),
            *(Spec(90, E, "causal", "tf32") for E in (64, 128)),
            *itertools.starmap(
                Spec, itertools.product((80, 90, 100), (512,), ("additive",), ("bf16", "fp32"))
            ),
        ]
    )
)


def compile_spec(spec: Spec) -> dict[str, dict[str, int]]:
    """Registers, bytes spilled and bytes of shared memory of each kernel that the specialisation launches."""
    from seqkern.triton import config

    config.machine = lambda device: spec.arch if spec.arch != 86 else 0
    figures = {}
    for kernel, arguments in launches(spec):
        name = kernel.__name__.removeprefix("attention_").removesuffix("_kernel")
        figures[name] = compile_kernel(kernel, arguments, spec.arch)
    return figures


def launches(spec: Spec) -> list[tuple[Any, dict[str, Any]]]:
    """What the launchers would launch on tensors without memory: (kernel, arguments by name)."""
    from seqkern.triton import additive, attention, backward, forward, tiles, weights

    recorded: list[tuple[Any, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.recorded = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names = self.recorded.arg_names
            return lambda *args, **kwargs: recorded.append(
                (self.recorded, dict(zip(names, args, strict=False)) | kwargs)
            )

    for module in (additive, forward, weights, backward, tiles):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                setattr(module, name, Recorder(getattr(value, "recorded", value)))
    attention.precision = lambda q: "tf32" if spec.dtype == "tf32" else "ieee"

    def empty(*shape: int, dtype: torch.dtype = DTYPES[spec.dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if spec.what == "additive":
        q, k, v = empty(64, 32, spec.E), empty(64, 128, spec.E), empty(spec.E)
        valid = empty(64, 128, dtype=torch.bool)
        context, w = additive.additive_forward(q, k, v, k, valid, None)
        additive.additive_backward(context, w, q, k, v, k, valid, None, w, True, True, True, True)
        return recorded
    B, N, L, E = 4, 16, 2048, spec.E
    q, k, v = (empty(B, L, N, E).transpose(1, 2) for _ in "qkv")
    options: dict[str, Any] = dict.fromkeys(
        ("bias", "key_valid", "key_lengths", "query_valid", "query_lengths", "cu_q", "cu_k")
    )
    options |= dict(
        max_q=0, max_k=0, seed=None, scale=0.125, left=-1, right=-1, bottom_right=False, dropout_p=0.0
    )
    match spec.what:
        case "window":
            options |= dict(left=128, right=128)
        case "lengths":
            options |= dict.fromkeys(("key_lengths", "query_lengths"), empty(B, dtype=torch.int64))
        case "mask":
            options |= dict.fromkeys(("key_valid", "query_valid"), empty(B, L, dtype=torch.bool)) | dict(
                right=0
            )
        case "add":
            options |= dict(bias=empty(1, N, L, L))
        case "bool":
            options |= dict(bias=empty(1, 1, L, L, dtype=torch.bool))
        case "dropout":
            options |= dict(seed=empty(1, dtype=torch.int64), dropout_p=0.1)
        case "packed":
            q, k, v = (empty(B * L, N, E) for _ in "qkv")
            options |= dict.fromkeys(("cu_q", "cu_k"), empty(B + 1, dtype=torch.int32)) | dict(
                max_q=L, max_k=L, right=0
            )
        case "causal" | "weights":
            options |= dict(right=0)
    rest = tuple(options.values())
    out, lse = attention.attention_forward(q, k, v, *rest)
    dw = None
    if spec.what == "weights":
        dw = attention.attention_weights(q, k, *rest, lse, True)
    needs = (True, True, True, spec.what == "add")
    attention.attention_backward(torch.empty_like(out), None, dw, True, out, lse, q, k, v, *rest, *needs)
    return recorded


def compile_kernel(kernel: Any, arguments: dict[str, Any], arch: int) -> dict[str, int]:
    """As Triton's launcher would specialise it: 1 is a constant, multiples of 16 are known as such."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    types |= {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    assert set(arguments) == set(kernel.arg_names), set(arguments) ^ set(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, name = arguments[parameter.name], parameter.name
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = "*" + types[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = log.getvalue()
    assert compiled.asm["cubin"], kernel.__name__
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    return dict(
        registers=int(registers[1]), spilled=int(spills[1]) + int(spills[2]), shared=compiled.metadata.shared
    )


def compile_in_a_process(specs: list[Spec]) -> dict[str, dict[str, dict[str, int]]]:
    """compile_spec of each, by its name, in a fresh Python without the interpreter and with Triton's own
    ptxas."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    with tempfile.TemporaryDirectory() as cache:
        environment |= dict(TRITON_CACHE_DIR=cache, TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")
        done = subprocess.run(
            [sys.executable, __file__, *map(str, specs)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def version() -> str:
    import triton

    return f"triton {triton.__version__}"


def check(specs: list[Spec]) -> None:
    """No kernel wants more shared memory than there is, nor more of anything than was recorded."""
    pytest.importorskip("triton", reason="triton is not installed")
    recorded = json.loads(RECORDED.read_text()).get(version(), {})
    complaints = []
    for name, kernels in compile_in_a_process(specs).items():
        limit = SHARED_KIB[int(name.split()[0].removeprefix("sm_"))] * 1024
        for kernel, got in kernels.items():
            if got["shared"] > limit:
                complaints.append(f"{name}: {kernel}: shared memory {got['shared']} > {limit}")
            expected = recorded.get(name, {}).get(kernel)
            if expected is None and recorded:
                complaints.append(f"{name}: {kernel}: no figures recorded, got {got}")
            elif recorded and any(got[what] > expected[what] for what in got):
                complaints.append(f"{name}: {kernel}: got {got}, recorded {expected}")
    assert not complaints, "\n".join(complaints)
    if not recorded:
        pytest.skip(f"compiled within the limits; no figures recorded for {version()} in {RECORDED.name}")


@pytest.mark.parametrize("arch", sorted({spec.arch for spec in SAMPLE}), ids="sm_{}".format)
def test_sample(arch: int) -> None:
    check([spec for spec in SAMPLE if spec.arch == arch])


REST = [spec for spec in EVERY if spec not in SAMPLE]
GROUPS = sorted({(spec.arch, spec.E) for spec in REST})


@pytest.mark.slow
@pytest.mark.parametrize("arch, E", GROUPS, ids=[f"sm_{arch}-E{E}" for arch, E in GROUPS])
def test_every(arch: int, E: int) -> None:
    check([spec for spec in REST if (spec.arch, spec.E) == (arch, E)])


def test_nothing_spills_where_it_matters() -> None:
    """The recorded figures themselves: sm_90, 16 bit, E 64 and 128, whatever masks, windows and padding."""
    recorded = json.loads(RECORDED.read_text())
    for triton_version, figures in recorded.items():
        for E, what, kernel in itertools.product(
            (64, 128), ("plain", "causal", "lengths", "mask"), ("forward", "dkdv", "dq")
        ):
            spilled = figures[str(Spec(90, E, what))][kernel]["spilled"]
            assert spilled == 0, f"{triton_version}: {Spec(90, E, what)}: {kernel} spills {spilled} bytes"


def record(only: str) -> None:
    """Overwrites the figures of the specs whose names begin with `only`; a process per machine and head
    dim."""
    chosen = [spec for spec in EVERY if str(spec).startswith(only)]
    for group in sorted({(spec.arch, spec.E) for spec in chosen}):
        got = compile_in_a_process([spec for spec in chosen if (spec.arch, spec.E) == group])
        known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        known[version()] = known.get(version(), {}) | got
        blocks = []
        for one in sorted(known):
            lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(known[one].items())]
            blocks.append(f" {json.dumps(one)}: {{\n" + ",\n".join(lines) + "\n }")
        RECORDED.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
        print(f"sm_{group[0]} E{group[1]}: {len(got)} recorded", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("specs", nargs="*")
    given = parser.parse_args()
    if given.record:
        record(given.only)
    else:
        by_name = {str(spec): spec for spec in EVERY}
        print(json.dumps({name: compile_spec(by_name[name]) for name in given.specs}))
