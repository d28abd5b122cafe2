"""PyTorch's tools that meet a layer in deployment: TorchScript, ONNX, AOTInductor, loss scaling, profiles,
heads on several devices."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import flat
from conftest import why_no_cpu_backend
from torch import Tensor, nn

import seqkern

X, WIDE = (5, 2, 6), (5, 2, 8)  # [T, B, I] and, for attention, [L, B, E]
LAYERS: dict[str, tuple[nn.Module, list[tuple[int, ...]]]] = {
    "RNN": (seqkern.RNN(6, 8), [X]),
    "LSTM": (seqkern.LSTM(6, 8, 2, bidirectional=True), [X]),
    "GRU": (seqkern.GRU(6, 8, batch_first=True), [X]),
    "RNNCell": (seqkern.RNNCell(6, 8), [(3, 6)]),
    "LSTMCell": (seqkern.LSTMCell(6, 8), [(3, 6)]),
    "GRUCell": (seqkern.GRUCell(6, 8), [(3, 6)]),
    "PeepholeLSTM": (seqkern.PeepholeLSTM(6, 8), [X]),
    "LayerNormGRU": (seqkern.LayerNormGRU(6, 8), [X]),
    "SLSTMCell": (seqkern.SLSTMCell(6, 8, num_heads=2), [(3, 6)]),
    "MultiHeadAttention": (seqkern.MultiHeadAttention(8, 2), [WIDE] * 3),
    "TransformerEncoderLayer": (seqkern.TransformerEncoderLayer(8, 2, 16), [WIDE]),
    "TransformerDecoderLayer": (seqkern.TransformerDecoderLayer(8, 2, 16), [WIDE, WIDE]),
    "AdditiveAttention": (seqkern.AdditiveAttention(8, 8, 8), [(2, 8), (2, 5, 8)]),
    "CRF": (seqkern.CRF(8), [WIDE]),
}
each = pytest.mark.parametrize("name", LAYERS)
each_but_crf = pytest.mark.parametrize("name", [name for name in LAYERS if name != "CRF"])


def of(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module, shapes = LAYERS[name]
    return module.eval(), tuple(torch.randn(shape) for shape in shapes)


# ---- TorchScript -------------------------------------------------------------------------------------------


@each
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_is_refused(name: str) -> None:
    """Before anything is compiled, alone and inside a model, with what to do instead."""
    module, _ = of(name)
    for model in (module, nn.Sequential(module)):
        with pytest.raises(
            RuntimeError, match=f"seqkern.{name}: TorchScript is not supported; use torch.comp"
        ):
            torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_restored_models_can_be_scripted() -> None:
    model, x = nn.Sequential(nn.LSTM(6, 8)), torch.randn(X)
    seqkern.replace(model)
    expected = model(x)[0]
    seqkern.restore(model)
    torch.testing.assert_close(torch.jit.script(model)(x)[0], expected)


@pytest.mark.parametrize("name", ("RNN", "LSTM", "GRU", "MultiHeadAttention"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_runs_torchs_forward(name: str) -> None:
    module, inputs = of(name)
    traced = torch.jit.trace(module, inputs)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any("seqkern" in kind for kind in kinds), kinds
    torch.testing.assert_close(flat(traced(*inputs)), flat(module(*inputs)), rtol=1e-5, atol=1e-6)


# ---- ONNX --------------------------------------------------------------------------------------------------


@each_but_crf
def test_onnx(name: str) -> None:
    """Every layer exports, and another runtime computes the same."""
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    module, inputs = of(name)
    file = io.BytesIO()
    torch.onnx.export(module, inputs, file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file.getvalue())
    given = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    for got, expected in zip(session.run(None, given), flat(module(*inputs)), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


def test_onnx_with_lengths_and_another_batch() -> None:
    """Lengths as an input of the exported model, the batch of any size."""
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = seqkern.GRU(6, 8, bidirectional=True, batch_first=True)
            self.attention = seqkern.MultiHeadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y, _ = self.rnn(x, lengths=lengths)
            return self.attention(y, y, y, lengths=lengths, need_weights=False)[0]

    model, file = Model().eval(), io.BytesIO()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) * 2
    example = torch.randn(3, 5, 6), torch.tensor([5, 2, 4])
    torch.onnx.export(model, example, file, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = runtime.InferenceSession(file.getvalue())
    for lengths in ([5, 2, 4], [1, 5, 3, 2, 5]):
        x, n = torch.randn(len(lengths), 5, 6), torch.tensor(lengths)
        (got,) = session.run(None, {"x": x.numpy(), "lengths": n.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x, n), rtol=1e-4, atol=1e-5)


# ---- torch.compile and AOTInductor -------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    before = torch._dynamo.config.allow_rnn
    yield
    torch._dynamo.config.allow_rnn = before
    torch._dynamo.reset()


def test_compile_helper(fresh_dynamo: None) -> None:
    """What torch.compile refuses for a subclass of torch.nn.LSTM, one graph with seqkern.compile."""
    torch._dynamo.config.allow_rnn = False
    module, (x,) = of("LSTM")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    compiled = seqkern.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(flat(compiled(x)), flat(module(x)))

    @seqkern.compile(fullgraph=True, backend="eager")
    def last(x: Tensor) -> Tensor:
        return module(x)[0][-1]

    torch.testing.assert_close(last(x), module(x)[0][-1])


@pytest.mark.slow
def test_aot_inductor(fresh_dynamo: None, tmp_path: Path) -> None:
    """A package of compiled code, for batches and lengths of any size."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = seqkern.LSTM(6, 8, batch_first=True)
            self.attention = seqkern.MultiHeadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y, _ = self.rnn(x, lengths=lengths)
            return self.attention(y, y, y, lengths=lengths, need_weights=False)[0]

    model = Model().eval()
    batch, steps = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("steps", min=2, max=64)
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        program = torch.export.export(
            *(model, (torch.randn(2, 5, 6), torch.tensor([5, 3]))),
            dynamic_shapes=({0: batch, 1: steps}, {0: batch}),
        )
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        package = torch._inductor.aoti_load_package(path)
        for B, T in ((2, 5), (3, 9)):
            x, lengths = torch.randn(B, T, 6), torch.randint(1, T + 1, (B,))
            torch.testing.assert_close(package(x, lengths), model(x, lengths))


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("LSTM", "GRU", "MultiHeadAttention"))
def test_grad_scaler(name: str) -> None:
    """float16 under autocast: the step whose gradients overflow is left out, the others are torch.nn's."""
    ours, shapes = LAYERS[name]
    arguments = (8, 2) if name == "MultiHeadAttention" else (6, 8)
    theirs = (nn.MultiheadAttention if name == "MultiHeadAttention" else getattr(nn, name))(*arguments)
    mine = type(ours)(*arguments)
    mine.load_state_dict(theirs.state_dict())
    before = [p.detach().clone() for p in mine.parameters()]

    def loss_of(module: nn.Module, step: int) -> Tensor:
        inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for shape in shapes]
        return flat(module(*inputs))[0].float().square().mean()

    optimizer = torch.optim.SGD(mine.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for step in range(5):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(mine, step)
        optimizer.zero_grad()
        scaler.scale(loss * (1e38 if step == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [1024, 2048, 1024, 1024, 2048]
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for step in (0, 1, 3, 4):
        optimizer.zero_grad()
        loss_of(theirs, step).backward()
        optimizer.step()
    for got, expected, old in zip(mine.parameters(), theirs.parameters(), before, strict=True):
        moved = (expected - old).abs().max().item()
        assert moved > 0
        torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * moved)


def test_state_dict_hooks() -> None:
    """A hook that renames on the way out, and one that renames back on the way in."""
    module, other = seqkern.LSTM(6, 8), seqkern.LSTM(6, 8)

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state["recurrent"] = state.pop("weight_hh_l0")

    def back(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state["weight_hh_l0"] = state.pop("recurrent")

    module.register_state_dict_post_hook(rename)
    other.register_load_state_dict_pre_hook(back)
    state = module.state_dict()
    assert "recurrent" in state and "weight_hh_l0" not in state
    other.load_state_dict(state)
    assert torch.equal(other.weight_hh_l0, module.weight_hh_l0)


@pytest.mark.skipif(why_no_cpu_backend() is not None, reason=str(why_no_cpu_backend()))
@pytest.mark.parametrize(
    ("name", "operators"),
    (
        ("RNN", ("rnn_forward", "rnn_backward")),
        ("LSTM", ("lstm_forward", "lstm_backward")),
        ("GRU", ("gru_forward", "gru_backward")),
        ("PeepholeLSTM", ("recurrent_forward", "recurrent_backward")),
    ),
)
def test_profiles_name_the_kernels(name: str, operators: tuple[str, ...]) -> None:
    module, inputs = of(name)
    module.train()
    with torch.profiler.profile() as profile:
        flat(module(*inputs))[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {f"seqkern::{operator}" for operator in operators} <= names


@each_but_crf
def test_deterministic_algorithms(name: str) -> None:
    """Nothing here needs to be told to be deterministic: two runs give the same bits."""
    module, inputs = of(name)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            outputs = flat(module(*inputs))
            loss = sum(y.square().sum() for y in outputs)
            runs.append([*outputs, *torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- heads on several devices ------------------------------------------------------------------------------


class Heads(nn.Module):
    """Grouped-query attention, its number of heads read off what the projections give."""

    def __init__(self, E: int = 32, N: int = 4, Nk: int = 2) -> None:
        super().__init__()
        self.head_dim = E // N
        self.q, self.out = nn.Linear(E, E), nn.Linear(E, E)
        self.k, self.v = (nn.Linear(E, Nk * self.head_dim) for _ in range(2))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = seqkern.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, lengths=lengths)
        return self.out(y.transpose(1, 2).flatten(2))


def tensor_parallel(rank: int, store: str) -> None:
    """One of two processes, each with half of the heads: outputs and gradients of the whole."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, x, lengths = Heads(), torch.randn(3, 7, 32), torch.tensor([7, 2, 5])
    split = copy.deepcopy(whole)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    columns = {name: ColwiseParallel() for name in ("q", "k", "v")}
    parallelize_module(split, mesh, columns | {"out": RowwiseParallel()})
    assert split.q.weight.to_local().shape == (16, 32)
    ys = [module(x, lengths) for module in (whole, split)]
    torch.testing.assert_close(ys[1], ys[0])
    for y in ys:
        y.square().sum().backward()
    for (name, p), part in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(part.grad.full_tensor(), p.grad, msg=lambda m, name=name: f"{name}: {m}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_tensor_parallel_heads(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(tensor_parallel, (str(tmp_path / "store"),), nprocs=2)
