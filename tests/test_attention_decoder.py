"""The decoder with attention, fused and step by step, beside the papers' equations on torch.nn's cells."""

import math
from dataclasses import dataclass

import pytest
import torch
from attention_cases import errors_nearby_named, evaluate_named, normal, valid_places
from cases import SHORT, pairwise, unique
from compare import ORACLES_AGREE, agree, poisoned, same_bits, within
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import seqkern
from seqkern import AttentionDecoder, DecoderState, DotProductAttention, _extension, ops

INSTRUCTION_SETS = _extension._C.instruction_sets() if _extension.AVAILABLE else []


@dataclass(frozen=True)
class Case:
    cell: str = "lstm"
    feeding: str = "bahdanau"
    attention: str | None = None
    T: int = 4
    B: int = 3
    S: int = 7
    I: int = 5  # noqa: E741
    H: int = 6
    K: int = 4
    D: int = 3
    A: int = 9
    bias: bool = True
    keys: str = "lengths"
    state: bool = True
    reach: float = 1.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.cell, self.feeding, self.attention or "default"]
        words += [f"{name}{getattr(self, name)}" for name in "TBSIHKDA"] + [f"keys.{self.keys}"]
        words += ["nobias"] * (not self.bias) + ["state"] * self.state
        return "-".join([*words, *[f"reach{self.reach}"] * (self.reach != 1), SHORT[self.dtype]])

    @property
    def kind(self) -> str:
        return self.attention or ("additive" if self.feeding == "bahdanau" else "general")

    def module(self) -> AttentionDecoder:
        torch.manual_seed(4)
        attention_dim = self.A if self.kind in ("additive", "concat") else None
        return AttentionDecoder(
            *(self.I, self.H, self.K, self.D, self.cell, self.feeding, self.attention, attention_dim),
            bias=self.bias,
            dtype=self.dtype,
        )

    def valid(self) -> Tensor:
        return valid_places(self.keys, self.B, self.S, torch.Generator().manual_seed(6))

    def padding(self) -> dict[str, Tensor]:
        if self.keys == "all":
            return {}
        return (
            {"lengths": self.valid().sum(1)}
            if self.keys == "lengths"
            else {"key_padding_mask": ~self.valid()}
        )

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        shapes = dict(
            input=(self.T, self.B, self.I), keys=(self.B, self.S, self.K), values=(self.B, self.S, self.D)
        )
        if self.state:
            shapes["h0"] = (self.B, self.H)
            shapes |= {"c0": (self.B, self.H)} if self.cell == "lstm" else {}
            shapes |= {"fed0": (self.B, self.H)} if self.feeding == "luong" else {}
        found = {name: normal(shape, generator, self.dtype) for name, shape in shapes.items()}
        found["keys"] = found["keys"] * self.reach
        return found | {name: p.detach() for name, p in self.module().named_parameters()}


INPUTS = ("input", "keys", "values", "h0", "c0", "fed0")


