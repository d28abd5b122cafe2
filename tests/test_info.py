"""seqkern.info(), the command line, and how an extension that does not fit is recognised."""

import platform

import pytest
import torch

import seqkern
from seqkern import __main__ as command_line
from seqkern import _extension
from seqkern.info import Info
from seqkern.ops import _backend

needs_extension = pytest.mark.skipif(not _extension.AVAILABLE, reason=f"{_extension.WHY_NOT}")


def test_info_names_versions_and_backends() -> None:
    found = seqkern.info()
    assert found.seqkern == seqkern.__version__
    assert found.python == platform.python_version()
    assert found.torch.startswith(f"{torch.__version__} (")
    assert set(found.backends) == {"eager", "cpu", "cuda", "triton"}
    assert found.backends["eager"] is None, "the eager backend runs everywhere"
    assert found.backends["cpu"] == _extension.WHY_NOT
    if _backend.WHY_NO_CUDA or not torch.cuda.is_available():
        assert found.backends["cuda"] == (_backend.WHY_NO_CUDA or "needs a CUDA device")
    if _backend.WHY_NO_TRITON:
        assert found.backends["triton"] == _backend.WHY_NO_TRITON
    else:
        expected = None if torch.cuda.is_available() else "needs a CUDA device"
        assert found.backends["triton"] == expected
    assert set(_backend.BACKENDS) <= set(found.backends)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_info_says_what_serves(dtype: str) -> None:
    """The table's word is what a call does."""
    found = seqkern.info()
    kind = getattr(torch, dtype)
    lstm, x = seqkern.LSTM(3, 4, dtype=kind), torch.randn(2, 1, 3, dtype=kind)
    crf, scores = seqkern.CRF(3, dtype=kind), torch.randn(2, 1, 3, dtype=kind)
    calls = {
        ("lstm", "seqkern::lstm_forward"): lambda: lstm(x),
        ("crf", "seqkern::crf_forward"): lambda: crf.log_partition(scores),
        ("recurrent", "seqkern::recurrent_forward"): lambda: seqkern.MGU(3, 4, dtype=kind)(x),
    }
    for (op, operator), call in calls.items():
        with torch.profiler.profile() as profile, torch.no_grad():
            call()
        ran = any(event.key == operator for event in profile.key_averages())
        assert ran == (found.serves["cpu", op, dtype] == "cpu"), op
    assert ("cpu", "lstm") not in found.eager_because or found.backends["cpu"] is not None


def test_info_says_why_only_eager(monkeypatch) -> None:
    monkeypatch.setattr(_backend, "WHY_NO_KERNELS", "it was left out")
    found = seqkern.info()
    assert found.serves["cpu", "gru", "float32"] == "eager"
    assert "cpu needs the compiled extension: it was left out" in found.eager_because["cpu", "gru"]
    assert found.serves["cpu", "attention", "float32"] == "cpu"  # torch's own products
    assert "  gru                 eager     eager     eager     eager     cpu needs the compiled" in str(
        found
    )


@needs_extension
def test_info_names_instruction_sets() -> None:
    found = seqkern.info()
    assert found.instruction_sets[0] == "baseline"
    assert found.instruction_set in found.instruction_sets
    compiled = found.build["instruction_sets"]
    assert [name for name in compiled if name in found.instruction_sets] == found.instruction_sets
    assert found.build["torch"] == torch.__version__
    assert found.build["compiler"]


@needs_extension
def test_unknown_instruction_set_raises_and_changes_nothing() -> None:
    before = _extension._C.instruction_set()
    with pytest.raises(ValueError, match=r"mmx"):
        _extension._C.set_instruction_set("mmx")
    assert _extension._C.instruction_set() == before


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_status_without_a_gpu() -> None:
    status = _extension._C.cuda_status()
    if seqkern.info().build["cuda"]:
        assert status == "no CUDA driver" or ", 0 devices" in status or "cudaGetDeviceCount: " in status
    else:
        assert status.startswith("no CUDA kernels in this build: ")


