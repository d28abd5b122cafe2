"""PackedSequence in and out, as torch.nn has it: sorted or not, with states or without."""

import pytest
import torch
from cases import DTYPES, KINDS, SIZES, Case, State, legal, option_factors, our_layer, pairwise, unique
from compare import check_parity, flat
from test_lengths import make_lengths
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

PATTERNS = ("ragged", "descending", "all T", "all shorter")


def through_packing(lengths: Tensor, enforce_sorted: bool):
    """Pack inside the graph, so that the padded input's gradient is compared; the packed data comes out."""

    def call(layer: nn.RNNBase, x: Tensor, hx: State | None) -> tuple[Tensor, State]:
        packed = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted)
        out, state = layer(packed, hx)
        assert isinstance(out, PackedSequence)
        for mine, given in zip(out[1:], packed[1:], strict=True):  # batch_sizes and both permutations
            assert (mine is None and given is None) or torch.equal(mine, given)
        return out.data, state

    return call


def pattern_cases(kind: str) -> list[tuple[Case, str, bool]]:
    options = option_factors(kind) | {
        "pattern": PATTERNS,
        "batched": (True,),
        "enforce_sorted": (False, True),
    }
    sizes = dict(T=(1, 2, 7, 33), B=(1, 2, 3, 5, 8, 9, 17, 33), I=SIZES, H=SIZES)
    small = dict(T=(2, 7), B=(3, 9), I=(1, 17), H=(15, 33), dtype=DTYPES)
    cases = []
    for row in pairwise(options | sizes) + pairwise(options | small):
        pattern, enforce_sorted = row.pop("pattern"), row.pop("enforce_sorted")
        if enforce_sorted and pattern != "all T":
            pattern = "descending"
        cases.append((legal(Case(kind, **row)), pattern, enforce_sorted))
    return unique(iter(cases))


ALL = [parts for kind in KINDS for parts in pattern_cases(kind)]
IDS = [f"{c}-{p.replace(' ', '_')}{'-sorted' * s}" for c, p, s in ALL]


@pytest.mark.parametrize(("case", "pattern", "enforce_sorted"), ALL, ids=IDS)
def test_parity(case: Case, pattern: str, enforce_sorted: bool, backend: str) -> None:
    layer = case.torch_layer()
    lengths = make_lengths(pattern, case.T, case.B)
    call = through_packing(lengths, enforce_sorted)
    check_parity(layer, our_layer(layer), *case.inputs(), f"{case} {pattern}", call, call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_pack_sequence(kind: str, enforce_sorted: bool, backend: str) -> None:
    case = Case(kind, num_layers=2, bidirectional=True)
    layer = case.torch_layer()
    rows = [torch.randn(n, case.I) for n in ((5, 3, 3, 1) if enforce_sorted else (3, 1, 5, 3))]
    packed = pack_sequence(rows, enforce_sorted=enforce_sorted)
    with torch.no_grad():
        got, expected = our_layer(layer)(packed), layer(packed)
    y, y_ = (pad_packed_sequence(out)[0] for out, _ in (got, expected))
    for a, b in zip([y, *flat(got[1])], [y_, *flat(expected[1])], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_lengths(kind: str, backend: str) -> None:
    """The two ways to say a ragged batch agree with each other, in the order of the caller's rows."""
    case = Case(kind, T=9, B=7, H=33, num_layers=2, bidirectional=True)
    layer = our_layer(case.torch_layer())
    x, hx = case.inputs()
    lengths = make_lengths("ragged", 9, 7)
    with torch.no_grad():
        packed, state = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        y, state_ = layer(x, hx, lengths=lengths)
    unpacked, lengths_ = pad_packed_sequence(packed, total_length=9)
    assert torch.equal(lengths_, lengths)
    for a, b in zip([unpacked, *flat(state)], [y, *flat(state_)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_pass_packed_sequences_on(kind: str, backend: str) -> None:
    """One layer's packed output is the next one's input, without unpacking."""
    case = Case(kind, I=15, H=15, B=5)
    first, second = case.torch_layer(), Case(kind, I=15, H=15, B=5, seed=1).torch_layer()

    def call(layers: list[nn.RNNBase]):
        def run(layer: nn.RNNBase, x: Tensor, hx: State | None) -> tuple[Tensor, State]:
            following = layers[0].to(x.dtype)
            packed = pack_padded_sequence(x, [7, 5, 4, 4, 1])
            out, _ = following(layer(packed, hx)[0])
            padded, _ = pad_packed_sequence(out, total_length=case.T)
            return padded, following(out)[1]

        return run

    check_parity(
        first,
        our_layer(first),
        *case.inputs(),
        case,
        call=call([our_layer(second)]),
        their_call=call([second]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hand_made_packed_sequence(kind: str, backend: str) -> None:
    """A PackedSequence whose data is strided, as a slice of a wider tensor is."""
    case = Case(kind, I=5, H=17)
    layer = case.torch_layer()
    wide = torch.randn(7, 12)
    packed = PackedSequence(wide[:, 3:8], torch.tensor([3, 2, 1, 1]))
    assert not packed.data.is_contiguous()
    with torch.no_grad():
        out, state = our_layer(layer)(packed)
        out_, state_ = layer(packed)
    for a, b in zip([out.data, *flat(state)], [out_.data, *flat(state_)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_packed_layers(kind: str, backend: str) -> None:
    """Dropping everything is the one dropout without chance."""
    case = Case(kind, num_layers=2, bidirectional=True)
    layer = case.torch_layer()
    layer.dropout = 1.0
    call = through_packing(torch.tensor([7, 2, 4]), enforce_sorted=False)
    got = check_parity(layer, our_layer(layer), *case.inputs(), case, call, call)
    assert (got["d weight_ih_l1"] == 0).all()
