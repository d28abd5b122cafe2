"""Every recurrent cell through ops.recurrent: against its equations, and the kernels against both."""

import math
from collections.abc import Iterator

import pytest
import torch
from cases import pairwise
from compare import Results, agree, same_bits
from conftest import instruction_sets, why_no_cpu_backend
from recurrent_cases import CELL_NAMES, Case, check_parity, evaluate_case
from test_threads import TOLERANCE
from torch import Tensor

import seqkern
from seqkern.ops import CELLS, recurrent
from seqkern.reference.masks import recurrent_mask

each_cell = pytest.mark.parametrize("cell", CELL_NAMES)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu" and (why := why_no_cpu_backend()):
        pytest.skip(why)
    with seqkern.use_backend(request.param):
        yield request.param


# ---- the eager formula against the papers' equations -------------------------------------------------------


def regularised(cell: str) -> list[tuple[tuple[str, object], ...]]:
    """Sets of regularisers that mean something for the cell."""
    spec = CELLS[cell]
    zone_c = 0.3 if len(spec.states) > 1 else 0.0
    sets = [
        (("zoneout", (0.4, zone_c)),),
        (("variational_dropout", 0.4), ("weight_dropout", 0.3)),
    ]
    everything = [*sets[0], *sets[1]]
    if spec.candidate:
        sets.append((("recurrent_dropout", 0.4),))
        everything.append(("recurrent_dropout", 0.25))
    if spec.clips:
        sets.append((("cell_clip", 0.3),))
        everything.append(("cell_clip", 0.5))
    return [*sets, tuple(everything)]


def twin_cases(cell: str) -> list[Case]:
    cases = [
        Case(cell),
        Case(cell, bias="ih", hx=False),
        Case(cell, bias="none", bidirectional=True),
        Case(cell, bidirectional=True, num_layers=2, form="lengths"),
        Case(cell, bidirectional=True, form="packed", T=6, B=4),
        Case(cell, H=1, I=1, T=2),
        *(Case(cell, options=options) for options in regularised(cell)),
        Case(cell, options=regularised(cell)[-1], training=False),
        Case(cell, options=regularised(cell)[-1], num_layers=2, bidirectional=True, form="lengths"),
        Case(cell, options=regularised(cell)[-1], bidirectional=True, form="packed"),
    ]
    if cell == "lstm":
        cases += [
            Case(cell, P=4, bidirectional=True, options=(("zoneout", (0.0, 0.3)),)),
            Case(cell, P=4, num_layers=2, options=(("proj_clip", 0.2), ("cell_clip", 0.4))),
            Case(cell, P=4, options=(("zoneout", (0.0, 0.3)),), training=False),
        ]
    if cell in ("gru", "gru_reset_before"):
        cases += [
            Case(cell, options=(("update_gate", "replace"),), bidirectional=True),
            Case(cell, options=(("update_gate", "replace"), ("zoneout", (0.3, 0.0)))),
        ]
    return cases


@pytest.mark.parametrize("case", [case for cell in CELL_NAMES for case in twin_cases(cell)], ids=str)
def test_equations(case: Case) -> None:
    tensors = case.tensors()
    agree(evaluate_case(case, tensors, "eager"), evaluate_case(case, tensors, "twin"), 1e-11, case)


# ---- the kernels against the eager formula -----------------------------------------------------------------