@needs_extension
@pytest.mark.gpu
def test_cuda_status_names_the_gpu() -> None:
    status = _extension._C.cuda_status()
    if not seqkern.info().build["cuda"]:
        pytest.skip(status)
    device = torch.cuda.get_device_properties(0)
    assert (
        f"cuda:0 {device.name}, sm_{device.major}{device.minor}, {device.multi_processor_count} SMs" in status
    )
    assert "runs this build's sm_" in status


def test_info_reads_well_with_everything() -> None:
    text = str(
        Info(
            seqkern="1.2",
            python="3.11.7",
            torch="2.13.0 (CUDA 13.0, 8 threads)",
            triton="3.6.0",
            backends={"eager": None, "cpu": None, "cuda": "no device"},
            instruction_sets=["baseline", "avx2"],
            instruction_set="avx2",
            build={"torch": "2.13.0", "compiler": "GNU 12.2.0", "cuda": "13.0", "cuda_archs": "sm_80 sm_90a"},
            cuda="driver for CUDA 13.0\ncuda:0 H200",
        )
    )
    assert text == "\n".join(
        [
            "seqkern     1.2, Python 3.11.7",
            "torch       2.13.0 (CUDA 13.0, 8 threads)",
            "Triton      3.6.0",
            "extension   built for torch 2.13.0 with GNU 12.2.0, CUDA 13.0 (sm_80 sm_90a)",
            "CPU         avx2 in use, of baseline, avx2",
            "CUDA        driver for CUDA 13.0",
            "            cuda:0 H200",
            "backends",
            "  eager     ready",
            "  cpu       ready",
            "  cuda      no device",
        ]
    )


def test_info_says_what_is_missing() -> None:
    text = str(
        Info(
            "1.2",
            "3.11.7",
            "2.14.0",
            None,
            {"eager": None, "cpu": "built for torch 2.13, found 2.14: reinstall"},
        )
    )
    assert "Triton      not installed" in text
    assert "extension   not used: built for torch 2.13, found 2.14: reinstall" in text
    assert "CPU         no compiled kernels" in text


def test_info_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["info"]) == 0
    assert capsys.readouterr().out == f"{seqkern.info()}\n"


@pytest.mark.parametrize("arguments", [[], ["tune"]], ids=["none", "unknown"])
def test_wrong_command_names_the_right_ones(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command_line.main(arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in ("info", "plan", "verify", "demo")), message


@pytest.mark.parametrize(
    ("built", "found", "expected"),
    [
        (["2.13.0+cpu"], "2.13.0+cpu", None),
        (["2.13.0+cpu"], "2.13.2+cu130", None),
        (["2.13.0+cpu"], "2.14.0", "built for torch 2.13, found 2.14: reinstall seqkern"),
        (["2.13.0"], "3.13.0", "built for torch 2.13, found 3.13: reinstall seqkern"),
        (["2.1.0"], "2.13.0", "built for torch 2.1, found 2.13: reinstall seqkern"),
        (["2.14.0a0+git1234567"], "2.14.0", None),
        (["2.11.0", "2.12.1", "2.13.0"], "2.12.0", None),
        (
            ["2.11.0", "2.12.1", "2.13.0"],
            "2.1.3",
            "built for torch 2.11, 2.12 and 2.13, found 2.1: reinstall seqkern",
        ),
        ([], "2.13.0", "the extension does not say which torch it was built for: reinstall seqkern"),
    ],
)
def test_mismatch(built: list[str], found: str, expected: str | None) -> None:
    assert _extension.mismatch(built, found) == expected


def test_built_for_reads_the_mark(tmp_path) -> None:
    marked, bare = tmp_path / "marked.so", tmp_path / "bare.so"
    marked.write_bytes(b"\x7fELF" + bytes(5000) + b"seqkern was built for torch=2.13.0+cpu\0" + bytes(5000))
    bare.write_bytes(b"\x7fELF" + bytes(100))
    assert _extension.built_for(marked) == "2.13.0+cpu"
    assert _extension.built_for(bare) is None


def test_extension_for_another_python_is_named(tmp_path) -> None:
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    module, why_not = _extension._load(tmp_path, torch.__version__)
    assert module is None
    assert why_not == "built for another Python (_C.cpython-399-x86_64-linux-gnu.so): reinstall seqkern"
