"""Which backend computes an operation: one pure function over a table, and the caller's wish.

eager   the literal formula of seqkern.reference: every dtype, every device, every order of differentiation
cpu     recurrent layers, additive attention and CRF: the compiled kernels in csrc/cpu; attention:
        seqkern.ops.attention_cpu
cuda    recurrent layers: the compiled kernels in csrc/cuda
triton  attention, additive attention, CRF: the kernels in seqkern.triton
"""

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from seqkern import _extension

BACKENDS = ("eager", "cpu", "cuda", "triton")

COMPILED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})  # cpu and cuda
TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
RECURRENT = frozenset({"rnn", "lstm", "gru", "recurrent"})
BACKENDS_OF: dict[str, tuple[str, ...]] = {  # besides eager
    "rnn": ("cpu", "cuda"),
    "lstm": ("cpu", "cuda"),
    "gru": ("cpu", "cuda"),
    "recurrent": ("cpu", "cuda"),  # the cells of ops/_cells.py, and regularised recurrences
    "attention": ("cpu", "triton"),
    "additive_attention": ("cpu", "triton"),
    "attention_decoder": ("cpu",),
    "crf": ("cpu", "triton"),
    "crf_nbest": ("cpu",),  # several best sequences
}
CRF = frozenset({"crf", "crf_nbest"})
CRF_DTYPES = frozenset({torch.float32, torch.float64})  # 16-bit tensors are computed in float32
MAX_HEAD_DIM = 256  # of the Triton kernels
MAX_TAGS = 128  # of the Triton kernels
MIN_CAPABILITY = (8, 0)  # of the CUDA kernels


def _why_no_kernels() -> str | None:
    if not _extension.AVAILABLE:
        return _extension.WHY_NOT or "it could not be loaded"
    if not hasattr(torch.ops.seqkern, "lstm_forward"):
        return "it was built without the layers' operators"
    return None


WHY_NO_KERNELS: str | None = _why_no_kernels()


def _why_no_cuda() -> str | None:
    """Whether there are CUDA kernels, whatever devices there are. Asks no driver."""
    if WHY_NO_KERNELS is not None:
        return f"needs the compiled extension: {WHY_NO_KERNELS}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("seqkern::lstm_forward", "CUDA"):
        return "was left out when seqkern was built: reinstall seqkern where nvcc is"
    if torch.version.cuda is None:
        return f"needs a torch with CUDA, and torch {torch.__version__} has none"
    return None


WHY_NO_CUDA: str | None = _why_no_cuda()


def unsupported(capability: tuple[int, int], archs: str) -> str | None:
    """Why a device of this compute capability cannot run code for `archs`, such as "sm_80 sm_90a sm_100".

    sm_80 runs on 8.0 and later 8.x, sm_90a on 9.0 alone.
    """
    major, minor = capability
    if capability < MIN_CAPABILITY:
        return f"needs compute capability {'.'.join(map(str, MIN_CAPABILITY))} or newer, got {major}.{minor}"
    for arch in archs.split():
        digits = arch.removeprefix("sm_").rstrip("af")
        fits = minor >= int(digits[-1]) if digits == arch.removeprefix("sm_") else minor == int(digits[-1])
        if int(digits[:-1]) == major and fits:
            return None
    return f"has no code for compute capability {major}.{minor}: seqkern was built for {archs}"


_lacks: dict[torch.device, str | None] = {}


