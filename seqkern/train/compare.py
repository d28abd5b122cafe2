"""seqkern beside torch.nn, on the same inputs: errors against float64, then times taken in turn.

A `Comparison` says how to build and call both; `parity` and `speed` know nothing of layers. A new layer is
compared by writing one more function that returns a Comparison (as `recurrent` does) and listing its results.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from seqkern.nn import MultiHeadAttention
from seqkern.nn._recurrent import RecurrentCell
from seqkern.ops import use_backend

Call = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]

NEARBY = 8


@dataclass(frozen=True)
class Comparison:
    """One layer in one case.

    build:      dtype → (torch.nn's module, seqkern's), with the same parameters
    inputs:     dtype → the floating inputs, whose gradients are compared too
    call_peer:  (module, inputs) → outputs, through torch.nn
    call_ours:  the same outputs, through seqkern
    is_wide:    the peer computes 16 bits within float32, rounding results only
    """

    layer: str
    case: str
    build: Callable[[torch.dtype], tuple[nn.Module, nn.Module]]
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    call_peer: Call
    call_ours: Call
    is_wide: bool = False


def recurrent(
    peer: type[nn.RNNBase],
    ours: type[nn.RNNBase],
    sizes: tuple[int, int, int, int],
    *,
    lengths: Sequence[int] | None = None,
    packed: bool = False,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """A layer of torch.nn against its namesake: input and states in, output and states out.

    sizes:    (T, B, I, H)
    lengths:  torch.nn packs, runs, unpacks; seqkern gets `lengths=`, or, where `packed`, a PackedSequence
    """
    T, B, input_size, hidden_size = sizes
    D = 2 if options.get("bidirectional") else 1
    rows = D * options.get("num_layers", 1)
    state_sizes = [hidden_size]
    if issubclass(peer, nn.LSTM):
        state_sizes = [options.get("proj_size") or hidden_size, hidden_size]
    lengths_ = None if lengths is None else torch.tensor(lengths)

    def states(h: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return h if len(h) > 1 else h[0]

    def flat(y: Tensor, h: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (y, *h) if isinstance(h, tuple) else (y, h)

    def call_packed(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *h = given
        sequence: PackedSequence = pack_padded_sequence(x, lengths_, enforce_sorted=False)  # on the CPU
        y, h = module(sequence, states(tuple(h)))
        y, _ = pad_packed_sequence(y, total_length=T)
        return flat(y, h)

    def call_padded(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *h = given
        return flat(*module(x, states(tuple(h))))

    def call_lengths(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *h = given
        assert lengths_ is not None
        return flat(*module(x, states(tuple(h)), lengths=lengths_.to(x.device)))

    words = [
        f"B {B}",
        f"T {T}",
        f"I {input_size}",
        f"H {hidden_size}",
        *(f"{k} {v}" for k, v in options.items()),
    ]
    if lengths is not None:
        words.append(f"{'packed' if packed else 'lengths'} {min(lengths)}…{max(lengths)}")
    return Comparison(
        layer=ours.__name__,
        case=", ".join(words),
        build=_twins(peer, ours, input_size, hidden_size, seed, options),
        inputs=_random([(T, B, input_size), *((rows, B, size) for size in state_sizes)], seed),
        call_peer=call_padded if lengths is None else call_packed,
        call_ours=call_padded if lengths is None else call_packed if packed else call_lengths,
    )


def attention(
    sizes: tuple[int, int, int, int, int],
    *,
    lengths: Sequence[int] | None = None,
    is_causal: bool = False,
    need_weights: bool = False,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """MultiHeadAttention against torch.nn's: query, key and value in, output and averaged weights out.

    sizes:    (B, L, S, N, E), E of a head
    lengths:  of the keys, at least 1; torch.nn gets a key_padding_mask
    """
    B, L, S, N, E = sizes
    padding = None if lengths is None else torch.arange(S) >= torch.tensor(lengths)[:, None]
    causal = torch.ones(L, S, dtype=torch.bool).triu(1) if is_causal else None

    def call_peer(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        masks = {"key_padding_mask": padding, "attn_mask": causal}
        there = {name: None if mask is None else mask.to(given[0].device) for name, mask in masks.items()}
        found = module(*given, **there, need_weights=need_weights)
        return found if need_weights else found[:1]

    def call_ours(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = module(
            *given,
            lengths=None if lengths is None else torch.tensor(lengths, device=given[0].device),
            is_causal=is_causal,
            need_weights=need_weights,
        )
        return found if need_weights else found[:1]

    options = {"batch_first": True, **options}
    words = [f"B {B}, L {L}, S {S}, N {N}, E {E}", *(f"{k} {v}" for k, v in options.items())]
    words += ["lengths"] * (lengths is not None) + ["causal"] * is_causal + ["weights"] * need_weights
    return Comparison(
        layer="MultiHeadAttention",
        case=", ".join(words),
        build=_twins(nn.MultiheadAttention, MultiHeadAttention, N * E, N, seed, options),
        inputs=_random([(B, L, N * E), (B, S, N * E), (B, S, N * E)], seed),
        call_peer=call_peer,
        call_ours=call_ours,
    )


def recurrent_cell(
    peer: type[nn.RNNCellBase],
    ours: type[nn.RNNCellBase],
    sizes: tuple[int, int, int],
    *,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """A cell of torch.nn against its namesake, one step; sizes: (B, I, H)."""
    B, input_size, hidden_size = sizes
    states = 2 if issubclass(peer, nn.LSTMCell) else 1

    def call(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *h = given
        out = module(x, tuple(h) if states == 2 else h[0])
        return out if isinstance(out, tuple) else (out,)

    words = [f"B {B}", f"I {input_size}", f"H {hidden_size}", *(f"{k} {v}" for k, v in options.items())]
    return Comparison(
        layer=ours.__name__,
        case=", ".join(words),
        build=_twins(peer, ours, input_size, hidden_size, seed, options),
        inputs=_random([(B, input_size), *[(B, hidden_size)] * states], seed),
        call_peer=call,
        call_ours=call,
    )


def against_eager(
    make: Callable[[], nn.Module],
    inputs: Sequence[tuple[int, ...]] | Callable[[torch.dtype], tuple[Tensor, ...]],
    case: str,
    call: Call,
    *,
    seed: int = 0,
) -> Comparison:
    """A module that torch.nn has no namesake of, against itself on the eager backend.

    inputs:  their shapes, or what makes them
    """

    def build(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        module = _made(make, seed).to(dtype)
        return module, copy.deepcopy(module)

    def call_eager(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with use_backend("eager"):
            return call(module, given)

    return Comparison(
        layer=type(_made(make, seed)).__name__,
        case=case,
        build=build,
        inputs=inputs if callable(inputs) else _random(inputs, seed),
        call_peer=call_eager,
        call_ours=call,
        is_wide=True,
    )


def variant(
    make: Callable[[], nn.Module],
    sizes: tuple[int, int, int],
    *,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Comparison:
    """One of seqkern's own recurrent layers, or a cell: input and states in, output and states out.

    The states are those after three steps: in a norm's neighbourhood of zero there is no gradient to check.

    sizes:  (T, B, I);  of a cell (1, B, I)
    """
    T, B, I = sizes  # noqa: E741
    wide = _made(make, seed).double()
    is_cell = isinstance(wide, RecurrentCell)
    first = _random([(3, B, I)], seed + 1)(torch.float64)[0]
    state: Any = None
    with torch.no_grad(), use_backend("eager"):
        if is_cell:
            for x in first:
                state = wide(x, state)
        else:
            _, state = wide(first)
    states = state if isinstance(state, tuple) else (state,)
    x_of = _random([(B, I) if is_cell else (T, B, I)], seed)

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (*x_of(dtype), *(s.to(dtype) for s in states))

    def call(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *h = given
        before = tuple(h) if len(h) > 1 else h[0]
        if is_cell:
            after = module(x, before)
            return after if isinstance(after, tuple) else (after,)
        there = None if lengths is None else torch.tensor(lengths, device=x.device)
        y, after = module(x, before, lengths=there)
        return (y, *after) if isinstance(after, tuple) else (y, after)

    case = f"B {B}, T {T}, I {I}" + (f", lengths {min(lengths)}…{max(lengths)}" if lengths else "")
    return against_eager(make, inputs, case, call, seed=seed)


def _made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What it makes from this seed, the caller's random numbers left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _twins(
    peer: type[nn.Module],
    ours: type[nn.Module],
    input_size: int,
    hidden_size: int,
    seed: int,
    options: dict[str, Any],
) -> Callable[[torch.dtype], tuple[nn.Module, nn.Module]]:
    def build(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = peer(input_size, hidden_size, dtype=dtype, **options)
            twin = ours(input_size, hidden_size, dtype=dtype, **options)
        twin.load_state_dict(module.state_dict())
        return module, twin

    return build


def _random(shapes: Sequence[tuple[int, ...]], seed: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
        )

    return inputs


@dataclass(frozen=True)
class Parity:
    """The tensor that agrees worst: largest errors against float64, and what was allowed.

    All three are shares of the tensor's largest magnitude.
    """

    tensor: str
    error: float
    peer_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        allowed = f"allowed {self.allowed:.2g} (torch.nn's: {self.peer_error:.2g})"
        return f"{self.tensor}: error {self.error:.2g}, {allowed}"


def parity(
    comparison: Comparison,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    floor_ulp: float = 4,
) -> Parity:
    """Every output and every gradient in `dtype` on `device`, against torch.nn in float64 on the CPU.

    Allowed: twice torch.nn's own error in `dtype`, and `floor_ulp` units in the largest value's last place;
    in float64, where the yardstick rounds as much as what it measures, four times as many; in 16 bits twice
    as many, where the peer rounds results only. Where that is not enough, torch.nn's error is its largest of
    NEARBY problems, an ulp away.
    """
    peer, ours = comparison.build(dtype)
    inputs = comparison.inputs(dtype)
    peer_errors, exact = _peer_errors(comparison, peer, inputs, device)
    found = outputs_and_gradients(comparison.call_ours, ours.to(device), tuple(x.to(device) for x in inputs))
    errors = {name: _error(found[name], wanted) for name, wanted in exact.items()}
    floor = floor_ulp * torch.finfo(dtype).eps * (4 if dtype == torch.float64 else 1)
    if comparison.is_wide and dtype.itemsize == 2:
        floor *= 2

    def worst() -> Parity:
        results = [
            Parity(name, error, peer_errors[name], 2 * peer_errors[name] + floor)
            for name, error in errors.items()
        ]
        return max(results, key=lambda result: result.error / result.allowed)

    result = worst()
    if not result.ok:  # torch.nn may have been lucky here: its error on NEARBY draws
        for draw in range(NEARBY):
            near = _peer_errors(comparison, *_nudged(peer, inputs, dtype, draw), device)[0]
            unit = torch.finfo(dtype).eps / torch.finfo(_nudged_dtype(dtype)).eps
            peer_errors = {name: max(error, near[name] * unit) for name, error in peer_errors.items()}
        result = worst()
    return result


def _peer_errors(
    comparison: Comparison, peer: nn.Module, inputs: tuple[Tensor, ...], device: torch.device | str
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """torch.nn's error in each tensor, and the tensors in float64."""
    oracle = copy.deepcopy(peer).cpu().double()
    exact = outputs_and_gradients(comparison.call_peer, oracle, tuple(x.cpu().double() for x in inputs))
    theirs = outputs_and_gradients(
        comparison.call_peer, copy.deepcopy(peer).to(device), tuple(x.to(device) for x in inputs)
    )
    return {name: _error(theirs[name], wanted) for name, wanted in exact.items()}, exact


