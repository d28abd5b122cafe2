"""A seqkern layer is torch.nn's layer to every tool that meets one."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from cases import KINDS, OUR_CELL, OURS, TORCH, TORCH_CELL, Case, our_layer
from compare import evaluate, flat, same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import seqkern

OPTIONS = dict(num_layers=2, bidirectional=True, batch_first=True)
CLASSES = [(OURS[kind], TORCH[kind]) for kind in KINDS] + [
    (OUR_CELL[kind], TORCH_CELL[kind]) for kind in KINDS
]
each_class = pytest.mark.parametrize(("ours", "theirs"), CLASSES, ids=[ours.__name__ for ours, _ in CLASSES])
each_kind = pytest.mark.parametrize("kind", KINDS)


def is_cell(cls: type) -> bool:
    return issubclass(cls, nn.RNNCellBase)


def constructions(cls: type) -> list[dict]:
    """Every combination of the class's options, as keywords."""
    choices = {"bias": (True, False), "dtype": (None, torch.float64, torch.bfloat16)}
    if issubclass(cls, (nn.RNN, nn.RNNCell)):
        choices["nonlinearity"] = ("tanh", "relu")
    if issubclass(cls, nn.LSTM):
        choices["proj_size"] = (0, 2)
    if not is_cell(cls):
        choices |= dict(
            num_layers=(1, 3), batch_first=(False, True), bidirectional=(False, True), dropout=(0.0, 0.5)
        )
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@each_class
def test_is_one(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    assert isinstance(ours(3, 4), theirs)
    assert ours.__name__ == theirs.__name__
    assert getattr(seqkern, ours.__name__) is ours
    assert getattr(seqkern.nn, ours.__name__) is ours


@each_class
def test_construction(ours: type, theirs: type) -> None:
    """The same parameters bit for bit from one seed, the same names and order, repr and attributes."""
    for options in constructions(theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dropout with one layer
            layers = []
            for cls in (theirs, ours):
                torch.manual_seed(3)
                layers.append(cls(5, 7, **options))
                layers.append(torch.rand(1).item())  # the generator was moved on alike
        (its, its_next, mine, my_next) = layers
        assert my_next == its_next
        assert list(mine.state_dict()) == list(its.state_dict()), options
        for (name, weight), (name_, weight_) in zip(
            mine.named_parameters(), its.named_parameters(), strict=True
        ):
            assert name == name_ and weight.dtype == weight_.dtype and torch.equal(weight, weight_), name
        assert repr(mine) == repr(its)
        for name in (*options, "input_size", "hidden_size"):
            assert name == "dtype" or getattr(mine, name) == getattr(its, name), name


@each_class
def test_positional_arguments(ours: type, theirs: type) -> None:
    options = {
        "RNN": (5, 7, 2, "relu", False, True, 0.5, True),
        "LSTM": (5, 7, 2, False, True, 0.5, True, 3),
        "GRU": (5, 7, 2, False, True, 0.5, True),
        "RNNCell": (5, 7, False, "relu"),
        "LSTMCell": (5, 7, False),
        "GRUCell": (5, 7, False),
    }[theirs.__name__]
    assert repr(ours(*options)) == repr(theirs(*options))
    assert list(ours(*options).state_dict()) == list(theirs(*options).state_dict())


@each_kind
def test_dropout_with_one_layer_warns(kind: str) -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        OURS[kind](3, 4, dropout=0.5)


@each_class
def test_state_dict_both_ways(ours: type, theirs: type) -> None:
    mine, its = ours(5, 7), theirs(5, 7)
    its.load_state_dict(mine.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), its.parameters(), strict=True))
    fresh = ours(5, 7)
    fresh.load_state_dict(its.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), mine.parameters(), strict=True))
    assert mine.state_dict()._metadata == its.state_dict()._metadata


