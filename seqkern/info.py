"""What this installation can do here: backends, instruction sets, torch, Triton, CUDA; what is missing."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from seqkern import _extension
from seqkern.ops import _backend


@dataclass(frozen=True)
class Info:
    """The answer of `seqkern.info()`; `print` it, or read its fields.

    `backends` maps each backend to None where it runs and to the reason where it does not.
    `serves` maps (device, operation, dtype) to the backend that a free choice gives there;  `eager_because`
    maps (device, operation) to why it is "eager" in every dtype, where it is.
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
    serves: dict[tuple[str, str, str], str] = field(default_factory=dict)
    eager_because: dict[tuple[str, str], str] = field(default_factory=dict)

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
        return "\n".join([*(f"{name:<11} {text}".rstrip() for name, text in rows), *self._serves_text()])

    def _serves_text(self) -> Iterator[str]:
        """A table for each device: the backend of every operation and dtype, and why none but eager."""
        dtypes = list(dict.fromkeys(dtype for _, _, dtype in self.serves))
        for device in dict.fromkeys(device for device, _, _ in self.serves):
            yield (f"{f'on {device}':<22}" + "".join(f"{dtype:<10}" for dtype in dtypes)).rstrip()
            for op in dict.fromkeys(op for place, op, _ in self.serves if place == device):
                line = f"  {op:<20}" + "".join(f"{self.serves[device, op, dtype]:<10}" for dtype in dtypes)
                why = self.eager_because.get((device, op))
                yield (line + (why or "")).rstrip()

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


def _serving() -> tuple[dict[tuple[str, str, str], str], dict[tuple[str, str], str]]:
    """What a free choice gives on each kind of device that is here."""
    serves: dict[tuple[str, str, str], str] = {}
    because: dict[tuple[str, str], str] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op, backends in _backend.BACKENDS_OF.items():
            on_triton = "triton" in backends and (device == "cuda" or op == "attention")
            state: dict[str, Any] = {
                "missing": _backend.WHY_NO_TRITON if on_triton else _backend.WHY_NO_KERNELS,
                "no_cuda": _why_no_cuda(),
            }
            found = {}
            for dtype in _DTYPES:
                in_float32 = op in _backend.CRF and dtype.itemsize == 2
                computed = torch.float32 if in_float32 else dtype
                found[dtype] = _backend.choose(op, device, computed, **state)
            for dtype, backend in found.items():
                serves[device, op, str(dtype).removeprefix("torch.")] = backend
            if set(found.values()) == {"eager"}:
                reasons = [_backend.refusal(b, op, device, torch.float32, **state) for b in backends]
                because[device, op] = "; ".join(reason for reason in reasons if reason)
    return serves, because


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def info() -> Info:
    """What runs here, and why the rest does not. Imports no Triton; asks the CUDA driver, if there is one."""
    from seqkern import __version__

    extension = _extension._C
    serves, because = _serving()
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
        serves=serves,
        eager_because=because,
    )
