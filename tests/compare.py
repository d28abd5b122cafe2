"""How near is near enough: error against float64, measured beside torch.nn's own error on the same inputs.

The rule, for every output and every gradient, tensor by tensor:

    max |got - oracle|  <=  2 * max |torch.nn - oracle|  +  FLOOR_ULPS * eps(dtype) * max |oracle|

The oracle is seqkern's eager reference in float64 on the same (rounded) inputs, weights and cotangents;
torch.nn in float64 is a second one, and both must agree to 1e-12 of the tensor's largest value.

One draw of torch.nn's error is a small sample where few numbers are rounded, and may nearly vanish by luck.
So, where the rule says no, torch.nn is asked again at NEARBY inputs, an ulp away: other roundings of as good
as the same problem; the largest of its errors counts (`errors_nearby`). In float64 the oracle is as rounded
as torch.nn, often in the same places: there torch.nn's error is its float32 error nearby, in proportion.
Nothing is random but for seeds: equal inputs give equal verdicts.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkern

State = Tensor | tuple[Tensor, Tensor] | None
Results = dict[str, Tensor]
Call = Callable[[nn.Module, Tensor, Any], Any]
Nudge = Callable[[Tensor], Tensor]

FLOOR_ULPS = 4
NEARBY = 16
ORACLES_AGREE = 1e-12


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty comes filled with NaN, so that a read of memory that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def flat(state: Any) -> list[Tensor]:
    """The tensors of a result or a state, in order: y, h_n, c_n or h0, c0."""
    if state is None:
        return []
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state for tensor in flat(part)]


def with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values in memory with these strides (0 repeats)."""
    if tensor.numel() == 0 or tensor.stride() == tuple(strides):
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    memory = torch.zeros(span, dtype=tensor.dtype, device=tensor.device)
    places = sum(
        torch.arange(size).view(-1, *[1] * (tensor.dim() - 1 - i)) * stride
        for i, (size, stride) in enumerate(zip(tensor.shape, strides, strict=True))
    )
    memory[places.flatten()] = tensor.flatten()
    return memory.as_strided(tensor.shape, strides)


def evaluate(
    layer: nn.Module,
    x: Tensor,
    hx: State,
    seed: int = 0,
    call: Call | None = None,
    rounded: torch.dtype | None = None,
) -> Results:
    """Every output of `layer` and every gradient of a random linear function of the outputs, by name.

    Args:     x, hx: in layer's dtype, any strides; call: (layer, x, hx) -> outputs, by default layer(x, hx)
              rounded: the cotangents are rounded to this dtype (that of the layer compared with)
    Returns:  y, h_n, c_n (of a cell: h', c'); d x, d h0, d c0; d <parameter's name>
    """
    dtype = x.dtype
    x = leaf(x)
    states = [leaf(state) for state in flat(hx)]
    hx = None if hx is None else states[0] if isinstance(hx, Tensor) else tuple(states)
    outputs = flat(call(layer, x, hx) if call else layer(x, hx))
    generator = torch.Generator().manual_seed(seed)
    wanted = {"d x": x} | dict(zip(("d h0", "d c0"), states, strict=False))
    wanted |= {f"d {name}": weight for name, weight in layer.named_parameters()}
    grown, cotangents = [], []
    for y in outputs:
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(rounded or dtype)
        if y.requires_grad:
            grown.append(y)
            cotangents.append(dy.to(y))
    grads = torch.autograd.grad(grown, list(wanted.values()), cotangents, materialize_grads=True)
    names = ("h'", "c'") if isinstance(layer, nn.RNNCellBase) and call is None else ("y", "h_n", "c_n")
    results = dict(zip(names, outputs, strict=False)) | dict(zip(wanted, grads, strict=True))
    return {name: tensor.detach() for name, tensor in results.items()}


def leaf(tensor: Tensor) -> Tensor:
    """A leaf of a new graph in the same memory, with its strides and its overlap."""
    return tensor.detach().requires_grad_()


def check_parity(
    theirs: nn.Module,
    ours: nn.Module,
    x: Tensor,
    hx: State,
    case: object,
    call: Call | None = None,
    their_call: Call | None = None,
) -> Results:
    """seqkern's layer `ours` obeys the rule beside torch.nn's layer `theirs`, which has equal weights.

    `call` runs ours, `their_call` theirs; either the layer itself by default. Returns what ours gave.
    """
    same = dict(seed=1, rounded=x.dtype)
    with poisoned():
        got = evaluate(ours, x, hx, call=call, **same)
    peer = evaluate(theirs, x, hx, call=their_call, **same)
    x64, hx64 = doubled(x), doubled(hx)
    with seqkern.use_backend("eager"):
        oracle = evaluate(copy.deepcopy(ours).double(), x64, hx64, call=call, **same)
    second = evaluate(copy.deepcopy(theirs).double(), x64, hx64, call=their_call, **same)
    agree(oracle, second, ORACLES_AGREE, f"{case}: eager float64 (got) against torch.nn float64 (expected)")
    within(got, peer, oracle, case, lambda: errors_nearby(theirs, x, hx, their_call))
    return got


