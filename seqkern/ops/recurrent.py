"""The recurrent variants and regularised recurrences: one operation for every cell of `_cells.CELLS`."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkern.ops import _backend, _cells, _layers, _segments
from seqkern.ops.gru import choose_layer as choose_gru
from seqkern.ops.lstm import choose_layer as choose_lstm
from seqkern.ops.rnn import choose_layer as choose_rnn
from seqkern.reference import recurrent_layer
from seqkern.reference.masks import candidate_scale, recurrent_mask, variational_scale, weight_scale

_forward = _backend.operator("recurrent_forward")
_backward = _backend.operator("recurrent_backward")
_mask = _backend.operator("recurrent_mask")

UPDATE_GATES = ("keep", "replace")
MAX_HEADS = 64  # of both directions, kMostDirections in csrc/params.h


class Regularisers(NamedTuple):
    """What may be asked of a recurrence beside its equations; see `recurrent`."""

    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    variational_dropout: float = 0.0
    weight_dropout: float = 0.0
    cell_clip: float | None = None
    proj_clip: float | None = None

    def check(self, spec: _cells.Cell, projects: bool) -> None:
        """The probabilities and limits are ones, and mean something for this cell.

        Raises:   ValueError
        """
        zone_h, zone_c = self.zoneout
        for name, p in (
            ("zoneout", zone_h),
            ("zoneout", zone_c),
            ("recurrent_dropout", self.recurrent_dropout),
            ("variational_dropout", self.variational_dropout),
            ("weight_dropout", self.weight_dropout),
        ):
            if not 0 <= p <= 1:
                raise ValueError(f"{name}: expected a probability, 0..1, got {p}")
        for name, limit in (("cell_clip", self.cell_clip), ("proj_clip", self.proj_clip)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}: expected a number above 0, or None, got {limit}")
        cell = spec.name
        if zone_c > 0 and len(spec.states) == 1:
            raise ValueError(f"zoneout: expected (p, 0), as {cell} has no state but h, got {self.zoneout}")
        if zone_h > 0 and projects:
            raise ValueError(f"zoneout: expected (0, p) with proj_size, got {self.zoneout}")
        if self.recurrent_dropout > 0 and not spec.candidate:
            raise ValueError(
                f"recurrent_dropout: expected 0, as {cell} has no candidate, got {self.recurrent_dropout}"
            )
        if self.cell_clip is not None and not spec.clips:
            why = "its stabiliser bounds it" if "c" in spec.states else "it has no cell state"
            raise ValueError(f"cell_clip: expected None for {cell}: {why}; got {self.cell_clip}")
        if self.proj_clip is not None and not projects:
            raise ValueError(f"proj_clip: expected None without proj_size, got {self.proj_clip}")


def recurrent(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor | None],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    sorted_indices: Tensor | None = None,
    reset: Tensor | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    zoneout: tuple[float, float] = (0.0, 0.0),
    recurrent_dropout: float = 0.0,
    variational_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    eps: float = 1e-5,
    update_gate: str = "keep",
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run any cell over a batch of sequences, with what regularises its recurrence.

    The equations: seqkern.reference.recurrent_layer and the step functions beside it. rnn_tanh, rnn_relu, gru
    and lstm run on their own kernels where nothing acts inside the recurrence (weight_dropout and resets act
    outside).

    Random masks are functions of one seed, drawn from torch's generator on input's device, and of layer,
    direction, step and row: padded, packed and cut batches see the same, and backward and a checkpoint's
    recomputation draw the same again.

    Args:
        cell: a name in seqkern.ops.CELLS
        input: [T, B, I], time first, any strides; with batch_sizes the data [N, I] of a PackedSequence
        hx: the states, h_0 [L*D, B, P] and what else the cell carries, [L*D, B, H] each; None for zeros
        params: per layer and direction one tensor or None for each of the cell's positions: w_ih, w_hh, b_ih,
            b_hh, w_hr (lstm's projection), then the cell's own
        lengths: [B] integers in 0..T on input's device, as for `lstm`
        batch_sizes: [T] int64 on the CPU, non-increasing, as in a PackedSequence; not with lengths
        sorted_indices: [B], which row of the owner's batch each packed row is (a PackedSequence's): masks are
            drawn by the owner's numbers. None: the same
        reset: bool, [T, B], or [N] with batch_sizes, on any device: True at t: the state before step t is
            zero, and no gradient passes. The reverse direction sees the same documents, each on its own:
            its h_0 enters the row's last, its h_n comes from the first. Reading it synchronises with a GPU;
            on the CPU it does not. Not in one graph under torch.compile
        dropout: probability with which, in training, outputs of all layers but the last are dropped
        zoneout: probabilities (of h, of the other states) with which a unit keeps its value (Krueger et al.
            2017); in evaluation the expectation. Not of h with a projection
        recurrent_dropout: of the candidate, at each step (Semeniuta et al. 2016); not for rnn and indrnn
        variational_dropout: of h_{t-1} as it enters the product with W_hh, one mask for all steps (Gal and
            Ghahramani 2016)
        weight_dropout: of the elements of W_hh, one mask for all rows and steps (Merity et al. 2018)
        cell_clip: c (nested_lstm: c and d) is clamped to -cell_clip..cell_clip before it is used; the
            gradient is zero where it was beyond
        proj_clip: likewise the projected h
        eps: of layer normalisation
        update_gate: of gru and gru_reset_before: "keep", h = (1 - z) n + z h_prev as in torch, or "replace",
            h = (1 - z) h_prev + z n
        backend: "eager", "cpu" or "cuda"; None: the fastest that is correct. See seqkern.use_backend. The
            kernels take up to 64 heads of both directions
    Returns:
        output: [T, B, D*P] or [N, D*P];  the final states, as hx; dtype of input. Under torch.autocast: its
            dtype on a GPU, on a CPU (as torch.nn.GRU) the wider of its dtype and the states'
    Raises:
        ValueError: input's dtype is not the weights', lengths, batch_sizes or reset are wrong, an option is
            out of range or means nothing for the cell, no such cell or backend
        RuntimeError: a wrong shape, device or dtype of anything else; T = 0; a named backend cannot serve the
            request
    """
    spec = _cells.find(cell)
    D = 2 if bidirectional else 1
    regularisers = Regularisers(
        zoneout, recurrent_dropout, variational_dropout, weight_dropout, cell_clip, proj_clip
    )
    sizes = _first_sizes(spec, params, num_layers * D)
    projects = params[4] is not None
    regularisers.check(spec, projects)
    _check_update_gate(spec, update_gate)
    if hx is None:
        hx = _layers.zero_states(input, num_layers * D, batch_sizes, *spec.state_sizes(sizes))
    if _layers.autocast_active(input):
        given = [p for p in params if p is not None]
        dtype, h_dtype = _layers.autocast_dtypes(input, hx, given, lower=False, projects=projects)
        with torch.autocast(input.device.type, enabled=False):
            output, (h_n, *others) = recurrent(
                cell,
                input.to(dtype),
                [s.to(dtype) for s in hx],
                [None if p is None else p.to(dtype) for p in params],
                lengths=lengths,
                batch_sizes=batch_sizes,
                sorted_indices=sorted_indices,
                reset=reset,
                num_layers=num_layers,
                bidirectional=bidirectional,
                dropout=dropout,
                training=training,
                eps=eps,
                update_gate=update_gate,
                backend=backend,
                **regularisers._asdict(),
            )
            return output.to(h_dtype), (h_n.to(h_dtype), *others)

    T, B = _check(spec, sizes, input, hx, params, num_layers, D, lengths, batch_sizes)
    if lengths is not None:
        lengths = _layers.check_lengths(lengths, T, B, input.device)
    if update_gate == "replace":
        params = _exchange_update_gate(params)

    seed = _layers.new_seed(input.device) if training and _is_random(regularisers) else None
    if seed is not None and weight_dropout > 0:
        params = _drop_weights(spec, params, seed, weight_dropout, D)
    places = Places(sorted_indices)
    initial, rows = hx, None
    if reset is not None:
        reset, valid_lengths, rows = _check_reset(reset, input, lengths, batch_sizes)
        segments = _segments.cut(reset, valid_lengths, D, input.device)
        if segments is not None:
            index = segments.t * B + segments.b
            shape, index = (input.shape[:-1], index) if rows is None else (input.shape[:1], rows[index])
            places = Places(sorted_indices, segments)
            input = (input if batch_sizes is not None else input.flatten(0, 1)).index_select(0, index)
            hx = [segments.gather_states(s) for s in hx]
            lengths, batch_sizes = None, segments.batch_sizes
    layers = _choose_layers(
        spec, input, hx, params, num_layers, D, training, regularisers, eps, seed, places, backend
    )
    output, *finals = _layers.run_layers(
        layers, input, hx, params, D, dropout, training, lengths, batch_sizes
    )
    if reset is not None and segments is not None:
        rest = output.new_zeros((math.prod(shape), output.shape[1]))
        output = rest.index_copy(0, index, output).unflatten(0, shape)
        finals = [segments.scatter_states(s, s_0) for s, s_0 in zip(finals, initial, strict=True)]
    return output, tuple(finals)