@each_kind
def test_load_by_assignment_and_strictness(kind: str, backend: str) -> None:
    its = TORCH[kind](5, 7, **OPTIONS)
    mine = OURS[kind](5, 7, **OPTIONS)
    mine.load_state_dict(its.state_dict(), assign=True)
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(mine(x)[0], its(x)[0], rtol=1e-5, atol=1e-6)
    for change in ({"extra": torch.zeros(1)}, {"weight_ih_l0": None}):
        state = {k: v for k, v in (its.state_dict() | change).items() if v is not None}
        with pytest.raises(RuntimeError, match=next(iter(change))):
            mine.load_state_dict(state)
        mine.load_state_dict(state, strict=False)


def same_layer(copied: nn.Module, layer: nn.Module, case: Case) -> None:
    """The copy computes the same bits from its own memory, and shares nothing that is written to."""
    x, hx = case.inputs()
    expected = evaluate(layer, x, hx)
    same_bits(evaluate(copied, x, hx), expected, case)
    with torch.no_grad():
        copied.weight_ih_l0.add_(1.0)
    assert not torch.equal(copied(x, hx)[0], expected["y"]), "a weight written to was not read again"
    same_bits(evaluate(layer, x, hx), expected, case)


@each_kind
def test_pickle(kind: str, backend: str) -> None:
    case = Case(kind, **OPTIONS)
    layer = our_layer(case.torch_layer())
    layer(*case.inputs())  # whatever a call leaves behind must not be in the way
    loaded = pickle.loads(pickle.dumps(layer))
    assert type(loaded) is OURS[kind]
    same_layer(loaded, layer, case)


@each_kind
def test_save_and_load(kind: str, backend: str) -> None:
    case = Case(kind, **OPTIONS)
    layer = our_layer(case.torch_layer())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    same_layer(torch.load(file, weights_only=False), layer, case)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = OURS[kind](case.I, case.H, **case.options())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    same_layer(fresh, layer, case)


@each_kind
def test_copies(kind: str, backend: str) -> None:
    case = Case(kind, **OPTIONS)
    layer = our_layer(case.torch_layer())
    layer(*case.inputs())
    same_layer(copy.deepcopy(layer), layer, case)
    shallow = copy.copy(layer)
    assert shallow.weight_ih_l0 is layer.weight_ih_l0
    same_bits(evaluate(shallow, *case.inputs()), evaluate(layer, *case.inputs()), case)


@each_class
def test_cells_and_layers_pickle_by_their_public_name(ours: type, theirs: type) -> None:
    for copied in (pickle.loads(pickle.dumps(ours(3, 4))), copy.deepcopy(ours(3, 4))):
        assert type(copied) is ours
    assert pickle.loads(pickle.dumps(ours)) is ours


def write_data(weight: torch.Tensor) -> None:
    weight.data.mul_(0.5)


def write_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[...] *= 0.5


