"""What the models share: finding recurrent layers by name, running them over padded rows, pooling over time.

Every model takes `layers`, the module its recurrent and attention layers come from: seqkern.nn, or torch.nn
for the same model, with the same parameters, on PyTorch's own layers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqkern.nn import Regularised
from seqkern.ops._attention import valid_from_lengths
from seqkern.ops._layers import check_lengths
from seqkern.ops.recurrent import Regularisers

State = Any  # a tensor, or a tuple of states: h for RNN and GRU, (h, c) for LSTM, as each cell carries it

POOLINGS = ("last", "mean", "max")


def make(layers: ModuleType, cell: str | Callable[..., Any], *sizes: int, **options: Any) -> Any:
    """The recurrent layer `cell` of `layers`: its class's name in any case, "lstm", "layer_norm_gru".

    A callable is taken as it is. Regularisers (seqkern.nn.Regularised) are among the options.

    Raises:   ValueError: `layers` has no such recurrent layer, or one without the regularisers given
    """
    if not isinstance(cell, str):
        return cell(*sizes, **options)
    known = {
        name.lower(): layer
        for name, layer in vars(layers).items()
        if isinstance(layer, type)
        and issubclass(layer, (nn.RNNBase, Regularised))
        and layer not in (nn.RNNBase, Regularised)
    }
    layer = known.get(cell.lower().replace("_", ""))
    if layer is None:
        names = ", ".join(sorted(known))
        raise ValueError(f"cell: expected one of {names} of {layers.__name__}, got {cell!r}")
    regularisers = set(Regularisers._fields) & options.keys()
    if regularisers and not issubclass(layer, Regularised):
        raise ValueError(
            f"{', '.join(sorted(regularisers))}: expected none with {layers.__name__}.{layer.__name__}, "
            "which has no regularisers; seqkern.nn's layers do"
        )
    return layer(*sizes, **options)


def run(
    layer: Any,
    x: Tensor,
    lengths: Tensor | None = None,
    state: State | None = None,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, State]:
    """A recurrent layer of seqkern.nn or torch.nn over padded rows.

    Args:     x: [T, B, I], with layer.batch_first [B, T, I]
              lengths: [B] integers in 0..T on x's device, or None: all T steps of every row
              state: as the layer takes it, None for zeros
              reset: bool [T, B] or [B, T]: steps that start from zeros; seqkern.nn's layers take it
    Returns:  y: [T, B, D*H] or [B, T, D*H], zero beyond each row's length;  the state at each row's last
              valid step, of a row of length 0 the initial one
    Raises:   ValueError: wrong lengths, or reset with torch.nn's layer
    """
    if isinstance(layer, Regularised):
        return layer(x, state, lengths=lengths, reset=reset)  # type: ignore[operator]
    if reset is not None:
        raise ValueError(
            f"reset: expected None with torch.nn's {type(layer).__name__}; seqkern.nn's layers take it"
        )
    return layer(x, state) if lengths is None else _run_packed(layer, x, lengths, state)


def _run_packed(layer: nn.RNNBase, x: Tensor, lengths: Tensor, state: State | None) -> tuple[Tensor, State]:
    """torch.nn's way to `lengths`. Packing refuses empty rows: they run for a step, of zeros, and are put
    aside."""
    time_dim, batch_dim = (1, 0) if layer.batch_first else (0, 1)
    T, B = x.shape[time_dim], x.shape[batch_dim]
    lengths = check_lengths(lengths, T, B, x.device)
    if B == 0:
        return layer(x, state)
    empty = (lengths == 0).unsqueeze(1)  # [B, 1]
    any_empty = bool(empty.any())
    if any_empty:
        x = torch.where(empty.unsqueeze(time_dim), 0, x)
    packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), layer.batch_first, enforce_sorted=False)
    packed_y, final = layer(packed, state)
    y, _ = pad_packed_sequence(packed_y, layer.batch_first, total_length=T)
    if not any_empty:
        return y, final
    y = torch.where(empty.unsqueeze(time_dim), 0, y)
    if isinstance(final, Tensor):
        return y, torch.where(empty, 0 if state is None else state, final)
    initial = [0] * len(final) if state is None else state
    return y, tuple(torch.where(empty, h0, h) for h0, h in zip(initial, final, strict=True))


def last_hidden(state: State, bidirectional: bool = False) -> Tensor:
    """The last layer's final h of a state [L*D, B, H]: [B, H]; of both directions: [B, 2H]."""
    h = state if isinstance(state, Tensor) else state[0]
    return torch.cat([h[-2], h[-1]], dim=1) if bidirectional else h[-1]


def check_pooling(pooling: str) -> str:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    return pooling


def pool(pooling: str, y: Tensor, state: State, lengths: Tensor | None, bidirectional: bool) -> Tensor:
    """One vector [B, D*H] a row: the final hidden state ("last"), or the mean or maximum of y [B, T, D*H]
    over its valid steps. An empty row gives zeros."""
    if pooling == "last":
        return last_hidden(state, bidirectional)
    if pooling == "mean":
        return y.mean(1) if lengths is None else y.sum(1) / lengths.clamp(min=1).unsqueeze(1)
    return y.amax(1) if lengths is None else max_over_time(y, lengths)


def max_over_time(y: Tensor, lengths: Tensor) -> Tensor:
    """y [B, T, F] -> [B, F], over each row's valid steps; zeros for an empty row."""
    valid = valid_from_lengths(lengths, y.shape[1]).unsqueeze(2)
    largest = torch.where(valid, y, -torch.inf).amax(1)
    return torch.where((lengths > 0).unsqueeze(1), largest, 0)


def attend(scores: Tensor, y: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over time of scores [B, T], and the sum of y [B, T, F] so weighted: (context [B, F], weights
    [B, T]). Padded steps have weight zero; an empty row gives zeros."""
    if lengths is None:
        weights = torch.softmax(scores, 1)
    else:
        valid = valid_from_lengths(lengths, scores.shape[1])
        valid_or_empty = valid | (lengths == 0).unsqueeze(1)  # a softmax over nothing would be NaN
        weights = torch.softmax(torch.where(valid_or_empty, scores, -torch.inf), 1)
        weights = torch.where(valid, weights, 0)
    return (weights.unsqueeze(1) @ y).squeeze(1), weights