def recurrent_cell(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor | None],
    *,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    eps: float = 1e-5,
    update_gate: str = "keep",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """One step: `recurrent` with T = 1, without what is random.

    Args:     input: [B, I];  hx: the states, [B, P] and [B, H], None for zeros;  params: one per position;
              the rest as for `recurrent`
    Returns:  the new states, h first
    """
    spec = _cells.find(cell)
    sizes = _first_sizes(spec, params, 1)
    projects = params[4] is not None
    regularisers = Regularisers(cell_clip=cell_clip, proj_clip=proj_clip)
    regularisers.check(spec, projects)
    _check_update_gate(spec, update_gate)
    if hx is None:
        hx = [input.new_zeros((input.shape[0], size)) for size in spec.state_sizes(sizes)]
    if _layers.autocast_active(input):
        given = [p for p in params if p is not None]
        dtype, _ = _layers.autocast_dtypes(input, hx, given, lower=False)
        with torch.autocast(input.device.type, enabled=False):
            return recurrent_cell(
                cell,
                input.to(dtype),
                [s.to(dtype) for s in hx],
                [None if p is None else p.to(dtype) for p in params],
                cell_clip=cell_clip,
                proj_clip=proj_clip,
                eps=eps,
                update_gate=update_gate,
                backend=backend,
            )
    _check(spec, sizes, input, hx, params, 1, 1, None, None, cell=True)
    if update_gate == "replace":
        params = _exchange_update_gate(params)
    (layer,) = _choose_layers(
        spec, input, hx, params, 1, 1, False, regularisers, eps, None, Places(), backend
    )
    _, *finals = layer(input.unsqueeze(0), [s.unsqueeze(0) for s in hx], params, None, None)
    return tuple(s.squeeze(0) for s in finals)