def kernel_cases(cell: str, slow: bool = False) -> list[Case]:
    """Pairs of sizes in float32; pairs of options and dtypes at small sizes."""
    sizes = dict(T=(1, 2, 7, 33), B=(1, 3, 8, 33), I=(1, 16, 17), H=(1, 15, 16, 17, 33, 65))
    options = dict(
        bidirectional=(False, True),
        num_layers=(1, 2),
        bias=("both", "ih", "none"),
        hx=(True, False),
        form=("padded", "lengths", "packed"),
        options=((), *regularised(cell)),
        training=(True, False),
        dtype=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    )
    small = dict(T=(1, 2, 7), B=(1, 3, 8), I=(5,), H=(1, 15, 16, 33))
    if slow:
        small = sizes
    if CELLS[cell].normalises:
        # A row of one unit's three or four gates has hardly a degree of freedom left once it is normalised,
        # and rounding decides its gradient. The sizes above have H = 1 in float32.
        small = small | dict(H=(2, *small["H"][1:]))
    rows = [row | dict(dtype=torch.float32) for row in pairwise(sizes)] + pairwise(options | small)
    if cell == "lstm":
        rows += [dict(P=5, H=17, T=7, B=8, dtype=torch.float32, options=(("proj_clip", 0.2),))]
    for row in rows:
        if cell.endswith("relu") and row["dtype"] is not torch.float64 and row.get("num_layers") == 2:
            # Two units steer the second layer's ReLU (Case.steer), unless a mask keeps them from it.
            row["num_layers"] = 2 if row["H"] > 1 and not row["options"] else 1
    return list(dict.fromkeys(Case(cell, **row) for row in rows))


@pytest.mark.parametrize("case", [case for cell in CELL_NAMES for case in kernel_cases(cell)], ids=str)
def test_parity(case: Case) -> None:
    """All outputs and all gradients of the C++ kernels."""
    if why := why_no_cpu_backend():
        pytest.skip(why)
    check_parity(case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for cell in CELL_NAMES for c in kernel_cases(cell, slow=True)], ids=str)
def test_parity_at_all_sizes(case: Case) -> None:
    if why := why_no_cpu_backend():
        pytest.skip(why)
    check_parity(case, "cpu")


@each_cell
def test_one_thread_and_two(cell: str, threads: None) -> None:
    """Each number of threads gives its bits again at every call, and the other's numbers."""
    if why := why_no_cpu_backend():
        pytest.skip(why)
    sizes = dict(I=17, H=65, bidirectional=True, dtype=torch.float32)
    for case in (Case(cell, T=9, B=33, **sizes | dict(H=33)), Case(cell, T=1, B=9, form="lengths", **sizes)):
        runs: dict[int, Results] = {}
        for n in (1, 2, 1, 2, 3):
            torch.set_num_threads(n)
            results = evaluate_case(case, case.tensors(), "cpu")
            if n in runs:
                same_bits(results, runs[n], f"{case} on {n} threads, again")
            runs[n] = results
        agree(runs[2], runs[1], TOLERANCE[case.dtype], f"{case} on 2 threads against 1")
        agree(runs[3], runs[1], TOLERANCE[case.dtype], f"{case} on 3 threads against 1")


@pytest.mark.parametrize("instruction_set", instruction_sets(), indirect=True)
@each_cell
def test_every_instruction_set(cell: str, instruction_set: str) -> None:
    if why := why_no_cpu_backend():
        pytest.skip(why)
    for options, B, dtype in (
        ((), 7, torch.float32),
        (regularised(cell)[-1], 1, torch.float32),
        (regularised(cell)[-1], 9, torch.bfloat16),
    ):
        sizes = dict(T=5, B=B, I=17, H=33)
        case = Case(cell, **sizes, bidirectional=True, form="lengths", options=options, dtype=dtype)
        check_parity(case, "cpu")


@pytest.mark.parametrize("instruction_set", instruction_sets(), indirect=True)
@each_cell
def test_single_steps(cell: str, instruction_set: str) -> None:
    """One step of a few rows, which multiplies by the weights as they lie in memory; some rows' length
    is 0. Every dtype, with one instruction set: test_parity."""
    if why := why_no_cpu_backend():
        pytest.skip(why)
    # A variational mask scales h before the product: such a step is a sequence's.
    every = tuple(option for option in regularised(cell)[-1] if option[0] != "variational_dropout")
    for dtype, B, H, options in (
        (torch.float32, 5, 33, every),
        (torch.bfloat16, 1, 20, regularised(cell)[0]),
    ):
        sizes = dict(T=1, B=B, I=17, H=H, dtype=dtype)
        check_parity(Case(cell, **sizes, bidirectional=True, form="lengths", options=options), "cpu")


