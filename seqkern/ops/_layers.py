"""What rnn, lstm and gru share: checking a request, the loop over layers, the eager backend and its
differentiation.

Letters: T steps, B batch, N packed rows, I input, H hidden, P projected hidden (H without proj_size), D
    directions, L layers, G gates.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops import _backend

INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
SIXTEEN_BITS = frozenset({torch.bfloat16, torch.float16})

# One layer on one backend: (x, states, params, lengths, batch_sizes) -> (y, *final states)
Layer = Callable[
    [Tensor, Sequence[Tensor], Sequence[Tensor], Tensor | None, Tensor | None], tuple[Tensor, ...]
]


# ---- meaning, checked once ---------------------------------------------------------------------------------


def check(
    op: str,
    gates: int,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    num_layers: int,
    D: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    cell: bool = False,
) -> Tensor | None:
    """Check one request's meaning before any work, with torch.nn's exception classes; returns lengths as
    int64. A cell's input is [B, I] and its states [B, H]; a layer's are as `lstm`, `gru` and `rnn` say.

    Raises:
        ValueError: input's dtype is not the parameters', lengths are wrong, a wrong number of parameters
        RuntimeError: a wrong shape, device or dtype of anything else, or T = 0
    """
    rows = num_layers * D
    per_direction, rest = divmod(len(params), rows)
    if rest or not (per_direction == 4 or per_direction == 2 or (op == "lstm" and per_direction in (3, 5))):
        raise ValueError(
            f"params: expected w_ih, w_hh[, b_ih, b_hh]{'[, w_hr]' if op == 'lstm' else ''} "
            f"for each of {num_layers} layers * {D} directions, got {len(params)} tensors"
        )
    w_ih, w_hh = params[0], params[1]
    # torch.nn's cells and its packed LSTM leave a wrong dtype to the kernel.
    unchecked = cell or (op == "lstm" and batch_sizes is not None)
    T, B, input_size = check_input(input, w_ih, lengths, batch_sizes, cell, unchecked)

    # The first weights say what I, H and P are.
    G, P = w_ih.shape[0], w_hh.shape[-1]
    H, odd = divmod(G, gates)
    if odd:
        raise RuntimeError(f"weight_ih_l0: expected [{gates}*H, I], got {tuple(w_ih.shape)}")
    projects = per_direction % 2 == 1
    if not projects:
        P = H
    shapes: tuple[tuple[int, ...], ...] = ((G, input_size), (G, P))
    if per_direction >= 4:
        shapes += ((G,), (G,))
    if projects:
        shapes += ((P, H),)
    names = partial(param_names, len(params), num_layers, D)
    check_tensors(input, states, params, shapes, (P, H), names, rows, B, D, cell)
    return None if lengths is None else check_lengths(lengths, T, B, input.device)


def check_input(
    input: Tensor,
    w_ih: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    cell: bool,
    unchecked_dtype: bool = False,
) -> tuple[int, int, int]:
    """T, B and I of an input that fits w_ih [G, I] in dtype and size. Another dtype is a ValueError, which
    torch.nn checks first; a RuntimeError where it leaves that to its kernel."""
    dtype = input.dtype
    if w_ih.dtype is not dtype:
        raise (RuntimeError if unchecked_dtype else ValueError)(
            f"input: expected the dtype of the weights, {w_ih.dtype}, got {dtype}. Convert the input, "
            f"input.to({w_ih.dtype}), or the model, model.to({dtype})"
        )
    if cell:
        if input.dim() != 2:
            raise RuntimeError(f"input: expected 2 dimensions [B, I], got {tuple(input.shape)}")
        T, (B, input_size) = 1, input.shape
    elif batch_sizes is None:
        if input.dim() != 3:
            raise RuntimeError(f"input: expected 3 dimensions [T, B, I], got {tuple(input.shape)}")
        T, B, input_size = input.shape
        if T == 0:
            raise RuntimeError("input: Expected sequence length to be larger than 0 in RNN, got T = 0")
    else:
        if input.dim() != 2:
            raise RuntimeError(
                f"input: expected 2 dimensions [N, I] with batch_sizes, got {tuple(input.shape)}"
            )
        if lengths is not None:
            raise ValueError("lengths: not with batch_sizes; a packed input carries its own lengths")
        N, input_size = input.shape
        T, B = _check_batch_sizes(batch_sizes, N)
    if w_ih.shape[-1] != input_size:
        layout = "[B, I]" if cell else "[T, B, I]" if batch_sizes is None else "[N, I]"
        raise RuntimeError(
            f"input: expected {layout} with I = input_size = {w_ih.shape[-1]}, got {tuple(input.shape)}"
        )
    return T, B, input_size


def check_tensors(
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    shapes: tuple[tuple[int, ...], ...],
    state_sizes: tuple[int, ...],
    names: Callable[[], list[str]],
    rows: int,
    B: int,
    D: int,
    cell: bool,
) -> None:
    """Parameters and states fit the input in dtype and device, and have their shapes.

    shapes: of one direction's parameters in the first layer; state_sizes: P, H, ...; names: of all parameters
    """
    dtype, device = input.dtype, input.device
    P = state_sizes[0]
    k = 0
    for row in range(rows):
        if row == D:  # above the first layer
            shapes = ((shapes[0][0], D * P), *shapes[1:])
        for shape in shapes:
            t = params[k]
            if t is not None and (t.shape != shape or t.dtype is not dtype or t.device != device):
                raise _mismatch(names()[k].removesuffix("_l0" if cell else ""), t, shape, input)
            k += 1
    for k, t in enumerate(states):
        size = state_sizes[k]
        shape = (B, size) if cell else (rows, B, size)
        if t.shape != shape or t.dtype is not dtype or t.device != device:
            name = "hx" if len(states) == 1 else f"hx[{k}]"
            letter = "proj_size" if k == 0 and state_sizes[-1] != P else "H"
            letters = f"[B, {letter}] = " if cell else f"[D*num_layers, B, {letter}] = "
            raise _mismatch(name, t, shape, input, letters)


def _mismatch(name: str, t: Tensor, shape: tuple[int, ...], input: Tensor, letters: str = "") -> RuntimeError:
    """The exception for a tensor that fits the input in device, dtype or shape badly."""
    if t.device != input.device:
        return RuntimeError(f"{name}: expected the device of the input, {input.device}, got {t.device}")
    if t.dtype is not input.dtype:
        return RuntimeError(f"{name}: expected the dtype of the input, {input.dtype}, got {t.dtype}")
    return RuntimeError(f"{name}: expected {letters}{tuple(shape)}, got {tuple(t.shape)}")


def param_names(count: int, num_layers: int, D: int) -> list[str]:
    """torch.nn's names for a flat list of `count` parameters."""
    per_direction = count // (num_layers * D)
    kinds = ["weight_ih", "weight_hh"]
    kinds += ["bias_ih", "bias_hh"] if per_direction >= 4 else []
    kinds += ["weight_hr"] if per_direction % 2 == 1 else []
    return [
        f"{kind}_l{layer}{suffix}"
        for layer in range(num_layers)
        for suffix in ("", "_reverse")[:D]
        for kind in kinds
    ]