# ---- meaning, checked once ---------------------------------------------------------------------------------


def _first_sizes(spec: _cells.Cell, params: Sequence[Tensor | None], rows: int) -> _cells.Sizes:
    """What the first direction's weights say of I, H, P, G and heads.

    Raises:   ValueError: a wrong number of parameters, one that is missing or one too many
              RuntimeError: weights of another number of dimensions
    """
    positions = spec.parameters
    if len(params) != rows * len(positions):
        raise ValueError(
            f"params: expected {len(positions)} positions of {spec.name} for each of {rows} layers * "
            f"directions, got {len(params)}"
        )
    for k, p in enumerate(params):
        position = positions[k % len(positions)]
        if p is None and not position.optional and position.allowed:
            raise ValueError(f"{position.name.format('')}: expected a tensor for {spec.name}, got None")
        if p is not None and not position.allowed:
            raise ValueError(f"{position.name.format('')}: expected None for {spec.name}, got a tensor")
    w_ih, w_hh, w_hr = params[0], params[1], params[4]
    assert w_ih is not None and w_hh is not None  # as no cell leaves them out
    if any((p is None) != (w_hr is None) for p in params[4 :: len(positions)]):
        raise ValueError("weight_hr: expected one for each layer and direction, or none at all")
    w_hh_dim = len(spec.base[1].shape(_cells.Sizes(1, 1, 1, 1)))
    if w_ih.dim() != 2 or w_ih.shape[0] % spec.gates:
        raise RuntimeError(f"weight_ih_l0: expected [{spec.gates}*H, I], got {tuple(w_ih.shape)}")
    if w_hh.dim() != w_hh_dim:
        raise RuntimeError(f"weight_hh_l0: expected {w_hh_dim} dimensions, got {tuple(w_hh.shape)}")
    G, I = w_ih.shape  # noqa: E741
    H = G // spec.gates
    P = H if w_hr is None else w_hh.shape[-1]
    heads = w_hh.shape[0] if spec.has_heads else 1
    if heads == 0 or H % heads:
        raise RuntimeError(f"weight_hh_l0: expected a number of heads that divides H = {H}, got {heads}")
    return _cells.Sizes(I, H, P, G, heads)


