"""What the recurrent cells are, in one table: parameters and their shapes, states, what may be regularised.

A layer's parameters are a flat list, per direction one tensor or None for each of the cell's positions: w_ih,
w_hh, b_ih, b_hh, w_hr, then the cell's own. The equations: seqkern.reference.

Letters: I input, H hidden, P projected hidden (H without proj_size), G rows of w_ih.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

BASE_POSITIONS = 5  # w_ih, w_hh, b_ih, b_hh, w_hr
STATISTICS = 32  # a normalised row's, in the reserve


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


def _base(w_hh: Shape | None = None, projects: bool = False, one_bias: bool = False) -> tuple[Parameter, ...]:
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

    saved: values per hidden unit that the kernels keep for backward, for each row and direction
    saves_h: whether they keep h, too, where it is not the output
    normalises: whether whole rows are normalised
    """

    name: str
    gates: int  # G / H
    states: tuple[str, ...]  # the first is h, of size P; the others have size H
    base: tuple[Parameter, ...] = _base()
    own: tuple[Parameter, ...] = ()
    candidate: bool = True  # there is a candidate, which recurrent dropout may drop
    clips: bool = False  # there is a cell state that cell_clip may clip
    saved: int = 0
    saves_h: bool = False
    normalises: bool = False

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (*self.base, *self.own)

    @property
    def has_heads(self) -> bool:
        return self.base[1].shape is _per_head

    def reserve_width(self, H: int, regularised: bool) -> int:
        """Values that the kernels keep per row and direction (csrc/params.h)."""
        saved = self.saved + (len(self.states) - 1 + self.saves_h if regularised else 0)
        return saved * ((H + 15) // 16 * 16) + (STATISTICS if self.normalises else 0)

    def state_sizes(self, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.P, *(sizes.H,) * (len(self.states) - 1))


_H, _HC = ("h",), ("h", "c")

CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 1, _H, candidate=False, saves_h=True),
        Cell("rnn_relu", 1, _H, candidate=False, saves_h=True),
        Cell("gru", 3, _H, saved=4),
        Cell("lstm", 4, _HC, base=_base(projects=True), clips=True, saved=5),
        Cell(
            *("peephole_lstm", 4, _HC),
            own=(Parameter("weight_peep{}", lambda s: (3 * s.H,)),),
            clips=True,
            saved=5,
        ),
        Cell("cifg_lstm", 3, _HC, clips=True, saved=4),
        Cell("gru_reset_before", 3, _H, saved=3),
        Cell("mgu", 2, _H, saved=2),
        Cell("indrnn_tanh", 1, _H, base=_base(w_hh=_hidden), candidate=False, saves_h=True),
        Cell("indrnn_relu", 1, _H, base=_base(w_hh=_hidden), candidate=False, saves_h=True),
        Cell("nested_lstm", 4, ("h", "c", "d"), own=_INNER, clips=True, saved=10),
        Cell("nested_gru", 3, _H, own=_INNER, saved=8),
        Cell("slstm", 4, ("h", "c", "n", "m"), base=_base(w_hh=_per_head), saved=8),
        Cell(
            *("layer_norm_lstm", 4, _HC),
            base=_base(one_bias=True),
            own=(*_norm("ln_i", _gates), *_norm("ln_h", _gates), *_norm("ln_c", _hidden)),
            clips=True,
            saved=14,
            normalises=True,
        ),
        Cell(
            *("layer_norm_gru", 3, _H),
            base=_base(one_bias=True),
            own=(*_norm("ln_i", _gates), *_norm("ln_h", _gates)),
            saved=10,
            normalises=True,
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