def _check_batch_sizes(batch_sizes: Tensor, N: int) -> tuple[int, int]:
    """T and B of a packed batch."""
    if batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
        raise ValueError(
            f"batch_sizes: expected a [T] int64 tensor on the CPU, got {tuple(batch_sizes.shape)} "
            f"{batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("batch_sizes: Expected sequence length to be larger than 0 in RNN, got T = 0")
    if sizes[-1] < 0 or any(map(int.__lt__, sizes, sizes[1:])):
        raise ValueError(f"batch_sizes: expected non-increasing, non-negative sizes, got {sizes}")
    if sum(sizes) != N:
        raise ValueError(f"batch_sizes: expected a sum of N = {N} rows of input, got {sum(sizes)}")
    return len(sizes), sizes[0]


def check_lengths(lengths: Tensor, T: int, B: int, device: torch.device, name: str = "lengths") -> Tensor:
    """lengths [B] as int64, each in 0..T: checked on a CPU; on other devices, where looking would cost a
    synchronisation, every backend takes a length below 0 for 0 and one beyond T for T."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name}: expected a [B] integer tensor, got {type(lengths).__name__}")
    if lengths.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected an integer dtype, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"{name}: expected [B] = ({B},), got {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"{name}: expected the device of the input, {device}, got {lengths.device}")
    if torch.compiler.is_compiling() and device.type == "cpu":
        # A graph cannot look at values while it is traced; this looks when it runs.
        in_range = ((lengths >= 0) & (lengths <= T)).all()
        torch._assert_async(in_range, f"{name}: expected values in 0..T")
    elif device.type == "cpu" and has_values(lengths):
        values = lengths.tolist()
        if values and not (min(values) >= 0 and max(values) <= T):
            b = next(b for b, value in enumerate(values) if not 0 <= value <= T)
            raise ValueError(f"{name}: expected values in 0..T = 0..{T}, got {name}[{b}] = {values[b]}")
    return lengths if lengths.dtype is torch.int64 else lengths.to(torch.int64)


def has_values(t: Tensor) -> bool:
    """False for fake tensors and for those that torch.vmap batches."""
    return type(t) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(t)


# ---- the state of the caller's program ---------------------------------------------------------------------


def transformed(*groups: Sequence[Tensor]) -> bool:
    """Is a torch.func transform active, or does a tensor carry a forward-mode tangent?

    Classic autograd Functions fail under the former, operators drop the latter in silence.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for group in groups for t in group)


