"""RNNCell, LSTMCell and GRUCell against torch.nn's."""

import pytest
import torch
from cases import BATCHES, DTYPES, KINDS, OUR_CELL, SIZES, TORCH_CELL, Case, State, legal, pairwise, unique
from compare import check_parity, evaluate, flat, within
from torch import Tensor, nn


def torch_cell(case: Case) -> nn.RNNCellBase:
    """torch.nn's cell with the weights of the case's first layer."""
    options = {"nonlinearity": case.nonlinearity} if case.kind == "rnn" else {}
    cell = TORCH_CELL[case.kind](case.I, case.H, bias=case.bias, dtype=case.dtype, **options)
    weights = case.torch_layer().state_dict()
    cell.load_state_dict({name: weights[f"{name}_l0"] for name in cell.state_dict()})
    return cell


def our_cell(cell: nn.RNNCellBase) -> nn.RNNCellBase:
    kind = next(kind for kind in KINDS if type(cell) is TORCH_CELL[kind])
    options = {"nonlinearity": cell.nonlinearity} if kind == "rnn" else {}
    twin = OUR_CELL[kind](
        cell.input_size, cell.hidden_size, bias=cell.bias, dtype=cell.weight_ih.dtype, **options
    )
    twin.load_state_dict(cell.state_dict())
    return twin


def cell_inputs(case: Case) -> tuple[Tensor, State | None]:
    """x: [B, I] or [I]; states [B, H] or [H]."""
    x, hx = case.inputs()
    x = x[0]
    if hx is None:
        return x, None
    h0, *c0 = (state[0] for state in flat(hx))
    return x, (h0, *c0) if c0 else h0


def cell_cases(kind: str, slow: bool = False) -> list[Case]:
    options = dict(bias=(True, False), hx=(True, False), batched=(True, False), dtype=DTYPES)
    if kind == "rnn":
        options["nonlinearity"] = ("tanh", "relu")
    rows = pairwise(options | dict(T=(1,), B=BATCHES, I=SIZES, H=SIZES))
    if slow:
        rows = [
            row | dict(T=1, B=B, I=I, H=H)
            for row in pairwise(options)
            for B in (1, 5, 8, 33)
            for I in SIZES  # noqa: E741
            for H in SIZES
        ]
    return unique(legal(Case(kind, **row)) for row in rows)


@pytest.mark.parametrize("case", [case for kind in KINDS for case in cell_cases(kind)], ids=str)
def test_parity(case: Case, backend: str) -> None:
    cell = torch_cell(case)
    check_parity(cell, our_cell(cell), *cell_inputs(case), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for kind in KINDS for case in cell_cases(kind, slow=True)], ids=str)
def test_parity_full_cross(case: Case, backend: str) -> None:
    cell = torch_cell(case)
    check_parity(cell, our_cell(cell), *cell_inputs(case), case)


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: str, backend: str) -> None:
    """Columns of a wider tensor, transposed memory, one row for all."""
    case = Case(kind, B=5, I=17, H=33)
    cell = torch_cell(case)
    x, hx = cell_inputs(case)
    sliced = torch.cat([x, x, x], dim=1)[:, 17:34]
    transposed = x.t().contiguous().t()
    states = [torch.cat([state, state], dim=1)[:, 33:] for state in flat(hx)]
    expanded = [state[:1].expand(5, 33) for state in flat(hx)]
    for what, x_, states_ in (
        ("sliced", sliced, states),
        ("transposed", transposed, [state.t().contiguous().t() for state in states]),
        ("expanded", x[:1].expand(5, 17), expanded),
    ):
        hx_ = tuple(states_) if kind == "lstm" else states_[0]
        check_parity(cell, our_cell(cell), x_, hx_, f"{case} {what}")


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str, backend: str) -> None:
    cell = torch_cell(Case(kind, I=3, H=5))
    x = torch.zeros(0, 3)
    hx = (torch.zeros(0, 5), torch.zeros(0, 5)) if kind == "lstm" else torch.zeros(0, 5)
    got = check_parity(cell, our_cell(cell), x, hx, f"{kind} B0")
    assert (got["d weight_hh"] == 0).all()
    for a, b in zip(flat(our_cell(cell)(x)), flat(cell(x)), strict=True):
        assert a.shape == b.shape == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_make_a_layer(kind: str, backend: str) -> None:
    """A cell in a loop gives what the layer gives: outputs and gradients."""
    case = Case(kind, T=6, B=3, I=10, H=20)
    layer, cell = case.torch_layer(), torch_cell(case)
    x, hx = case.inputs()

    def loop(cell: nn.RNNCellBase, x: Tensor, hx: State) -> tuple[Tensor, ...]:
        state = tuple(s[0] for s in flat(hx)) if kind == "lstm" else hx[0]
        outputs = []
        for x_t in x:
            state = cell(x_t, state)
            outputs.append(flat(state)[0])
        return (torch.stack(outputs), *(s[None] for s in flat(state)))

    def results(module: nn.Module, call=None) -> dict[str, Tensor]:
        dtype = next(module.parameters()).dtype
        states = tuple(state.to(dtype) for state in flat(hx))
        found = evaluate(module, x.to(dtype), states if kind == "lstm" else states[0], 1, call)
        return {name.removesuffix("_l0"): tensor for name, tensor in found.items()}

    got, peer = results(our_cell(cell), loop), results(layer)
    within(got, peer, results(layer.double()), case)


@pytest.mark.parametrize("subset", ["x", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_requires_grad_subsets(kind: str, subset: str, backend: str) -> None:
    case = Case(kind, B=4, I=17, H=15)
    runs = []
    for make in (lambda cell: cell, our_cell):
        cell = make(torch_cell(case)).requires_grad_(False)
        x, hx = cell_inputs(case)
        wanted = {"x": [x], "hx": flat(hx)}.get(subset) or [
            w for name, w in cell.named_parameters() if name == subset
        ]
        for tensor in wanted:
            tensor.requires_grad_()
        outputs = flat(cell(x, hx))
        assert all(y.requires_grad == bool(wanted) for y in outputs)
        if wanted:
            sum(y.square().sum() for y in outputs).backward()
        runs.append([tensor.grad for tensor in wanted])
        idle = [t for t in (x, *flat(hx), *cell.parameters()) if not any(t is w for w in wanted)]
        assert all(t.grad is None for t in idle)
    for expected, got in zip(*runs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
