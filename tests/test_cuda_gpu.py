"""The CUDA kernels on a device: RNN, LSTM and GRU against torch.nn there, by compare.py's rule; the variants
and regularised recurrences against the eager formula.

What runs without one is in test_cuda.py. Each tier of csrc/cuda/plan.h is forced by name; "" is a free
choice.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import recurrent_cases
import torch
from cases import KINDS, OUR_CELL, SHORT, TORCH_CELL, Case, State, our_layer, sample
from compare import check_parity, evaluate, flat, packed_call, same_bits
from test_cuda_variants import PERSISTENT
from test_variants import regularised
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqkern
from seqkern import _extension
from seqkern.ops import _backend
from seqkern.plan import facts_of

DEVICE = "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PATIENCE = 60.0  # seconds until kernels that have not ended count as hanging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_backend.WHY_NO_CUDA is not None, reason=f"cuda {_backend.WHY_NO_CUDA}"),
]


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    """The backend by name: nothing here falls back."""
    with seqkern.use_backend("cuda"):
        yield


@contextlib.contextmanager
def tier(name: str) -> Iterator[None]:
    """Forces a tier."""
    _extension._C.set_cuda_tier(name)
    try:
        yield
    finally:
        _extension._C.set_cuda_tier("")


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """float32's: "tf32" or "ieee", of the RNNs and of the products beside them."""
    switches = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = name
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def layers(case: Case) -> tuple[nn.RNNBase, nn.RNNBase]:
    """torch.nn's and seqkern's, with equal weights."""
    theirs = case.torch_layer()
    return theirs.to(DEVICE), our_layer(theirs).to(DEVICE)


def inputs(case: Case) -> tuple[Tensor, State | None]:
    x, hx = case.inputs()
    if hx is None:
        return x.to(DEVICE), None
    states = [state.to(DEVICE) for state in flat(hx)]
    return x.to(DEVICE), tuple(states) if case.kind == "lstm" else states[0]


