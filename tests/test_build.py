"""The install: what is loaded, what is not, and what happens without an extension or with a wrong one."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

import seqkern
from seqkern import _extension

PACKAGE = Path(seqkern.__file__).parent
ROOT = Path(__file__).parent.parent
EXTENSION = next(iter(_extension.find_extensions(PACKAGE)), None)
KERNELS = PACKAGE / "libseqkern_kernels.so"

needs_extension_file = pytest.mark.skipif(EXTENSION is None, reason="seqkern was built without its extension")


def python(code: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh Python; `path` comes before every installed package."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, text=True, capture_output=True, timeout=300
    )
    assert run.returncode == 0, f"{code}\n{run.stdout}\n{run.stderr}"
    return run


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A directory with seqkern's Python files and no extension."""
    shutil.copytree(PACKAGE, tmp_path / "seqkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def extension_for(minor: str) -> bytes:
    """The extension, as if built for another torch, 2.`minor`, two digits as this one's."""
    built_for = _extension.built_for(EXTENSION)
    other = f"{built_for[: built_for.index('.')]}.{minor}" + built_for[built_for.index(".") + 3 :]
    assert len(other) == len(built_for), "written over the mark, in place"
    content = EXTENSION.read_bytes()
    mark = f"seqkern was built for torch={built_for}".encode()
    assert content.count(mark) == 1
    return content.replace(mark, f"seqkern was built for torch={other}".encode())


@pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "c++")) and shutil.which("cmake")),
    reason="no C++ compiler or no CMake on PATH",
)
def test_extension_is_there_where_it_can_be_built() -> None:
    assert _extension.AVAILABLE, _extension.WHY_NOT


@needs_extension_file
def test_extension_file_names_its_torch() -> None:
    built_for = _extension.built_for(EXTENSION)
    assert built_for is not None
    assert built_for.split(".")[:2] == torch.__version__.split(".")[:2]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_one_openmp_runtime(tmp_path: Path) -> None:
    """Two runtimes would be two thread pools that fight for the cores."""
    libraries = python(
        "import seqkern, torch; torch.ones(300, 300) @ torch.ones(300, 300)\n"
        "files = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "print('\\n'.join(f for f in files if any(n in f for n in ('libgomp', 'libiomp', 'libomp'))))",
        cwd=tmp_path,
    ).stdout.split()
    assert len(libraries) == 1, libraries


def test_import_loads_no_heavy_package(tmp_path: Path) -> None:
    """Nor does attention on a CPU."""
    python(
        "import sys, torch; before = set(sys.modules); import seqkern\n"
        "x = torch.randn(1, 2, 3, 4, requires_grad=True)\n"
        "seqkern.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.1).sum().backward()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = new & {'triton', 'matplotlib', 'tokenizers', 'transformers', 'pandas', 'hypothesis'}\n"
        "assert not heavy, heavy\n"
        "users = {f'seqkern.{name}' for name in ('models', 'text', 'train')} & set(sys.modules)\n"
        "assert not users, users",
        cwd=tmp_path,
    )


