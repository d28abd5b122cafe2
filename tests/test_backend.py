"""The choice of a backend: the table, the reasons for a refusal, and the caller's wish."""

import re
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern.ops import _backend
from seqkern.ops._backend import choose, refusal

NO_COMPILER = "no compiled extension"
NO_NVCC = "was left out when seqkern was built: reinstall seqkern where nvcc is"

FORWARD = {"rnn": seqkern.ops.rnn, "lstm": seqkern.ops.lstm, "gru": seqkern.ops.gru}
GATES = {"rnn": 1, "lstm": 4, "gru": 3}


class Operators(TorchDispatchMode):
    """Records which of seqkern's operators ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "seqkern":
            self.names.append(func._schema.name.removeprefix("seqkern::"))
        return func(*args, **(kwargs or {}))


def operators_of(call) -> list[str]:
    with Operators() as ran:
        call()
    return ran.names


def request_for(op: str, H: int = 3, dtype: torch.dtype = torch.float32):
    """A function that runs `op` with keywords."""
    G = GATES[op] * H
    x = torch.randn(4, 2, 5, dtype=dtype)
    params = [torch.randn(*shape, dtype=dtype) for shape in ((G, 5), (G, H), (G,), (G,))]
    return lambda **keywords: FORWARD[op](x, None, params, **keywords)


# ---- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rnn", "lstm", "gru", "recurrent"])
@pytest.mark.parametrize(
    ("device", "dtype", "keywords", "expected"),
    [
        ("cpu", torch.float32, {}, "cpu"),
        ("cpu", torch.float64, {}, "cpu"),
        ("cpu", torch.bfloat16, {}, "cpu"),
        ("cpu", torch.float16, {}, "cpu"),
        ("cpu", torch.complex64, {}, "eager"),
        ("meta", torch.float32, {}, "eager"),
        ("cpu", torch.float32, {"no_cuda": NO_NVCC}, "cpu"),
        ("cuda", torch.float32, {}, "cuda"),
        ("cuda", torch.float64, {}, "cuda"),
        ("cuda", torch.bfloat16, {"head_dim": 320}, "cuda"),
        ("cuda", torch.float16, {}, "cuda"),
        ("cuda", torch.complex64, {}, "eager"),
        ("cuda", torch.float32, {"transformed": True}, "eager"),
        ("cuda", torch.float32, {"missing": NO_COMPILER}, "eager"),
        ("cuda", torch.float32, {"no_cuda": NO_NVCC}, "eager"),
        ("cuda", torch.float32, {"wish": "cuda"}, "cuda"),
        ("cuda", torch.float32, {"wish": "eager"}, "eager"),
        ("mps", torch.float32, {}, "eager"),
        ("cpu", torch.float32, {"transformed": True}, "eager"),
        ("cpu", torch.float32, {"missing": NO_COMPILER}, "eager"),
        ("cpu", torch.float32, {"wish": "eager"}, "eager"),
        ("cpu", torch.float32, {"wish": "cpu"}, "cpu"),
        ("cuda", torch.complex64, {"wish": "eager", "transformed": True, "missing": NO_COMPILER}, "eager"),
    ],
)
def test_choice(op, device, dtype, keywords, expected):
    assert choose(op, device, dtype, **keywords) == expected


COMPUTED = "computes float32, float64, bfloat16 and float16, got torch.complex64"
MISSING = f"needs the compiled extension: {NO_COMPILER}"
OLD = "needs compute capability 8.0 or newer, got 7.5"


@pytest.mark.parametrize("op", ["rnn", "lstm", "gru", "recurrent"])
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "keywords", "reason", "instead"),
    [
        ("cpu", "cuda", torch.float32, {}, "needs tensors on a CPU, got cuda", "cuda"),
        ("cpu", "cpu", torch.complex64, {}, COMPUTED, "eager"),
        ("cpu", "cpu", torch.float32, {"transformed": True}, "has no rule for torch.func", "eager"),
        ("cpu", "cpu", torch.float32, {"missing": NO_COMPILER}, MISSING, "eager"),
        ("cuda", "cpu", torch.float32, {}, "needs tensors on a CUDA device, got cpu", "cpu"),
        ("cuda", "meta", torch.float32, {}, "needs tensors on a CUDA device, got meta", "eager"),
        ("cuda", "cuda", torch.complex64, {}, COMPUTED, "eager"),
        ("cuda", "cuda", torch.float32, {"transformed": True}, "has no rule for torch.func", "eager"),
        ("cuda", "cuda", torch.float32, {"missing": NO_COMPILER, "no_cuda": MISSING}, MISSING, "eager"),
        ("cuda", "cuda", torch.float32, {"no_cuda": OLD}, OLD, "eager"),
        ("cuda", "cpu", torch.float32, {"no_cuda": NO_NVCC}, NO_NVCC, "cpu"),
    ],
)
def test_a_named_backend_refuses_with_the_reason(op, backend, device, dtype, keywords, reason, instead):
    assert refusal(backend, op, device, dtype, **keywords).startswith(f"{backend} {reason}")
    expected = re.escape(f"backend {backend!r} was asked for: {backend} {reason}")
    with pytest.raises(RuntimeError, match=expected):
        choose(op, device, dtype, wish=backend, **keywords)
    assert choose(op, device, dtype, **keywords) == instead


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), OLD),
        ((8, 0), None),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 0), None),
        ((10, 3), None),
        ((12, 0), "has no code for compute capability 12.0: seqkern was built for sm_80 sm_90a sm_100"),
    ],
)
def test_which_devices_run_the_code_that_was_built(capability, expected):
    assert _backend.unsupported(capability, "sm_80 sm_90a sm_100") == expected
    assert "has no code" in (_backend.unsupported((9, 1), "sm_90a") or "")  # sm_90a is for 9.0 alone


def test_why_cuda_cannot_asks_each_device_once_and_not_for_a_cpu_tensor(monkeypatch):
    asked = []

    def capability(device):
        asked.append(device)
        return (7, 5) if device.index == 1 else (8, 0)

    facts = type("Extension", (), {"build_info": staticmethod(lambda: {"cuda_archs": "sm_80"})})
    monkeypatch.setattr(_backend._extension, "_C", facts)
    monkeypatch.setattr(_backend, "_lacks", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = torch.device("cuda", 0)
    assert _backend.why_device_cannot(cuda) == "needs a CUDA device, and torch finds none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backend, "WHY_NO_CUDA", None)
    assert _backend.why_no_cuda(torch.ones(1)) is None and not asked
    for _ in range(2):
        assert _backend.why_device_cannot(cuda) is None
        assert _backend.why_device_cannot(torch.device("cuda", 1)) == OLD
    assert asked == [cuda, torch.device("cuda", 1)]


@pytest.mark.parametrize("lacks", [None, OLD])
def test_the_device_is_asked_when_a_graph_is_traced(monkeypatch, lacks):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(_backend, "_lacks", {cuda: lacks})

    def reason(x):
        return x + (0 if _backend.why_device_cannot(cuda) is None else 1)

    torch._dynamo.reset()
    compiled = torch.compile(reason, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == (lacks is not None)


def test_cuda_by_name_says_why_not():
    if _backend.WHY_NO_CUDA is None:
        expected = "cuda needs tensors on a CUDA device, got cpu"
    else:
        expected = f"cuda {_backend.WHY_NO_CUDA}"
    for op in FORWARD:
        with pytest.raises(RuntimeError, match=re.escape(f"backend 'cuda' was asked for: {expected}")):
            request_for(op)(backend="cuda")
        with seqkern.use_backend("cuda"), pytest.raises(RuntimeError, match="was asked for: cuda"):
            request_for(op)()
    x = torch.randn(1, 2, 3, 4)
    with (
        seqkern.use_backend("cuda"),
        pytest.raises(RuntimeError, match="backend 'cuda' was asked for: cuda has no kernel for attention"),
    ):
        seqkern.scaled_dot_product_attention(x, x, x)


NO_TRITON = "Triton is not installed: pip install triton"


@pytest.mark.parametrize(
    ("device", "dtype", "keywords", "expected"),
    [
        ("cpu", torch.float32, {}, "cpu"),
        ("cpu", torch.float64, {}, "cpu"),
        ("cpu", torch.bfloat16, {"head_dim": 320}, "cpu"),
        ("cpu", torch.float16, {"missing": NO_TRITON}, "cpu"),
        ("cpu", torch.float32, {"interpreted": True}, "cpu"),
        ("cpu", torch.complex64, {}, "eager"),
        ("cpu", torch.float32, {"transformed": True}, "eager"),
        ("cpu", torch.float32, {"wish": "eager"}, "eager"),
        ("cpu", torch.float32, {"wish": "cpu"}, "cpu"),
        ("cpu", torch.float32, {"wish": "triton", "interpreted": True}, "triton"),
        ("cpu", torch.float64, {"wish": "triton", "interpreted": True, "head_dim": 256}, "triton"),
        ("meta", torch.float32, {}, "eager"),
        ("cuda", torch.float32, {}, "triton"),
        ("cuda", torch.bfloat16, {"head_dim": 256}, "triton"),
        ("cuda", torch.float16, {"wish": "triton", "head_dim": 1}, "triton"),
        ("cuda", torch.float32, {"no_cuda": NO_NVCC}, "triton"),
        ("cuda", torch.float64, {}, "eager"),
        ("cuda", torch.float32, {"head_dim": 257}, "eager"),
        ("cuda", torch.float32, {"missing": NO_TRITON}, "eager"),
        ("cuda", torch.float32, {"transformed": True}, "eager"),
        ("cuda", torch.float32, {"wish": "eager", "missing": NO_TRITON}, "eager"),
        ("mps", torch.float32, {}, "eager"),
    ],
)
def test_choice_for_attention(device, dtype, keywords, expected):
    assert choose("attention", device, dtype, **keywords) == expected


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "keywords", "reason"),
    [
        ("cpu", "cuda", torch.float32, {}, "cpu needs tensors on a CPU, got cuda"),
        ("cuda", "cuda", torch.float32, {}, "cuda has no kernel for attention"),
        ("cuda", "cpu", torch.float32, {"no_cuda": NO_NVCC}, "cuda has no kernel for attention"),
        ("cpu", "cpu", torch.complex64, {}, "cpu computes float32, float64, bfloat16 and float16, got"),
        ("cpu", "cpu", torch.float32, {"transformed": True}, "cpu has no rule for torch.func transforms"),
        ("triton", "cpu", torch.float32, {}, "triton needs tensors on a CUDA device, got cpu"),
        (
            "triton",
            "cuda",
            torch.float64,
            {},
            "triton computes float32, bfloat16 and float16, got torch.float64",
        ),
        ("triton", "cuda", torch.float32, {"head_dim": 320}, "triton needs head_dim <= 256, got 320"),
        (
            *("triton", "cpu", torch.float32),
            {"head_dim": 320, "interpreted": True},
            "triton needs head_dim <= 256, got 320",
        ),
        ("triton", "cuda", torch.float32, {"missing": NO_TRITON}, f"triton: {NO_TRITON}"),
        (
            "triton",
            "cuda",
            torch.float32,
            {"transformed": True},
            "triton has no rule for torch.func transforms",
        ),
    ],
)
def test_a_named_backend_refuses_attention_with_the_reason(backend, device, dtype, keywords, reason):
    assert refusal(backend, "attention", device, dtype, **keywords).startswith(reason)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' was asked for: " + re.escape(reason)):
        choose("attention", device, dtype, wish=backend, **keywords)
    assert choose("attention", device, dtype, **keywords) in {"eager", "cpu", "triton"} - {backend}


@pytest.mark.parametrize(
    ("device", "dtype", "keywords", "expected"),
    [
        ("cpu", torch.float32, {}, "cpu"),
        ("cpu", torch.float64, {}, "cpu"),
        ("cpu", torch.float32, {"missing": NO_COMPILER}, "eager"),
        ("cpu", torch.float32, {"transformed": True}, "eager"),
        ("cpu", torch.float32, {"wish": "triton", "interpreted": True}, "triton"),
        ("cuda", torch.float16, {}, "triton"),
        ("cuda", torch.float64, {}, "eager"),
        ("cuda", torch.float32, {"missing": NO_TRITON}, "eager"),
        ("meta", torch.float32, {}, "eager"),
    ],
)
def test_choice_for_additive_attention(device, dtype, keywords, expected):
    assert choose("additive_attention", device, dtype, **keywords) == expected


@pytest.mark.parametrize(
    ("backend", "device", "keywords", "reason"),
    [
        ("cpu", "cpu", {"missing": NO_COMPILER}, f"cpu needs the compiled extension: {NO_COMPILER}"),
        ("cpu", "cuda", {}, "cpu needs tensors on a CPU, got cuda"),
        ("cuda", "cuda", {}, "cuda has no kernel for additive_attention"),
        ("triton", "cpu", {}, "triton needs tensors on a CUDA device, got cpu"),
        ("triton", "cuda", {"missing": NO_TRITON}, f"triton: {NO_TRITON}"),
    ],
)
def test_a_named_backend_refuses_additive_attention_with_the_reason(backend, device, keywords, reason):
    with pytest.raises(RuntimeError, match=f"backend '{backend}' was asked for: " + re.escape(reason)):
        choose("additive_attention", device, torch.float32, wish=backend, **keywords)


@pytest.mark.parametrize("op", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("missing", [None, NO_COMPILER])
def test_triton_has_no_recurrent_kernels(op, missing):
    for device in ("cpu", "cuda"):
        expected = f"triton has no kernel for {op}"
        assert refusal("triton", op, device, torch.float32, missing=missing, interpreted=True) == expected
    with pytest.raises(RuntimeError, match=f"backend 'triton' was asked for: {expected}"):
        request_for(op)(backend="triton")


@pytest.mark.parametrize("op", ["rnn", "lstm", "gru", "attention"])
def test_the_eager_backend_never_refuses(op):
    assert refusal("eager", op, "cuda", torch.complex128, transformed=True, missing=NO_COMPILER) is None


def test_an_unknown_backend_is_a_value_error():
    expected = "backend: expected one of eager, cpu, cuda, triton or None, got 'cudnn'"
    with pytest.raises(ValueError, match=expected):
        choose("lstm", "cpu", torch.float32, wish="cudnn")
    with pytest.raises(ValueError, match=expected), seqkern.use_backend("cudnn"):
        pass
    with pytest.raises(ValueError, match=expected):
        request_for("gru")(backend="cudnn")
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=expected):
        seqkern.scaled_dot_product_attention(x, x, x, backend="cudnn")


# ---- the wish ----------------------------------------------------------------------------------------------


def test_use_backend_nests_and_ends_also_after_an_error():
    assert _backend.current_wish() is None
    with seqkern.use_backend("eager"):
        assert _backend.current_wish() == "eager"
        with seqkern.use_backend("cpu"):
            assert _backend.current_wish() == "cpu"
            with seqkern.use_backend(None):
                assert _backend.current_wish() is None
            assert _backend.current_wish() == "cpu"
        with pytest.raises(ZeroDivisionError), seqkern.use_backend("cpu"):
            raise ZeroDivisionError
        assert _backend.current_wish() == "eager"
    assert _backend.current_wish() is None
    assert _backend._process_wish is None


def test_use_backend_belongs_to_its_thread():
    entered, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with seqkern.use_backend("eager"):
            entered.set()
            leave.wait(30)
            seen.append(_backend.current_wish())
        seen.append(_backend.current_wish())

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert entered.wait(30)
        assert _backend.current_wish() is None
        with seqkern.use_backend("cpu"):
            assert _backend._process_wish == _backend.AMBIGUOUS  # what compiled code would refuse
        assert _backend._process_wish == "eager"
    finally:
        leave.set()
        thread.join()
    assert seen == ["eager", None]
    assert _backend._process_wish is None


@pytest.mark.parametrize("op", ["rnn", "lstm", "gru"])
def test_the_wish_decides_what_runs(op, cpu_backend):
    run = request_for(op)
    forward = [f"{op}_forward"]
    assert operators_of(run) == forward
    with seqkern.use_backend("eager"):
        assert operators_of(run) == []
        assert operators_of(lambda: run(backend="cpu")) == forward
    with seqkern.use_backend(None):
        assert operators_of(run) == forward
        assert operators_of(lambda: run(backend="eager")) == []


@pytest.mark.parametrize("cls", [seqkern.RNN, seqkern.LSTM, seqkern.GRU])
def test_modules_follow_the_wish(cls, cpu_backend):
    layer, x = cls(5, 3, num_layers=2), torch.randn(4, 2, 5)
    assert len(operators_of(lambda: layer(x))) == 2
    with seqkern.use_backend("eager"):
        assert operators_of(lambda: layer(x)) == []


def test_attention_follows_the_wish():
    layer, x = seqkern.MultiHeadAttention(8, 2), torch.randn(4, 2, 8)
    heads, cu = torch.randn(2, 3, 4, 8), torch.tensor([0, 3, 4])
    calls = [
        lambda **wish: seqkern.scaled_dot_product_attention(heads, heads, heads, **wish),
        lambda **wish: seqkern.varlen_attention(x, x, x, cu, **wish),
        lambda: layer(x, x, x),
        lambda: layer(x, x, x, lengths=torch.tensor([1, 2]), need_weights=False),
    ]
    for call in calls:
        assert operators_of(call) == ["attention_forward"]
        with seqkern.use_backend("eager"):
            assert operators_of(call) == []
            with seqkern.use_backend("cpu"):
                assert operators_of(call) == ["attention_forward"]
    for call in calls[:2]:
        assert operators_of(lambda call=call: call(backend="eager")) == []
        with seqkern.use_backend("eager"):
            assert operators_of(lambda call=call: call(backend="cpu")) == ["attention_forward"]


def test_attention_needs_no_extension(monkeypatch):
    """Its CPU backend is Python."""
    monkeypatch.setattr(_backend, "WHY_NO_KERNELS", NO_COMPILER)
    layer, x = seqkern.MultiHeadAttention(8, 2), torch.randn(4, 2, 8)
    with seqkern.use_backend("cpu"):
        assert operators_of(lambda: layer(x, x, x)) == ["attention_forward"]


def test_without_triton_attention_says_so(monkeypatch):
    monkeypatch.setattr(_backend, "WHY_NO_TRITON", NO_TRITON)
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for: triton: Triton is not installed"):
        seqkern.scaled_dot_product_attention(x, x, x, backend="triton")
    assert operators_of(lambda: seqkern.scaled_dot_product_attention(x, x, x)) == ["attention_forward"]


def test_the_interpreter_serves_only_who_asks(monkeypatch):
    x = torch.randn(1, 2, 3, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton needs tensors on a CUDA device, got cpu"):
        seqkern.scaled_dot_product_attention(x, x, x, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert operators_of(lambda: seqkern.scaled_dot_product_attention(x, x, x)) == ["attention_forward"]


@pytest.mark.parametrize("cls", [seqkern.RNNCell, seqkern.LSTMCell, seqkern.GRUCell])
def test_cells_follow_the_wish(cls, cpu_backend):
    cell, x = cls(5, 3), torch.randn(2, 5)
    assert len(operators_of(lambda: cell(x))) == 1
    with seqkern.use_backend("eager"):
        assert operators_of(lambda: cell(x)) == []


@pytest.mark.parametrize("op", ["rnn", "lstm", "gru"])
def test_without_the_extension_everything_runs_eagerly(op, monkeypatch):
    monkeypatch.setattr(_backend, "WHY_NO_KERNELS", NO_COMPILER)
    run = request_for(op)
    assert operators_of(run) == []
    with (
        pytest.raises(RuntimeError, match="cpu needs the compiled extension: " + NO_COMPILER),
        seqkern.use_backend("cpu"),
    ):
        run()


@pytest.mark.parametrize("op", ["rnn", "lstm", "gru"])
def test_a_named_backend_does_not_fall_back_under_a_transform(op, cpu_backend):
    run = request_for(op)
    with pytest.raises(RuntimeError, match=r"no rule for torch\.func transforms"):
        torch.func.vmap(lambda _: run()[0])(torch.zeros(2))


def test_a_named_backend_refuses_a_dtype_it_lacks(cpu_backend):
    with pytest.raises(RuntimeError, match=r"cpu computes .* got torch\.complex64"):
        request_for("gru", dtype=torch.complex64)()


@pytest.mark.parametrize("op", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_rounds_sixteen_bits_once(op, dtype):
    """The eager backend computes 16-bit layers in float32 and rounds at the store."""
    G, H = GATES[op] * 8, 8
    x = torch.randn(20, 3, 5, dtype=dtype)
    params = [torch.randn(*shape).mul(0.3).to(dtype) for shape in ((G, 5), (G, H), (G,), (G,))]
    y, _ = FORWARD[op](x, None, params, backend="eager")
    wide, _ = FORWARD[op](x.float(), None, [p.float() for p in params], backend="eager")
    assert y.dtype is dtype
    torch.testing.assert_close(y, wide.to(dtype), rtol=0, atol=0)
