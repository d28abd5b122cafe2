"""What this installation can do here: backends, instruction sets, torch, Triton, CUDA; what is missing."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata

import torch

from seqkern import _extension
from seqkern.ops import _backend


@dataclass(frozen=True)
class Info:
    """The answer of `seqkern.info()`; `print` it, or read its fields.

    `backends` maps each backend to None where it runs and to the reason where it does not.
    """

    seqkern: str
    python: str
    torch: str
    triton: str | None
    backends: dict[str, str | None]
    instruction_sets: list[str] = field(default_factory=list)
    instruction_set: str | None = None
    build: dict[str, object] = field(default_factory=dict)
    cuda: str = ""

    def __str__(self) -> str:
        rows = [
            ("seqkern", f"{self.seqkern}, Python {self.python}"),
            ("torch", self.torch),
            ("Triton", self.triton or "not installed"),
            ("extension", self._extension_text()),
            ("CPU", self._instruction_sets_text()),
            ("CUDA", self.cuda.replace("\n", "\n" + " " * 12)),
        ]
        rows += [(f"  {name}", why_not or "ready") for name, why_not in self.backends.items()]
        rows.insert(6, ("backends", ""))
        return "\n".join(f"{name:<11} {text}".rstrip() for name, text in rows)

    def _extension_text(self) -> str:
        if not self.build:
            return f"not used: {self.backends['cpu']}"
        cuda = f"CUDA {self.build['cuda']} ({self.build['cuda_archs']})" if self.build["cuda"] else "no CUDA"
        return f"built for torch {self.build['torch']} with {self.build['compiler']}, {cuda}"

    def _instruction_sets_text(self) -> str:
        if not self.instruction_sets:
            return "no compiled kernels"
        return f"{self.instruction_set} in use, of {', '.join(self.instruction_sets)}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _why_no_cuda() -> str | None:
    """Why no recurrent layer can run on cuda, None if one can on the first device."""
    if _backend.WHY_NO_CUDA is not None:
        return _backend.WHY_NO_CUDA
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return _backend.why_device_cannot(torch.device("cuda", 0))


def _why_no_triton() -> str | None:
    return _backend.WHY_NO_TRITON or (None if torch.cuda.is_available() else "needs a CUDA device")


def info() -> Info:
    """What runs here, and why the rest does not. Imports no Triton; asks the CUDA driver, if there is one."""
    from seqkern import __version__

    extension = _extension._C
    torch_cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return Info(
        seqkern=__version__,
        python=platform.python_version(),
        torch=f"{torch.__version__} ({torch_cuda}, {torch.get_num_threads()} threads)",
        triton=_version("triton"),
        backends={
            "eager": None,
            "cpu": _extension.WHY_NOT,
            "cuda": _why_no_cuda(),
            "triton": _why_no_triton(),
        },
        instruction_sets=extension.instruction_sets() if extension else [],
        instruction_set=extension.instruction_set() if extension else None,
        build=extension.build_info() if extension else {},
        cuda=extension.cuda_status() if extension else "not asked: needs the compiled extension",
    )