# What a user's program is told of the types, torch itself being unknown to the checker: Any.
TYPED = """
import torch
from torch import Tensor
from typing_extensions import assert_type

import seqkern
from seqkern import models, text

States = tuple[Tensor, Tensor]
x = torch.randn(5, 2, 8)

lstm = seqkern.LSTM(8, 8, batch_first=True, zoneout=0.1)
assert_type(lstm(x), tuple[Tensor, States])
assert_type(lstm.forward(x, lengths=torch.tensor([5, 2])), tuple[Tensor, States])
assert_type(seqkern.GRU(8, 8, reset_after=False)(x), tuple[Tensor, Tensor])
assert_type(seqkern.RNN(8, 8, nonlinearity="relu")(x), tuple[Tensor, Tensor])
assert_type(seqkern.LSTMCell(8, 8)(x[0], (x[0], x[0])), States)
assert_type(seqkern.PeepholeLSTM(8, 8)(x)[0], Tensor)

attention, cache = seqkern.MultiHeadAttention(8, 2, num_kv_heads=1), seqkern.KeyValueCache()
assert_type(attention(x, x, x), tuple[Tensor, Tensor | None])
assert_type(attention(x, x, x, cache=cache), tuple[Tensor, Tensor | None, seqkern.KeyValueCache])
layer = seqkern.TransformerEncoderLayer(8, 2, activation="gelu")
assert_type(layer(x, is_causal=True), Tensor)
assert_type(layer(x, cache=cache), tuple[Tensor, seqkern.KeyValueCache])
stack = seqkern.TransformerDecoder(seqkern.TransformerDecoderLayer(8, 2), 2)
assert_type(stack(x, None, cache=stack.new_cache()), tuple[Tensor, seqkern.TransformerCache])

assert_type(seqkern.scaled_dot_product_attention(x, x, x, is_causal=True), Tensor)
assert_type(seqkern.scaled_dot_product_attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])

crf = seqkern.CRF(3, constraints=seqkern.bio_constraints(["O", "B-PER", "I-PER"]))
assert_type(crf.decode(x), list[list[int]])
assert_type(crf.decode(x, return_scores=True), tuple[list[list[int]], Tensor])
assert_type(crf.decode(x, nbest=2, return_scores=True), tuple[Tensor, Tensor])

attend, decoder = seqkern.LuongAttention(8), seqkern.AttentionDecoder(8, 8)
assert_type(attend(x, x), tuple[Tensor, Tensor])
assert_type(decoder(x, x), tuple[Tensor, seqkern.DecoderState, Tensor, Tensor])

vocabulary = text.Vocabulary.build([["a", "b"]])
assert_type(vocabulary.encode(["a"]), list[int])
assert_type(models.scheduled_sampling(1, 10), float)
tagger = models.BiLSTMCRF(len(vocabulary), 3, 8, 8)
with seqkern.patch(), seqkern.use_backend("cpu"):
    report = seqkern.replace(tagger)
assert_type(report.changed, list[tuple[str, str, str]])
assert_type(seqkern.compile(tagger), models.BiLSTMCRF)
assert_type(seqkern.info().backends["cpu"], str | None)
assert_type(seqkern.plan("lstm", steps=9, batch=2, hidden=8), str)
"""
# Each line is wrong, and what the checker must call it stands behind it.
MISTYPED = """
import seqkern
from seqkern import models, text
from torch import Tensor
x = Tensor()
seqkern.LSTM(3, "4")  # arg-type
seqkern.GRU(3, 4, zoneot=0.1)  # call-arg
seqkern.LSTM(3, 4)(x, length=x)  # call-overload
y: int = seqkern.GRU(3, 4)(x)  # assignment
print(seqkern.KeyValueCache().size)  # attr-defined
seqkern.scaled_dot_product_attention(x, x, x, causal_alignment=1)  # call-overload
seqkern.CRF("5")  # arg-type
seqkern.CRF(5).decode(x)[0].lower()  # attr-defined
seqkern.use_backend(3)  # arg-type
seqkern.replace()  # call-arg
models.RNNTagger(9, 3, 8, "8")  # arg-type
text.Vocabulary.build([[1]])  # list-item
"""


def test_types_reach_the_user(package_copy: Path) -> None:
    """The package as installed, beside no torch: a second instead of twenty."""
    pytest.importorskip("mypy")
    venv.create(package_copy / "venv", symlinks=True)
    (site,) = package_copy.glob("venv/lib/python*/site-packages")
    shutil.move(package_copy / "seqkern", site)
    (package_copy / "right.py").write_text(TYPED)
    (package_copy / "wrong.py").write_text(MISTYPED)
    (package_copy / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-torch.*]\nignore_missing_imports = true\n"
    )
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context"),
            *("--python-executable", "venv/bin/python", "right.py", "wrong.py"),
        ],
        cwd=package_copy,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")},
        text=True,
        capture_output=True,
    )
    errors = [line for line in run.stdout.splitlines() if ": error: " in line]
    found = {(error.split(": error: ")[0], error.rpartition("[")[2].rstrip("]")) for error in errors}
    wanted = {
        (f"wrong.py:{number}", line.partition("  # ")[2])
        for number, line in enumerate(MISTYPED.splitlines(), 1)
        if "  # " in line
    }
    assert found == wanted, run.stdout + run.stderr


