"""Any number of OpenMP threads, every instruction set, DataLoader workers, several Python threads."""

import multiprocessing
import threading

import pytest
import torch
from cases import DTYPES, KINDS, Case, our_layer
from compare import Results, agree, check_parity, evaluate, packed_call, same_bits
from conftest import instruction_sets
from test_cells import cell_inputs, our_cell, torch_cell
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import seqkern
from seqkern import _extension

LENGTHS = torch.tensor([9, 1, 0, 4, 9, 7, 2])
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def some_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Case]:
    """Single rows and batches, single steps and sequences, sizes on both sides of a vector's width."""
    cases = []
    for kind in KINDS:
        for dtype in dtypes:
            cases.append(Case(kind, T=9, B=7, I=17, H=33, num_layers=2, bidirectional=True, dtype=dtype))
            cases.append(Case(kind, T=5, B=1, I=33, H=65, dtype=dtype))
            cases.append(Case(kind, T=1, B=2, I=16, H=16, bias=False, dtype=dtype))
    cases.append(Case("lstm", T=9, B=7, I=17, H=33, proj_size=15, bidirectional=True))
    cases.append(Case("rnn", T=9, B=7, I=17, H=33, nonlinearity="relu"))
    cases.append(Case("gru", T=3, B=70, I=65, H=129))
    return cases


@pytest.mark.parametrize("case", some_cases(), ids=str)
def test_one_thread_and_two(case: Case, backend: str, threads: None) -> None:
    """Each number of threads gives its bits again at every call, and the other's numbers."""
    layer = our_layer(case.torch_layer())
    runs: dict[int, Results] = {}
    for n in (1, 2, 1, 2, 3):
        torch.set_num_threads(n)
        results = evaluate(layer, *case.inputs())
        if n in runs:
            same_bits(results, runs[n], f"{case} on {n} threads, again")
        runs[n] = results
    agree(runs[2], runs[1], TOLERANCE[case.dtype], f"{case} on 2 threads against 1")
    agree(runs[3], runs[1], TOLERANCE[case.dtype], f"{case} on 3 threads against 1")


each_set = pytest.mark.parametrize("instruction_set", instruction_sets(), indirect=True)


@each_set
@pytest.mark.parametrize("case", some_cases(), ids=str)
def test_every_instruction_set(case: Case, instruction_set: str) -> None:
    layer = case.torch_layer()
    check_parity(layer, our_layer(layer), *case.inputs(), f"{case} on {instruction_set}")


@each_set
@pytest.mark.parametrize("case", [case for case in some_cases() if case.B == 7], ids=str)
def test_every_instruction_set_with_lengths(case: Case, instruction_set: str) -> None:
    layer = case.torch_layer()
    call, their_call = (lambda layer, x, hx: layer(x, hx, lengths=LENGTHS)), packed_call(LENGTHS)
    label = f"{case} lengths on {instruction_set}"
    check_parity(layer, our_layer(layer), *case.inputs(), label, call, their_call)


@each_set
@pytest.mark.parametrize(
    "case", [Case(kind, T=1, B=B, H=H) for kind in KINDS for B, H in ((1, 33), (9, 16))], ids=str
)
def test_every_instruction_set_in_cells(case: Case, instruction_set: str) -> None:
    cell = torch_cell(case)
    check_parity(cell, our_cell(cell), *cell_inputs(case), f"{case} cell on {instruction_set}")