def _check_update_gate(spec: _cells.Cell, update_gate: str) -> None:
    if update_gate not in UPDATE_GATES:
        raise ValueError(f"update_gate: expected 'keep' or 'replace', got {update_gate!r}")
    if update_gate == "replace" and spec.name not in ("gru", "gru_reset_before"):
        raise ValueError(f"update_gate: expected 'keep' for {spec.name}, got 'replace'")


def _check(
    spec: _cells.Cell,
    sizes: _cells.Sizes,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    num_layers: int,
    D: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    cell: bool = False,
) -> tuple[int, int]:
    """T and B of a request whose shapes, dtypes and devices fit. Exceptions: `recurrent`."""
    T, B, _ = _layers.check_input(input, params[0], lengths, batch_sizes, cell)
    if len(states) != len(spec.states):
        raise RuntimeError(f"hx: {spec.name} expects {len(spec.states)} states, got {len(states)}")
    positions = spec.parameters
    rows = num_layers * D

    def names() -> list[str]:
        suffixes = [f"_l{k}{suffix}" for k in range(num_layers) for suffix in ("", "_reverse")[:D]]
        return [p.name.format("" if cell else suffix) for suffix in suffixes for p in positions]

    shapes = tuple(p.shape(sizes) for p in positions)
    state_sizes = spec.state_sizes(sizes)
    _layers.check_tensors(input, states, params, shapes, state_sizes, names, rows, B, D, cell)
    return T, B