@each_cell
def test_subsets_of_gradients(cell: str, backend: str) -> None:
    """Whatever alone requires a gradient gets the one it has among all."""
    case = Case(cell, T=4, B=2, H=7, dtype=torch.float32)
    tensors = case.tensors()
    every = evaluate_case(case, tensors, backend)
    for name in tensors:
        leaves = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        outputs = case.call(leaves)
        pairs = zip(outputs, case.cotangents(outputs, case.dtype), strict=True)
        grown = [(y, dy) for y, dy in pairs if y.requires_grad]
        (grad,) = torch.autograd.grad([y for y, _ in grown], leaves[name], [dy for _, dy in grown])
        torch.testing.assert_close(grad, every[f"d {name}"], rtol=0, atol=0)
    with torch.no_grad():
        y = case.call(tensors)[0]
    assert not y.requires_grad and torch.equal(y, every["y"])


@each_cell
def test_strides(cell: str, backend: str) -> None:
    """Input, states and weights may have any strides; torch may then add up in another order."""

    def strided(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in tensors.items()}
        return found | {"x": torch.cat([tensors["x"]] * 2, dim=-1)[..., 5:]}

    case = Case(cell, T=4, B=3, I=5, H=6, bidirectional=True, dtype=torch.float32)
    check_parity(case, backend, strided)


@each_cell
def test_empty_batches(cell: str, backend: str) -> None:
    case = Case(cell, T=3, B=0, H=4, bidirectional=True, dtype=torch.float32)
    got = evaluate_case(case, case.tensors(), backend)
    assert got["y"].shape == (3, 0, 8) and got["h_n"].shape == (2, 0, 4)
    assert all((got[f"d {name}"] == 0).all() for name in case.parameter_shapes())
    lengths = torch.zeros(2, dtype=torch.int64)
    full = Case(cell, T=3, B=2, H=4, dtype=torch.float32)
    tensors = full.tensors()
    states = [tensors[f"{name}0"] for name in CELLS[cell].states]
    y, finals = recurrent(cell, tensors["x"], states, full.flat_params(tensors), lengths=lengths)
    assert (y == 0).all() and all(torch.equal(s, s_0) for s, s_0 in zip(finals, states, strict=True))


@each_cell
def test_nan_in_padding_reaches_nothing(cell: str, backend: str) -> None:
    case = Case(cell, T=5, B=4, H=6, form="lengths", bidirectional=True, num_layers=2, dtype=torch.float32)
    tensors = case.tensors()
    expected = evaluate_case(case, tensors, backend)
    padding = torch.arange(5).unsqueeze(1) >= case.lengths()
    tensors["x"][padding] = torch.nan
    same_bits(evaluate_case(case, tensors, backend), expected, case)


# ---- differentiation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [False, True], ids=["plain", "regularised"])
@each_cell
def test_gradcheck(cell: str, options: bool, backend: str) -> None:
    """First and second derivatives in float64 against differences; with masks they are the same in forward
    and backward, or this fails."""
    case = Case(cell, T=3, B=2, I=2, H=2, bidirectional=True, form="lengths")
    if options:
        chosen = tuple((name, value) for name, value in regularised(cell)[-1] if name != "cell_clip")
        case = Case(cell, T=3, B=2, I=2, H=2, num_layers=2, options=chosen)
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
    if "n0" in tensors:  # away from the step at n = 0
        tensors["n0"] = (tensors["n0"].detach() + 0.5).requires_grad_()

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return case.call(dict(zip(tensors, leaves, strict=True)))

    leaves = tuple(tensors.values())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", ("peephole_lstm", "mgu", "slstm", "layer_norm_gru"))