def split(leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {n: t for n, t in leaves.items() if n in INPUTS}, {
        n: t for n, t in leaves.items() if n not in INPUTS
    }


def state_of(inputs: dict[str, Tensor]) -> DecoderState | None:
    return DecoderState(inputs["h0"], inputs.get("c0"), inputs.get("fed0")) if "h0" in inputs else None


def results(output: Tensor, state: DecoderState, context: Tensor, weights: Tensor) -> dict[str, Tensor]:
    found = dict(output=output, context=context, weights=weights, h_n=state.hidden)
    return found | ({} if state.cell is None else {"c_n": state.cell})


def ours(case: Case, method: str = "forward"):
    def call(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs, parameters = split(leaves)
        module = case.module().to(inputs["input"].dtype)

        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module

            def forward(self) -> dict[str, Tensor]:
                x, keys, values, state = inputs["input"], inputs["keys"], inputs["values"], state_of(inputs)
                if method == "forward":
                    return results(*module(x, keys, state, values, **case.padding()))
                projected = module.project_keys(keys, values, **case.padding())
                steps = []
                for x_t in x:
                    output, state, context, weights = module.step(x_t, projected, state)
                    steps.append((output, context, weights))
                outputs, contexts, all_weights = zip(*steps, strict=True)
                return results(
                    torch.stack(outputs), state, torch.stack(contexts), torch.stack(all_weights, 1)
                )

        return torch.func.functional_call(Holder(), {f"inner.{n}": p for n, p in parameters.items()}, ())

    return call


def literal(case: Case):
    """The papers' equations, a step at a time, with torch.nn's cell."""

    def call(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs, p = split(leaves)
        x, keys, values = inputs["input"], inputs["keys"], inputs["values"]
        zeros = x.new_zeros((case.B, case.H))
        h, c, fed = (inputs.get(name, zeros) for name in ("h0", "c0", "fed0"))
        width = case.D if case.feeding == "bahdanau" else case.H
        cell = (nn.LSTMCell if case.cell == "lstm" else nn.GRUCell)(
            case.I + width, case.H, case.bias, dtype=x.dtype
        )
        cell_parameters = {n.removeprefix("cell."): t for n, t in p.items() if n.startswith("cell.")}

        def run_cell(step: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            hx = (h, c) if case.cell == "lstm" else h
            found = torch.func.functional_call(cell, cell_parameters, (step, hx))
            return found if case.cell == "lstm" else (found, c)

        def attend(h: Tensor) -> tuple[Tensor, Tensor]:
            match case.kind:
                case "additive":
                    q, k = (
                        h @ p["attention.query_projection.weight"].T,
                        keys @ p["attention.key_projection.weight"].T,
                    )
                    e = torch.tanh(q[:, None] + k) @ p["attention.v"]
                case "general":
                    e = torch.einsum("bq,qk,bsk->bs", h, p["attention.projection.weight"], keys)
                case "concat":
                    pairs = torch.cat([h[:, None].expand(-1, case.S, -1), keys], -1)
                    e = torch.tanh(pairs @ p["attention.projection.weight"].T) @ p["attention.v"]
                case "dot":
                    e = torch.einsum("bk,bsk->bs", h, keys)
            valid = case.valid()
            some = valid.any(-1, keepdim=True)
            w = torch.softmax(torch.where(some, e.masked_fill(~valid, -math.inf), 0), -1)
            w = torch.where(valid, w, 0)
            return torch.einsum("bs,bsd->bd", w, values), w

        steps = []
        for x_t in x:
            if case.feeding == "bahdanau":
                context, w = attend(h)
                h, c = run_cell(torch.cat([x_t, context], -1), h, c)
                output = h
            else:
                h, c = run_cell(torch.cat([x_t, fed], -1), h, c)
                context, w = attend(h)
                fed = output = torch.tanh(torch.cat([context, h], -1) @ p["combine.weight"].T)
            steps.append((output, context, w))
        outputs, contexts, weights = zip(*steps, strict=True)
        state = DecoderState(h, c if case.cell == "lstm" else None)
        return results(torch.stack(outputs), state, torch.stack(contexts), torch.stack(weights, 1))

    return call


def check(case: Case, method: str = "forward") -> None:
    tensors, same = case.tensors(), dict(seed=3, rounded=case.dtype)
    with poisoned():
        got = evaluate_named(ours(case, method), tensors, **same)
    peer = evaluate_named(literal(case), tensors, **same)
    in_double = {name: t.double() for name, t in tensors.items()}
    oracle = evaluate_named(literal(case), in_double, **same)
    with seqkern.use_backend("eager"):
        agree(evaluate_named(ours(case, method), in_double, **same), oracle, ORACLES_AGREE, case)
    within(got, peer, oracle, case, lambda: errors_nearby_named(literal(case), tensors))


FACTORS = dict(
    cell=("lstm", "gru"), T=(1, 2, 7), B=(1, 3, 9), S=(1, 7, 17), I=(1, 5), H=(1, 6, 17, 33), A=(1, 9, 40),
    D=(1, 3, 20), bias=(True, False), keys=("all", "lengths", "holes", "none"), state=(True, False),
    dtype=tuple(SHORT),
)  # fmt: skip
FUSED = unique(Case(**row) for row in pairwise(FACTORS))
COMPOSED = unique(
    Case(**row, H=4, K=4)
    for row in pairwise(
        dict(
            cell=("lstm", "gru"), feeding=("bahdanau", "luong"),
            attention=("additive", "general", "concat", "dot"),
            keys=("all", "lengths", "holes"), state=(True, False), dtype=(torch.float32, torch.float64),
        )
    )
)  # fmt: skip


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_parity_of_the_fused_loop(case, backend):
    check(case)


@pytest.mark.parametrize("case", COMPOSED, ids=str)
@pytest.mark.parametrize("method", ["forward", "step"])
def test_parity_of_every_kind(case, method):
    check(case, method)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_parity_on_each_instruction_set(cell, dtype, cpu_backend):
    before = _extension._C.instruction_set()
    try:
        for name in INSTRUCTION_SETS:
            _extension._C.set_instruction_set(name)
            check(Case(cell, T=5, B=9, S=21, H=37, A=41, D=19, keys="holes", dtype=dtype))
    finally:
        _extension._C.set_instruction_set(before)


@pytest.mark.parametrize("reach", [30.0, 300.0])
def test_parity_where_keys_are_beyond_the_factored_tanh(reach, cpu_backend):
    check(Case(B=5, reach=reach))


def test_queries_beyond_the_factored_tanh(cpu_backend):
    case = Case(B=5)
    tensors = case.tensors()
    tensors["h0"][2] *= 1e3
    got = evaluate_named(ours(case), tensors, 0, torch.float32)
    peer = evaluate_named(literal(case), tensors, 0, torch.float32)
    oracle = evaluate_named(literal(case), {n: t.double() for n, t in tensors.items()}, 0, torch.float32)
    within(got, peer, oracle, case, lambda: errors_nearby_named(literal(case), tensors))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_steps_are_the_sequence(cell, cpu_backend):
    """Decoding step by step with projected keys gives what teacher forcing gives, gradients included."""
    case = Case(cell, dtype=torch.float64, keys="holes")
    got = evaluate_named(ours(case, "step"), case.tensors(), 0, torch.float64)
    agree(got, evaluate_named(ours(case), case.tensors(), 0, torch.float64), 1e-12, case)


@pytest.mark.parametrize(
    "case",
    [Case("lstm"), Case("gru", keys="holes"), Case("gru", "luong"), Case("lstm", "luong", "concat")],
    ids=str,
)
def test_padding_is_not_read(case, backend):
    tensors = case.tensors()
    want = evaluate_named(ours(case), tensors, 0, torch.float32)
    for name in ("keys", "values"):
        tensors[name] = torch.where(case.valid()[..., None], tensors[name], math.nan)
    agree(evaluate_named(ours(case), tensors, 0, torch.float32), want, 1e-6, case)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_both_orders(cell, backend):
    case = Case(cell, T=2, B=2, S=3, I=2, H=2, K=2, D=2, A=2, dtype=torch.float64)
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}

    def call(*leaves: Tensor):
        return tuple(ours(case)(dict(zip(tensors, leaves, strict=True))).values())

    assert gradcheck(call, tuple(tensors.values()))
    assert gradgradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize(
    "wanted", ["input", "keys", "values", "h0", "attention.v", "cell.weight_hh", "cell.weight_ih"]
)
@pytest.mark.parametrize("output", ["output", "context", "weights", "c_n"])
def test_one_gradient_of_one_output(wanted, output, cpu_backend):
    case = Case()
    found = []
    for call in (ours(case), literal(case)):
        leaves = {name: t.requires_grad_(name == wanted) for name, t in case.tensors().items()}
        y = call(leaves)[output]
        (grad,) = torch.autograd.grad(y.square().sum(), leaves[wanted], materialize_grads=True)
        found.append({wanted: grad})
    agree(*found, 1e-5, case)


def test_equal_calls_give_equal_bits(cpu_backend):
    case = Case(T=9, B=9, S=33, H=65, A=70, D=50)
    first = evaluate_named(ours(case), case.tensors(), 0, torch.float32)
    same_bits(evaluate_named(ours(case), case.tensors(), 0, torch.float32), first, case)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compiles_whole(cell, cpu_backend):
    case = Case(cell)
    module, inputs = case.module(), split(case.tensors())[0]
    arguments = (inputs["input"], inputs["keys"], state_of(inputs), inputs["values"])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, want = (results(*f(*arguments, **case.padding())) for f in (compiled, module))
    parameters = list(module.parameters())
    grads = [torch.autograd.grad(sum(y.sum() for y in found.values()), parameters) for found in (got, want)]
    for y, y_ in zip((*got.values(), *grads[0]), (*want.values(), *grads[1]), strict=True):
        torch.testing.assert_close(y, y_)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("bias", [True, False])
def test_fake_kernels_tell_the_truth(cell, bias, cpu_backend):
    T, B, S, H, A, D = 3, 2, 5, 4, 6, 7
    G = 4 if cell == "lstm" else 3
    normal_ = lambda *shape: torch.randn(shape)  # noqa: E731
    inputs = (
        *(normal_(T, B, G * H), normal_(B, H), normal_(B, H) if cell == "lstm" else None, normal_(G * H, H)),
        *(normal_(G * H) if bias else None, normal_(G * H, D), normal_(A, H), normal_(B, S, A), normal_(A)),
        *(normal_(B, S, D), None, torch.tensor([5, 0])),
    )
    tests = ("test_schema", "test_faketensor")
    forward = torch.ops.seqkern.attention_decoder_forward.default
    torch.library.opcheck(forward, inputs, test_utils=tests)
    kept = forward(*inputs)
    backward = torch.ops.seqkern.attention_decoder_backward.default
    torch.library.opcheck(backward, (kept[0], None, None, kept[3], *inputs, *kept), test_utils=tests)


def test_batch_first_and_hard_attention():
    decoder = AttentionDecoder(5, 6, attention=DotProductAttention(hard=True), batch_first=True)
    x, keys = torch.randn(2, 4, 5), torch.randn(2, 7, 6)
    output, state, context, weights = decoder(x, keys, lengths=torch.tensor([7, 3]))
    assert output.shape == (2, 4, 6) and context.shape == (2, 4, 6) and weights.shape == (2, 4, 7)
    assert torch.equal(weights.sum(-1), torch.ones(2, 4)) and set(weights.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(state.hidden, output[:, -1])
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_beam_search_reorders_state_and_keys():
    decoder = AttentionDecoder(5, 6, cell="gru", feeding="luong").eval()
    keys, x, index = torch.randn(2, 7, 6), torch.randn(2, 5), torch.tensor([1, 1, 0])
    projected = decoder.project_keys(keys, lengths=torch.tensor([4, 7]))
    _, state, _, _ = decoder.step(x, projected)
    want = decoder.step(x, projected, state)
    got = decoder.step(x[index], projected.reorder(index), state.reorder(index))
    torch.testing.assert_close(got[0], want[0][index])
    torch.testing.assert_close(got[3], want[3][index])
    assert got[1].cell is None


def operands(**change):
    shapes = dict(input=(3, 2, 4), w_query=(6, 5), key=(2, 7, 6), v=(6,), value=(2, 7, 3))
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    found["hx"] = (torch.randn(2, 5), torch.randn(2, 5))
    found["params"] = [torch.randn(20, 7), torch.randn(20, 5), torch.randn(20), torch.randn(20)]
    return found | change


BAD = [
    (
        dict(input=torch.randn(0, 2, 4)),
        RuntimeError,
        r"input: expected \[T, B, I\] with T > 0, got \(0, 2, 4\)",
    ),
    (
        dict(input=torch.randn(3, 2, 5)),
        RuntimeError,
        r"w_ih: expected \[G\*H, I \+ D\] = \(20, 8\), got \(20, 7\)",
    ),
    (dict(hx=torch.randn(2, 5)), RuntimeError, r"w_ih: expected \[G\*H, I \+ D\] = \(15, 7\), got \(20, 7\)"),
    (
        dict(hx=(torch.randn(2, 5), torch.randn(3, 5))),
        RuntimeError,
        r"hx\[1\]: expected \[B, H\] = \(2, 5\), got",
    ),
    (dict(w_query=torch.randn(5, 5)), RuntimeError, r"w_query: expected \[A, H\] = \(6, 5\), got \(5, 5\)"),
    (
        dict(key=torch.randn(3, 7, 6)),
        RuntimeError,
        r"key: expected \[B, S, A\] = \(2, 7, 6\), got \(3, 7, 6\)",
    ),
    (dict(v=torch.randn(6).double()), RuntimeError, "v: expected the dtype of input, torch.float32, got"),
    (dict(lengths=torch.tensor([1, 8])), ValueError, r"lengths: expected values in 0..T = 0..7"),
    (dict(backend="triton"), RuntimeError, "triton has no kernel for attention_decoder"),
    (dict(params=[torch.randn(20, 7)]), ValueError, r"hx, params: expected h_0 or \(h_0, c_0\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_operation_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.attention_decoder(**operands(**change))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AttentionDecoder(4, 5, cell="rnn"), ValueError, "cell: expected 'lstm' or 'gru', got 'rnn'"),
        (lambda: AttentionDecoder(4, 5, feeding="x"), ValueError, "feeding: expected 'bahdanau' or 'luong'"),
        (lambda: AttentionDecoder(4, 5, attention="x"), ValueError, "attention: expected 'additive', 'dot'"),
        (
            lambda: AttentionDecoder(4, 5)(torch.randn(2, 4), torch.randn(2, 7, 5)),
            RuntimeError,
            r"input: expected \[T, B, I\] with T > 0, got \(2, 4\)",
        ),
        (
            lambda: AttentionDecoder(4, 5)(torch.randn(3, 2, 4), torch.randn(7, 5)),
            RuntimeError,
            r"keys: expected \[B, S, K\], got \(7, 5\)",
        ),
        (
            lambda: AttentionDecoder(4, 5).step(torch.randn(3, 2, 4), torch.randn(2, 7, 5)),
            RuntimeError,
            r"input: expected \[B, I\], got \(3, 2, 4\)",
        ),
    ],
)
def test_module_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