def sweep() -> Tensor:
    """Every float32 exponent, subnormal ones too, both signs and zeros; dense where tanh and sigmoid bend."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    mantissas = 1 + torch.arange(8, dtype=torch.float64) / 8
    everywhere = (torch.exp2(exponents)[:, None] * mantissas).flatten()
    bends = torch.cat(
        [torch.linspace(0, 2, 8191), torch.linspace(2, 20, 4095), torch.linspace(80, 105, 2047)]
    )
    positive = torch.cat([torch.zeros(1), everywhere.float(), bends])
    return torch.cat([positive, -positive])


def ulps_off(got: Tensor, exact: Tensor) -> Tensor:
    """|got - exact| in units of the spacing of float32 at `exact` (subnormal spacing below 2^-126)."""
    exponent = torch.frexp(exact).exponent - 1
    spacing = torch.exp2(exponent.clamp_min(-126).double() - 23)
    return (got.double() - exact).abs() / spacing


@each_set
@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid], ids=["tanh", "sigmoid"])
def test_activations_within_two_ulp(function, instruction_set: str) -> None:
    """Read off layers with weights 0 and 1: h = tanh(x) of an RNN, c = sigmoid(x) tanh(40) of an LSTM."""
    x = sweep()
    with torch.no_grad():
        if function is torch.tanh:
            layer = seqkern.RNN(1, 1, bias=False)
            layer.weight_ih_l0.fill_(1)
            got = layer(x.view(1, -1, 1))[1].flatten()
        else:
            layer = seqkern.LSTM(1, 1)
            for weight in layer.parameters():
                weight.zero_()
            layer.weight_ih_l0[0] = 1
            layer.bias_ih_l0[2] = 40
            got = layer(x.view(1, -1, 1))[1][1].flatten()
    off = ulps_off(got, function(x.double()))
    worst = int(off.nan_to_num(nan=float("inf")).argmax())
    assert off[worst] <= 2, (
        f"{function.__name__}({x[worst]:.9g}) = {got[worst]:.9g}, {off[worst]:.2f} ulp off"
    )


@each_set
def test_activations_at_infinity(instruction_set: str) -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan")]).view(1, 3, 1)
    with torch.no_grad():
        for kind in KINDS:
            layer, reference = our_layer(torch_of_ones(kind)), torch_of_ones(kind).double()
            got, expected = layer(x)[0], reference(x.double())[0]
            assert torch.equal(got.isnan(), expected.isnan()), (
                f"{kind}: {got.flatten()}, {expected.flatten()}"
            )
            torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0, equal_nan=True)


def torch_of_ones(kind: str):
    """One unit whose every gate sees x itself."""
    layer = Case(kind, I=1, H=1, bias=False).torch_layer()
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
        layer.weight_hh_l0.zero_()
    return layer


def test_instruction_set_names(cpu_backend: str) -> None:
    names = instruction_sets()
    assert _extension._C.instruction_set() in names
    with pytest.raises(ValueError, match="sse9"):
        _extension._C.set_instruction_set("sse9")
    assert _extension._C.instruction_set() in names


class Encoded(Dataset):
    """Items that a seqkern layer computes inside a DataLoader's worker, gradient included."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        self.layer = our_layer(case.torch_layer())

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(index)
        x = torch.randn(5, 4, self.case.I, requires_grad=True)
        with seqkern.use_backend(self.backend):
            y = self.layer(x, lengths=torch.tensor([5, 0, 3, 1]))[0]
            (dx,) = torch.autograd.grad(y.square().sum(), x)
        return y.detach(), dx


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("kind", KINDS)
def test_dataloader_workers(kind: str, start: str, backend: str) -> None:
    """Forked after this process has run layers on its own threads, which the child does not inherit."""
    dataset = Encoded(Case(kind, H=33, num_layers=2, bidirectional=True), backend)
    expected = [dataset[i] for i in range(len(dataset))]
    context = multiprocessing.get_context(start)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context, timeout=120)
    got = list(loader)
    assert len(got) == len(expected)
    for mine, its in zip(got, expected, strict=True):
        for tensor, tensor_ in zip(mine, its, strict=True):
            torch.testing.assert_close(tensor, tensor_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["one layer", "own layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_python_threads(kind: str, shared: bool, backend: str) -> None:
    """Calls at once from several threads, forward and backward: each gets what it gets alone."""
    cases = [Case(kind, T=9, B=5, H=33, num_layers=2, bidirectional=True, seed=seed) for seed in range(4)]
    layers = [our_layer(case.torch_layer()) for case in cases]
    if shared:
        layers = [layers[0]] * 4
    expected = [evaluate(layer, *case.inputs()) for layer, case in zip(layers, cases, strict=True)]
    failures: list[str] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            start.wait(timeout=60)
            for _ in range(5):
                with seqkern.use_backend(backend):
                    same_bits(evaluate(layers[i], *cases[i].inputs()), expected[i], f"{cases[i]} thread {i}")
        except Exception as error:  # carried to the main thread, where it fails the test
            failures.append(repr(error))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_in_another_thread(kind: str, backend: str) -> None:
    """The graph keeps its backend: autograd runs it where nobody asked for one."""
    case = Case(kind, H=33, num_layers=2)
    layer = our_layer(case.torch_layer())
    expected = evaluate(layer, *case.inputs())["d weight_hh_l1"]
    y = layer(*case.inputs())[0]
    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y.sum(), layer.weight_hh_l1)))
    worker.start()
    worker.join(timeout=60)
    (reference,) = torch.autograd.grad(layer(*case.inputs())[0].sum(), layer.weight_hh_l1)
    assert torch.equal(found[0], reference)
    assert found[0].shape == expected.shape


def test_backend_choice_is_the_threads_own() -> None:
    """use_backend in one thread says nothing about another."""
    from seqkern.ops import _backend

    seen: list[str | None] = []
    with seqkern.use_backend("eager"):
        worker = threading.Thread(target=lambda: seen.append(_backend.current_wish()))
        worker.start()
        worker.join(timeout=60)
        assert _backend.current_wish() == "eager"
    assert seen == [None]
    assert _backend.current_wish() is None