def test_torch_func(cell: str) -> None:
    """vmap, forward mode and jacrev run, on the eager backend."""
    case = Case(cell, T=3, B=2, I=2, H=2)
    tensors = case.tensors()
    x = tensors.pop("x")

    def call(x: Tensor) -> Tensor:
        return case.call(tensors | {"x": x})[0]

    stacked = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(call)(stacked), torch.stack([call(x), call(2 * x)]))
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(call, (x,), (tangent,))
    reverse = torch.func.jacrev(call)(x)
    torch.testing.assert_close(forward, torch.einsum("tbhsci,sci->tbh", reverse, tangent))


# ---- where a variant is something known --------------------------------------------------------------------


def both(cell: str, params: list, other: str, its: list, **options: object) -> None:
    """Two cells give the same outputs and final h."""
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    got, (h, *_) = recurrent(cell, x, None, params, **options)
    expected, (h_, *_) = recurrent(other, x, None, its)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(h, h_)


def weights(case: Case) -> list:
    return case.flat_params(case.tensors())


def test_known_relatives(backend: str) -> None:
    H = 6
    lstm = weights(Case("lstm"))
    both("peephole_lstm", [*lstm, torch.zeros(3 * H, dtype=torch.float64)], "lstm", lstm)

    # f = 1 - i = sigmoid(-i's pre-activation)
    cifg = weights(Case("cifg_lstm"))
    coupled = [None if w is None else torch.cat([w[:H], -w[:H], w[H:]]) for w in cifg]
    both("cifg_lstm", cifg, "lstm", coupled)

    # A reset gate that is 1 may stand on either side of the product.
    gru = weights(Case("gru"))
    open_reset = [None if w is None else torch.cat([0 * w[:H], w[H:]]) for w in gru]
    open_reset[2][:H] = 50
    both("gru_reset_before", open_reset, "gru", open_reset)

    # Zhou et al.: a GRU whose gates are one, r = f and z = 1 - f.
    mgu = weights(Case("mgu"))
    one_gate = [None if w is None else torch.cat([w[:H], -w[:H], w[H:]]) for w in mgu]
    both("mgu", mgu, "gru_reset_before", one_gate)

    for cell in ("gru", "gru_reset_before"):
        params = weights(Case(cell))
        negated = [None if w is None else torch.cat([w[:H], -w[H : 2 * H], w[2 * H :]]) for w in params]
        both(cell, params, cell, negated, update_gate="replace")

    for activation in ("tanh", "relu"):
        indrnn = weights(Case(f"indrnn_{activation}"))
        diagonal = [indrnn[0], torch.diag(indrnn[1]), *indrnn[2:]]
        both(f"indrnn_{activation}", indrnn, f"rnn_{activation}", diagonal)

    # An inner GRU that keeps all of h~ = z * h_prev, and an inner LSTM that is a plain product of gates.
    nested = weights(Case("nested_gru"))
    nested[7][:], nested[8][:] = 0, 0
    nested[7][H : 2 * H] = 50
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    h0 = torch.randn(1, 3, H, dtype=torch.float64)
    y, _ = recurrent("nested_gru", x, [h0], [*nested[:5], *(0 * w for w in nested[5:7]), *nested[7:]])
    z = torch.sigmoid((x[0] @ nested[0].T + h0[0] @ nested[1].T + nested[2] + nested[3])[:, H : 2 * H])
    torch.testing.assert_close(y[0], z * h0[0])