def doubled(state: Any) -> Any:
    if isinstance(state, Tensor):
        return with_strides(state.detach().double(), state.stride())
    return None if state is None else tuple(doubled(part) for part in state)


def errors_nearby(theirs: nn.Module, x: Tensor, hx: State, call: Call | None) -> dict[str, float]:
    """torch.nn's largest error in each result, of NEARBY draws in which x, hx and weights move by an ulp."""

    def draw(nudged: Nudge, working: torch.dtype, seed: int) -> tuple[Results, Results]:
        layer = copy.deepcopy(theirs).to(working)
        for weight, given in zip(layer.parameters(), theirs.parameters(), strict=True):
            weight.data = nudged(given)
        x_, hx_ = nudged(x), None if hx is None else tuple(nudged(state) for state in flat(hx))
        hx_ = hx_[0] if isinstance(hx, Tensor) else hx_
        same = dict(seed=seed, call=call, rounded=working)
        exact = evaluate(copy.deepcopy(layer).double(), doubled(x_), doubled(hx_), **same)
        return evaluate(layer, x_, hx_, **same), exact

    return largest_errors(draw, x.dtype)


def check_modules(
    theirs: nn.Module, ours: nn.Module, run: Callable, case: str, vanishing: str = ""
) -> tuple[Tensor, ...]:
    """run(module, dtype) → outputs. The rule for all outputs and parameters' gradients of whole modules.

    torch.nn's module `theirs` gives the weights; the float64 oracle is torch.nn's. `vanishing` names a
    parameter whose exact gradient is 0, so that any number found is rounding. Returns seqkern's outputs.
    """
    ours.load_state_dict(theirs.state_dict())

    def evaluate(module: nn.Module, dtype: torch.dtype) -> Results:
        outputs = flat(run(module, dtype))
        generator = torch.Generator().manual_seed(0)
        dys = [torch.randn(y.shape, generator=generator, dtype=torch.float32).to(dtype) for y in outputs]
        names, weights = zip(*module.named_parameters(), strict=True)
        grads = torch.autograd.grad(outputs, weights, dys, materialize_grads=True)
        results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        return results | {f"d {name}": grad for name, grad in zip(names, grads, strict=True)}

    def draw(nudged: Nudge, working: torch.dtype, seed: int) -> tuple[Results, Results]:
        module = copy.deepcopy(theirs)
        for weight in module.parameters():
            weight.data = nudged(weight)
        return evaluate(module, working), evaluate(copy.deepcopy(module).double(), torch.float64)

    got = evaluate(ours, torch.float32)
    peer = evaluate(theirs, torch.float32)
    oracle = evaluate(copy.deepcopy(theirs).double(), torch.float64)
    if vanishing:
        results = [found.pop(f"d {vanishing}").abs().max() for found in (oracle, peer, got)]
        assert all(size < bound for size, bound in zip(results, (1e-12, 1e-5, 1e-5), strict=True)), results
    within(got, peer, oracle, case, lambda: largest_errors(draw, torch.float32))
    return tuple(y for name, y in got.items() if name.startswith("output"))


def largest_errors(
    draw: Callable[[Nudge, torch.dtype, int], tuple[Results, Results]], dtype: torch.dtype
) -> dict[str, float]:
    """The largest error in each result, of NEARBY draws, in proportion to dtype's precision.

    `draw` takes what moves a tensor by an ulp of the working dtype, that dtype, and the draw's number; it
    returns results in that dtype and the same in float64.
    """
    working = torch.float32 if dtype is torch.float64 else dtype
    eps = torch.finfo(working).eps
    generator = torch.Generator().manual_seed(2)

    def nudged(tensor: Tensor) -> Tensor:
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2.0 - 1
        return (tensor.detach().double() * (1 + signs.double() * eps)).to(working)

    largest: dict[str, float] = {}
    for seed in range(NEARBY):
        got, exact = draw(nudged, working, seed)
        for name, y in got.items():
            error = (y.double() - exact[name]).abs().max().item() if y.numel() else 0.0
            largest[name] = max(largest.get(name, 0.0), error * torch.finfo(dtype).eps / eps)
    return largest


