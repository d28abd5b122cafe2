"""What regularises a recurrence: its masks, their repetition in backward, their means, its limits."""

import copy
import pickle

import pytest
import torch
from cases import OURS
from compare import same_bits
from recurrent_cases import CELL_NAMES, CLIPS, HAS_C, HAS_CANDIDATE, Case, evaluate_case
from test_variants import backend, regularised  # noqa: F401 (a fixture)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import seqkern
from seqkern.ops import CELLS, _layers, recurrent
from seqkern.reference.masks import recurrent_mask, variational_scale, weight_scale

SEED = torch.tensor([0x123456789ABCDEF])
each_cell = pytest.mark.parametrize("cell", CELL_NAMES)
each_kind = pytest.mark.parametrize("kind", ("rnn", "lstm", "gru"))


# ---- the masks ---------------------------------------------------------------------------------------------


def half(seed: int, unit: int, c1: int, c2: int, c3: int) -> int:
    """Philox4x32-10 in whole numbers: the 16 bits of a unit."""
    c, k = [unit >> 3, c1, c2, c3], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[(unit & 7) >> 1] >> (16 * (unit & 1)) & 0xFFFF


def test_mask_by_hand() -> None:
    T, B, D, H, layer = 3, 2, 2, 11, 5
    chances = (0.3, 0.5, 0.7)
    t, b = torch.arange(T)[:, None], torch.tensor([7, 2])
    mask = recurrent_mask(SEED, chances, t, b, layer, D, H)
    assert mask.shape == (T, B, D * H) and mask.dtype is torch.uint8
    for i in range(T):
        for j in range(B):
            for d in range(D):
                for u in range(H):
                    expected = sum(
                        (half(SEED.item(), u, i, int(b[j]), 8 * (2 * layer + d) + k) < round(p * 65536)) << k
                        for k, p in enumerate(chances)
                    )
                    assert mask[i, j, d * H + u] == expected
    scale = variational_scale(SEED, 0.5, b, layer, D, H, torch.float64)
    weight = weight_scale(SEED, 0.25, torch.zeros(3, 4, 11), layer, 1)
    for u in range(H):
        for j in range(B):
            for d in range(D):
                dropped = half(SEED.item(), u, 0, int(b[j]), 8 * (2 * layer + d) + 3) < 32768
                assert scale[d, j, u] == (0 if dropped else 2)
        for row in range(12):
            dropped = half(SEED.item(), u, row, 0, 8 * (2 * layer + 1) + 4) < 16384
            assert weight.view(12, 11)[row, u] == (0 if dropped else torch.tensor(4 / 3, dtype=torch.float32))