def exported(library: Path) -> set[str]:
    listing = subprocess.run(
        ["nm", "-D", "-C", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split(maxsplit=2)[2] for line in listing.splitlines() if len(line.split(maxsplit=2)) == 3}


@needs_extension_file
@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_libraries_export_little() -> None:
    """A symbol that is visible to other libraries could be replaced by theirs, or replace theirs."""
    extension, kernels = exported(EXTENSION), exported(KERNELS)
    assert "PyInit__C" in extension
    ours = [name for name in extension if "seqkern" in name or name.startswith(("cuda", "cu"))]
    assert not ours, ours
    assert "seqkern::kernels()" in kernels
    loud = [
        name
        for name in kernels
        if name.startswith(("cuda", "cu"))
        or any(f"seqkern::{isa}::" in name for isa in seqkern.info().build["instruction_sets"])
    ]
    assert not loud, loud


@needs_extension_file
def test_of_several_extensions_the_one_for_this_torch_is_loaded(package_copy: Path) -> None:
    suffix = EXTENSION.name.removeprefix("_C")
    shutil.copy(KERNELS, package_copy / "seqkern")
    for number, content in enumerate((extension_for("98"), EXTENSION.read_bytes(), extension_for("99"))):
        (package_copy / "seqkern" / f"_C_{number}{suffix}").write_bytes(content)
    run = python(
        "import seqkern, torch\n"
        "seqkern.GRU(3, 4)(torch.randn(5, 2, 3))\n"
        "print(*(line.split()[-1] for line in open('/proc/self/maps') if '/seqkern/' in line), sep='\\n')",
        cwd=package_copy,
        path=package_copy,
    )
    assert run.stderr == ""
    loaded = {Path(file).name for file in run.stdout.split()}
    assert loaded == {f"_C_1{suffix}", KERNELS.name}


def test_without_extension_it_says_so_once_and_works(package_copy: Path) -> None:
    run = python(
        "import seqkern, seqkern.info, torch\n"
        "print(seqkern.__file__)\n"
        "y, h = seqkern.GRU(3, 4)(torch.randn(5, 2, 3))\n"
        "assert y.shape == (5, 2, 4) and h.shape == (1, 2, 4)\n"
        "attention, x = seqkern.MultiHeadAttention(8, 2), torch.randn(5, 2, 8, requires_grad=True)\n"
        "with seqkern.use_backend('cpu'):  # attention's is Python\n"
        "    attention(x, x, x, lengths=torch.tensor([5, 2]), is_causal=True)[0].sum().backward()\n"
        "assert seqkern.info().backends['cpu'], 'must say why'\n"
        "print(seqkern.info())",
        cwd=package_copy,
        path=package_copy,
    )
    assert run.stdout.startswith(str(package_copy)), run.stdout
    warning = "UserWarning: seqkern runs on its eager backend only: no compiled extension"
    assert run.stderr.count(warning) == 1, run.stderr
    assert "extension   not used: no compiled extension" in run.stdout


@needs_extension_file
def test_extension_for_another_torch_is_left_out(package_copy: Path) -> None:
    (package_copy / "seqkern" / EXTENSION.name).write_bytes(extension_for("99"))

    found = ".".join(torch.__version__.split(".")[:2])
    why_not = f"built for torch 2.99, found {found}: reinstall seqkern"
    run = python(
        "import seqkern, sys, torch\n"
        "assert 'seqkern._C' not in sys.modules\n"
        "print(seqkern.info().backends['cpu'])\n"
        "try:\n"
        "    with seqkern.use_backend('cpu'):\n"
        "        seqkern.GRU(3, 4)(torch.randn(5, 2, 3))\n"
        "except (RuntimeError, ValueError) as error:\n"
        "    print(error)",
        cwd=package_copy,
        path=package_copy,
    )
    assert run.stderr.count(f"seqkern runs on its eager backend only: {why_not}") == 1, run.stderr
    info_line, *error_lines = run.stdout.splitlines()
    assert info_line == why_not
    assert why_not in " ".join(error_lines), "a backend that the caller names says why it cannot run"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` gives beside the wheel, of the files that git knows, unpacked."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).exists():  # it may be deleted, and not yet committed so
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=checkout, check=True, capture_output=True)
    (archive,) = checkout.glob("dist/*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(checkout / "unpacked", filter="data")
    (unpacked,) = (checkout / "unpacked").iterdir()
    return unpacked


def test_sdist_is_complete(sdist: Path) -> None:
    """Every file of the project but git's own and CI's."""
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    checkout = sdist.parents[1]
    wanted = {
        path.relative_to(checkout).as_posix()
        for path in checkout.rglob("*")
        if path.is_file()
        and path.relative_to(checkout).parts[0] not in ("unpacked", "dist", "seqkern.egg-info")
    }
    assert wanted - found == {".gitignore", ".ci/run"}
    assert {name for name in found - wanted if not name.startswith("seqkern.egg-info/")} == {
        "PKG-INFO",
        "setup.cfg",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("SEQKERN_EXTENSION", "off", "SEQKERN_EXTENSION=off"),
        ("CXX", "/nowhere/c++", "CMake found no way to build them here"),
    ],
    ids=["switched off", "no compiler"],
)
def test_install_without_extension(
    variable: str, value: str, reason: str, sdist: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-v", "--no-index"]
    pip += ["--no-deps", "--no-build-isolation", "--target", str(target), str(sdist)]
    install = subprocess.run(pip, env={**os.environ, variable: value}, text=True, capture_output=True)
    log = install.stdout + install.stderr
    assert install.returncode == 0, log
    assert f"installed without its compiled kernels (eager backend only): {reason}" in log
    assert not list((target / "seqkern").glob("*.so"))
    assert (target / "seqkern" / "py.typed").is_file()
    run = python(
        "import seqkern, torch; print(seqkern.__file__)\n"
        "print(seqkern.LSTM(3, 4)(torch.randn(5, 2, 3))[0].shape)\n"
        "x = torch.randn(5, 2, 8); print(seqkern.MultiHeadAttention(8, 2)(x, x, x)[0].shape)",
        cwd=target,
        path=target,
    )
    where, *shapes = run.stdout.splitlines()
    assert where == str(target / "seqkern" / "__init__.py")
    assert shapes == ["torch.Size([5, 2, 4])", "torch.Size([5, 2, 8])"]