def within(
    got: Results,
    peer: Results,
    oracle: Results,
    case: object,
    nearby: Callable[[], dict[str, float]] | None = None,
) -> None:
    """The rule, for each tensor of `got`: beside `peer` of the same dtype, against the float64 `oracle`.

    `nearby` says, if it comes to that, how large torch.nn's errors are at inputs nearby.
    """
    complaints = []
    assert got.keys() == peer.keys() == oracle.keys(), f"{case}: {list(got)}, {list(peer)}, {list(oracle)}"
    errors_around: dict[str, float] = {}
    for name, y in got.items():
        if complaint := alike(y, peer[name]):
            complaints.append(f"{name}: {complaint}")
            continue
        if y.numel() == 0:
            continue
        exact = oracle[name]
        error = (y.double() - exact).abs()
        peer_error = (peer[name].double() - exact).abs().max().item()
        precision = torch.finfo(y.dtype)
        floor = FLOOR_ULPS * precision.eps * max(exact.abs().max().item(), precision.tiny)
        index = place(error.nan_to_num(nan=float("inf")).argmax(), y.shape)
        if error[index] <= 2 * peer_error + floor:
            continue
        errors_around = errors_around or (nearby() if nearby else {})
        around = errors_around.get(name, 0.0)
        bound = 2 * max(peer_error, around) + floor
        if not error[index] <= bound:  # a NaN fails, too
            complaints.append(
                f"{name}{list(index)}: got {y[index].item()!r}, expected {exact[index].item()!r}, torch.nn "
                f"{peer[name][index].item()!r}; error {error[index].item():.3g} > bound {bound:.3g} "
                f"(torch.nn's largest error {peer_error:.3g}, nearby {around:.3g}; "
                f"{int((~(error <= bound)).sum())} of {y.numel()} beyond)"
            )
    assert not complaints, "\n".join([f"case {case}", *complaints])


def agree(got: Results, expected: Results, relative: float, case: object) -> None:
    """Each tensor of `got` within `relative` of the largest value of its twin; 0 demands equal values."""
    complaints = []
    assert got.keys() == expected.keys(), f"{case}: {list(got)}, {list(expected)}"
    for name, y in got.items():
        y_ = expected[name]
        if complaint := alike(y, y_):
            complaints.append(f"{name}: {complaint}")
            continue
        if y.numel() == 0:
            continue
        error = (y.double() - y_.double()).abs()
        bound = relative * y_.abs().max().item()
        index = place(error.nan_to_num(nan=float("inf")).argmax(), y.shape)
        if not error[index] <= bound:
            complaints.append(
                f"{name}{list(index)}: got {y[index].item()!r}, expected {y_[index].item()!r}, "
                f"error {error[index].item():.3g} > bound {bound:.3g}"
            )
    assert not complaints, "\n".join([f"case {case}", *complaints])


def same_bits(got: Results, expected: Results, case: object) -> None:
    """Each tensor of `got` equals its twin bit for bit."""
    assert got.keys() == expected.keys(), f"{case}: {list(got)}, {list(expected)}"
    for name, y in got.items():
        y_ = expected[name]
        assert not (complaint := alike(y, y_)), f"case {case}\n{name}: {complaint}"
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()]
        differ = (y.contiguous().view(integers) != y_.contiguous().view(integers)).nonzero()
        if len(differ):
            index = tuple(differ[0].tolist())
            raise AssertionError(
                f"case {case}\n{name}{list(index)}: got {y[index].item()!r}, expected {y_[index].item()!r} "
                f"({len(differ)} of {y.numel()} differ)"
            )


def alike(y: Tensor, y_: Tensor) -> str | None:
    """What differs in shape, dtype or device, if anything does."""
    for what in ("shape", "dtype", "device"):
        if getattr(y, what) != getattr(y_, what):
            return f"{what}: got {getattr(y, what)}, expected {getattr(y_, what)}"
    return None


def place(flat_index: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat_index, shape))


def packed_call(lengths: Tensor) -> Call:
    """What `lengths` means in torch.nn's words: pack → layer → unpack to T steps, rows of length 0 aside.

    Those rows give zeros, and their final states are their initial ones.
    """
    lengths = lengths.detach().cpu().to(torch.int64)

    def call(layer: nn.RNNBase, x: Tensor, hx: State) -> tuple[Tensor, State]:
        batch_dim, time_dim = (0, 1) if layer.batch_first else (1, 0)
        T, B = x.size(time_dim), x.size(batch_dim)
        D = 2 if layer.bidirectional else 1
        chosen_lengths = lengths[lengths > 0]
        rows = lengths.nonzero().squeeze(1).to(x.device)
        h0, *c0 = flat(hx) or [
            x.new_zeros(layer.num_layers * D, B, size)
            for size in (layer.proj_size or layer.hidden_size, layer.hidden_size)
        ]
        states = (h0, *c0) if isinstance(layer, nn.LSTM) else (h0,)
        width = D * (layer.proj_size or layer.hidden_size)
        y = x.new_zeros((B, T, width) if layer.batch_first else (T, B, width))
        if len(rows) == 0:
            return y, states if len(states) > 1 else states[0]
        packed = pack_padded_sequence(
            x.index_select(batch_dim, rows), chosen_lengths, layer.batch_first, enforce_sorted=False
        )
        chosen = tuple(state.index_select(1, rows) for state in states)
        out, last = layer(packed, chosen if len(states) > 1 else chosen[0])
        out, _ = pad_packed_sequence(out, layer.batch_first, total_length=T)
        last = tuple(state.index_copy(1, rows, part) for state, part in zip(states, flat(last), strict=True))
        return y.index_copy(batch_dim, rows, out), last if len(states) > 1 else last[0]

    return call
