"""What the modules share: reading their weights, and torch.nn's checks of dimensions.

The modules are subclasses of torch.nn's own, bound when seqkern is imported, so that parameters, state_dict,
repr, initialisation, pickling and every tool that asks `isinstance` hold by construction. Only `forward` is
new.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Device: TypeAlias = "torch.device | str | int | None"  # what torch's constructors take


def flat_weights(module: torch.nn.RNNBase) -> list[Tensor]:
    """The module's weights as they are now, in the order of _flat_weights.

    _flat_weights itself goes stale under functional_call, parametrize and weight_norm; the attributes never
    do.
    """
    parameters = module._parameters
    try:
        return [parameters[name] for name in module._flat_weights_names]
    except KeyError:  # parametrized, pruned, or replaced by a plain tensor
        return [getattr(module, name) for name in module._flat_weights_names]


def cell_weights(module: torch.nn.RNNCellBase) -> list[Tensor]:
    """w_ih, w_hh[, b_ih, b_hh] of a cell, as they are now. One bias alone is completed with zeros."""
    parameters = module._parameters
    try:
        w_ih, w_hh = parameters["weight_ih"], parameters["weight_hh"]
        b_ih, b_hh = parameters["bias_ih"], parameters["bias_hh"]
    except KeyError:  # parametrized, pruned, or replaced by a plain tensor
        w_ih, w_hh, b_ih, b_hh = module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh
    if b_ih is None and b_hh is None:
        return [w_ih, w_hh]
    if b_ih is None:
        b_ih = torch.zeros_like(b_hh)
    elif b_hh is None:
        b_hh = torch.zeros_like(b_ih)
    return [w_ih, w_hh, b_ih, b_hh]


def exporting_to_torchscript_or_onnx() -> bool:
    """Neither knows seqkern's operators: there the modules run torch.nn's own forward."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch._C._get_tracing_state() is not None


def refuse_torchscript(module: torch.nn.Module) -> None:
    """The modules' __prepare_scriptable__, which torch.jit.script calls first."""
    name = type(module).__name__
    raise RuntimeError(
        f"seqkern.{name}: TorchScript is not supported; use torch.compile or torch.export, or script "
        "torch.nn's module, which seqkern.restore(model) brings back where seqkern.replace made it ours"
    )


def refuse_lengths(lengths: Tensor | None, what: str) -> None:
    if lengths is not None:
        raise ValueError(f"lengths: expected none with {what}, got a tensor")


def as_batch(name: str, input: Tensor, batch_first: bool) -> tuple[Tensor, bool]:
    """input [T, B, I], [B, T, I] or [T, I] -> (x [T, B, I], is it a batch?)."""
    dim = input.dim()
    if dim == 3:
        return (input.transpose(0, 1) if batch_first else input), True
    if dim == 2:
        return input.unsqueeze(1), False
    raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dim}D instead")


def as_state(hx: Tensor, batched: bool) -> Tensor:
    """hx [L*D, B, H] or, unbatched, [L*D, H] -> [L*D, B, H]."""
    if not isinstance(hx, Tensor):
        raise AttributeError(f"hx: expected a tensor, got {type(hx).__name__}")
    if hx.dim() != (3 if batched else 2):
        raise state_dim_error(
            batched, f"hx should also be {3 if batched else 2}-D but got {hx.dim()}-D tensor"
        )
    return hx if batched else hx.unsqueeze(1)


def as_states(op: str, names: Sequence[str], hx: Any, batched: bool) -> tuple[Tensor, ...]:
    """The states of a cell that carries several, ("h", "c") or more, as [L*D, B, .], with torch.nn's
    exceptions."""
    letters = f"({', '.join(f'{name}_0' for name in names)})"
    if isinstance(hx, Tensor):
        error = IndexError if hx.dim() and hx.shape[0] == 1 else RuntimeError
        raise error(f"hx: expected a {'pair' if len(names) == 2 else 'tuple'} {letters}, got one tensor")
    if len(hx) != len(names):
        error = IndexError if len(hx) < 2 else RuntimeError
        count = "two" if len(names) == 2 else len(names)
        raise error(f"hx: {op} expects {count} hidden states {letters}, got {len(hx)}")
    dim = 3 if batched else 2
    if any(state.dim() != dim for state in hx):
        which = "hx and cx" if len(names) == 2 else "all states"
        dims = ", ".join(f"{state.dim()}-D" for state in hx)
        raise state_dim_error(batched, f"{which} should also be {dim}-D but got ({dims}) tensors")
    return tuple(hx) if batched else tuple(state.unsqueeze(1) for state in hx)


def state_dim_error(batched: bool, what: str) -> RuntimeError:
    return RuntimeError(f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, {what}")


def permute_state(hx: Tensor, indices: Tensor | None) -> Tensor:
    """The columns (batch dimension) of hx in another order, for a PackedSequence that was sorted."""
    return hx if indices is None else hx.index_select(1, indices)


def repack(output: Tensor, packed: PackedSequence) -> PackedSequence:
    return PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


# ---- cells -------------------------------------------------------------------------------------------------


def cell_input(name: str, input: Tensor) -> tuple[Tensor, bool]:
    """input [B, I] or [I] -> (x [B, I], is it a batch?)."""
    dim = input.dim()
    if dim == 2:
        return input, True
    if dim == 1:
        return input.unsqueeze(0), False
    raise ValueError(f"{name}: Expected input to be 1D or 2D, got {dim}D instead")


def cell_state(name: str, hx: Tensor | None, batched: bool) -> Tensor | None:
    """hx [B, H] or [H] -> [B, H]."""
    if hx is None:
        return None
    if not isinstance(hx, Tensor):
        raise AttributeError(f"hx: expected a tensor, got {type(hx).__name__}")
    if hx.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
    return hx if batched else hx.unsqueeze(0)
