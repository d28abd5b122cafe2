"""torch.compile, torch.export and the operators' own contracts."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.utils.parametrize
from conftest import why_no_cpu_backend
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import seqkern
from seqkern.ops import _fake

KINDS = ("rnn", "lstm", "gru")
OURS = {"rnn": seqkern.RNN, "lstm": seqkern.LSTM, "gru": seqkern.GRU}
OUR_CELL = {"rnn": seqkern.RNNCell, "lstm": seqkern.LSTMCell, "gru": seqkern.GRUCell}
GATES = {"rnn": 1, "lstm": 4, "gru": 3}

needs_kernels = pytest.mark.skipif(why_no_cpu_backend() is not None, reason=str(why_no_cpu_backend()))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for part in outputs if part is not None for t in flatten(part)]


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(flatten(got), flatten(expected), strict=True):
        torch.testing.assert_close(a, b)


def gradients(call: Callable, layer: nn.Module, *inputs: Tensor, **keywords: Tensor) -> list[Tensor]:
    """Outputs and the gradients of a scalar of them, for inputs and parameters."""
    inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)
    outputs = call(*inputs, **keywords)
    loss = sum((t * t).sum() for t in flatten(outputs))
    return [*flatten(outputs), *torch.autograd.grad(loss, [*inputs, *layer.parameters()])]


def nodes(counter: torch._dynamo.testing.CompileCounterWithBackend) -> list[str]:
    """The names of everything called in the graphs that Dynamo captured."""
    found = []
    for graph in counter.graphs:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                found += [str(node.target) for node in module.graph.nodes]
    return found


# ---- torch.compile -----------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_one_graph_for_all_lengths_and_batches(kind, ragged, train):
    """fullgraph, both dynamic: after the first recompilation no shape compiles again."""
    layer = OURS[kind](3, 4, num_layers=2, bidirectional=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T, B in ((5, 3), (7, 4), (9, 6), (12, 2)):
        x = torch.randn(T, B, 3)
        keywords = {"lengths": torch.randint(0, T + 1, (B,))} if ragged else {}
        if train:
            assert_same(gradients(compiled, layer, x, **keywords), gradients(layer, layer, x, **keywords))
        else:
            with torch.no_grad():
                assert_same(compiled(x, **keywords), layer(x, **keywords))
    assert counter.frame_count == 2
    assert any(f"seqkern.{kind}_forward" in name for name in nodes(counter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
def test_eager_backend_traces_step_by_step(kind, ragged):
    """Without kernels the reference is what is compiled: batch dynamic, one graph per length."""
    layer = OURS[kind](3, 4, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with seqkern.use_backend("eager"):
        for T, B in ((2, 3), (2, 4), (1, 5)):
            x = torch.randn(T, B, 3)
            keywords = {"lengths": torch.randint(0, T + 1, (B,))} if ragged else {}
            assert_same(gradients(compiled, layer, x, **keywords), gradients(layer, layer, x, **keywords))


@needs_kernels
@pytest.mark.parametrize(
    "kind", ["lstm", pytest.param("gru", marks=pytest.mark.slow), pytest.param("rnn", marks=pytest.mark.slow)]
)
def test_inductor(kind):
    """Forward and backward through generated code, with the layer in the middle of a model."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 5)
            self.layer = OURS[kind](5, 4, num_layers=2, batch_first=True)

        def forward(self, x, lengths):
            y, _ = self.layer(self.embed(x).relu(), lengths=lengths)
            return y.tanh().mean(1)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    for T, B in ((5, 3), (7, 4)):
        x, lengths = torch.randn(B, T, 3), torch.randint(0, T + 1, (B,))
        assert_same(
            gradients(compiled, model, x, lengths=lengths), gradients(model, model, x, lengths=lengths)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_states(kind):
    layer = OURS[kind](3, 4, num_layers=2, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def states(*shape):
        return (torch.randn(shape), torch.randn(shape)) if kind == "lstm" else torch.randn(shape)

    for x, hx in (
        (torch.randn(5, 6, 3), states(2, 5, 4)),
        (torch.randn(6, 3), states(2, 4)),
        (torch.randn(6, 3), None),
    ):
        assert_same(compiled(x, hx), layer(x, hx))


@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_in_two_places(kind):
    """Dynamo cannot pass one tensor twice to an autograd Function: tied weights, h_0 for c_0."""
    layer = OURS[kind](4, 4)
    layer.weight_hh_l0, layer.bias_hh_l0 = layer.weight_ih_l0, layer.bias_ih_l0
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def twice(call):
        return lambda x, h: call(x, (h, h) if kind == "lstm" else h)

    x, h = torch.randn(5, 2, 4), torch.randn(1, 2, 4)
    assert_same(gradients(twice(compiled), layer, x, h), gradients(twice(layer), layer, x, h))


@pytest.mark.parametrize("kind", KINDS)
def test_cells(kind):
    cell = OUR_CELL[kind](3, 4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cell, fullgraph=True, backend=counter)
    for B in (2, 5, 7):
        x = torch.randn(B, 3)
        assert_same(gradients(compiled, cell, x), gradients(cell, cell, x))
    assert counter.frame_count == 2
    assert_same(compiled(torch.ones(3)), cell(torch.ones(3)))


@needs_kernels
def test_compiled_code_follows_the_wish():
    """Never a stale backend: each wish has its own graph."""
    layer, x = seqkern.LSTM(3, 4), torch.randn(5, 2, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)

    def kernels() -> int:
        return sum("lstm_forward" in name for name in nodes(counter))

    compiled(x)
    assert (counter.frame_count, kernels()) == (1, 1)
    with seqkern.use_backend("eager"):
        assert_same(compiled(x), layer(x))
    assert (counter.frame_count, kernels()) == (2, 1)
    compiled(x)
    assert counter.frame_count == 2


@needs_kernels
def test_use_backend_inside_compiled_code():
    layer, x = seqkern.GRU(3, 4), torch.randn(5, 2, 3)

    def call(x):
        with seqkern.use_backend("eager"):
            first = layer(x)
        return first, layer(x)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    assert_same(torch.compile(call, fullgraph=True, backend=counter)(x), call(x))
    assert sum("gru_forward" in name for name in nodes(counter)) == 1
    assert seqkern.ops._backend.current_wish() is None
    assert seqkern.ops._backend._process_wish is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [[6, 1], [5, -1]])
def test_lengths_out_of_range_are_found_when_the_graph_runs(kind, wrong):
    layer, x = OURS[kind](3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x, lengths=torch.tensor([5, 0]))
    with pytest.raises(RuntimeError, match=r"lengths: expected values in 0\.\.T"):
        compiled(x, lengths=torch.tensor(wrong))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    layer, x = OURS[kind](3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = gradients(compiled, layer, x), gradients(layer, layer, x)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert_same(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_from_elsewhere(kind):
    layer, x = OURS[kind](3, 4), torch.randn(5, 2, 3)

    def call(weights, x):
        return torch.func.functional_call(layer, weights, (x,))

    weights = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    assert_same(torch.compile(call, fullgraph=True, backend="aot_eager")(weights, x), call(weights, x))

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, layer, x), gradients(layer, layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind):
    layer, x = OURS[kind](3, 4), torch.randn(5, 2, 3)

    def call(x):
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, layer, x), gradients(layer, layer, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_func_transforms(kind, transform):
    layer, x = OURS[kind](3, 4).requires_grad_(False), torch.randn(3, 2, 3)

    def scalar(x):
        return layer(x)[0].square().sum()

    if transform == "grad":
        call = torch.func.grad(scalar)
    elif transform == "vmap":
        call = torch.func.vmap(lambda x: layer(x)[0], in_dims=1)
        x = x.unsqueeze(-2)
    else:

        def call(x):
            return torch.func.jvp(scalar, (x,), (torch.ones_like(x),))

    assert_same(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def test_packed_sequences_run_outside_the_graph():
    """Dynamo skips PackedSequence's functions; without fullgraph the layer still works."""
    layer = seqkern.GRU(3, 4)
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    compiled = torch.compile(layer, backend="aot_eager")
    assert_same(compiled(packed)[0].data, layer(packed)[0].data)


def test_dynamo_wants_allow_rnn():
    """It refuses every subclass of torch.nn's layers otherwise. When this fails, drop the docs' note."""
    layer = seqkern.LSTM(3, 4)
    with torch._dynamo.config.patch(allow_rnn=False), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(5, 2, 3))


# ---- torch.export ------------------------------------------------------------------------------------------


class Outer(nn.Module):
    """A module around the layer whose lengths are positional."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths=None):
        return self.layer(x, lengths=lengths)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dynamic_shapes(kind, ragged, strict):
    model = Outer(OURS[kind](3, 4, num_layers=2, bidirectional=True))
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2]) if ragged else None
    shapes = {"x": {0: T, 1: B}, "lengths": {0: B} if ragged else None}
    with torch.no_grad():
        program = torch.export.export(model, (x, lengths), dynamic_shapes=shapes, strict=strict)
        assert any(f"{kind}_forward" in str(node.target) for node in program.graph.nodes)
        for T_, B_ in ((5, 2), (8, 4)):
            x = torch.randn(T_, B_, 3)
            lengths = torch.randint(0, T_ + 1, (B_,)) if ragged else None
            assert_same(program.module()(x, lengths), model(x, lengths))
            assert_same(program.run_decompositions().module()(x, lengths), model(x, lengths))


@pytest.mark.parametrize("kind", KINDS)
def test_export_of_the_eager_backend(kind):
    """Only core operators: runs where seqkern is not installed; the length is fixed."""
    model, x = Outer(OURS[kind](3, 4)), torch.randn(3, 2, 3)
    with seqkern.use_backend("eager"):
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: torch.export.Dim("B")}})
    assert not any("seqkern" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(3, 7, 3)
    assert_same(program.module()(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace_records_torch_nns_layer(kind):
    layer, x = OURS[kind](3, 4, num_layers=2), torch.randn(5, 2, 3)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    x = torch.randn(7, 4, 3)
    assert_same(traced(x), layer(x))
    assert f"aten::{'rnn_tanh' if kind == 'rnn' else kind}" in str(traced.inlined_graph)


# ---- the operators -----------------------------------------------------------------------------------------


def operator_arguments(kind: str, batch: str, D: int, bias: bool, project: bool, save: bool) -> tuple:
    """Arguments of `<kind>_forward`."""
    T, B, I, H = 3, 4, 5, 6  # noqa: E741
    P, G = (2 if project else H), GATES[kind] * H
    per_direction = [(G, I), (G, P)] + [(G,), (G,)] * bias + [(P, H)] * project
    params = [torch.randn(shape) for shape in per_direction * D]
    x, lengths, batch_sizes = torch.randn(T, B, I), None, None
    if batch == "lengths":
        lengths = torch.tensor([3, 0, 1, 2])
    elif batch == "packed":
        batch_sizes = torch.tensor([4, 3, 1])
        x = torch.randn(8, I)
    elif batch == "strided":
        x = torch.randn(B, I, T).permute(2, 0, 1)
    states = [torch.randn(D, B, P)] + [torch.randn(D, B, H)] * (kind == "lstm")
    extra = [False] if kind == "rnn" else []
    return (x, *states, params, lengths, batch_sizes, *extra, save)


def backward_arguments(
    kind: str, forward: tuple, outputs: tuple, need: tuple[bool, bool], partial: bool
) -> tuple:
    """Arguments of `<kind>_backward` after a forward call with save=True."""
    y, *finals, reserve = outputs
    grads = [None if partial else torch.randn_like(y), *(torch.randn_like(t) for t in finals)]
    inputs = forward[: -2 if kind == "rnn" else -1]
    extra = [False] if kind == "rnn" else []
    return (*grads, *inputs, y, reserve, *extra, *need)


OPERATOR_CASES = [
    pytest.param(
        kind, batch, D, bias, project, id=f"{kind}-{batch}-D{D}-{'bias' if bias else 'nobias'}-P{project:d}"
    )
    for kind in KINDS
    for batch, D, bias, project in [
        ("padded", 1, True, False),
        ("strided", 2, False, False),
        ("lengths", 2, True, False),
        ("packed", 1, True, False),
        ("padded", 2, True, True),
    ]
    if kind == "lstm" or not project
]


@needs_kernels
@pytest.mark.parametrize(("kind", "batch", "D", "bias", "project"), OPERATOR_CASES)
def test_opcheck(kind, batch, D, bias, project):
    """Schema, fake kernel, autograd registration and AOTAutograd, forward and backward.

    With lengths the last rows of the reserve belong to no step: never written, never read. opcheck compares
    them too, so where the reserve is compared every row has T steps.
    """
    forward = getattr(torch.ops.seqkern, f"{kind}_forward").default
    backward = getattr(torch.ops.seqkern, f"{kind}_backward").default
    arguments = operator_arguments(kind, batch, D, bias, project, save=True)
    torch.library.opcheck(forward, (*arguments[:-1], False))
    outputs = forward(*arguments)
    for need, partial in (((True, True), False), ((False, False), True)):
        torch.library.opcheck(backward, backward_arguments(kind, arguments, outputs, need, partial))
    if batch == "lengths":
        arguments = tuple(torch.full_like(t, 3) if is_lengths(t) else t for t in arguments)
    torch.library.opcheck(forward, arguments)


def is_lengths(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dtype is torch.int64


def described(outputs: Any) -> list[tuple]:
    return [(tuple(t.shape), t.stride(), t.dtype) for t in flatten(outputs)]


@needs_kernels
@pytest.mark.parametrize(("kind", "batch", "D", "bias", "project"), OPERATOR_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fake_kernels_say_what_the_kernels_give(kind, batch, D, bias, project, dtype):
    """Shape, strides and dtype of every output, saving or not, whatever gradients are wanted."""

    def cast(argument):
        if isinstance(argument, list):
            return [cast(t) for t in argument]
        return (
            argument.to(dtype) if isinstance(argument, Tensor) and argument.is_floating_point() else argument
        )

    fakes = {kernel.__name__: kernel for kernel in _fake.OPERATORS}
    for save in (True, False):
        arguments = tuple(map(cast, operator_arguments(kind, batch, D, bias, project, save)))
        outputs = getattr(torch.ops.seqkern, f"{kind}_forward")(*arguments)
        assert described(fakes[f"{kind}_forward"](*arguments)) == described(outputs)
    arguments = (*arguments[:-1], True)
    outputs = getattr(torch.ops.seqkern, f"{kind}_forward")(*arguments)
    for need in ((True, True), (True, False), (False, True), (False, False)):
        for partial in (False, True):
            backward = backward_arguments(kind, arguments, outputs, need, partial)
            got = getattr(torch.ops.seqkern, f"{kind}_backward")(*backward)
            assert described(fakes[f"{kind}_backward"](*backward)) == described(got)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind):
    """Shapes without values, as torch.nn gives them."""
    x = torch.empty(5, 2, 3, device="meta")
    ours = OURS[kind](3, 4, num_layers=2, bidirectional=True, device="meta")
    theirs = getattr(nn, type(ours).__name__)(3, 4, num_layers=2, bidirectional=True, device="meta")
    assert [t.shape for t in flatten(ours(x))] == [t.shape for t in flatten(theirs(x))]
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    assert ours(x, lengths=lengths)[0].shape == (5, 2, 8)