def write_no_grad(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.mul_(0.5)


def set_data(weight: torch.Tensor) -> None:
    weight.data = weight.data * 0.5


@pytest.mark.parametrize("write", [write_data, write_numpy, write_no_grad, set_data])
@each_kind
def test_weights_are_read_at_every_call(kind: str, write, backend: str) -> None:
    """A write that bumps no version counter is seen, too, in single steps without grad as well."""
    for T in (1, 4):
        case = Case(kind, T=T, B=1, num_layers=2, mode="eval")
        layer = case.torch_layer()
        mine = our_layer(layer)
        x, hx = case.inputs()
        with torch.no_grad():
            before = mine(x, hx)[0].clone()
            mine(x, hx)
            for weight, weight_ in zip(mine.parameters(), layer.parameters(), strict=True):
                write(weight)
                write(weight_)
                after = mine(x, hx)[0]
                torch.testing.assert_close(after, layer(x, hx)[0], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(before, after)


@each_kind
def test_replaced_parameters(kind: str, backend: str) -> None:
    case = Case(kind, **OPTIONS)
    layer = case.torch_layer()
    mine = our_layer(layer)
    mine(*case.inputs())
    for module in (layer, mine):
        torch.manual_seed(0)
        module.weight_hh_l1_reverse = nn.Parameter(0.2 * torch.randn_like(module.weight_hh_l1_reverse))
    torch.testing.assert_close(mine(*case.inputs())[0], layer(*case.inputs())[0], rtol=1e-5, atol=1e-6)


@each_kind
def test_dtype_conversions(kind: str, backend: str) -> None:
    case = Case(kind, **OPTIONS)
    layer = case.torch_layer()
    for convert, dtype in (
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.float(), torch.float32),
    ):
        layer = convert(layer)
        mine = convert(our_layer(layer))
        assert all(weight.dtype is dtype for weight in mine.parameters())
        x, hx = case.inputs()
        hx = tuple(h.to(dtype) for h in hx) if kind == "lstm" else hx.to(dtype)
        outputs, outputs_ = flat(mine(x.to(dtype), hx)), flat(layer(x.to(dtype), hx))
        for y, y_ in zip(outputs, outputs_, strict=True):
            assert y.dtype is dtype
            tolerance = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(y, y_, rtol=tolerance, atol=tolerance)


@each_kind
def test_flatten_parameters(kind: str, backend: str) -> None:
    case = Case(kind, **OPTIONS)
    layer = our_layer(case.torch_layer())
    expected = evaluate(layer, *case.inputs())
    assert layer.flatten_parameters() is None
    same_bits(evaluate(layer, *case.inputs()), expected, case)
    assert [len(group) for group in layer.all_weights] == [
        len(group) for group in case.torch_layer().all_weights
    ]
    layer.reset_parameters()
    assert not torch.equal(layer(*case.inputs())[0], expected["y"])


@each_kind
def test_share_memory(kind: str, backend: str) -> None:
    case = Case(kind, **OPTIONS)
    layer = our_layer(case.torch_layer())
    expected = evaluate(layer, *case.inputs())
    layer.share_memory()
    assert all(weight.is_shared() for weight in layer.parameters())
    same_bits(evaluate(layer, *case.inputs()), expected, case)


@each_kind
def test_functional_call(kind: str, backend: str) -> None:
    """Other weights for one call; the layer's own before and after; gradients reach the given ones."""
    case = Case(kind, **OPTIONS)
    layer = our_layer(case.torch_layer())
    other = Case(kind, **OPTIONS, seed=1).torch_layer()
    x, hx = case.inputs()
    before = layer(x, hx)[0]
    given = {name: weight.detach().clone().requires_grad_() for name, weight in other.named_parameters()}
    y = torch.func.functional_call(layer, given, (x, hx))[0]
    torch.testing.assert_close(y, other(x, hx)[0], rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    other(x, hx)[0].square().sum().backward()
    for name, weight in other.named_parameters():
        torch.testing.assert_close(given[name].grad, weight.grad, rtol=1e-4, atol=1e-5)
    assert all(weight.grad is None for weight in layer.parameters())
    assert torch.equal(layer(x, hx)[0], before)


def orthogonal(module: nn.Module, name: str) -> None:
    parametrizations.orthogonal(module, name)


def weight_norm(module: nn.Module, name: str) -> None:
    parametrizations.weight_norm(module, name)


def spectral_norm(module: nn.Module, name: str) -> None:
    parametrizations.spectral_norm(module, name)


@pytest.mark.parametrize("register", [orthogonal, weight_norm, spectral_norm])
@each_kind
def test_parametrize(kind: str, register, backend: str) -> None:
    """A parametrized weight is what the layer computes with; its originals get the gradients."""
    case = Case(kind, **OPTIONS, mode="eval")
    layer = case.torch_layer()
    mine = our_layer(layer)
    name = "weight_hh_l0"
    for module in (layer, mine):
        torch.manual_seed(0)
        register(module, name)
    assert parametrize.is_parametrized(mine, name)
    mine.load_state_dict(layer.state_dict())
    x, hx = case.inputs()
    runs = []
    for module in (layer.eval(), mine.eval()):
        y = module(x, hx)[0]
        y.square().sum().backward()
        runs.append([y, *(weight.grad for weight in module.parameters())])
    assert all(grad is not None for grad in runs[1])
    for its, my in zip(*runs, strict=True):
        torch.testing.assert_close(my, its, rtol=1e-4, atol=1e-5)


@each_kind
def test_old_weight_norm_and_pruning(kind: str, backend: str) -> None:
    for change in (
        lambda m: torch.nn.utils.weight_norm(m, "weight_hh_l0"),
        lambda m: prune.l1_unstructured(m, "weight_ih_l0", amount=0.5),
    ):
        case = Case(kind, **OPTIONS)
        layer = case.torch_layer()
        mine = our_layer(layer)
        runs = []
        for module in (layer, mine):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                change(module)
            module(*case.inputs())[0].square().sum().backward()
            y = module(*case.inputs())[0]
            runs.append([y, *(weight.grad for weight in module.parameters())])
        for its, my in zip(*runs, strict=True):
            torch.testing.assert_close(my, its, rtol=1e-4, atol=1e-5)


@each_kind
def test_training_steps(kind: str, backend: str) -> None:
    """Ten steps of Adam from equal weights stay together: what a user sees of parity."""
    case = Case(kind, T=9, B=8, I=6, H=12, num_layers=2)
    layer = case.torch_layer()
    x, hx = case.inputs()
    target = torch.randn(9, 8, 12)
    losses = []
    for module in (layer, our_layer(layer)):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        trace = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = (module(x, hx)[0] - target).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@each_class
def test_hooks(ours: type, theirs: type, backend: str) -> None:
    layer = ours(5, 7)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, out: seen.append("after"))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    layer.weight_hh_l0.register_hook(lambda grad: seen.append("weight")) if not is_cell(
        ours
    ) else layer.weight_hh.register_hook(lambda grad: seen.append("weight"))
    x = torch.randn(2, 5, requires_grad=True)
    flat(layer(x))[0].sum().backward()
    assert sorted(seen) == ["after", "backward", "before", "weight"]


@each_class
def test_other_tools(ours: type, theirs: type, backend: str) -> None:
    """skip_init (which takes no torch.nn.RNN, LSTM or GRU either), to_empty, apply, a container's names."""
    layer = torch.nn.utils.skip_init(ours, 5, 7) if is_cell(ours) else ours(5, 7)
    assert type(layer) is ours
    layer.reset_parameters()
    on_meta = ours(5, 7, device="meta")
    on_meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    x = torch.randn(2, 5)
    assert torch.equal(flat(on_meta(x))[0], flat(layer(x))[0])
    visited = []
    container = nn.ModuleDict({"layer": layer})
    container.apply(lambda module: visited.append(type(module)))
    assert visited == [ours, nn.ModuleDict]
    assert list(container.state_dict()) == [f"layer.{name}" for name in theirs(5, 7).state_dict()]


def test_quantities_of_parameters() -> None:
    """Nothing beside torch.nn's parameters: no buffers, no hidden copies that a checkpoint would carry."""
    for ours, theirs in CLASSES:
        mine, its = ours(5, 7), theirs(5, 7)
        assert not list(mine.buffers())
        assert sum(w.numel() for w in mine.parameters()) == sum(w.numel() for w in its.parameters())
        assert set(vars(mine)) - set(vars(its)) == set()


@each_kind
def test_the_automatic_choice(kind: str) -> None:
    """With no backend named the layer picks one, and obeys the rule's sense: torch.nn's numbers."""
    case = Case(kind, **OPTIONS, T=9, B=5, H=33)
    layer = case.torch_layer()
    expected, got = evaluate(layer, *case.inputs()), evaluate(our_layer(layer), *case.inputs())
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