def choose_backend(
    op: str, input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], backend: str | None
) -> str:
    """The backend for a recurrent layer, `backend` being the caller's wish."""
    return _backend.choose(
        op,
        device_type(input),
        input.dtype,
        transformed=transformed((input,), states, params),
        wish=_backend.current_wish() if backend is None else backend,
        missing=_backend.WHY_NO_KERNELS,
        no_cuda=_backend.why_no_cuda(input),
    )


def wants_grad(*groups: Sequence[Tensor]) -> bool:
    """Does anything need a gradient through this call?"""
    if not torch.is_grad_enabled():
        return False
    for group in groups:
        for t in group:
            if t.requires_grad:
                return True
    return False


def new_seed(device: torch.device) -> Tensor:
    """A fresh seed, [1] int64, from torch's generator on the device: right under graph capture and in a
    checkpoint."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments for an autograd Function.

    Dynamo cannot pass one tensor twice (h_0 for c_0, tied weights): there further occurrences become views.
    """
    if not torch.compiler.is_compiling():
        return tensors
    seen: list[Tensor] = []
    arguments = []
    for t in tensors:
        if t is not None:
            if any(t is other for other in seen):
                t = t.view_as(t)
            seen.append(t)
        arguments.append(t)
    return tuple(arguments)


def autocast_active(input: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type)


def device_type(input: Tensor) -> str:
    """input.device.type, at a quarter of its price on a CPU."""
    return "cpu" if input.is_cpu else input.device.type


def autocast_dtypes(
    input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], *, lower: bool, projects: bool = False
) -> tuple[torch.dtype, torch.dtype]:
    """(dtype to compute in, dtype of output and h_n) as torch.nn's layer gives them under torch.autocast.

    On a CPU some of torch's layers run wholly in autocast's dtype (`lower`: RNN, RNNCell, and LSTM where
    oneDNN takes it); in the others autocast lowers only the products, and the states' dtype comes through the
    gates. float64 is never cast.

    Raises:   RuntimeError: float64 beside another dtype
    """
    dtypes = {t.dtype for t in (input, *states, *params)}
    if torch.float64 in dtypes or not input.is_floating_point():
        if len(dtypes) > 1:
            raise RuntimeError(
                "input, hx and parameters: expected one dtype (autocast leaves torch.float64 as it is), got "
                + ", ".join(sorted(map(str, dtypes)))
            )
        return input.dtype, input.dtype
    device = input.device.type
    autocast_dtype = torch.get_autocast_dtype(device)
    if lower or device != "cpu":
        return autocast_dtype, autocast_dtype
    wide = torch.promote_types(autocast_dtype, states[-1].dtype)
    return wide, autocast_dtype if projects else wide


def zero_states(input: Tensor, rows: int, batch_sizes: Tensor | None, *sizes: int) -> tuple[Tensor, ...]:
    """States for hx=None, [rows, B, size] each; equal sizes share one tensor, which is only read."""
    if batch_sizes is not None:
        B = int(batch_sizes[0]) if batch_sizes.numel() else 0
    else:
        B = input.shape[1] if input.dim() == 3 else 0
    by_size = {
        size: torch.zeros((rows, B, size), dtype=input.dtype, device=input.device) for size in set(sizes)
    }
    return tuple(by_size[size] for size in sizes)


# ---- the loop over layers ----------------------------------------------------------------------------------