def test_slstm_is_its_unstabilised_equations(backend: str) -> None:
    """m only scales: h is that of c = sigmoid(f) c + exp(i) z, n likewise; shifting a state's m by k while
    scaling c and n by exp(-k) changes no h. Far beyond exp's range everything stays finite."""
    case = Case("slstm", T=6, H=4)
    tensors = case.tensors()
    params = case.flat_params(tensors)
    y, _ = recurrent("slstm", tensors["x"], None, params)
    h = c = n = torch.zeros(3, 4, dtype=torch.float64)
    for t, x in enumerate(tensors["x"]):
        R = [torch.block_diag(*params[1][:, j : j + 1]) for j in range(4)]  # heads of one unit
        pre = x @ params[0].T + params[2] + params[3] + torch.cat([h @ block.T for block in R], dim=-1)
        i, f, z, o = pre.chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        torch.testing.assert_close(y[t], h)

    h0, c0, n0, m0 = (tensors[f"{name}0"] for name in "hcnm")
    n0 = n0 + 0.1
    y, _ = recurrent("slstm", tensors["x"], [h0, c0, n0, m0], params)
    shifted, _ = recurrent("slstm", tensors["x"], [h0, c0 * 0.5, n0 * 0.5, m0 + math.log(2)], params)
    torch.testing.assert_close(shifted, y)

    single = [None if p is None else p.float().requires_grad_() for p in params]
    x = (1000 * tensors["x"]).float().requires_grad_()
    y, finals = recurrent("slstm", x, None, single)
    grads = torch.autograd.grad(y.sum(), [x, *(p for p in single if p is not None)])
    assert all(t.isfinite().all() for t in (y, *finals, *grads)) and (y.abs() <= 1).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hastes_layer_norm_and_zoneout(training: bool, backend: str) -> None:
    """haste's LayerNormLSTM with zoneout, as its documentation writes it: gates i, g, f, o, a gain but no
    bias in the norms of both projections, h = z * h_prev + (1 - z) * h_new with z its mask or, in evaluation,
    its probability."""
    T, B, I, H, p = 5, 4, 3, 6, 0.3  # noqa: E741
    case = Case("layer_norm_lstm", T=T, B=B, I=I, H=H)
    tensors = case.tensors()
    params = case.flat_params(tensors)
    w_ih, w_hh, b, _, _, gamma_i, _, gamma_h, _, gamma_c, beta_c = params
    params[6] = params[8] = None
    torch.manual_seed(5)
    y, (h_n, c_n) = recurrent(
        "layer_norm_lstm", tensors["x"], None, params, zoneout=(p, 0.0), training=training, eps=1e-5
    )
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    bits = recurrent_mask(seed, (p, 0.0, 0.0), torch.arange(T)[:, None], torch.arange(B), 0, 1, H)
    order = torch.cat([torch.arange(H) + k * H for k in (0, 2, 1, 3)])  # i g f o of i f g o
    W, R, bias = w_ih[order].T, w_hh[order].T, b[order]
    gain = torch.stack([gamma_i[order], gamma_h[order]])

    def normalised(v: Tensor) -> Tensor:
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    h = c = torch.zeros(B, H, dtype=torch.float64)
    for t in range(T):
        v = normalised(tensors["x"][t] @ W) * gain[0] + normalised(h @ R) * gain[1] + bias
        i, g, f, o = v.chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h_new = torch.sigmoid(o) * torch.tanh(normalised(c) * gamma_c + beta_c)
        z = (bits[t] & 1).double() if training else p
        h = z * h + (1 - z) * h_new
        torch.testing.assert_close(y[t], h)
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hastes_layer_norm_gru(training: bool, backend: str) -> None:
    """haste's LayerNormGRU with zoneout: gates z, r, g, a recurrent bias under the reset gate."""
    T, B, H, p = 5, 4, 6, 0.3
    case = Case("layer_norm_gru", T=T, B=B, H=H)
    tensors = case.tensors()
    params = case.flat_params(tensors)
    w_ih, w_hh, b, _, _, gamma_i, _, gamma_h, beta_h = params
    params[6] = None
    torch.manual_seed(5)
    y, _ = recurrent("layer_norm_gru", tensors["x"], None, params, zoneout=(p, 0.0), training=training)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    bits = recurrent_mask(seed, (p, 0.0, 0.0), torch.arange(T)[:, None], torch.arange(B), 0, 1, H)
    h = torch.zeros(B, H, dtype=torch.float64)
    for t in range(T):
        vx = torch.nn.functional.layer_norm(tensors["x"][t] @ w_ih.T, (3 * H,)) * gamma_i
        vh = torch.nn.functional.layer_norm(h @ w_hh.T, (3 * H,)) * gamma_h
        (xr, xz, xg), (hr, hz, hg) = vx.chunk(3, -1), vh.chunk(3, -1)
        (br, bz, bg), (rr, rz, rg) = b.chunk(3), beta_h.chunk(3)
        z = torch.sigmoid(xz + hz + bz + rz)
        r = torch.sigmoid(xr + hr + br + rr)
        g = torch.tanh(xg + r * (hg + rg) + bg)
        h_new = z * h + (1 - z) * g
        keep = (bits[t] & 1).double() if training else p
        h = keep * h + (1 - keep) * h_new
        torch.testing.assert_close(y[t], h)