def ragged(T: int, B: int) -> Tensor:
    """[B]: 0, T and others between."""
    lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(3))
    lengths[0] = T
    lengths[-1] = min(int(lengths[-1]), T // 2) if B < 3 else 0
    return lengths


def with_lengths(lengths: Tensor) -> Callable[..., Any]:
    return lambda layer, x, hx: layer(x, hx, lengths=lengths.to(x.device))


def skip_unless_possible(ours: nn.Module, x: Tensor, hx: State | None, name: str) -> None:
    """A tier that cannot run a layer says so: csrc/cuda/plan.cpp."""
    try:
        evaluate(ours, x, hx)
    except (ValueError, RuntimeError) as error:
        if name and f"cuda tier '{name}' was asked for" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise


def finish(what: str) -> None:
    """Waits for the device; if it hangs, so would every test to come."""
    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + PATIENCE
    while not event.query():
        if time.monotonic() > end:
            pytest.exit(f"{what}: kernels still run after {PATIENCE:.0f} s: a deadlock", returncode=3)
        time.sleep(0.001)


# ---- parity ------------------------------------------------------------------------------------------------

SIZES = {  # tier -> (T, B, I, H, options)
    "block": ((9, 3, 17, 15, {}), (17, 9, 33, 64, {"bidirectional": True}), (5, 17, 72, 50, {})),
    "cluster": ((9, 5, 65, 129, {}), (17, 16, 40, 256, {"bidirectional": True}), (6, 9, 33, 448, {})),
    "grid": ((9, 5, 31, 200, {"bidirectional": True}), (6, 16, 64, 768, {}), (5, 33, 65, 1024, {})),
    "step": ((9, 5, 31, 65, {"bidirectional": True}), (4, 17, 65, 1024, {})),
    "": ((33, 2, 300, 512, {}), (7, 129, 63, 129, {"num_layers": 2, "bidirectional": True})),
}
TIERED = [
    (name, Case(kind, T, B, I, H, dtype=dtype, **options))
    for name, rows in SIZES.items()
    for T, B, I, H, options in rows  # noqa: E741
    for kind in KINDS
    for dtype in FLOATS
]


@pytest.mark.parametrize(("name", "case"), TIERED, ids=[f"{name or 'free'}-{case}" for name, case in TIERED])
def test_parity_of_tiers(name: str, case: Case) -> None:
    """Padded, and the same with lengths."""
    theirs, ours = layers(case)
    x, hx = inputs(case)
    lengths = ragged(case.T, case.B)
    for fp32 in ("tf32", "ieee") if case.dtype is torch.float32 else ("tf32",):
        with precision(fp32), tier(name):
            skip_unless_possible(ours, x, hx, name)
            check_parity(theirs, ours, x, hx, f"{name} {fp32} {case}")
            call, their_call = with_lengths(lengths), packed_call(lengths)
            check_parity(theirs, ours, x, hx, f"{name} {fp32} {case} ragged", call, their_call)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="wants clusters"
)
@pytest.mark.parametrize(("name", "H"), [("block", 64), ("cluster", 256), ("grid", 768), ("step", 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_tier_can_run_what_it_is_for(name: str, H: int, kind: str) -> None:
    """So that the tests above do not all skip."""
    case = Case(kind, T=3, B=16, I=16, H=H, dtype=torch.bfloat16)
    with tier(name):
        evaluate(layers(case)[1], *inputs(case))


@pytest.mark.parametrize("case", [c for kind in KINDS for c in sample(kind)[::2]], ids=str)
def test_parity_of_options(case: Case) -> None:
    theirs, ours = layers(case)
    with precision("ieee"):
        check_parity(theirs, ours, *inputs(case), case)


@pytest.mark.parametrize("name", ["cluster", "grid", ""], ids=["cluster", "grid", "free"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=SHORT.get)
def test_parity_of_long_sequences(kind: str, dtype: torch.dtype, name: str) -> None:
    case = Case(kind, T=300, B=16, I=512, H=512, dtype=dtype)
    theirs, ours = layers(case)
    x, hx = inputs(case)
    with tier(name):
        skip_unless_possible(ours, x, hx, name)
        check_parity(theirs, ours, x, hx, f"{name} {case}")


def through_packing(lengths: Tensor) -> Callable[..., Any]:
    def call(layer: nn.RNNBase, x: Tensor, hx: State | None) -> tuple[Tensor, State]:
        out, state = layer(pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=False), hx)
        return out.data, state

    return call


PACKED = [
    Case(kind, T=12, B=9, I=17, H=H, num_layers=2, bidirectional=True, dtype=dtype)
    for kind in KINDS
    for H, dtype in ((33, torch.float32), (256, torch.bfloat16), (520, torch.float16))
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_parity_of_packed_sequences(case: Case) -> None:
    theirs, ours = layers(case)
    call = through_packing(ragged(case.T, case.B).clamp(min=1))
    with precision("ieee"):
        check_parity(theirs, ours, *inputs(case), case, call, call)


PROJECTED = [
    Case("lstm", T=7, B=5, I=33, H=H, proj_size=P, num_layers=2, bidirectional=True, dtype=dtype)
    for H, P in ((33, 8), (600, 256))
    for dtype in (*FLOATS, torch.float64)
]


@pytest.mark.parametrize("case", PROJECTED, ids=str)
def test_parity_of_projections(case: Case) -> None:
    theirs, ours = layers(case)
    x, hx = inputs(case)
    lengths = ragged(case.T, case.B)
    with precision("ieee"):
        check_parity(theirs, ours, x, hx, case)
        check_parity(theirs, ours, x, hx, f"{case} ragged", with_lengths(lengths), packed_call(lengths))


def variants() -> list[tuple[str, recurrent_cases.Case]]:
    """Every cell, alone and with every regulariser, in each tier that can run it."""
    found = []
    for cell in recurrent_cases.CELL_NAMES:
        tiers = {"step": 40} | (dict(block=64, cluster=256, grid=512) if cell in PERSISTENT else {})
        for name, H in tiers.items():
            dtypes = (*FLOATS, torch.float64) if name == "step" else FLOATS
            for k, dtype in enumerate(dtypes):
                options = [(), regularised(cell)[-1]]
                for chosen in options[cell in recurrent_cases.PLAIN :]:
                    case = recurrent_cases.Case(
                        cell,
                        *(7, 9, 33, H),
                        bidirectional=True,
                        form=("padded", "lengths", "packed")[k % 3],
                        options=chosen,
                        dtype=dtype,
                        device=DEVICE,
                    )
                    found.append((name, case))
    return found


@pytest.mark.parametrize(("name", "case"), variants(), ids=lambda value: str(value))
def test_parity_of_variants(name: str, case: recurrent_cases.Case) -> None:
    with tier(name), precision("ieee"):
        recurrent_cases.check_parity(case, "cuda")


@pytest.mark.parametrize("cell", recurrent_cases.CELL_NAMES)
def test_a_cuda_graph_replays_a_variant(cell: str) -> None:
    """Forward and backward, captured, give what they give at once."""
    case = recurrent_cases.Case(
        cell, T=6, B=4, I=8, H=64, bidirectional=True, form="lengths", dtype=torch.float32, device=DEVICE
    )
    leaves = {name: t.requires_grad_() for name, t in case.tensors().items()}
    lengths = case.lengths().to(DEVICE)
    states = [leaves[f"{name}0"] for name in seqkern.ops.CELLS[cell].states]

    def run() -> list[Tensor]:
        params = case.flat_params(leaves)
        y, finals = seqkern.ops.recurrent(
            cell, leaves["x"], states, params, lengths=lengths, bidirectional=True
        )
        outputs = [y, *finals]
        return [
            *outputs,
            *torch.autograd.grad(outputs, list(leaves.values()), list(map(torch.ones_like, outputs))),
        ]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    torch.cuda.synchronize()
    same_bits(dict(enumerate(got)), dict(enumerate(expected)), case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=SHORT.get)
def test_parity_of_cells(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = TORCH_CELL[kind](17, 33, dtype=dtype, device=DEVICE)
    ours = OUR_CELL[kind](17, 33, dtype=dtype, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x, h, c = (torch.randn(5, size, device=DEVICE).to(dtype) for size in (17, 33, 33))
    with precision("ieee"):
        check_parity(theirs, ours, x, (h, c) if kind == "lstm" else h, f"{kind} cell {dtype}")


SMALL = {"block": 33, "cluster": 129, "grid": 200, "step": 33}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_small(kind: str, dtype: torch.dtype, name: str) -> None:
    """One run of each kernel: what compute-sanitizer looks at."""
    case = Case(kind, T=4, B=9, H=SMALL[name], bidirectional=True, dtype=dtype)
    _, ours = layers(case)
    x, hx = inputs(case)
    with tier(name):
        skip_unless_possible(ours, x, hx, name)
        found = evaluate(ours, x, hx, call=with_lengths(ragged(case.T, case.B)))
    assert all(tensor.isfinite().all() for tensor in found.values())


# ---- lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("H", [33, 256, 768])
def test_lengths_out_of_range_are_clamped(kind: str, H: int) -> None:
    case = Case(kind, T=6, B=4, H=H, bidirectional=True)
    _, ours = layers(case)
    wild, tame = torch.tensor([-3, 6 + 5, 4, 2**40]), torch.tensor([0, 6, 4, 6])
    x, hx = inputs(case)
    found = [evaluate(ours, x, hx, call=with_lengths(lengths)) for lengths in (wild, tame)]
    same_bits(*found, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("H", [33, 256, 768])
@pytest.mark.parametrize("dtype", FLOATS, ids=SHORT.get)
def test_nan_in_the_padding_reaches_nothing(kind: str, H: int, dtype: torch.dtype) -> None:
    case = Case(kind, T=6, B=5, H=H, bidirectional=True, dtype=dtype)
    _, ours = layers(case)
    lengths = ragged(case.T, case.B)
    x, hx = inputs(case)
    clean = evaluate(ours, x, hx, call=with_lengths(lengths))
    padding = (torch.arange(case.T)[:, None] >= lengths).to(DEVICE)
    spoilt = evaluate(ours, x.masked_fill(padding[..., None], math.nan), hx, call=with_lengths(lengths))
    same_bits(spoilt, clean, case)


def test_lengths_elsewhere_raise() -> None:
    _, ours = layers(Case("gru", T=6, B=4))
    with pytest.raises(ValueError, match="lengths: expected the device of the input"):
        ours(inputs(Case("gru", T=6, B=4))[0], lengths=torch.tensor([1, 2, 3, 4]))


def test_nothing_waits_for_the_device() -> None:
    """Forward and backward with lengths, without a synchronisation."""
    case = Case("lstm", T=6, B=4, H=64, num_layers=2, bidirectional=True)
    _, ours = layers(case)
    x, hx = inputs(case)
    lengths = ragged(case.T, case.B).to(DEVICE)
    y, _ = ours(x, hx, lengths=lengths)  # first calls may load code
    y.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, _ = ours(x, hx, lengths=lengths)
        y.backward(torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the same bits -----------------------------------------------------------------------------------------

BITS = [
    (name, Case(kind, T=40, B=16, I=64, H=H, bidirectional=True, dtype=dtype))
    for kind in KINDS
    for name, H in (("block", 96), ("cluster", 256), ("grid", 512), ("step", 96))
    for dtype in (torch.float32, torch.bfloat16)
]
BIT_IDS = [f"{name}-{case}" for name, case in BITS]


@pytest.mark.parametrize(("name", "case"), BITS, ids=BIT_IDS)
def test_equal_inputs_give_equal_bits(name: str, case: Case) -> None:
    _, ours = layers(case)
    x, hx = inputs(case)
    call = with_lengths(ragged(case.T, case.B))
    with tier(name):
        skip_unless_possible(ours, x, hx, name)
        first = evaluate(ours, x, hx, call=call)
        for _ in range(10):
            same_bits(evaluate(ours, x, hx, call=call), first, f"{name} {case}")


def training_step(layer: nn.Module, x: Tensor, dy: Tensor, lengths: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of every parameter."""
    y, _ = layer(x, lengths=lengths)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def draw(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, dy, lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.T, case.B, case.I, generator=generator).to(DEVICE, case.dtype)
    dy = torch.randn(case.T, case.B, case.D * case.H, generator=generator).to(DEVICE, case.dtype)
    return x, dy, torch.randint(0, case.T + 1, (case.B,), generator=generator).to(DEVICE)


@pytest.mark.parametrize(("name", "case"), BITS, ids=BIT_IDS)
def test_a_cuda_graph_replays_with_new_inputs_and_lengths(name: str, case: Case) -> None:
    _, ours = layers(case)
    with tier(name):
        x, dy, lengths = draw(case, 0)
        x.requires_grad_()
        skip_unless_possible(ours, x.detach(), None, name)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                training_step(ours, x, dy, lengths)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = training_step(ours, x, dy, lengths)
        for seed in (1, 2):
            new = draw(case, seed)
            with torch.no_grad():
                for static, values in zip((x, dy, lengths), new, strict=True):
                    static.copy_(values)
            graph.replay()
            finish("graph replay")
            expected = training_step(ours, new[0].requires_grad_(), *new[1:])
            for k, (got, right) in enumerate(zip(captured, expected, strict=True)):
                assert torch.equal(got, right), f"{name} {case}: tensor {k} of replay {seed}"


@pytest.mark.parametrize(("name", "case"), BITS, ids=BIT_IDS)
def test_the_current_stream_is_used(name: str, case: Case) -> None:
    """On a side stream whose input is late: a launch elsewhere would read the old one."""
    _, ours = layers(case)
    with tier(name):
        x, dy, lengths = draw(case, 0)
        skip_unless_possible(ours, x, None, name)
        expected = training_step(ours, x.clone().requires_grad_(), dy, lengths)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            got = training_step(ours, late.requires_grad_(), dy, lengths)
        torch.cuda.current_stream().wait_stream(stream)
        finish("side stream")
    for k, (mine, right) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(mine, right), f"{name} {case}: tensor {k}"


# ---- beside others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), BITS, ids=BIT_IDS)
def test_two_streams_run_the_same_layer(name: str, case: Case) -> None:
    """Each kernel wants many multiprocessors at once, and neither may wait for the other's for ever."""
    _, ours = layers(case)
    with tier(name):
        x, dy, lengths = draw(case, 0)
        skip_unless_possible(ours, x, None, name)
        expected = training_step(ours, x.clone().requires_grad_(), dy, lengths)
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in range(3)], []
        for _ in range(8):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(training_step(ours, x.detach().requires_grad_(), dy, lengths))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        finish(f"{name} {case} on three streams")
    for got in found:
        for k, (mine, right) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(mine, right), f"{name} {case}: tensor {k}"


HOLD = """
extern "C" __global__ void hold(long long cycles) {
  extern __shared__ char all_of_it[];
  for (long long start = clock64(); clock64() - start < cycles;) {}
}
"""


@pytest.mark.parametrize(("name", "case"), BITS, ids=BIT_IDS)
def test_beside_a_kernel_that_holds_multiprocessors(name: str, case: Case) -> None:
    """For a tenth of a second it holds three quarters of them, shared memory and all."""
    if not hasattr(torch.cuda, "_compile_kernel"):
        pytest.skip("needs torch.cuda._compile_kernel")
    properties = torch.cuda.get_device_properties(0)
    hold = torch.cuda._compile_kernel(HOLD, "hold")
    shared = properties.shared_memory_per_block_optin
    hold.set_shared_memory_config(shared)
    blocks = properties.multi_processor_count * 3 // 4
    _, ours = layers(case)
    with tier(name):
        x, dy, lengths = draw(case, 0)
        skip_unless_possible(ours, x, None, name)
        expected = training_step(ours, x.clone().requires_grad_(), dy, lengths)
        torch.cuda.synchronize()
        other = torch.cuda.Stream()
        hold(
            *((blocks, 1, 1), (64, 1, 1)),
            args=[150_000_000],
            shared_mem=shared,
            stream=other,
        )
        got = training_step(ours, x.clone().requires_grad_(), dy, lengths)
        finish(f"{name} {case} beside a persistent kernel")
        other.synchronize()
    for k, (mine, right) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(mine, right), f"{name} {case}: tensor {k}"


@pytest.mark.parametrize("kind", KINDS)
def test_beside_matrix_products(kind: str) -> None:
    case = Case(kind, T=40, B=16, I=64, H=512, dtype=torch.bfloat16)
    _, ours = layers(case)
    x, dy, lengths = draw(case, 0)
    expected = training_step(ours, x.clone().requires_grad_(), dy, lengths)
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        for _ in range(100):
            a @ a
    got = [training_step(ours, x.clone().requires_grad_(), dy, lengths) for _ in range(5)]
    finish(f"{case} beside matrix products")
    torch.cuda.synchronize()
    for results in got:
        for k, (mine, right) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(mine, right), f"{case}: tensor {k}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_is_not_the_current_one(kind: str) -> None:
    case = Case(kind, T=9, B=5, H=256, dtype=torch.bfloat16)
    _, ours = layers(case)
    x, dy, lengths = draw(case, 0)
    expected = training_step(ours, x.clone().requires_grad_(), dy, lengths)
    there = [t.to("cuda:1") for t in (x, dy, lengths)]
    got = training_step(copy.deepcopy(ours).to("cuda:1"), there[0].requires_grad_(), *there[1:])
    assert torch.cuda.current_device() == 0
    for k, (mine, right) in enumerate(zip(got, expected, strict=True)):
        assert mine.device.index == 1 and torch.equal(mine.cpu(), right.cpu()), f"{case}: tensor {k}"


def test_distributed_data_parallel_with_one_process() -> None:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    case = Case("lstm", T=9, B=5, H=256, num_layers=2, dtype=torch.float32)
    _, ours = layers(case)
    x, dy, lengths = draw(case, 0)
    expected = training_step(ours, x.clone().requires_grad_(), dy, lengths)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours, device_ids=[0])
        y, _ = wrapped(x, lengths=lengths)
        y.backward(dy)
    finally:
        distributed.destroy_process_group()
    for weight, right in zip(ours.parameters(), expected[2:], strict=True):
        assert torch.equal(weight.grad, right)


# ---- torch's other machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
def test_compile(kind: str, how: str) -> None:
    case = Case(kind, T=9, B=5, H=64, num_layers=2, bidirectional=True)
    _, ours = layers(case)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(ours, backend=how, fullgraph=True)
        for seed, T, B in ((0, 9, 5), (1, 7, 3)):
            x, dy, lengths = draw(replace(case, T=T, B=B), seed)
            got = training_step(compiled, x.clone().requires_grad_(), dy, lengths)
            expected = training_step(ours, x.clone().requires_grad_(), dy, lengths)
            for mine, right in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, right)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("given", [torch.float32, torch.float16], ids=SHORT.get)
def test_autocast_gives_the_dtypes_of_torch(kind: str, low: torch.dtype, given: torch.dtype) -> None:
    """Layers and cells run wholly in autocast's dtype."""
    case = Case(kind, T=4, B=3, hx=False)
    theirs, ours = layers(case)
    x = inputs(case)[0].to(given)
    pairs = [(theirs, ours, x)]
    cell = TORCH_CELL[kind](case.I, case.H, device=DEVICE)
    our_cell = OUR_CELL[kind](case.I, case.H, device=DEVICE)
    our_cell.load_state_dict(cell.state_dict())
    pairs.append((cell, our_cell, x[0]))
    for their_layer, our_layer_, input in pairs:
        with torch.autocast(DEVICE, dtype=low):
            expected, got = flat(their_layer(input)), flat(our_layer_(input))
        assert [t.dtype for t in got] == [t.dtype for t in expected]
        for mine, right in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=0.05, atol=0.02)


def test_a_free_choice_takes_these_kernels() -> None:
    x = torch.randn(3, 2, 5, device=DEVICE)
    for kind in KINDS:
        chosen = _backend.choose(kind, "cuda", x.dtype, no_cuda=_backend.why_no_cuda(x))
        assert chosen == "cuda", _backend.why_no_cuda(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, B", [(1, 0), (3, 0), (1, 1)])
def test_few_or_no_rows(kind: str, T: int, B: int) -> None:
    _, ours = layers(Case(kind))
    x = torch.randn(T, B, 17, device=DEVICE, requires_grad=True)
    y, _ = ours(x)
    grads = torch.autograd.grad(y.sum(), [x, *ours.parameters()])
    assert y.shape == (T, B, 15) and all(grad.isfinite().all() for grad in grads)


def test_the_facts_are_the_device_s() -> None:
    facts, device = facts_of(0), torch.cuda.get_device_properties(0)
    assert facts.capability == 10 * device.major + device.minor
    assert facts.sms == device.multi_processor_count
    assert facts.shared_bytes == device.shared_memory_per_block_optin
    assert facts.max_cluster >= 8 if device.major >= 9 else facts.max_cluster == 1
