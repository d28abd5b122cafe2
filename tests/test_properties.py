"""Drawn cases: sizes, lengths, dtypes and strides that nobody thought of, and laws that hold for all of them.

Each property runs a few derandomised draws by default and many random ones when slow tests run.
"""

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, KINDS, Case, State, legal, our_layer
from compare import check_parity, evaluate, flat, packed_call, with_strides
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence


@st.composite
def cases(draw: st.DrawFn, **fixed) -> Case:
    kind = draw(st.sampled_from(KINDS))
    case = Case(
        kind,
        T=draw(st.integers(1, 12)),
        B=draw(st.integers(0, 19)),
        I=draw(st.integers(1, 40)),
        H=draw(st.integers(1, 70)),
        num_layers=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.integers(0, 40)) if kind == "lstm" else 0,
        nonlinearity=draw(st.sampled_from(("tanh", "relu"))) if kind == "rnn" else "tanh",
        hx=draw(st.booleans()),
        batched=fixed.pop("batched", True),
        dtype=fixed.pop("dtype", None) or draw(st.sampled_from(DTYPES)),
        mode=draw(st.sampled_from(("train", "eval"))),
        seed=draw(st.integers(0, 10**6)),
    )
    return legal(case)


def layouts(dims: int) -> st.SearchStrategy[tuple]:
    """An order of the dimensions in memory, a gap after each, which of them repeat one value (stride 0)."""
    return st.tuples(
        st.permutations(range(dims)),
        st.lists(st.integers(0, 3), min_size=dims, max_size=dims),
        st.lists(st.booleans(), min_size=dims, max_size=dims).filter(lambda repeat: sum(repeat) < 2),
    )


def laid_out(tensor: Tensor, layout: tuple) -> Tensor:
    order, gaps, repeats = layout
    for dim, repeat in enumerate(repeats):
        if repeat and tensor.size(dim) > 0:
            tensor = tensor.narrow(dim, 0, 1).expand_as(tensor)
    strides, step = [0] * tensor.dim(), 1
    for dim in reversed(order):
        if repeats[dim]:
            continue
        strides[dim] = step
        step *= tensor.size(dim) + gaps[dim]
    return with_strides(tensor, strides) if tensor.numel() else tensor


def both(*strategies: st.SearchStrategy, examples: int = 40) -> Callable:
    """Make a property two tests: `examples` fixed draws, and, marked slow, hypothesis' profile "slow"."""

    def decorate(law: Callable) -> Callable:
        @pytest.mark.parametrize("effort", ["default", pytest.param("slow", marks=pytest.mark.slow)])
        def test(effort: str, backend: str) -> None:
            profile = settings.get_profile(effort)
            draws = settings(profile, max_examples=examples) if effort == "default" else profile
            draws(given(*strategies)(law))()

        test.__doc__ = law.__doc__
        test.__name__ = law.__name__
        return test

    return decorate


@both(cases(), layouts(3), layouts(3), layouts(3), examples=60)
def test_parity(case: Case, x_layout: tuple, h_layout: tuple, c_layout: tuple) -> None:
    """The rule holds for any sizes, options and strides."""
    layer = case.torch_layer()
    x, hx = case.inputs()
    x = laid_out(x, x_layout)
    states = [laid_out(s, layout) for s, layout in zip(flat(hx), (h_layout, c_layout), strict=False)]
    hx = None if hx is None else states[0] if isinstance(hx, Tensor) else tuple(states)
    if case.away_from_kink:  # an expanded x is steered no more
        x, hx = case.inputs()
    check_parity(layer, our_layer(layer), x, hx, f"{case} x {x.stride()} {[s.stride() for s in flat(hx)]}")


@both(cases(batched=False), examples=20)
def test_parity_unbatched(case: Case) -> None:
    layer = case.torch_layer()
    check_parity(layer, our_layer(layer), *case.inputs(), case)


@both(st.data(), cases(), layouts(3), examples=60)
def test_parity_with_lengths(data: st.DataObject, case: Case, layout: tuple) -> None:
    lengths = torch.tensor(
        data.draw(st.lists(st.integers(0, case.T), min_size=case.B, max_size=case.B)), dtype=torch.int64
    )
    layer = case.torch_layer()
    x, hx = case.inputs()
    if not case.away_from_kink:
        x = laid_out(x, layout)
    call, their_call = (lambda layer, x, hx: layer(x, hx, lengths=lengths)), packed_call(lengths)
    label = f"{case} lengths {lengths.tolist()} x {x.stride()}"
    got = check_parity(layer, our_layer(layer), x, hx, label, call, their_call)
    beyond = torch.arange(case.T)[:, None] >= lengths
    beyond = beyond.T if case.batch_first else beyond
    assert (got["y"][beyond] == 0).all() and (got["d x"][beyond] == 0).all(), label


@both(st.data(), cases(), examples=40)
def test_parity_packed(data: st.DataObject, case: Case) -> None:
    if case.B == 0:
        return
    sizes = st.lists(st.integers(1, case.T), min_size=case.B, max_size=case.B)
    lengths = torch.tensor(data.draw(sizes), dtype=torch.int64)

    def call(layer: nn.RNNBase, x: Tensor, hx: State | None) -> tuple[Tensor, State]:
        packed = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=False)
        out, state = layer(packed, hx)
        assert isinstance(out, PackedSequence)
        return out.data, state

    layer = case.torch_layer()
    label = f"{case} lengths {lengths.tolist()}"
    check_parity(layer, our_layer(layer), *case.inputs(), label, call, call)