def test_mask_statistics() -> None:
    """Each bit has its probability; bits, steps, rows, units, directions, layers and seeds are
    independent."""
    t, b = torch.arange(32)[:, None], torch.arange(64)
    mask = recurrent_mask(SEED, (0.3, 0.1, 0.5), t, b, 0, 2, 128)
    bits = [(mask >> k & 1).double() for k in range(3)]
    n = mask.numel()
    for bit, p in zip(bits, (0.3, 0.1, 0.5), strict=True):
        assert abs(bit.mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
        for dim in range(3):
            mean = bit.mean([k for k in range(3) if k != dim])
            assert (mean - p).abs().max() < 6 * (p * (1 - p) * len(mean) / n) ** 0.5
    chosen = bits[0]
    others = [bits[1], bits[2], chosen.roll(1, 0), chosen.roll(1, 1), chosen.roll(1, 2), chosen.roll(128, 2)]
    for layer, seed in ((1, SEED), (0, SEED + 1)):
        others.append((recurrent_mask(seed, (0.3, 0, 0), t, b, layer, 2, 128) & 1).double())
    for other in others:
        together = torch.corrcoef(torch.stack([chosen.flatten(), other.flatten()]))[0, 1]
        assert abs(together) < 5 / n**0.5


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_never_and_always(p: float) -> None:
    t, b = torch.arange(3)[:, None], torch.arange(4)
    mask = recurrent_mask(SEED, (p, p, p), t, b, 0, 1, 9)
    assert (mask == (7 if p else 0)).all()
    assert (variational_scale(SEED, p, b, 0, 1, 9, torch.float32) == 1 - p).all()
    for name in ("recurrent_dropout", "variational_dropout", "weight_dropout"):
        case = Case("lstm", options=((name, p),))
        got = evaluate_case(case, case.tensors(), "eager")
        assert all(tensor.isfinite().all() for tensor in got.values()), name


# ---- the layers --------------------------------------------------------------------------------------------


@each_cell
def test_same_seed_same_bits(cell: str, backend: str) -> None:  # noqa: F811
    """One seed gives its bits again, another one others; two calls in a row draw anew."""
    for options in regularised(cell):
        if options[0][0] == "cell_clip":
            continue
        case = Case(cell, T=6, H=17, B=5, num_layers=2, bidirectional=True, options=options)
        tensors = case.tensors()
        got = evaluate_case(case, tensors, backend)
        same_bits(evaluate_case(case, tensors, backend), got, case)
        y = Case.call(Case(**{**vars(case), "seed": 1}), tensors)[0]
        assert not torch.equal(y, got["y"]), options
        torch.manual_seed(0)
        keywords = dict(training=True, num_layers=2, bidirectional=True, **dict(options))
        twice = [recurrent(cell, tensors["x"], None, case.flat_params(tensors), **keywords)[0] for _ in "ab"]
        assert not torch.equal(*twice), options


@each_cell
def test_forms_draw_the_same(cell: str, backend: str) -> None:  # noqa: F811
    """Padded, ragged, packed (in any order) and cut batches have the same masks where the same row and step
    is data."""
    options = dict(regularised(cell)[-1])
    case = Case(cell, T=6, B=4, H=9)
    tensors = case.tensors()
    x, params = tensors["x"], case.flat_params(tensors)
    lengths = torch.tensor([3, 6, 1, 4])
    valid = torch.arange(6)[:, None] < lengths

    def call(x: Tensor, **keywords: object) -> Tensor:
        torch.manual_seed(3)
        return recurrent(cell, x, None, params, training=True, **options, **keywords)[0]

    full = call(x)
    torch.testing.assert_close(call(x, lengths=lengths)[valid], full[valid])
    torch.testing.assert_close(call(x, reset=torch.zeros(6, 4, dtype=torch.bool)), full)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    keywords = dict(batch_sizes=packed.batch_sizes, sorted_indices=packed.sorted_indices)
    for more in ({}, {"reset": torch.zeros(int(lengths.sum()), dtype=torch.bool)}):
        y = call(packed.data, **keywords, **more)
        output = torch.nn.utils.rnn.PackedSequence(
            y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
        torch.testing.assert_close(padded[valid], full[valid])


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_cell
def test_checkpoint(cell: str, use_reentrant: bool, backend: str) -> None:  # noqa: F811
    """A recomputed forward has the same masks: outputs and gradients, bit for bit."""
    case = Case(cell, T=5, H=9, num_layers=2, options=regularised(cell)[-1])
    tensors = case.tensors()
    names = list(tensors)
    runs = []
    for through in (False, True):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]

        def call(*leaves: Tensor) -> Tensor:
            given = dict(zip(names, leaves, strict=True))
            states = [given[f"{name}0"] for name in CELLS[cell].states]
            keywords = dict(training=True, num_layers=2, **dict(case.options))
            return recurrent(cell, given["x"], states, case.flat_params(given), **keywords)[0]

        torch.manual_seed(4)
        y = checkpoint(call, *leaves, use_reentrant=use_reentrant) if through else call(*leaves)
        torch.manual_seed(5)  # not the state in which the forward ran
        y.square().sum().backward()
        runs.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_cell
def test_evaluation(cell: str, backend: str) -> None:  # noqa: F811
    """Dropouts are the identity; probabilities of zero change nothing in training either."""
    case = Case(cell, H=9, bidirectional=True)
    tensors = case.tensors()
    plain = evaluate_case(case, tensors, backend)
    options = dict(regularised(cell)[-1])
    off = {name: value for name, value in options.items() if name not in ("zoneout", "cell_clip")}
    evaluation = Case(cell, H=9, bidirectional=True, training=False, options=tuple(off.items()))
    zero = tuple((name, (0.0, 0.0) if name == "zoneout" else 0.0) for name in options if name != "cell_clip")
    params, states = case.flat_params(tensors), [tensors[f"{name}0"] for name in CELLS[cell].states]
    for chosen, training in ((evaluation.options, False), (zero, True)):
        keywords = dict(bidirectional=True, training=training, **dict(chosen))
        y, finals = recurrent(cell, tensors["x"], states, params, **keywords)
        torch.testing.assert_close(y, plain["y"])
        torch.testing.assert_close(finals[-1], plain[f"{CELLS[cell].states[-1]}_n"])


@each_cell
def test_zoneouts_mean_is_its_evaluation(cell: str, backend: str) -> None:  # noqa: F811
    """Over many rows, all alike, the mean of one step in training is the step in evaluation."""
    case = Case(cell, T=1, B=1, H=5)
    tensors = {name: t.float() for name, t in case.tensors().items()}
    many = 20000
    x = tensors["x"].expand(1, many, -1)
    states = [tensors[f"{name}0"].expand(1, many, -1) for name in CELLS[cell].states]
    zoneout = (0.4, 0.25 if cell in HAS_C else 0.0)
    params = case.flat_params(tensors)
    _, trained = recurrent(cell, x, states, params, zoneout=zoneout, training=True)
    _, expected = recurrent(cell, x[:, :1], [s[:, :1] for s in states], params, zoneout=zoneout)
    for s, s_ in zip(trained, expected, strict=True):
        spread = s.std(1) / many**0.5
        assert ((s.mean(1) - s_[:, 0]).abs() < 6 * spread + 1e-5).all()


@pytest.mark.parametrize("cell", [cell for cell in HAS_CANDIDATE if cell in HAS_C and cell != "nested_lstm"])
def test_recurrent_dropouts_mean(cell: str, backend: str) -> None:  # noqa: F811
    """c is linear in the candidate, so its mean over masks is the plain c."""
    case = Case(cell, T=1, B=1, H=5)
    tensors = {name: t.float() for name, t in case.tensors().items()}
    many = 20000
    states = [tensors[f"{name}0"] for name in CELLS[cell].states]
    params = case.flat_params(tensors)
    _, plain = recurrent(cell, tensors["x"], states, params)
    wide = [s.expand(1, many, -1) for s in states]
    x = tensors["x"].expand(1, many, -1)
    _, dropped = recurrent(cell, x, wide, params, recurrent_dropout=0.3, training=True)
    c = dropped[1]
    assert ((c.mean(1) - plain[1][:, 0]).abs() < 6 * c.std(1) / many**0.5 + 1e-5).all()


@pytest.mark.parametrize("cell", CLIPS)
def test_clipping(cell: str, backend: str) -> None:  # noqa: F811
    """The memory, c or NestedLSTM's d, stays within the limit, and passes no gradient where it was cut."""
    case = Case(cell, T=4, B=9, H=6, options=(("cell_clip", 0.2),))
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
    memory = case.call(tensors)[-1].abs()
    assert (memory <= 0.2).all() and (memory == 0.2).any() and (memory < 0.2).any()
    states, params = [tensors[f"{name}0"] for name in CELLS[cell].states], case.flat_params(tensors)
    plain, _ = recurrent(cell, tensors["x"], states, params)
    assert torch.equal(recurrent(cell, tensors["x"], states, params, cell_clip=1e6)[0], plain)

    one = Case(cell, T=1, B=9, H=6, options=(("cell_clip", 0.2),))
    tensors = {name: t.requires_grad_() for name, t in one.tensors().items()}
    memory = one.call(tensors)[-1]
    grad = torch.autograd.grad(memory.sum(), tensors[f"{CELLS[cell].states[-1]}0"])[0]
    cut = memory.abs() == 0.2
    assert cut.any() and (grad[cut] == 0).all() and (grad[~cut] != 0).all()


def test_projection_is_clipped(backend: str) -> None:  # noqa: F811
    layer = seqkern.LSTM(3, 6, proj_size=4, proj_clip=0.01)
    y, (_, c_n) = layer(torch.randn(5, 2, 3))
    assert (y.abs() <= 0.01).all() and (y.abs() == 0.01).any() and (c_n.abs() > 0.01).any()


# ---- torch.nn's modules with keywords ----------------------------------------------------------------------


@each_kind
def test_keywords(kind: str, backend: str) -> None:  # noqa: F811
    """They reach the operation, stand in repr, survive pickle, deepcopy and eval(); attributes may be set
    later."""
    options = dict(zoneout=0.2, variational_dropout=0.3, weight_dropout=0.1)
    options |= {} if kind == "rnn" else {"recurrent_dropout": 0.25}
    options |= {"cell_clip": 0.5} if kind == "lstm" else {}
    layer = OURS[kind](3, 5, num_layers=2, bidirectional=True, **options)
    plain = OURS[kind](3, 5, num_layers=2, bidirectional=True)
    plain.load_state_dict(layer.state_dict())
    assert ", ".join(f"{name}={value}" for name, value in sorted(options.items())) == ", ".join(
        sorted(repr(layer)[repr(layer).index("bidirectional=True, ") + 20 : -1].split(", "))
    )
    x = torch.randn(6, 4, 3)
    h0 = torch.zeros(4, 4, 5)
    torch.manual_seed(1)
    y, state = layer(x)
    cell = {"rnn": "rnn_tanh"}.get(kind, kind)
    params = [w for w in layer._flat_weights]
    params = [w for k in range(0, 16, 4) for w in (*params[k : k + 4], None)]
    zoneout = (0.2, 0.2 if kind == "lstm" else 0.0)
    torch.manual_seed(1)
    expected, finals = recurrent(
        *(cell, x, None, params),
        num_layers=2,
        bidirectional=True,
        training=True,
        **options | {"zoneout": zoneout},
    )
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(state if kind == "lstm" else [state], finals, strict=True))
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        torch.manual_seed(1)
        assert torch.equal(twin(x)[0], y) and repr(twin) == repr(layer)
    assert not torch.equal(layer.eval()(x)[0], y)
    assert torch.equal(layer(x)[0], layer(x)[0])
    for name, value in options.items():
        setattr(plain, name, value)
    torch.manual_seed(1)
    assert torch.equal(plain(x)[0], y)
    hx = (h0, h0) if kind == "lstm" else h0
    torch.manual_seed(1)
    assert torch.equal(plain(x, hx)[0], y)


