"""What the recurrent cells are, in one table: parameters and their shapes, states, what may be regularised.

A layer's parameters are a flat list, per direction one tensor or None for each of the cell's positions: w_ih,
w_hh, b_ih, b_hh, w_hr, then the cell's own. The equations: seqkern.reference.

Letters: I input, H hidden, P projected hidden (H without proj_size), G rows of w_ih.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

BASE_POSITIONS = 5  # w_ih, w_hh, b_ih, b_hh, w_hr


class Sizes(NamedTuple):
    """What a layer's first weights say of its sizes."""

    I: int  # noqa: E741
    H: int
    P: int
    G: int
    heads: int = 1


Shape = Callable[[Sizes], tuple[int, ...]]


@dataclass(frozen=True)
class Parameter:
    """One position. `name` is a module's attribute, {} the layer's suffix: "_l0", "_l0_reverse"."""

    name: str
    shape: Shape
    optional: bool = False
    allowed: bool = True


def _gates(s: Sizes) -> tuple[int, ...]:
    return (s.G,)


def _hidden(s: Sizes) -> tuple[int, ...]:
    return (s.H,)


def _square(s: Sizes) -> tuple[int, ...]:
    return (s.G, s.H)


def _per_head(s: Sizes) -> tuple[int, ...]:
    return (s.heads, s.G // s.heads, s.H // s.heads)


_BASE = (
    Parameter("weight_ih{}", lambda s: (s.G, s.I)),
    Parameter("weight_hh{}", lambda s: (s.G, s.P)),
    Parameter("bias_ih{}", _gates, optional=True),
    Parameter("bias_hh{}", _gates, optional=True),
    Parameter("weight_hr{}", lambda s: (s.P, s.H), allowed=False),
)


def _base(w_hh: Shape | None = None, projects: bool = False, one_bias: bool = False):
    """The five first positions, where they differ from the usual."""
    w_ih, usual_w_hh, b_ih, b_hh, w_hr = _BASE
    return (
        w_ih,
        usual_w_hh if w_hh is None else replace(usual_w_hh, shape=w_hh),
        replace(b_ih, name="bias{}") if one_bias else b_ih,
        replace(b_hh, allowed=not one_bias),
        replace(w_hr, optional=True, allowed=projects),
    )


def _norm(name: str, shape: Shape) -> tuple[Parameter, Parameter]:
    return Parameter(f"{name}{{}}.weight", shape), Parameter(f"{name}{{}}.bias", shape, optional=True)


_INNER = (
    Parameter("inner_weight_ih{}", _square),
    Parameter("inner_weight_hh{}", _square),
    Parameter("inner_bias_ih{}", _gates, optional=True),
    Parameter("inner_bias_hh{}", _gates, optional=True),
)


@dataclass(frozen=True)
class Cell:
    """One cell.

    saved, row_scalars: what the kernels keep for backward, for each packed row and direction: values per
    hidden unit, and values that stand once
    """

    name: str
    gates: int  # G / H
    states: tuple[str, ...]  # the first is h, of size P; the others have size H
    base: tuple[Parameter, ...] = _base()
    own: tuple[Parameter, ...] = ()
    candidate: bool = True  # there is a candidate, which recurrent dropout may drop
    clips: bool = False  # there is a cell state that cell_clip may clip
    saved: int = 0
    row_scalars: int = 0

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (*self.base, *self.own)

    @property
    def has_heads(self) -> bool:
        return self.base[1].shape is _per_head

    def state_sizes(self, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.P, *(sizes.H,) * (len(self.states) - 1))


_H, _HC = ("h",), ("h", "c")

CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 1, _H, candidate=False),
        Cell("rnn_relu", 1, _H, candidate=False),
        Cell("gru", 3, _H),
        Cell("lstm", 4, _HC, base=_base(projects=True), clips=True),
        Cell(
            *("peephole_lstm", 4, _HC),
            own=(Parameter("weight_peep{}", lambda s: (3 * s.H,)),),
            clips=True,
        ),
        Cell("cifg_lstm", 3, _HC, clips=True),
        Cell("gru_reset_before", 3, _H),
        Cell("mgu", 2, _H),
        Cell("indrnn_tanh", 1, _H, base=_base(w_hh=_hidden), candidate=False),
        Cell("indrnn_relu", 1, _H, base=_base(w_hh=_hidden), candidate=False),
        Cell("nested_lstm", 4, ("h", "c", "d"), own=_INNER, clips=True),
        Cell("nested_gru", 3, _H, own=_INNER),
        Cell("slstm", 4, ("h", "c", "n", "m"), base=_base(w_hh=_per_head)),
        Cell(
            *("layer_norm_lstm", 4, _HC),
            base=_base(one_bias=True),
            own=(*_norm("ln_i", _gates), *_norm("ln_h", _gates), *_norm("ln_c", _hidden)),
            clips=True,
        ),
        Cell(
            *("layer_norm_gru", 3, _H),
            base=_base(one_bias=True),
            own=(*_norm("ln_i", _gates), *_norm("ln_h", _gates)),
        ),
    )
}


def find(name: str) -> Cell:
    """The cell of this name.

    Raises:   ValueError: there is none
    """
    try:
        return CELLS[name]
    except KeyError:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {name!r}") from None
