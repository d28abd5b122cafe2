"""What the recurrent modules share beyond torch.nn: regularisers, resets, the variants' two base classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqkern import ops
from seqkern.nn import _base
from seqkern.ops import _cells
from seqkern.ops.recurrent import Regularisers

REGULARISERS = Regularisers._fields


class RegulariserOptions(TypedDict, total=False):
    """The keywords that Regularised describes."""

    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    variational_dropout: float
    weight_dropout: float
    cell_clip: float | None
    proj_clip: float | None


class Regularised:
    """A layer whose recurrence may be regularised, by keywords of the constructor or attributes:

    zoneout: probability with which h, and where there is one the cell state, keeps its value at a step
        (Krueger et al. 2017); a pair (of h, of the other states). In evaluation their expectation
    recurrent_dropout: of the candidate, at each step (Semeniuta et al. 2016); RNN and IndRNN have none
    variational_dropout: of h_{t-1} on its way into W_hh h_{t-1}, one mask for all steps (Gal and Ghahramani
        2016)
    weight_dropout: of the elements of W_hh, one mask for all rows and steps: DropConnect (Merity et al. 2018)
    cell_clip: the cell state is clamped to -cell_clip..cell_clip before it is used
    proj_clip: likewise LSTM's projected h, with proj_size

    The random ones act in training; all but zoneout leave evaluation as it is. They stand on the class as
    long as they have their defaults, so that a module without them has nothing that torch.nn's lacks.
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    _cell: str  # its name in seqkern.ops.CELLS

    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    variational_dropout: float = 0.0
    weight_dropout: float = 0.0
    cell_clip: float | None = None
    proj_clip: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in REGULARISERS if name in kwargs}
        super().__init__(*args, **kwargs)
        self._regularise(given)

    def _regularise(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if value != getattr(type(self), name):
                setattr(self, name, value)
        regularisers_of(self).check(_cells.find(self._cell), getattr(self, "proj_size", 0) > 0)

    def extra_repr(self) -> str:
        return super().extra_repr() + "".join(self._changed(*REGULARISERS))  # type: ignore[misc]

    def _changed(self, *names: str) -> Iterator[str]:
        """The attributes that differ from their class's, for repr."""
        for name in names:
            if (value := getattr(self, name)) != getattr(type(self), name):
                yield f", {name}={value!r}"


def is_regularised(module: Regularised) -> bool:
    """Has any regulariser another value than the default?"""
    return not (
        module.zoneout == 0
        and module.recurrent_dropout == 0
        and module.variational_dropout == 0
        and module.weight_dropout == 0
        and module.cell_clip is None
        and module.proj_clip is None
    )


def regularisers_of(module: Regularised) -> Regularisers:
    """The module's attributes as the operation takes them; one number for zoneout serves all states."""
    zoneout = module.zoneout
    if isinstance(zoneout, int | float):
        zoneout = (zoneout, zoneout if len(_cells.find(module._cell).states) > 1 else 0.0)
    zone_h, zone_c = zoneout
    return Regularisers((zone_h, zone_c), *(getattr(module, name) for name in REGULARISERS[1:]))


def run(
    module: Any,
    params: list[Tensor | None],
    input: Tensor | PackedSequence,
    hx: Any,
    lengths: Tensor | None,
    reset: Tensor | PackedSequence | None,
    **options: Any,
) -> tuple[Any, Any]:
    """The layers of `module` on ops.recurrent, from what its forward was given to what that returns."""
    cell = module._cell
    names = _cells.find(cell).states
    options |= dict(
        num_layers=module.num_layers,
        bidirectional=module.bidirectional,
        dropout=module.dropout,
        training=module.training,
        **regularisers_of(module)._asdict(),
    )
    if isinstance(input, PackedSequence):
        _base.refuse_lengths(lengths, "a PackedSequence")
        if isinstance(reset, PackedSequence):
            if not torch.equal(reset.batch_sizes, input.batch_sizes):
                raise ValueError(
                    f"reset: expected the batch_sizes of input, {input.batch_sizes.tolist()}, got "
                    f"{reset.batch_sizes.tolist()}"
                )
            reset = reset.data
        if hx is not None:
            states = [hx] if len(names) == 1 else hx
            hx = [_base.permute_state(s, input.sorted_indices) for s in states]
        y, finals = ops.recurrent(
            *(cell, input.data, hx, params),
            batch_sizes=input.batch_sizes,
            sorted_indices=input.sorted_indices,
            reset=reset,
            **options,
        )
        output: Any = _base.repack(y, input)
        finals = tuple(_base.permute_state(s, input.unsorted_indices) for s in finals)
        return output, finals[0] if len(names) == 1 else finals

    x, batched = _base.as_batch(type(module).__name__, input, module.batch_first)
    if hx is not None:
        hx = [_base.as_state(hx, batched)] if len(names) == 1 else _base.as_states(cell, names, hx, batched)
    if not batched:
        _base.refuse_lengths(lengths, "unbatched input")
    if reset is not None:
        reset = _as_time_first(reset, batched, module.batch_first)
    y, finals = ops.recurrent(cell, x, hx, params, lengths=lengths, reset=reset, **options)
    if not batched:
        y, finals = y.squeeze(1), tuple(s.squeeze(1) for s in finals)
    elif module.batch_first:
        y = y.transpose(0, 1)
    return y, finals[0] if len(names) == 1 else finals


def _as_time_first(reset: Tensor | PackedSequence, batched: bool, batch_first: bool) -> Tensor:
    """reset [T, B], [B, T] or [T] as [T, B]."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a bool tensor, got {type(reset).__name__}")
    if reset.dim() != (2 if batched else 1):
        expected = ("[B, T]" if batch_first else "[T, B]") if batched else "[T]"
        raise ValueError(f"reset: expected {expected}, got {tuple(reset.shape)}")
    return reset.unsqueeze(1) if not batched else reset.t() if batch_first else reset


def plain_params(weights: list[Tensor], bias: bool, projects: bool) -> list[Tensor | None]:
    """torch.nn's flat weights, one tensor or None per position w_ih, w_hh, b_ih, b_hh, w_hr."""
    per_direction = 2 + 2 * bias + projects
    params: list[Tensor | None] = []
    for k in range(0, len(weights), per_direction):
        w_ih, w_hh, *rest = weights[k : k + per_direction]
        biases = rest[:2] if bias else [None, None]
        params += [w_ih, w_hh, *biases, rest[-1] if projects else None]
    return params


# ---- the variants ------------------------------------------------------------------------------------------


class _Variant(nn.Module):
    """The parameters of a variant, for layers and cells alike."""

    __prepare_scriptable__ = _base.refuse_torchscript

    _cell: str  # its name in seqkern.ops.CELLS

    input_size: int
    hidden_size: int
    bias: bool | Tensor | None
    layer_norm_eps: float = 1e-5
    num_heads: int = 1

    def _build(
        self, input_size: int, hidden_size: int, bias: bool, device: _base.Device, dtype: torch.dtype | None
    ) -> None:
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, int):
                raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
        if hidden_size <= 0:
            raise ValueError(f"hidden_size: expected a number above 0, got {hidden_size}")
        if not isinstance(bias, bool):
            raise TypeError(f"bias: expected a bool, got {type(bias).__name__}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        spec, H = _cells.find(self._cell), hidden_size
        if H % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size = {H}, got {self.num_heads}")
        self._param_names: list[list[str | None]] = []
        for width, suffix in self._suffixes():
            sizes = _cells.Sizes(width, H, H, spec.gates * H, self.num_heads)
            names: list[str | None] = []
            for position in spec.parameters:
                there = position.allowed and (
                    not position.optional or (bias and "weight_hr" not in position.name)
                )
                name = position.name.format(suffix)
                names.append(name if there else None)
                if not there:
                    if position.allowed and "." not in name:  # as torch.nn's: a name for what is left out
                        self.register_parameter(name, None)
                    continue
                norm, _, leaf = name.partition(".")
                shape = position.shape(sizes)
                if not leaf:
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(name, parameter)
                elif leaf == "weight":
                    made = nn.LayerNorm(shape, self.layer_norm_eps, bias=bias, device=device, dtype=dtype)
                    self.add_module(norm, made)
            self._param_names.append(names)
        if "bias" not in self._parameters:  # the cells with layer norms have one bias, of this name
            self.bias = bias
        self.reset_parameters()

    def _suffixes(self) -> Iterator[tuple[int, str]]:
        """Of every direction of every layer: the width of its input, and how its parameters' names end."""
        yield self.input_size, ""

    def _read(self, name: str | None) -> Tensor | None:
        if name is None:
            return None
        norm, _, leaf = name.partition(".")
        return getattr(getattr(self, norm), leaf) if leaf else getattr(self, name)

    def _params(self) -> list[Tensor | None]:
        """The parameters as they are now, one or None per position."""
        return [self._read(name) for names in self._param_names for name in names]

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(hidden_size), as torch.nn's layers; layer norms by their own rule."""
        reach = 1 / math.sqrt(self.hidden_size)
        for weight in self._parameters.values():
            if weight is not None:
                nn.init.uniform_(weight, -reach, reach)
        for child in self.children():
            if isinstance(child, nn.LayerNorm):
                child.reset_parameters()

    def _options(self) -> dict[str, Any]:
        return {"eps": self.layer_norm_eps}


class RecurrentLayer(Regularised, _Variant):
    """The base of the variants' layers: torch.nn.LSTM's constructor, attributes and call.

    Construct:  Layer(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
                bidirectional=False, device=None, dtype=None), and by keyword what regularises the recurrence:
                Regularised
    Call:       output, state = layer(input, state, lengths=lengths, reset=reset)

    Parameters: torch.nn's names, weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0, then the cell's own,
    each per layer and with _reverse for the second direction.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
        **regularisers: Any,
    ) -> None:
        if unknown := regularisers.keys() - set(REGULARISERS):
            raise TypeError(f"{type(self).__name__}: expected no argument {', '.join(sorted(unknown))}")
        nn.Module.__init__(self)
        if num_layers <= 0:
            raise ValueError(f"num_layers: expected a number above 0, got {num_layers}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability, 0..1, got {dropout}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout acts between layers, so that it expects num_layers greater than 1, but got "
                f"dropout={dropout} and num_layers={num_layers}",
                stacklevel=3,
            )
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self._regularise(regularisers)
        self._build(input_size, hidden_size, bias, device, dtype)

    def _suffixes(self) -> Iterator[tuple[int, str]]:
        D = 2 if self.bidirectional else 1
        for k in range(self.num_layers):
            for direction in ("", "_reverse")[:D]:
                yield self.input_size if k == 0 else D * self.hidden_size, f"_l{k}{direction}"

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters, a list for each layer and direction."""
        return [[self._read(name) for name in names if name is not None] for names in self._param_names]

    def flatten_parameters(self) -> None:
        """Nothing: seqkern's kernels take the parameters as they are. torch.nn's layers have it."""

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in (
            *(("num_layers", 1), ("bias", True), ("batch_first", False)),
            *(("dropout", 0.0), ("bidirectional", False)),
        ):
            if (value := getattr(self, name)) != default:
                text += f", {name}={value}"
        return text + "".join(self._changed("num_heads", "layer_norm_eps", *REGULARISERS))

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Any]: ...

    @overload
    def forward(  # type: ignore[overload-cannot-match]  # as torch is skipped, and with it the difference
        self,
        input: PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[PackedSequence, Any]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor | PackedSequence, Any]:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I], with batch_first [B, T, I], unbatched [T, I], or a PackedSequence
            hx: the state, [L*D, B, H], unbatched [L*D, H]; a tuple of them where the cell carries more than
                h; None for zeros
            lengths: [B] integers in 0..T on input's device, for a padded batch whose row b has lengths[b]
                steps: outputs beyond are zero, the reverse direction starts at the last valid step, the final
                state is the one after it. Not with a PackedSequence, nor with unbatched input
            reset: bool [T, B], with batch_first [B, T], unbatched [T], for a PackedSequence another one or
                its data: True at t: the state before step t is zero, no gradient passes, and the reverse
                direction stops there, too. On a GPU, reading it synchronises: give it on the CPU
        Returns:
            output: [T, B, D*H], [B, T, D*H], [T, D*H] or a PackedSequence, as input;  the final state, as hx
        Raises:
            ValueError: input is neither 2-D nor 3-D, input's dtype is not the weights', lengths or reset are
                wrong
            RuntimeError: any other wrong shape, dtype or device; T = 0
        """
        return run(self, self._params(), input, hx, lengths, reset, **self._options())

    if TYPE_CHECKING:
        __call__ = forward


class RecurrentCell(_Variant):
    """The base of the variants' cells: one step of the layer's.

    Construct:  Cell(input_size, hidden_size, bias=True, device=None, dtype=None, *, cell_clip=None)
    Call:       state = cell(input, state)
    """

    cell_clip: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
        *,
        cell_clip: float | None = None,
    ) -> None:
        super().__init__()
        Regularisers(cell_clip=cell_clip).check(_cells.find(self._cell), False)
        self.cell_clip = cell_clip
        self._build(input_size, hidden_size, bias, device, dtype)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        if self.bias is False or self.bias is None:
            text += ", bias=False"
        for name in ("num_heads", "layer_norm_eps", "cell_clip"):
            if (value := getattr(self, name)) != getattr(type(self), name):
                text += f", {name}={value}"
        return text

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step.

        Args:
            input: [B, I], unbatched [I]
            hx: the state, [B, H], unbatched [H]; a tuple of them where the cell carries more than h; None for
                zeros
        Returns:
            the new state, as hx
        Raises:
            ValueError: input or a state is neither 1-D nor 2-D
            RuntimeError: any other wrong shape, dtype or device
        """
        name, cell = type(self).__name__, self._cell
        names = _cells.find(cell).states
        x, batched = _base.cell_input(name, input)
        if hx is not None:
            if isinstance(hx, Tensor) != (len(names) == 1):
                expected = "a tensor" if len(names) == 1 else f"a tuple of {len(names)} tensors"
                raise TypeError(f"hx: expected {expected}, got {type(hx).__name__}")
            hx = [_base.cell_state(name, s, batched) for s in ([hx] if len(names) == 1 else hx)]
        new = ops.recurrent_cell(cell, x, hx, self._params(), cell_clip=self.cell_clip, **self._options())
        if not batched:
            new = tuple(s.squeeze(0) for s in new)
        return new[0] if len(names) == 1 else new

    if TYPE_CHECKING:
        __call__ = forward