def outputs(layer: nn.RNNBase, x: Tensor, hx: State | None, **options) -> list[Tensor]:
    with torch.no_grad():
        return flat(layer(x, hx, **options))


def repack(case: Case, states: list[Tensor]) -> State | None:
    if not states:
        return None
    return tuple(states) if case.kind == "lstm" else states[0]


def near(got: list[Tensor], expected: list[Tensor], case: object) -> None:
    for y, y_ in zip(got, expected, strict=True):
        torch.testing.assert_close(y, y_, rtol=1e-9, atol=1e-11, msg=lambda m: f"{case}\n{m}")


doubles = cases(dtype=torch.float64)


@both(doubles, st.randoms(use_true_random=False), examples=30)
def test_rows_are_independent_and_ordered(case: Case, rng) -> None:
    """Permuting the rows of a batch permutes the results; a row alone gives what it gives in company."""
    if case.B == 0:
        return
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    batch_dim = 0 if case.batch_first else 1
    order = torch.tensor(rng.sample(range(case.B), case.B))
    y, *states = outputs(layer, x, hx)
    permuted = repack(case, [state[:, order] for state in flat(hx)])
    got = outputs(layer, x.index_select(batch_dim, order), permuted)
    near(got, [y.index_select(batch_dim, order), *(state[:, order] for state in states)], case)
    b = int(order[0])
    alone = outputs(
        layer,
        x.narrow(batch_dim, b, 1),
        repack(case, [state[:, b : b + 1].contiguous() for state in flat(hx)]),
    )
    near(alone, [y.narrow(batch_dim, b, 1), *(state[:, b : b + 1] for state in states)], case)


@both(doubles, st.integers(1, 11), examples=30)
def test_a_sequence_in_two_parts(case: Case, cut: int) -> None:
    """Carrying the state over a cut changes nothing, in one direction."""
    if case.bidirectional or case.T < 2 or case.B == 0:
        return
    cut = min(cut, case.T - 1)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    time_dim = 1 if case.batch_first else 0
    y, *states = outputs(layer, x, hx)
    first, *middle = outputs(layer, x.narrow(time_dim, 0, cut), hx)
    second, *last = outputs(layer, x.narrow(time_dim, cut, case.T - cut), repack(case, middle))
    near([torch.cat([first, second], time_dim), *last], [y, *states], case)


@both(st.data(), doubles, st.integers(1, 9), examples=30)
def test_more_padding_changes_nothing(data: st.DataObject, case: Case, more: int) -> None:
    lengths = torch.tensor(
        data.draw(st.lists(st.integers(0, case.T), min_size=case.B, max_size=case.B)), dtype=torch.int64
    )
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    time_dim = 1 if case.batch_first else 0
    shape = list(x.shape)
    shape[time_dim] = more
    longer = torch.cat([x, torch.full(shape, float("nan"), dtype=x.dtype)], time_dim)
    y, *states = outputs(layer, x, hx, lengths=lengths)
    y_, *states_ = outputs(layer, longer, hx, lengths=lengths)
    near([y_.narrow(time_dim, 0, case.T), *states_], [y, *states], case)
    assert (y_.narrow(time_dim, case.T, more) == 0).all()


@both(doubles, examples=30)
def test_directions_mirror_each_other(case: Case) -> None:
    """One bidirectional layer on reversed time is the layer with its directions' weights exchanged."""
    if not case.bidirectional or case.num_layers > 1 or case.B == 0:
        return
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    time_dim = 1 if case.batch_first else 0
    y, *states = outputs(layer, x, hx)
    mirrored = our_layer(case.torch_layer())
    names = [name for name, _ in layer.named_parameters() if not name.endswith("_reverse")]
    weights = layer.state_dict()
    mirrored.load_state_dict(
        {name: weights[f"{name}_reverse"] for name in names}
        | {f"{name}_reverse": weights[name] for name in names}
    )
    exchanged = repack(case, [state.flip(0) for state in flat(hx)])
    y_, *states_ = outputs(mirrored, x.flip(time_dim), exchanged)
    there, back = y.flip(time_dim).chunk(2, dim=-1)
    near([y_, *states_], [torch.cat([back, there], dim=-1), *(state.flip(0) for state in states)], case)


@both(doubles, examples=15)
def test_gradients_are_slopes(case: Case) -> None:
    """Along a random direction in all inputs and weights, finite differences give the gradients' sum."""
    if case.B == 0 or case.nonlinearity == "relu":  # a kink has no slope
        return
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    found = evaluate(layer, x, hx)
    generator = torch.Generator().manual_seed(case.seed)
    tensors = {"d x": x} | dict(zip(("d h0", "d c0"), flat(hx), strict=False))
    tensors |= {f"d {name}": weight.detach() for name, weight in layer.named_parameters()}
    directions = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in tensors.items()
    }

    def loss(step: float) -> Tensor:
        for name, tensor in tensors.items():
            tensor += step * directions[name]
        cotangents = torch.Generator().manual_seed(0)
        total = sum(
            (y * torch.randn(y.shape, generator=cotangents, dtype=torch.float64)).sum()
            for y in outputs(layer, x, hx)
        )
        for name, tensor in tensors.items():
            tensor -= step * directions[name]
        return total

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    expected = sum((found[name] * direction).sum() for name, direction in directions.items())
    scale = sum((found[name] * direction).abs().sum() for name, direction in directions.items())
    assert abs(slope - expected) <= 1e-6 * scale + 1e-8, case
