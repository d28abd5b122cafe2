"""The persistent CUDA kernels as nvcc compiled them: registers and stack, without a GPU.

W lies in registers all through a kernel, so a kernel that spills (its stack holds nothing else) reads local
memory at every step. Held to the figures recorded for this nvcc in tests/cuda_resources.json. After a change
that is meant:

    python tests/test_cuda_compiled.py
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from seqkern import _extension

KERNELS = Path(_extension.__file__).with_name("libseqkern_kernels.so")
RECORDED = Path(__file__).with_name("cuda_resources.json")
PRODUCTS = ("f16", "bf16", "tf32", "tf32x3")
KERNEL = re.compile(
    r"Function _ZN7seqkern4cuda\d+(?P<way>forward|backward)_kernelINS(?P<regular>0_7RegularINS)?\S*?"
    r"\d(?P<cell>Lstm|Gru|Rnn|PeepholeLstm|CifgLstm|Slstm|GruResetBefore|Mgu|NestedLstm|NestedGru|"
    r"NormalisedLstm|NormalisedGru)Cell\S*?"
    r"LNS0_7ProductE(?P<product>\d)ELb(?P<grid>[01])ELb(?P<projected>[01])ELi(?P<items>\d)E\S*:"
    r"\s*REG:(?P<registers>\d+) STACK:(?P<stack>\d+)"
)


def cuobjdump() -> str | None:
    """The program that reads compiled kernels: the toolkit's, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.is_file() else None


def resources(library: Path) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack by "sm_90a lstm forward bf16 grid 1": the last, pairs per thread."""
    program = cuobjdump()
    assert program is not None
    run = subprocess.run(
        [program, "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    )
    found = {}
    for part in run.stdout.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", part)
        assert arch is not None
        for k in KERNEL.finditer(part):
            exchange = "grid" if k["grid"] == "1" else "shared"
            cell = re.sub(r"(?<!^)([A-Z])", r"_\1", k["cell"]).lower()
            cell += " regularised" if k["regular"] else " projected" if k["projected"] == "1" else ""
            name = f"{arch[1]} {cell} {k['way']} {PRODUCTS[int(k['product'])]} {exchange} {k['items']}"
            found[name] = {"registers": int(k["registers"]), "stack": int(k["stack"])}
    return found


def compiler() -> str:
    assert _extension._C is not None
    return f"nvcc {_extension._C.build_info()['cuda']}"


def built() -> Path:
    """The library of kernels, or a skip that says what is missing."""
    if _extension._C is None:
        pytest.skip(f"no extension: {_extension.WHY_NOT}")
    if not _extension._C.build_info()["cuda"]:
        pytest.skip("the extension was built without nvcc")
    if cuobjdump() is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    return KERNELS


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    found = resources(built())
    archs = {name.split()[0] for name in found}
    assert {"sm_80", "sm_90a"} <= archs
    cells, ways = ("lstm", "lstm projected", "gru", "rnn"), ("forward", "backward")
    exchanges = ("shared", "grid")
    expected = {
        f"{arch} {cell} {way} {product} {exchange} {items}"
        for arch in archs
        for cell in cells
        for way in ways
        for product in PRODUCTS
        for exchange in exchanges
        for items in (1, 2)
    }
    # Those that regularise are fewer: launch.cuh.
    names = (
        *("lstm", "gru", "rnn", "peephole_lstm", "cifg_lstm", "slstm"),
        *("gru_reset_before", "mgu", "nested_lstm", "nested_gru", "normalised_lstm", "normalised_gru"),
    )
    expected |= {
        f"{arch} {cell} regularised {way} {product} {exchange} 2"
        for arch in archs
        for cell in names
        for way in ways
        for product in ("f16", "bf16", "tf32x3")
        for exchange in exchanges
    }
    assert found.keys() == expected


def test_registers_and_stack_are_as_recorded() -> None:
    found = resources(built())
    recorded = json.loads(RECORDED.read_text())
    if compiler() not in recorded:
        pytest.skip(f"recorded for {', '.join(recorded)}; this is {compiler()}")
    assert found == recorded[compiler()]


def test_little_is_spilled() -> None:
    """A launch of 256 threads has 255 registers each; beyond them a few values of the gates may spill, W may
    not: a single fragment of it is 16 bytes in each of 5 to 16 chunks."""
    for name, figures in resources(built()).items():
        assert figures["registers"] <= 255
        assert figures["stack"] <= 128, f"{name}: {figures}"


def record() -> None:
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if _extension._C is None:
        sys.exit(f"no extension: {_extension.WHY_NOT}")
    recorded[compiler()] = dict(sorted(resources(KERNELS).items()))
    kernels = {
        nvcc: "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in figures.items()) + "\n }"
        for nvcc, figures in recorded.items()
    }
    text = ",\n".join(f" {json.dumps(nvcc)}: {figures}" for nvcc, figures in kernels.items())
    RECORDED.write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
    record()