def why_device_cannot(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the CUDA kernels, which there are. The driver is asked once a device."""
    if device not in _lacks:
        if not torch.cuda.is_available():  # a fake tensor's device
            return "needs a CUDA device, and torch finds none"
        archs = str(_extension._C.build_info()["cuda_archs"])
        _lacks[device] = unsupported(torch.cuda.get_device_capability(device), archs)
    return _lacks[device]


# As torch.compiler.assume_constant_result does, which would load torch._dynamo, and that Triton.
why_device_cannot._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_no_cuda(input: torch.Tensor) -> str | None:
    """Why the CUDA kernels cannot run on input's device; of another device: why there are none."""
    if WHY_NO_CUDA is not None or not input.is_cuda:
        return WHY_NO_CUDA
    return why_device_cannot(input.device)


def _why_no_triton() -> str | None:
    """Triton itself is not imported before a kernel runs."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"


WHY_NO_TRITON: str | None = _why_no_triton()


def triton_interprets() -> bool:
    """Do Triton's kernels run in its interpreter here, on CPU tensors?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def operator(name: str) -> Any:
    """torch.ops.seqkern.<name>, or None without the compiled extension."""
    return getattr(torch.ops.seqkern, name).default if WHY_NO_KERNELS is None else None


# Each thread's innermost wish.
_wishes: dict[int, str] = {}
_wishes_lock = threading.Lock()

# torch.compile bakes in what it reads, and guards a module's globals but nothing that differs between
# threads. So
# compiled code follows this instead: the one name wished for in the process, None for none, AMBIGUOUS for
# several.
AMBIGUOUS = "several"
_process_wish: str | None = None


def current_wish() -> str | None:
    """The backend named by the innermost use_backend of this thread, or None; in ONNX export, which knows
    none of the kernels' operators, "eager"."""
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return "eager"
    return _innermost_wish()


def _innermost_wish() -> str | None:
    if torch.compiler.is_compiling():
        if _process_wish == AMBIGUOUS:
            raise RuntimeError("use_backend: under torch.compile all threads must name the same backend")
        return _process_wish
    return _wishes.get(threading.get_ident()) if _wishes else None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every seqkern operation of this thread on the backend `name`, "eager", "cpu", "cuda" (recurrent
    layers) or "triton" (attention, additive attention, CRF); None frees the choice.

    A named backend runs or raises RuntimeError with the reason; it never changes quietly. An operation's own
    `backend=` wins over this. Code under torch.compile follows it too, recompiled for each backend, in all
    threads.

    Raises:   ValueError: name is no backend
    """
    _known(name)
    previous = _innermost_wish()
    _wish_for(name)
    try:
        yield
    finally:
        _wish_for(previous)


def _wish_for(name: str | None) -> None:
    global _process_wish
    if torch.compiler.is_compiling():
        _process_wish = name
        return
    with _wishes_lock:
        if name is None:
            _wishes.pop(threading.get_ident(), None)
        else:
            _wishes[threading.get_ident()] = name
        names = set(_wishes.values())
        _process_wish = None if not names else names.pop() if len(names) == 1 else AMBIGUOUS


def _known(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")


def refusal(
    backend: str,
    op: str,
    device: str,
    dtype: torch.dtype,
    *,
    transformed: bool = False,
    missing: str | None = None,
    no_cuda: str | None = None,
    head_dim: int = 0,
    num_tags: int = 0,
    interpreted: bool = False,
) -> str | None:
    """Why `backend` cannot serve the request, or None if it can. Arguments as for `choose`."""
    if backend == "eager":
        return None
    if backend not in BACKENDS_OF.get(op, ()):
        return f"{backend} has no kernel for {op}"
    if missing is not None and (op in RECURRENT or (op != "attention" and backend == "cpu")):
        return f"{backend} needs the compiled extension: {missing}"
    if missing is not None and backend == "triton":
        return f"triton: {missing}"
    if backend == "cpu":
        if device != "cpu":
            return f"cpu needs tensors on a CPU, got {device}"
        if op in CRF and dtype not in CRF_DTYPES:
            return f"cpu computes float32 and float64, got {dtype}"
        if dtype not in COMPILED_DTYPES:
            return f"cpu computes float32, float64, bfloat16 and float16, got {dtype}"
    elif backend == "cuda":
        if no_cuda is not None:
            return f"cuda {no_cuda}"
        if device != "cuda":
            return f"cuda needs tensors on a CUDA device, got {device}"
        if dtype not in COMPILED_DTYPES:
            return f"cuda computes float32, float64, bfloat16 and float16, got {dtype}"
    else:
        if device != "cuda" and not interpreted:
            return f"triton needs tensors on a CUDA device, got {device}"
        if op in CRF and dtype not in CRF_DTYPES:
            return f"triton computes float32 and float64, got {dtype}"
        if op not in CRF and dtype not in TRITON_DTYPES and not interpreted:
            return f"triton computes float32, bfloat16 and float16, got {dtype}"
        if head_dim > MAX_HEAD_DIM:
            return f"triton needs head_dim <= {MAX_HEAD_DIM}, got {head_dim}"
        if num_tags > MAX_TAGS:
            return f"triton needs num_tags <= {MAX_TAGS}, got {num_tags}"
    if transformed:
        return f"{backend} has no rule for torch.func transforms and forward-mode differentiation"
    return None


def choose(
    op: str,
    device: str,
    dtype: torch.dtype,
    *,
    transformed: bool = False,
    wish: str | None = None,
    missing: str | None = None,
    no_cuda: str | None = None,
    head_dim: int = 0,
    num_tags: int = 0,
    interpreted: bool = False,
) -> str:
    """The backend for one request: the fastest that is correct, or the one wished for.

    Args:
        op: "rnn", "lstm", "gru", "recurrent", "attention", "additive_attention", "attention_decoder",
            "crf", "crf_nbest"
        device: type of the input's device
        dtype: the one dtype of input, states and parameters
        transformed: a torch.func transform is active, or an input carries a forward-mode tangent
        wish: the backend the caller named, None for a free choice
        missing: why the kernels are not there, None if they are: a recurrent layer's compiled ones,
            attention's Triton ones, additive attention's and a CRF's of its device
        no_cuda: why a recurrent layer's CUDA kernels cannot run on this device, None if they can
        head_dim: the larger of attention's two
        num_tags: a CRF's
        interpreted: Triton's kernels run in its interpreter, on any device; for tests, never chosen freely
    Raises:
        ValueError: wish is no backend
        RuntimeError: the backend wished for cannot serve the request, with the reason
    """
    if wish is None:
        for backend in ("cpu", "cuda", "triton"):
            why_not = refusal(
                *(backend, op, device, dtype),
                transformed=transformed,
                missing=missing,
                no_cuda=no_cuda,
                head_dim=head_dim,
                num_tags=num_tags,
            )
            if why_not is None:
                return backend
        return "eager"
    _known(wish)
    why_not = refusal(
        *(wish, op, device, dtype),
        transformed=transformed,
        missing=missing,
        no_cuda=no_cuda,
        head_dim=head_dim,
        num_tags=num_tags,
        interpreted=interpreted,
    )
    if why_not is not None:
        raise RuntimeError(f"backend {wish!r} was asked for: {why_not}")
    return wish