@each_kind
def test_without_keywords_nothing_changes(kind: str) -> None:
    theirs = getattr(torch.nn, OURS[kind].__name__)
    layer = OURS[kind](3, 5, zoneout=0.0, recurrent_dropout=0.0, cell_clip=None)
    assert set(vars(layer)) == set(vars(theirs(3, 5))) and repr(layer) == repr(theirs(3, 5))
    old = pickle.loads(pickle.dumps(OURS[kind](3, 5)))
    assert old.zoneout == 0.0 and old.cell_clip is None


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("update_gate", ["keep", "replace"])
def test_gru_gates(reset_after: bool, update_gate: str, backend: str) -> None:  # noqa: F811
    """All four GRUs as layer and as cell, by their equations."""
    gates = dict(reset_after=reset_after, update_gate=update_gate)
    layer = seqkern.GRU(3, 5, dtype=torch.float64, **gates)
    cell = seqkern.GRUCell(3, 5, dtype=torch.float64, **gates)
    cell.load_state_dict({name[:-3]: weight for name, weight in layer.state_dict().items()})
    x, h = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    y, h_n = layer(x, h[None])
    w_ih, w_hh, b_ih, b_hh = cell.parameters()
    for t in range(4):
        after = cell(x[t], h)
        (ar, az, an), (hr, hz, hn) = (x[t] @ w_ih.T + b_ih).chunk(3, -1), (h @ w_hh.T + b_hh).chunk(3, -1)
        r, z = torch.sigmoid(ar + hr), torch.sigmoid(az + hz)
        if not reset_after:
            hn, r = ((r * h) @ w_hh.T + b_hh)[:, 10:], 1
        n = torch.tanh(an + r * hn)
        h = (1 - z) * n + z * h if update_gate == "keep" else (1 - z) * h + z * n
        torch.testing.assert_close(after, h)
        torch.testing.assert_close(y[t], h)
    torch.testing.assert_close(h_n[0], h)
    for module in (layer, cell):
        assert ("reset_after=False" in repr(module)) is not reset_after
        assert ("update_gate=replace" in repr(module)) is (update_gate == "replace")
        assert repr(pickle.loads(pickle.dumps(module))) == repr(module)


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: seqkern.LSTM(3, 5, zoneout=1.5), "zoneout: expected a probability, 0..1, got 1.5"),
        (lambda: seqkern.LSTM(3, 5, weight_dropout=-0.1), "weight_dropout: expected a probability"),
        (lambda: seqkern.GRU(3, 5, zoneout=(0.1, 0.1)), r"expected \(p, 0\), as gru has no state but h"),
        (lambda: seqkern.RNN(3, 5, recurrent_dropout=0.1), "as rnn_tanh has no candidate, got 0.1"),
        (lambda: seqkern.IndRNN(3, 5, recurrent_dropout=0.1), "indrnn_relu has no candidate"),
        (lambda: seqkern.LSTM(3, 5, proj_size=2, zoneout=0.1), r"zoneout: expected \(0, p\) with proj_size"),
        (lambda: seqkern.LSTM(3, 5, proj_clip=1.0), "proj_clip: expected None without proj_size, got 1.0"),
        (lambda: seqkern.GRU(3, 5, cell_clip=1.0), "cell_clip: expected None for gru: it has no cell state"),
        (lambda: seqkern.SLSTM(3, 5, cell_clip=1.0), "cell_clip: expected None for slstm: its stabiliser"),
        (lambda: seqkern.LSTM(3, 5, cell_clip=-1.0), "cell_clip: expected a number above 0"),
        (lambda: seqkern.GRU(3, 5, update_gate="z"), "update_gate: expected 'keep' or 'replace', got 'z'"),
        (lambda: seqkern.GRUCell(3, 5, update_gate="z"), "update_gate: expected 'keep' or 'replace'"),
    ],
)  # fmt: skip
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_type_of_gate() -> None:
    with pytest.raises(TypeError, match="reset_after: expected a bool, got str"):
        seqkern.GRU(3, 5, reset_after="no")


def test_the_seed_is_torchs(backend: str) -> None:  # noqa: F811
    """One number is taken from torch's generator for a call that draws masks, none for one that does not."""
    layer = seqkern.LSTM(3, 5, zoneout=0.1, num_layers=2)
    x = torch.randn(4, 2, 3)
    torch.manual_seed(2)
    layer(x)
    after = torch.rand(1)
    torch.manual_seed(2)
    _layers.new_seed(torch.device("cpu"))
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    layer.eval()(x)
    again = torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(again, torch.rand(1))