def run_layers(
    layers: Sequence[Layer],
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    D: int,
    dropout: float,
    training: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """Stack the layers: (output, *final states). Dropout is torch's own, between the layers, so that its
    random stream is torch.nn's."""
    num_layers = len(layers)
    if num_layers == 1:
        return layers[0](input, states, params, lengths, batch_sizes)
    per_layer = len(params) // num_layers
    layer_states = list(zip(*(state.split(D) for state in states), strict=True))  # L times ([D, B, .], ...)
    y, finals = input, []
    for k, layer in enumerate(layers):
        if k > 0 and training and dropout > 0:
            y = F.dropout(y, dropout, training=True)
        y, *final = layer(
            y, layer_states[k], params[k * per_layer : (k + 1) * per_layer], lengths, batch_sizes
        )
        finals.append(final)
    return (y, *(torch.cat(state) for state in zip(*finals, strict=True)))


# ---- the eager backend -------------------------------------------------------------------------------------


def eager_layer(
    reference: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One layer by its reference formula; `mask` has x's rows and is given on by name.

    16-bit layers are computed in float32 and rounded once, at the store, as the kernels do it.
    """
    dtype = x.dtype
    if dtype in SIXTEEN_BITS:
        x, states = x.float(), [s.float() for s in states]
        params = [None if p is None else p.float() for p in params]
    if batch_sizes is not None:
        rows, lengths, T = packed_rows(batch_sizes, x.device)
        B = states[0].shape[1]
        x = _unpacked(x, rows, T, B)
        mask = None if mask is None else _unpacked(mask, rows, T, B)
    outputs = reference(x, *states, params, lengths, **({} if mask is None else {"mask": mask}))
    if batch_sizes is not None:
        outputs = (outputs[0].flatten(0, 1).index_select(0, rows), *outputs[1:])
    return tuple(t.to(dtype) for t in outputs) if dtype in SIXTEEN_BITS else outputs


def _unpacked(x: Tensor, rows: Tensor, T: int, B: int) -> Tensor:
    """[N, .] -> [T, B, .], zero where no packed row lies."""
    return x.new_zeros((T * B, x.shape[1])).index_copy(0, rows, x).unflatten(0, (T, B))


def packed_rows(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Where the N packed rows lie in a padded [T*B] batch, the lengths [B], and T."""
    T, B = batch_sizes.numel(), int(batch_sizes[0])
    valid = torch.arange(B) < batch_sizes.unsqueeze(1)  # [T, B]
    return valid.flatten().nonzero().squeeze(1).to(device), valid.sum(0).to(device), T


def differentiate_eager(
    layer: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> Iterator[Tensor | None]:
    """The gradients of `layer` at `inputs`, themselves differentiable: for backward under create_graph=True.

    Runs the eager layer again and differentiates that; slow and correct.
    """
    device = next(t for t in inputs if t is not None).device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # An alias of each input, so that one input computed from another does not add its own path to that
        # one's gradient.
        aliases = [
            t if t is None or not need else t.view_as(t) for t, need in zip(inputs, needed, strict=True)
        ]
        outputs = layer(*aliases)
        pairs = [
            (y, dy) for y, dy in zip(outputs, grad_outputs, strict=True) if dy is not None and y.requires_grad
        ]
        wanted = [t for t, need in zip(aliases, needed, strict=True) if need]
        if pairs:
            grads = torch.autograd.grad(
                [y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=True, allow_unused=True
            )
        else:
            grads = (None,) * len(wanted)
    remaining = iter(grads)
    return (next(remaining) if need else None for need in needed)


def save_output(ctx: torch.autograd.function.FunctionCtx, y: Tensor) -> Tensor:
    """The alias of a Function's output y to save for backward.

    torch.nn's layers let a program change their output in place (`y *= mask`, ReLU(inplace=True)): few of
    them read it in backward. The kernels do, and saving y itself would make that an error. So the alias has a
    version counter of its own, and an empty tensor that shares y's counter tells `output_changed`.
    """
    if torch.compiler.is_compiling():  # a graph's values do not change
        ctx.output_counter = None
        return y
    counter = y.detach()
    counter.data = y.new_empty(0)  # lets go of y's memory, keeps its counter
    ctx.output_counter, ctx.output_version = counter, counter._version
    return y.data


def output_changed(ctx: torch.autograd.function.FunctionCtx) -> bool:
    """Has the output been changed since forward, so that backward must compute it again?"""
    if ctx.output_counter is None:
        return False
    if (
        torch.compiler.is_compiling()
    ):  # compiled autograd after an eager forward, whose graph guards no counter
        return True
    return ctx.output_counter._version != ctx.output_version


def wanted(grads: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Autograd's answer: the gradients asked for, None elsewhere. grads ends early where no parameter needs
    one."""
    return tuple(grads[k] if need and k < len(grads) else None for k, need in enumerate(needed))