def _nudged_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 is judged by float32's error, in proportion: there the oracle is as rounded as the peer."""
    return torch.float32 if dtype == torch.float64 else dtype


def _nudged(
    peer: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, seed: int
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and the inputs with every number an ulp up or down: other roundings of the same problem."""
    working = _nudged_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Tensor) -> Tensor:
        up = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
        return (x.detach().double() * (1 + torch.finfo(working).eps * up.double())).to(working)

    module = copy.deepcopy(peer).to(working)
    with torch.no_grad():
        for weight, given in zip(module.parameters(), peer.parameters(), strict=True):
            weight.copy_(nudge(given))
    return module, tuple(nudge(x) for x in inputs)


def outputs_and_gradients(call: Call, module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs, and gradients of their inner product with fixed random directions, by name."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    outputs = call(module, leaves)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    # Rounded to 16 bits first, so that every dtype is given the same directions.
    directions = [d.bfloat16().to(y) for d, y in zip(directions, outputs, strict=True)]
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(outputs, [*leaves, *parameters.values()], directions)
    names = [*(f"d_input{i}" for i in range(len(leaves))), *(f"d_{name}" for name in parameters)]
    found = {f"output{i}": y.detach() for i, y in enumerate(outputs)}
    return found | dict(zip(names, gradients, strict=True))


def _error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    scale = wanted.abs().max().item() or 1.0
    error = (found.cpu().double() - wanted).abs().max().item() / scale
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Speed:
    """Median seconds."""

    peer: float
    ours: float

    @property
    def ratio(self) -> float:
        """How many times faster seqkern is."""
        return self.peer / self.ours


def speed(
    comparison: Comparison,
    *,
    training: bool,
    seconds: float = 1.0,
    min_rounds: int = 5,
    device: torch.device | str = "cpu",
) -> Speed:
    """Both in turn, float32, for about `seconds`: forward under no_grad, or, `training`, with backward."""
    peer, ours = (module.to(device) for module in comparison.build(torch.float32))
    inputs = tuple(x.to(device) for x in comparison.inputs(torch.float32))
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def forward(call: Call, module: nn.Module) -> None:
        with torch.no_grad():
            call(module, inputs)
        wait()

    leaves = tuple(x.clone().requires_grad_() for x in inputs)

    def forward_backward(call: Call, module: nn.Module) -> None:
        outputs = call(module, leaves)
        torch.autograd.grad(outputs, [*leaves, *module.parameters()], [torch.ones_like(y) for y in outputs])
        wait()

    run = forward_backward if training else forward
    return in_turn(
        lambda: run(comparison.call_peer, peer),
        lambda: run(comparison.call_ours, ours),
        seconds=seconds,
        min_rounds=min_rounds,
    )


def in_turn(
    peer: Callable[[], object], ours: Callable[[], object], *, seconds: float, min_rounds: int = 5
) -> Speed:
    """Medians of `peer` and `ours`, called alternately, so that what slows the machine down slows both."""
    peer()
    ours()
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < min_rounds or time.perf_counter() - start < seconds:
        turn = ((peer, times[0]), (ours, times[1]))
        # Each goes first in every second round.
        for function, taken in turn if len(times[0]) % 2 == 0 else reversed(turn):
            before = time.perf_counter()
            function()
            taken.append(time.perf_counter() - before)
    return Speed(statistics.median(times[0]), statistics.median(times[1]))