# ---- errors ------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 3, 4), torch.zeros(12, 4)
MGU = [W[:8], W[:8], None, None, None]
CIFG = [torch.zeros(12, 4), torch.zeros(12, 4), None, None, None]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("cifg", X, None, CIFG), {}, ValueError, "cell: expected one of rnn_tanh, .*, got 'cifg'"),
        (("cifg_lstm", X, None, CIFG[:4]), {}, ValueError, "params: expected 5 positions of cifg_lstm"),
        (("cifg_lstm", X, None, [None, *CIFG[1:]]), {}, ValueError, "weight_ih: expected a tensor"),
        (("cifg_lstm", X, None, [*CIFG[:4], W]), {}, ValueError, "weight_hr: expected None for cifg_lstm"),
        (("cifg_lstm", X.double(), None, CIFG), {}, ValueError, "input: expected the dtype of the weights"),
        (("cifg_lstm", X[0], None, CIFG), {}, RuntimeError, "input: expected 3 dimensions"),
        (("cifg_lstm", X[:0], None, CIFG), {}, RuntimeError, "larger than 0 in RNN, got T = 0"),
        (("cifg_lstm", X[..., :3], None, CIFG), {}, RuntimeError, "with I = input_size = 4"),
        (("mgu", X, None, [W[:11], W[:, :3], None, None, None]), {}, RuntimeError, r"expected \[2\*H, I\]"),
        (("cifg_lstm", X, [X[0]], CIFG), {}, RuntimeError, "hx: cifg_lstm expects 2 states, got 1"),
        (
            ("cifg_lstm", X, [X[:1], X[:1, :2]], CIFG),
            {},
            RuntimeError,
            r"hx\[1\]: expected \[D\*num_layers, B, H\] = \(1, 3, 4\), got \(1, 2, 4\)",
        ),
        (
            ("cifg_lstm", X, None, [W, W, W[:, 0], W[:4, 0], None]),
            {},
            RuntimeError,
            r"bias_hh_l0: expected \(12,\), got \(4,\)",
        ),
        (
            ("slstm", X, None, [torch.zeros(16, 4), torch.zeros(3, 4, 1), None, None, None]),
            {},
            RuntimeError,
            "weight_hh_l0: expected a number of heads that divides H = 4, got 3",
        ),
        (("mgu", X, None, MGU), {"cell_clip": 1.0}, ValueError, "cell_clip: expected None"),
        (("cifg_lstm", X, None, CIFG), {"update_gate": "replace"}, ValueError, "expected 'keep' for cifg"),
        (("gru", X, None, CIFG), {"update_gate": "z"}, ValueError, "expected 'keep' or 'replace'"),
        (
            ("cifg_lstm", X, None, CIFG),
            {"backend": "triton"},
            RuntimeError,
            "triton has no kernel for recurrent",
        ),
    ],
)
def test_errors(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        recurrent(*arguments, **options)


# ---- what only the kernels could get wrong -----------------------------------------------------------------


def gradients(backend: str, call, *leaves: torch.Tensor) -> list[torch.Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with seqkern.use_backend(backend):
        y = call(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad((y * weights.to(y.dtype)).sum(), leaves)]


def test_projection_to_the_hidden_size() -> None:
    """h as large as c: the threads still may not share a row's units."""
    if why := why_no_cpu_backend():
        pytest.skip(why)
    T, I, H = 32, 16, 256  # noqa: E741
    shapes = [(T, 1, I), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,), (H, H)]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) * H**-0.5 for s in shapes]

    def call(x, *params):
        return seqkern.ops.lstm(x, None, params)[0]

    for got, expected in zip(gradients("cpu", call, *leaves), gradients("eager", call, *leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_projection_in_one_direction_alone_is_refused() -> None:
    w_ih, w_hh, w_hr = torch.zeros(16, 3), torch.zeros(16, 4), torch.zeros(4, 4)
    with pytest.raises(ValueError, match="weight_hr: expected one for each layer and direction"):
        recurrent(
            "lstm",
            torch.zeros(2, 1, 3),
            None,
            [w_ih, w_hh, None, None, w_hr, w_ih, w_hh, None, None, None],
            bidirectional=True,
            cell_clip=1.0,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_gradient_passes_a_clip_whatever_the_bound_rounds_to(dtype: torch.dtype) -> None:
    if why := why_no_cpu_backend():
        pytest.skip(why)
    generator = torch.Generator().manual_seed(0)
    x, w_ih, w_hh = (torch.randn(s, generator=generator).to(dtype) for s in ((1, 8, 4), (32, 4), (32, 8)))
    h_0, c_0 = torch.zeros(1, 8, 8, dtype=dtype), torch.full((1, 8, 8), 30.0, dtype=dtype)
    for clip in (0.7, 0.1, 0.3, 1.1):

        def call(c_0, clip=clip):
            return recurrent("lstm", x, (h_0, c_0), [w_ih, w_hh, None, None, None], cell_clip=clip)[0]

        got, expected = (gradients(backend, call, c_0)[1] for backend in ("cpu", "eager"))
        assert (got == 0).equal(expected == 0), clip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("winner", ["past", "new"])
def test_slstm_knows_its_stabiliser_whatever_rounds_to_one(dtype: torch.dtype, winner: str) -> None:
    """m = max(past, new): where they are near both exponentials round to 1, and m is one of them still."""
    if why := why_no_cpu_backend():
        pytest.skip(why)
    m_0 = torch.linspace(0.75, 2.0, 400).to(dtype)
    past = math.log(0.5) + m_0.double()  # f~ = 0
    step = torch.finfo(dtype).eps * past.abs().clamp(min=2**-4)
    new = (past + (-step if winner == "past" else step) / 4).to(dtype)
    near = (new.double() - past).abs() < torch.finfo(dtype).eps / 4
    right = (new.double() < past) if winner == "past" else (new.double() > past)
    m_0, new = m_0[near & right], new[near & right]
    H = len(m_0)
    assert H > 4
    bias = torch.cat([new, torch.zeros(3 * H, dtype=dtype)])
    layer = seqkern.SLSTMCell(1, H, num_heads=1, dtype=dtype)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.bias_ih.copy_(bias)
    ones = torch.ones(1, H, dtype=dtype)
    for backend in ("cpu", "eager"):
        with seqkern.use_backend(backend):
            m = layer(torch.zeros(1, 1, dtype=dtype), (ones, ones, ones, m_0[None]))[3]
        (gradient,) = torch.autograd.grad(m.sum(), [layer.bias_ih])
        of_new, of_past = gradient[:H], gradient[H : 2 * H]
        assert (of_new == (winner == "new")).all(), backend
        assert (of_past == (0.5 if winner == "past" else 0)).all(), backend


def test_more_heads_than_the_kernels_take() -> None:
    layer = seqkern.SLSTM(3, 128, num_heads=128)
    x = torch.randn(2, 1, 3)
    y, _ = layer(x)
    with seqkern.use_backend("eager"):
        assert y.equal(layer(x)[0])
    if why_no_cpu_backend() is None:
        with seqkern.use_backend("cpu"), pytest.raises(RuntimeError, match=r"up to 64 heads .* got 128"):
            layer(x)