def _check_reset(
    reset: Tensor, input: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """reset as [T, B], the lengths, and for a packed input where in it step t of row b lies, at t * B + b."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a bool tensor, got {type(reset).__name__}")
    if reset.dtype is not torch.bool:
        raise ValueError(f"reset: expected a bool tensor, got {reset.dtype}")
    expected, letters = input.shape[:-1], "[T, B]" if batch_sizes is None else "[N]"
    if reset.shape != expected:
        raise ValueError(f"reset: expected {letters} = {tuple(expected)}, got {tuple(reset.shape)}")
    if batch_sizes is None:
        return reset, lengths, None
    rows, lengths, T = _layers.packed_rows(batch_sizes, input.device)
    B = lengths.shape[0]
    places = torch.zeros(T * B, dtype=torch.int64, device=input.device)
    places[rows] = torch.arange(len(rows), device=input.device)
    padded = torch.zeros(T * B, dtype=torch.bool, device=reset.device)
    padded[rows.to(reset.device)] = reset
    return padded.view(T, B), lengths, places


# ---- what acts outside the recurrence ----------------------------------------------------------------------


def _exchange_update_gate(params: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The parameters with z's rows negated: sigmoid(-a) = 1 - sigmoid(a) exchanges h_prev and n."""
    w_ih = params[0]
    assert w_ih is not None
    G = w_ih.shape[0]
    sign = w_ih.new_ones(G)
    sign[G // 3 : 2 * G // 3] = -1
    return [p if p is None else p * (sign if p.dim() == 1 else sign.unsqueeze(1)) for p in params]


def _drop_weights(
    spec: _cells.Cell, params: Sequence[Tensor | None], seed: Tensor, p: float, D: int
) -> list[Tensor | None]:
    """The parameters with DropConnect's mask on every W_hh."""
    dropped = list(params)
    for row, k in enumerate(range(1, len(params), len(spec.parameters))):
        layer, d = divmod(row, D)
        dropped[k] = params[k] * weight_scale(seed, p, params[k], layer, d)
    return dropped


def _is_random(regularisers: Regularisers) -> bool:
    zoneout, *others = regularisers[:4]
    return any(p > 0 for p in (*zoneout, *others))


class Places(NamedTuple):
    """Which step of which row, as the batch's owner numbers them, the layer's rows are."""

    sorted_indices: Tensor | None = None
    segments: _segments.Segments | None = None

    def rows(self, B: int, device: torch.device) -> Tensor:
        """[B] the owner's row of each of the layer's rows."""
        rows = torch.arange(B, device=device) if self.segments is None else self.segments.row
        return rows if self.sorted_indices is None else self.sorted_indices.index_select(0, rows)

    def steps(self, x: Tensor, batch_sizes: Tensor | None, B: int) -> tuple[Tensor, Tensor]:
        """t and b, which broadcast to the shape of x without its last dimension."""
        if self.segments is not None:
            t, b = self.segments.t, self.segments.b
        elif batch_sizes is not None:
            places, _, _ = _layers.packed_rows(batch_sizes, x.device)
            t, b = places // B, places % B
        else:
            t = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
            return t, self.rows(B, x.device)
        return t, b if self.sorted_indices is None else self.sorted_indices.index_select(0, b)


# ---- one layer ---------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What a layer is told beside its tensors."""

    cell: str
    number: int  # of the layer
    probabilities: tuple[float, float, float]  # of recurrent_mask's bits; zeros: there is no mask
    scalars: tuple[float, ...]  # keep_h, keep_c, candidate_scale, cell_clip, proj_clip, eps

    def mask(self, seed: Tensor | None, t: Tensor | None, b: Tensor | None, D: int, H: int) -> Tensor | None:
        if not any(self.probabilities):
            return None
        assert seed is not None and t is not None and b is not None
        if _mask is None or not seed.is_cpu or _layers.transformed((seed,)):
            return recurrent_mask(seed, self.probabilities, t, b, self.number, D, H)
        t, b = torch.broadcast_tensors(t, b)
        return _mask(seed, self.probabilities, t, b, self.number, D, H)

    def hidden(self, params: Sequence[Tensor | None]) -> int:
        w_ih = params[0]
        assert w_ih is not None
        return w_ih.shape[0] // _cells.CELLS[self.cell].gates


def _choose_layers(
    spec: _cells.Cell,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    num_layers: int,
    D: int,
    training: bool,
    regularisers: Regularisers,
    eps: float,
    seed: Tensor | None,
    places: Places,
    backend: str | None,
) -> list[_layers.Layer]:
    given = [p for p in params if p is not None]
    zoneout, p, variational = regularisers[:3]
    limits = [math.inf if limit is None else limit for limit in regularisers[4:]]
    inside = any(zoneout) or (training and (p > 0 or variational > 0)) or min(limits) < math.inf
    if spec.name in _PLAIN and not inside:
        choose, *names = _PLAIN[spec.name]
        layer = choose(input, states, given, *names, backend)
        return [partial(_plain_layer, layer, len(spec.parameters))] * num_layers
    chosen = _layers.choose_backend("recurrent", input, states, given, backend)
    w_hh = params[1]
    heads = w_hh.shape[0] * D if spec.has_heads and w_hh is not None else 1
    if heads > MAX_HEADS and chosen != "eager":
        if backend or _backend.current_wish():
            raise RuntimeError(
                f"backend {chosen!r} was asked for: it takes up to {MAX_HEADS} heads of both directions, "
                f"got {heads}"
            )
        chosen = "eager"
    run = _eager_layer if chosen == "eager" else _operator_layer
    probabilities, keeps = ((*zoneout, p), (0.0, 0.0)) if training else ((0.0, 0.0, 0.0), zoneout)
    scalars = (*keeps, candidate_scale(p) if training else 1.0, *limits, eps)
    return [
        partial(
            _layer, run, Options(spec.name, k, probabilities, scalars), seed, places, variational * training
        )
        for k in range(num_layers)
    ]


# The cells with kernels of their own: what chooses one of their layers, and what more it asks.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "rnn_tanh": (choose_rnn, "tanh"),
    "rnn_relu": (choose_rnn, "relu"),
    "gru": (choose_gru,),
    "lstm": (choose_lstm,),
}


def _plain_layer(
    layer: _layers.Layer,
    positions: int,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """A layer that takes no None: one bias alone is completed with zeros."""
    weights: list[Tensor] = []
    for k in range(0, len(params), positions):
        w_ih, w_hh, b_ih, b_hh, w_hr = params[k : k + positions]
        if b_ih is not None or b_hh is not None:
            b_ih = torch.zeros_like(b_hh) if b_ih is None else b_ih
            b_hh = torch.zeros_like(b_ih) if b_hh is None else b_hh
        weights += [p for p in (w_ih, w_hh, b_ih, b_hh, w_hr) if p is not None]
    return layer(x, states, weights, lengths, batch_sizes)


def _layer(
    run: Callable[..., tuple[Tensor, ...]],
    options: Options,
    seed: Tensor | None,
    places: Places,
    variational: float,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """One layer with its masks, on either backend."""
    D, B, P = states[0].shape
    t = b = h_scale = None
    if any(options.probabilities):
        t, b = places.steps(x, batch_sizes, B)
    if variational > 0:
        rows = places.rows(B, x.device)
        h_scale = variational_scale(seed, variational, rows, options.number, D, P, x.dtype)
    return run(options, x, states, params, lengths, batch_sizes, seed, t, b, h_scale)


def _eager_layer(
    options: Options,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    t: Tensor | None,
    b: Tensor | None,
    h_scale: Tensor | None,
) -> tuple[Tensor, ...]:
    names = ("keep_h", "keep_c", "candidate_scale", "cell_clip", "proj_clip", "eps")
    scalars = dict(zip(names, options.scalars, strict=True))

    def reference(x: Tensor, *rest: Any, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        *states, params, lengths = rest
        return recurrent_layer(
            options.cell, x, states, params, lengths, mask=mask, h_scale=h_scale, **scalars
        )

    mask = options.mask(seed, t, b, states[0].shape[0], options.hidden(params))
    return _layers.eager_layer(reference, x, states, params, lengths, batch_sizes, mask)


def _operator_layer(
    options: Options,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    t: Tensor | None,
    b: Tensor | None,
    h_scale: Tensor | None,
) -> tuple[Tensor, ...]:
    tensors = (x, lengths, batch_sizes, seed, t, b, h_scale, *states, *params)
    if _layers.wants_grad((x, *states), [p for p in params if p is not None]):
        return RecurrentFunction.apply(options, len(states), *_layers.distinct(*tensors))
    mask = options.mask(seed, t, b, states[0].shape[0], options.hidden(params))
    y, finals, _ = _forward(
        options.cell, x, states, params, lengths, batch_sizes, mask, h_scale, *options.scalars, False
    )
    return (y, *finals)


class RecurrentFunction(torch.autograd.Function):
    """One layer on the operators. Kept for backward: the inputs, the output, the reserve and the seed, from
    which the mask is drawn again."""

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        count: int,
        x: Tensor,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        seed: Tensor | None,
        t: Tensor | None,
        b: Tensor | None,
        h_scale: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        states, params = rest[:count], rest[count:]
        mask = options.mask(seed, t, b, states[0].shape[0], options.hidden(params))
        y, finals, reserve = _forward(
            options.cell, x, states, params, lengths, batch_sizes, mask, h_scale, *options.scalars, True
        )
        ctx.options, ctx.count = options, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            _layers.save_output(ctx, y), reserve, x, lengths, batch_sizes, seed, t, b, h_scale, *rest
        )
        return (y, *finals)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinals: Tensor | None) -> tuple[Tensor | None, ...]:
        y, reserve, *tensors = ctx.saved_tensors
        x, lengths, batch_sizes, seed, t, b, h_scale, *rest = tensors
        options, count = ctx.options, ctx.count
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True

            def eager(
                x: Tensor,
                lengths: Tensor | None,
                batch_sizes: Tensor | None,
                seed: Tensor | None,
                t: Tensor | None,
                b: Tensor | None,
                h_scale: Tensor | None,
                *rest: Any,
            ) -> tuple[Tensor, ...]:
                states, params = rest[:count], rest[count:]
                return _eager_layer(options, x, states, params, lengths, batch_sizes, seed, t, b, h_scale)

            grads = _layers.differentiate_eager(eager, tensors, needed, (dy, *dfinals))
            return (None, None, *grads)
        states, params = rest[:count], rest[count:]
        mask = options.mask(seed, t, b, states[0].shape[0], options.hidden(params))
        given = (x, states, params, lengths, batch_sizes, mask, h_scale, *options.scalars)
        if _layers.output_changed(ctx):
            y = _forward(options.cell, *given, False)[0]
        dx, dstates, dparams = _backward(
            options.cell, dy, dfinals, *given, y, reserve, needed[0], any(needed[7 + count :])
        )
        return (None, None, *_layers.wanted((dx, *(None,) * 6, *dstates, *dparams), needed))
