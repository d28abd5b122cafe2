"""The Transformer's layers beside torch.nn's, and what they do beyond: lengths, nested batches, caches."""

import copy
import inspect
import itertools
import pickle
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SHORT, pairwise, unique
from compare import Results, agree, check_parity, evaluate, same_bits
from torch import Tensor, nn

import seqkern
from seqkern.nn import transformer

B, N, E, L, S = 3, 4, 16, 6, 9  # L steps of src or tgt, S of memory
CLASSES = {
    "encoder_layer": (seqkern.TransformerEncoderLayer, nn.TransformerEncoderLayer),
    "decoder_layer": (seqkern.TransformerDecoderLayer, nn.TransformerDecoderLayer),
    "encoder": (seqkern.TransformerEncoder, nn.TransformerEncoder),
    "decoder": (seqkern.TransformerDecoder, nn.TransformerDecoder),
    "transformer": (seqkern.Transformer, nn.Transformer),
}
KINDS = tuple(CLASSES)
each_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),  # torch.nn.Transformer's
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "callable": torch.tanh}


@pytest.fixture(autouse=True)
def _no_fast_path() -> Iterator[None]:
    """torch.nn's own eval-mode fast path changes results."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def make(kind: str, which: int, **options: Any) -> nn.Module:
    """The module of a kind, which=0 ours, 1 torch.nn's: two layers in a stack."""
    cls = CLASSES[kind][which]
    options = dict(dropout=0.0) | options
    if kind == "transformer":
        return cls(E, N, 2, 1, 20, **options)
    if kind.endswith("layer"):
        return cls(E, N, 20, **options)
    layer = CLASSES[f"{kind}_layer"][which](E, N, 20, **options)
    norm = nn.LayerNorm(E, bias=options.get("bias", True), dtype=options.get("dtype"))
    return cls(layer, 2, norm) if kind == "decoder" else cls(layer, 2, norm, enable_nested_tensor=False)


def with_random_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Layers of a stack start as copies of each other, biases as zeros: here all differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            numbers = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weight.copy_(centre + numbers * (0.3 if weight.dim() == 1 else weight.shape[1] ** -0.5))
    return module


def ours_like(theirs: nn.Module, kind: str, **options: Any) -> nn.Module:
    ours = make(kind, 0, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(theirs.training)


def causal_mask(size: int, dtype: torch.dtype) -> Tensor:
    if dtype is torch.bool:
        return torch.ones(size, size, dtype=torch.bool).triu(1)
    return nn.Transformer.generate_square_subsequent_mask(size, dtype=dtype)


# ---- parity with torch.nn ----------------------------------------------------------------------------------

MASKS = ("none", "causal bool", "causal float", "bool", "float", "bool per head", "float per head")
PADDINGS = ("none", "bool right", "bool left", "bool holes", "float right", "float numbers")


@dataclass(frozen=True)
class Case:
    kind: str
    batch_first: bool = True
    norm_first: bool = False
    bias: bool = True
    activation: str = "relu"
    mask: str = "none"
    padding: str = "none"
    memory_mask: str = "none"
    memory_padding: str = "none"
    hint: bool = False  # is_causal=True beside a causal mask
    batched: bool = True
    mode: str = "train"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.kind, SHORT[self.dtype], self.activation, self.mode, f"mask={self.mask}"]
        words += [f"padding={self.padding}", f"memory={self.memory_mask},{self.memory_padding}"]
        words += [name for name in ("batch_first", "norm_first", "hint") if getattr(self, name)]
        words += ["nobias"] * (not self.bias) + ["unbatched"] * (not self.batched)
        return "-".join(words).replace(" ", "_")

    @property
    def legal(self) -> "Case":
        """Nearest case that torch.nn takes without NaN, without duplicates."""
        case = self
        if "encoder" in case.kind:
            case = replace(case, memory_mask="none", memory_padding="none")
        if not case.mask.startswith("causal"):
            case = replace(case, hint=False)
        elif case.padding in ("bool left", "bool holes"):  # the first rows would see nothing
            case = replace(case, padding="bool right")
        if case.dtype is torch.bfloat16 and case.activation == "relu":  # rounding decides signs at the kink
            case = replace(case, activation="gelu")
        return case

    @property
    def options(self) -> dict[str, Any]:
        names = ("batch_first", "norm_first", "bias", "dtype")
        return {name: getattr(self, name) for name in names} | {"activation": ACTIVATIONS[self.activation]}

    def modules(self) -> tuple[nn.Module, nn.Module]:
        theirs = with_random_weights(make(self.kind, 1, **self.options)).train(self.mode == "train")
        return ours_like(theirs, self.kind, **self.options), theirs

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

        def batch(steps: int) -> Tensor:
            x = torch.randn(B, steps, E, generator=generator, dtype=torch.float64).to(self.dtype)
            if not self.batched:
                return x[0]
            return x if self.batch_first else x.transpose(0, 1).contiguous()

        return batch(L), None if "encoder" in self.kind else batch(S)

    def attention_mask(self, kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        if kind == "none":
            return None
        if kind.startswith("causal"):
            return causal_mask(rows, torch.bool if "bool" in kind else dtype)
        generator = torch.Generator().manual_seed(rows * columns)
        shape: tuple[int, ...] = (rows, columns)
        if "per head" in kind:
            shape = (N * (B if self.batched else 1), *shape)
        mask = torch.rand(shape, generator=generator) < 0.3
        mask[..., 0] = mask[..., -1] = False  # so that any padding leaves a key
        if kind.startswith("bool"):
            return mask
        numbers = torch.randint(-8, 8, shape, generator=generator).to(dtype) / 4
        return numbers.masked_fill(mask, -torch.inf)

    def key_padding(self, kind: str, size: int, dtype: torch.dtype) -> Tensor | None:
        if kind == "none":
            return None
        mask = torch.zeros(B, size, dtype=torch.bool)
        for b, count in enumerate((2, 0, size - 1)):
            mask[b] = torch.arange(size) >= size - count
            if kind == "bool left":
                mask[b] = mask[b].flip(0)
        if kind == "bool holes":
            mask = torch.arange(size).repeat(B, 1) % 2 == 1
            mask[:, -1] = False
        mask = mask if self.batched else mask[0]
        if kind.startswith("bool"):
            return mask
        if kind == "float right":
            return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)
        return (torch.arange(mask.numel()).view(mask.shape) % 5).to(dtype) / 4

    def call(self, layer: nn.Module, x: Tensor, memory: Tensor | None) -> Tensor:
        dtype = x.dtype
        mask = self.attention_mask(self.mask, L, L, dtype)
        padding = self.key_padding(self.padding, L, dtype)
        causal = {"is_causal": True} if self.hint else {}
        if self.kind == "encoder_layer":
            return layer(x, src_mask=mask, src_key_padding_mask=padding, **causal)
        if self.kind == "encoder":
            return layer(x, mask=mask, src_key_padding_mask=padding, **causal)
        keywords = {f"tgt_{name}": value for name, value in causal.items()}
        keywords |= dict(
            tgt_mask=mask,
            tgt_key_padding_mask=padding,
            memory_mask=self.attention_mask(self.memory_mask, L, S, dtype),
            memory_key_padding_mask=self.key_padding(self.memory_padding, S, dtype),
        )
        if self.kind != "transformer":
            return layer(x, memory, **keywords)
        keywords |= dict(
            src_mask=self.attention_mask("float" if self.mask == "bool" else "none", S, S, dtype),
            src_key_padding_mask=keywords["memory_key_padding_mask"],
        )
        return layer(memory, x, **keywords)


FACTORS = dict(
    batch_first=(False, True),
    norm_first=(False, True),
    bias=(True, False),
    activation=tuple(ACTIVATIONS),
    mask=MASKS,
    padding=PADDINGS,
    hint=(False, True),
    batched=(True, False),
    mode=("train", "eval"),
    dtype=(torch.float32, torch.float64, torch.bfloat16),
)
MEMORY = dict(memory_mask=("none", *MASKS[3:]), memory_padding=PADDINGS)


def parity_cases(seeds: range) -> list[Case]:
    found = []
    for kind, seed in itertools.product(KINDS, seeds):
        factors = FACTORS | ({} if "encoder" in kind else MEMORY)
        rows = pairwise(factors, seed)
        if kind == "transformer" and seeds == range(1):  # made of what the others test
            rows = random.Random(0).sample(rows, 20)
        found += [Case(kind, **row).legal for row in rows]
    return unique(found)


PARITY = parity_cases(range(1))
MORE = [case for case in parity_cases(range(1, 6)) if case not in PARITY]


@pytest.mark.parametrize("case", PARITY, ids=str)
def test_parity(case: Case) -> None:
    ours, theirs = case.modules()
    check_parity(theirs, ours, *case.inputs(), case, case.call, case.call)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_parity_more(case: Case) -> None:
    test_parity(case)


@each_kind
def test_eval_without_grad(kind: str) -> None:
    """No other path is taken: the same bits as with gradients and in train mode, at full length."""
    case = Case(kind, padding="bool right", memory_padding="bool right").legal
    ours, theirs = case.modules()
    inputs = case.inputs()
    expected = case.call(ours, *inputs)
    torch.testing.assert_close(expected, case.call(theirs, *inputs), rtol=1e-5, atol=1e-5)
    torch.backends.mha.set_fastpath_enabled(True)
    ours.eval()
    with torch.no_grad():
        got = case.call(ours, *inputs)
    with torch.inference_mode():
        again = case.call(ours, *inputs)
    assert torch.equal(got, expected) and torch.equal(again, expected)


def test_never_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.nn's fast path")

    for name in (
        "_transformer_encoder_layer_fwd",
        "_nested_tensor_from_mask",
        "_native_multi_head_attention",
    ):
        monkeypatch.setattr(torch, name, refuse)
    torch.backends.mha.set_fastpath_enabled(True)
    layer = seqkern.TransformerEncoderLayer(E, N, 20, batch_first=True)
    encoder = seqkern.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 4 + [True] * 2] * 2)
    with torch.no_grad():
        assert encoder(torch.randn(2, 6, E), src_key_padding_mask=padding).shape == (2, 6, E)
        assert encoder(torch.randn(2, 6, E)).shape == (2, 6, E)
        assert layer.eval()(torch.randn(2, 6, E), src_key_padding_mask=padding).shape == (2, 6, E)
        model = seqkern.Transformer(E, N, 1, 1, 20, batch_first=True).eval()
        model(torch.randn(2, 6, E), torch.randn(2, 5, E), src_key_padding_mask=padding)


@pytest.mark.parametrize("norm_first", [False, True])
def test_fully_masked_rows_are_finite(norm_first: bool) -> None:
    """Left padding and a causal mask: torch.nn gives NaN."""
    layer = seqkern.TransformerEncoderLayer(E, N, 20, 0.0, batch_first=True, norm_first=norm_first)
    padding = torch.tensor([[True, True, False, False], [False] * 4])
    x = torch.randn(2, 4, E, requires_grad=True)
    y = layer(x, src_key_padding_mask=padding, is_causal=True)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    alone = layer(x[:1, 2:], is_causal=True)
    torch.testing.assert_close(y[:1, 2:], alone)


# ---- the module --------------------------------------------------------------------------------------------

CONSTRUCTIONS = [
    dict(zip(("batch_first", "norm_first", "bias", "dtype", "activation"), values, strict=True))
    for values in itertools.product(
        (False, True), (False, True), (False, True), (None, torch.float64), ("relu", "gelu")
    )
]


@each_kind
def test_construction(kind: str) -> None:
    """The same random numbers are drawn in the same order; the same names; no warnings."""
    for options in CONSTRUCTIONS:
        made = []
        for which in (1, 0):
            torch.manual_seed(5)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if which else "error")
                module = make(kind, which, **options)
            made += [module, torch.rand(1).item()]
        theirs, next_theirs, ours, next_ours = made
        assert next_ours == next_theirs
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for (name, mine), (name_, its) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert name == name_ and mine.dtype == its.dtype and torch.equal(mine, its), name
        assert repr(ours).replace("MultiHead", "Multihead") == repr(theirs)


@each_kind
def test_is_one(kind: str) -> None:
    ours, theirs = CLASSES[kind]
    assert issubclass(ours, theirs) and ours.__name__ == theirs.__name__
    assert getattr(seqkern.nn, ours.__name__) is ours
    module = make(kind, 0)
    for child in module.modules():
        if isinstance(child, nn.MultiheadAttention):
            assert type(child) is seqkern.MultiHeadAttention and child.num_kv_heads == N
        for cls, base in CLASSES.values():
            assert not isinstance(child, base) or type(child) is cls


@each_kind
def test_signatures(kind: str) -> None:
    ours, theirs = CLASSES[kind]

    def positional(function: Callable) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]

    assert positional(ours.__init__) == positional(theirs.__init__)
    assert positional(ours.forward) == positional(theirs.forward)


@each_kind
def test_state_dict_both_ways(kind: str) -> None:
    ours, theirs = make(kind, 0), with_random_weights(make(kind, 1))
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    fresh = make(kind, 1)
    fresh.load_state_dict(ours.state_dict())
    for mine, its in zip(fresh.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its)


@each_kind
def test_copy_and_pickle(kind: str) -> None:
    case = Case(kind, mask="causal bool", padding="bool right")
    ours, _ = case.modules()
    inputs = case.inputs()
    expected = case.call(ours, *inputs)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert torch.equal(case.call(twin, *inputs), expected)


def test_custom_parts() -> None:
    encoder, decoder = make("encoder", 0), make("decoder", 0)
    model = seqkern.Transformer(E, N, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder and model.decoder is decoder
    theirs = nn.Transformer(E, N, custom_encoder=make("encoder", 1), custom_decoder=make("decoder", 1))
    theirs.load_state_dict(model.state_dict())
    src, tgt = torch.randn(S, B, E), torch.randn(L, B, E)
    torch.testing.assert_close(model(src, tgt), theirs(src, tgt), rtol=1e-5, atol=1e-5)


def test_a_stack_of_foreign_layers() -> None:
    """torch.nn's layers in our stack, and our layers in torch.nn's."""
    theirs = make("encoder", 1, batch_first=True)
    x, mask = torch.randn(B, L, E), causal_mask(L, torch.float32)
    mixed = seqkern.TransformerEncoder(nn.TransformerEncoderLayer(E, N, 20, 0.0, batch_first=True), 2)
    mixed.norm = nn.LayerNorm(E)
    mixed.load_state_dict(theirs.state_dict())
    reverse = nn.TransformerEncoder(make("encoder_layer", 0, batch_first=True), 2, nn.LayerNorm(E))
    reverse.load_state_dict(theirs.state_dict())
    expected = theirs(x, mask)
    torch.testing.assert_close(mixed(x, mask), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reverse(x, mask), expected, rtol=1e-5, atol=1e-5)


def test_overridden_blocks_are_used() -> None:
    """Subclasses that replace torch.nn's blocks keep working."""

    class Layer(seqkern.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False, **options) -> Tensor:
            return 2 * super()._sa_block(x, attn_mask, key_padding_mask, is_causal, **options)

    layer = Layer(E, N, 20, 0.0, batch_first=True, norm_first=True)
    x, lengths = torch.randn(B, L, E), torch.tensor([6, 2, 4])
    y = layer.norm1(x)
    expected = x + 2 * layer.self_attn(y, y, y, lengths=lengths)[0]
    got = layer(x, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[b, :length], expected[b, :length])


# ---- what attention is told --------------------------------------------------------------------------------


def told(module: nn.Module) -> list[dict[str, Any]]:
    """The keywords of every call of an attention in the module, as they come."""
    calls: list[dict[str, Any]] = []
    for child in module.modules():
        if isinstance(child, nn.MultiheadAttention):
            child.register_forward_pre_hook(
                lambda m, inputs, keywords: calls.append(keywords), with_kwargs=True
            )
    return calls


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_causal_masks_are_detected(dtype: torch.dtype) -> None:
    encoder, decoder = make("encoder", 0), make("decoder", 0)
    in_encoder, in_decoder = told(encoder), told(decoder)
    x = torch.randn(L, B, E)
    mask = causal_mask(L, dtype)

    def seen(mask: Tensor, **given: Any) -> tuple[bool, bool]:
        in_encoder.clear()
        in_decoder.clear()
        encoder(x, mask, **given)
        decoder(x, x, mask, **{f"tgt_{name}": value for name, value in given.items()})
        return in_encoder[0]["is_causal"], in_decoder[0]["is_causal"]

    assert seen(mask) == (True, True)
    assert seen(mask, is_causal=False) == (False, False)
    other = mask.clone()
    other[3, 1] = 1
    assert seen(other) == (False, False)
    assert seen(mask.expand(B * N, L, L)) == (False, False)  # torch.nn looks at 2-D masks only
    if dtype is not torch.bool:
        assert seen(mask.requires_grad_()) == (False, False)  # it wants a gradient


def test_bool_masks_stay_bool() -> None:
    model = seqkern.Transformer(E, N, 1, 1, 20, batch_first=True)
    calls = told(model)
    src, tgt = torch.randn(B, S, E), torch.randn(B, L, E)
    masks = dict(src_mask=(S, S), tgt_mask=(L, L), memory_mask=(L, S))
    masks |= dict(src_key_padding_mask=(B, S), tgt_key_padding_mask=(B, L), memory_key_padding_mask=(B, S))
    model(src, tgt, **{name: torch.zeros(shape, dtype=torch.bool) for name, shape in masks.items()})
    assert len(calls) == 3
    for keywords in calls:
        assert keywords["attn_mask"].dtype is torch.bool and keywords["key_padding_mask"].dtype is torch.bool
        assert keywords["need_weights"] is False


@pytest.mark.parametrize("padding", ["none", "bool right", "float right"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@each_kind
def test_causal_without_a_mask(kind: str, padding: str, mode: str) -> None:
    case = Case(kind, padding=padding, mask="causal bool", mode=mode)
    ours, theirs = case.modules()

    def call(layer: nn.Module, x: Tensor, memory: Tensor | None) -> Tensor:
        mask = case.key_padding(padding, L, x.dtype)
        if "encoder" in kind:
            return layer(x, src_key_padding_mask=mask, is_causal=True)
        inputs = (memory, x) if kind == "transformer" else (x, memory)
        return layer(*inputs, tgt_key_padding_mask=mask, tgt_is_causal=True)

    x, memory = case.inputs()
    check_parity(theirs, ours, x, memory, case, call, case.call)


def test_memory_is_causal_without_a_mask() -> None:
    layer = make("decoder_layer", 0, batch_first=True)
    tgt, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    mask = torch.ones(L, S, dtype=torch.bool).triu(1)
    torch.testing.assert_close(
        layer(tgt, memory, memory_is_causal=True), layer(tgt, memory, memory_mask=mask)
    )


# ---- lengths -----------------------------------------------------------------------------------------------

LENGTHS = {"src": (4, 6, 1, 0), "tgt": (4, 6, 1, 0), "memory": (9, 3, 1, 5)}


@pytest.fixture(params=["packed", "padded"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How padding is left out: "padded" is what a GPU and torch.compile get."""
    if request.param == "padded":
        monkeypatch.setattr(transformer, "_may_look", lambda x: False)
    return request.param


def with_lengths(kind: str, causal: bool, **changes: Any) -> Callable[..., Tensor]:
    """A call with the lengths above."""

    def call(layer: nn.Module, x: Tensor, memory: Tensor | None = None) -> Tensor:
        src, tgt, mem = (torch.tensor(LENGTHS[name]) for name in ("src", "tgt", "memory"))
        if "encoder" in kind:
            return layer(x, **(dict(lengths=src, is_causal=causal) | changes))
        if kind == "transformer":
            lengths = dict(src_lengths=mem, tgt_lengths=tgt, tgt_is_causal=causal)
            return layer(memory, x, **(lengths | changes))
        lengths = dict(tgt_lengths=tgt, memory_lengths=mem, tgt_is_causal=causal)
        return layer(x, memory, **(lengths | changes))

    return call


def one_by_one(kind: str, causal: bool) -> Callable[..., Tensor]:
    """The same, each row alone without its padding."""

    def call(layer: nn.Module, x: Tensor, memory: Tensor | None = None) -> Tensor:
        batch = 0 if batch_first(layer) else 1
        rows = []
        for b, (length, mem) in enumerate(zip(LENGTHS["src"], LENGTHS["memory"], strict=True)):
            own = x.select(batch, b)[:length].unsqueeze(batch)
            if length == 0:
                y = own
            elif "encoder" in kind:
                y = layer(own, is_causal=causal)
            else:
                other = memory.select(batch, b)[:mem].unsqueeze(batch)
                inputs = (other, own) if kind == "transformer" else (own, other)
                y = layer(*inputs, tgt_is_causal=causal)
            rows.append(F.pad(y.select(batch, 0), (0, 0, 0, L - length)))
        return torch.stack(rows, batch)

    return call


def batch_first(module: nn.Module) -> bool:
    return next(m for m in module.modules() if isinstance(m, nn.MultiheadAttention)).batch_first


def padded_batch(kind: str, first: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    x, memory = torch.randn(4, L, E, dtype=dtype), torch.randn(4, S, E, dtype=dtype)
    if not first:
        x, memory = x.transpose(0, 1).contiguous(), memory.transpose(0, 1).contiguous()
    return x, None if "encoder" in kind else memory


def padding_of(name: str, x: Tensor, first: bool) -> Tensor:
    """[B, L, 1] or [L, B, 1], True beyond a row's length."""
    size = x.shape[1 if first else 0]
    mask = torch.arange(size) >= torch.tensor(LENGTHS[name])[:, None]
    return (mask if first else mask.T).unsqueeze(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@each_kind
def test_lengths(kind: str, norm_first: bool, first: bool, causal: bool, route: str) -> None:
    """Outputs and every gradient as of each row alone; zero beyond."""
    options = dict(norm_first=norm_first, batch_first=first, dtype=torch.float64)
    ours = with_random_weights(make(kind, 0, **options))
    x, memory = padded_batch(kind, first)
    got = evaluate(ours, x, memory, call=with_lengths(kind, causal))
    expected = evaluate(ours, x, memory, call=one_by_one(kind, causal))
    agree(got, expected, 1e-12, f"{kind} {route}")
    assert (got["y"].masked_select(padding_of("src", x, first)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_kind
def test_lengths_in_lower_precision(kind: str, dtype: torch.dtype, route: str) -> None:
    ours = with_random_weights(make(kind, 0, batch_first=True, dtype=dtype))
    x, memory = padded_batch(kind, True, dtype)
    got, expected = with_lengths(kind, True)(ours, x, memory), one_by_one(kind, True)(ours, x, memory)
    assert got.dtype is dtype
    near = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(got, expected, rtol=near, atol=near)


@pytest.mark.parametrize("value", ["nan", "inf", "largest"])
@pytest.mark.parametrize("norm_first", [False, True])
@each_kind
def test_padding_never_leaks(kind: str, norm_first: bool, value: str, route: str) -> None:
    """Whatever padding holds, and whatever a loss sends back there, outputs and gradients keep their bits."""
    ours = with_random_weights(make(kind, 0, norm_first=norm_first, batch_first=True))
    x, memory = padded_batch(kind, True, torch.float32)
    number = torch.finfo(torch.float32).max if value == "largest" else float(value)

    def results(filling: float, back: float) -> Results:
        inputs = [x.masked_fill(padding_of("src", x, True), filling)]
        if memory is not None:
            inputs.append(memory.masked_fill(padding_of("memory", memory, True), filling))
        inputs = [t.requires_grad_() for t in inputs]
        y = with_lengths(kind, True)(ours, *inputs)
        generator = torch.Generator().manual_seed(0)
        dy = torch.randn(y.shape, generator=generator).masked_fill(padding_of("src", y, True), back)
        wanted = dict(zip(("d x", "d memory"), inputs, strict=False)) | dict(ours.named_parameters())
        grads = torch.autograd.grad(y, list(wanted.values()), dy)
        return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))

    expected, got = results(0.0, 0.0), results(number, number)
    assert all(tensor.isfinite().all() for tensor in expected.values())
    same_bits(got, expected, f"{kind} {route} {value}")
    assert (got["d x"].masked_select(padding_of("src", x, True)) == 0).all()


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["encoder_layer", "decoder_layer", "encoder", "decoder"])
def test_masked_padding_never_leaks(kind: str, first: bool, floating: bool, route: str) -> None:
    """With padding masks in place of lengths, too: NaN there reaches no valid row and no gradient."""
    ours = with_random_weights(make(kind, 0, batch_first=first))
    x, memory = padded_batch(kind, first, torch.float32)

    def results(filling: float) -> Results:
        padding = padding_of("src", x, first)
        inputs = [x.masked_fill(padding, filling)]
        masks = [padding.squeeze(-1) if first else padding.squeeze(-1).T]
        if memory is not None:
            padding = padding_of("memory", memory, first)
            inputs.append(memory.masked_fill(padding, filling))
            masks.append(padding.squeeze(-1) if first else padding.squeeze(-1).T)
        inputs = [t.requires_grad_() for t in inputs]
        if floating:
            masks = [torch.zeros(m.shape).masked_fill(m, -torch.inf) for m in masks]
        names = ("src",) if memory is None else ("tgt", "memory")
        y = ours(
            *inputs, **{f"{n}_key_padding_mask": m for n, m in zip(names, masks, strict=True)}
        ).masked_fill(padding_of("src", x, first), 0)
        wanted = dict(zip(("d x", "d memory"), inputs, strict=False)) | dict(ours.named_parameters())
        grads = torch.autograd.grad(y.square().sum(), list(wanted.values()))
        return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))

    expected, got = results(0.0), results(float("nan"))
    assert all(tensor.isfinite().all() for tensor in got.values())
    agree(got, expected, 1e-5, f"{kind} {route}")


@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_padding_is_left_out_of_everything(kind: str) -> None:
    """Rows are gathered once: each feed-forward and each norm sees the valid rows only."""
    ours = make(kind, 0, batch_first=True)
    seen = []
    for child in ours.modules():
        if isinstance(child, (nn.LayerNorm, nn.Linear)):
            child.register_forward_pre_hook(lambda m, inputs: seen.append(tuple(inputs[0].shape)))
    with_lengths(kind, True)(ours, *padded_batch(kind, True, torch.float32))
    allowed = {sum(LENGTHS["src"]), sum(LENGTHS["memory"])}
    assert seen and all(len(shape) == 2 and shape[0] in allowed for shape in seen), seen


@each_kind
def test_full_lengths_cost_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer._Rows, "gather", None)
    ours = make(kind, 0, batch_first=True)
    x, memory = padded_batch(kind, True, torch.float32)
    full, of_memory = torch.full((4,), L), torch.full((4,), S)
    if "encoder" in kind:
        assert torch.equal(ours(x, lengths=full), ours(x))
    elif kind == "transformer":
        assert torch.equal(ours(memory, x, src_lengths=of_memory, tgt_lengths=full), ours(memory, x))
    else:
        assert torch.equal(ours(x, memory, tgt_lengths=full, memory_lengths=of_memory), ours(x, memory))


@pytest.mark.parametrize("kind", ["encoder_layer", "encoder", "decoder_layer", "decoder"])
def test_lengths_beside_masks(kind: str, route: str) -> None:
    """A mask that is not causal keeps the batch padded."""
    ours = with_random_weights(make(kind, 0, batch_first=True, dtype=torch.float64))
    x, memory = padded_batch(kind, True)
    mask = torch.rand(L, L) < 0.3
    mask.fill_diagonal_(False)
    padding = padding_of("src", x, True).squeeze(-1)
    lengths = torch.tensor(LENGTHS["src"])
    if "encoder" in kind:
        got = ours(x, mask, lengths=lengths)
        expected = ours(x, mask, src_key_padding_mask=padding)
    else:
        of_memory = torch.tensor(LENGTHS["memory"])
        other = padding_of("memory", memory, True).squeeze(-1)
        got = ours(x, memory, mask, tgt_lengths=lengths, memory_lengths=of_memory)
        expected = ours(x, memory, mask, tgt_key_padding_mask=padding, memory_key_padding_mask=other)
        mixed = ours(x, memory, mask, tgt_lengths=lengths, memory_key_padding_mask=other)
        torch.testing.assert_close(mixed, got)
        mixed = ours(x, memory, mask, tgt_key_padding_mask=padding, memory_lengths=of_memory)
        torch.testing.assert_close(mixed.masked_fill(padding[..., None], 0), got)
    assert (got[padding] == 0).all()
    torch.testing.assert_close(got, expected.masked_fill(padding[..., None], 0))


def test_lengths_of_one_side_only(route: str) -> None:
    decoder = with_random_weights(make("decoder", 0, dtype=torch.float64))
    tgt, memory = padded_batch("decoder", False)
    padding = padding_of("memory", memory, False).squeeze(-1).T
    got = decoder(tgt, memory, memory_lengths=torch.tensor(LENGTHS["memory"]), tgt_is_causal=True)
    torch.testing.assert_close(got, decoder(tgt, memory, memory_key_padding_mask=padding, tgt_is_causal=True))
    lengths = torch.tensor(LENGTHS["tgt"])
    got = decoder(tgt, memory, tgt_lengths=lengths)
    padding = padding_of("tgt", tgt, False)
    expected = decoder(tgt, memory, tgt_key_padding_mask=padding.squeeze(-1).T)
    torch.testing.assert_close(got, expected.masked_fill(padding, 0))


def test_rows_without_memory(route: str) -> None:
    """A row of memory of length 0 gives zero attention: out_proj's bias, whatever memory holds."""
    layer = with_random_weights(make("decoder_layer", 0, batch_first=True, norm_first=True))
    tgt, memory = padded_batch("decoder_layer", True, torch.float32)
    memory[2] = float("nan")
    got = layer(tgt, memory, memory_lengths=torch.tensor([9, 3, 0, 5]))
    x = tgt[2:3] + layer.self_attn(*[layer.norm1(tgt[2:3])] * 3)[0]
    x = x + layer.multihead_attn.out_proj.bias
    torch.testing.assert_close(got[2:3], x + layer._ff_block(layer.norm3(x)))
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_transformer_with_lengths_and_a_memory_mask(route: str) -> None:
    """memory_key_padding_mask stands in for src_lengths in the decoder."""
    model = with_random_weights(make("transformer", 0, batch_first=True))
    tgt, src = padded_batch("transformer", True, torch.float32)
    lengths = torch.tensor(LENGTHS["memory"])
    mask = torch.arange(S) >= lengths[:, None]
    torch.testing.assert_close(
        model(src, tgt, src_lengths=lengths, memory_key_padding_mask=mask),
        model(src, tgt, src_lengths=lengths),
    )


@pytest.mark.parametrize("lengths", [(0, 0, 0, 0), (0, 1, 0, 0), (6, 6, 6, 5)])
@pytest.mark.parametrize("kind", ["encoder_layer", "encoder"])
def test_awkward_lengths(kind: str, lengths: tuple[int, ...], route: str) -> None:
    ours = make(kind, 0, batch_first=True)
    x = torch.randn(4, L, E, requires_grad=True)
    y = ours(x, lengths=torch.tensor(lengths, dtype=torch.int32))
    y.sum().backward()
    for b, length in enumerate(lengths):
        assert (y[b, length:] == 0).all() and (x.grad[b, length:] == 0).all()
        if length:
            torch.testing.assert_close(y[b, :length], ours(x[b : b + 1, :length])[0])
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("shape", [(0, L, E), (B, 0, E), (0, 0, E)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    ours, theirs = make("encoder", 0, batch_first=True), make("encoder", 1, batch_first=True)
    x = torch.randn(shape)
    assert ours(x).shape == theirs(x).shape == shape
    assert ours(x, lengths=torch.zeros(shape[0], dtype=torch.int64)).shape == shape


@each_kind
def test_wrong_lengths(kind: str) -> None:
    ours = make(kind, 0, batch_first=True)
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    given = dict(encoder_layer="lengths", encoder="lengths", transformer="src_lengths")
    name = given.get(kind, "memory_lengths")
    inputs = (x,) if "encoder" in kind else (memory, x) if kind == "transformer" else (x, memory)
    checked = "lengths" if kind == "transformer" else name
    for bad in ([1, 2], [1, 2, 99], [-1, 2, 3], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match=checked):
            ours(*inputs, **{name: torch.tensor(bad)})
    with pytest.raises(ValueError, match=checked):
        ours(*(t[0] for t in inputs), **{name: torch.tensor([1])})
    mask = {"lengths": "src", "src_lengths": "src"}.get(name, "memory") + "_key_padding_mask"
    padding = torch.zeros(B, S if kind not in ("encoder_layer", "encoder") else L, dtype=torch.bool)
    with pytest.raises(ValueError, match="key_padding_mask"):
        ours(*inputs, **{name: torch.tensor([1, 2, 3]), mask: padding})


# ---- packed and nested -------------------------------------------------------------------------------------


def jagged(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nested.nested_tensor(
        [torch.randn(size, E, dtype=dtype) for size in sizes], layout=torch.jagged
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@each_kind
def test_nested(kind: str, norm_first: bool, causal: bool) -> None:
    options = dict(batch_first=True, norm_first=norm_first, dtype=torch.float64)
    ours = with_random_weights(make(kind, 0, **options))
    x, memory = jagged((4, 6, 1)), jagged((9, 3, 5))
    x.requires_grad_()
    causal_name = "is_causal" if "encoder" in kind else "tgt_is_causal"
    inputs = (x,) if "encoder" in kind else (memory, x) if kind == "transformer" else (x, memory)
    y = ours(*inputs, **{causal_name: causal})
    assert y.is_nested and y.layout is torch.jagged
    parts = [t.unbind() for t in inputs]
    for b, got in enumerate(y.unbind()):
        expected = ours(*(part[b].unsqueeze(0) for part in parts), **{causal_name: causal})[0]
        torch.testing.assert_close(got, expected)
    (x + y).values().sum().backward()  # one ragged size
    assert all(p.grad is not None for p in ours.parameters())


def test_nested_with_gaps() -> None:
    encoder = make("encoder", 0, batch_first=True)
    values = torch.randn(10, E)
    x = torch.nested.nested_tensor_from_jagged(
        values, offsets=torch.tensor([0, 5, 10]), lengths=torch.tensor([3, 4])
    )
    first, second = encoder(x).unbind()
    torch.testing.assert_close(first, encoder(values[None, :3])[0])
    torch.testing.assert_close(second, encoder(values[None, 5:9])[0])


def test_packed_rows() -> None:
    encoder, decoder = make("encoder", 0, dtype=torch.float64), make("decoder", 0, dtype=torch.float64)
    x, cu, memory_cu = torch.randn(11, E).double(), torch.tensor([0, 4, 4, 11]), torch.tensor([0, 2, 3, 7])
    memory = torch.randn(7, E).double()
    y = encoder(x, is_causal=True, cu_seqlens=cu, max_seqlen=7)
    z = decoder(x, memory, tgt_is_causal=True, cu_seqlens=cu, memory_cu_seqlens=memory_cu)
    for a, b, c, d in ((0, 4, 0, 2), (4, 11, 3, 7)):
        torch.testing.assert_close(y[a:b], encoder(x[a:b], is_causal=True))
        torch.testing.assert_close(z[a:b], decoder(x[a:b], memory[c:d], tgt_is_causal=True))


def test_nested_and_packed_take_no_masks() -> None:
    encoder, decoder = make("encoder", 0), make("decoder", 0)
    nested, rows, cu = jagged((2, 3), torch.float32), torch.randn(5, E), torch.tensor([0, 2, 5])
    mask, lengths = torch.zeros(3, 3), torch.tensor([1, 2])
    for layer, x, extra in itertools.product(
        (encoder, encoder.layers[0]), (nested, rows), ({}, {"lengths": lengths})
    ):
        packed = {} if x.is_nested else {"cu_seqlens": cu}
        with pytest.raises(ValueError, match="expected None with"):
            layer(x, **(extra or {"src_key_padding_mask": mask}), **packed)
    for layer, extra in itertools.product(
        (decoder, decoder.layers[0]), ({"memory_mask": mask}, {"tgt_lengths": lengths})
    ):
        with pytest.raises(ValueError, match="expected None with nested"):
            layer(nested, nested, **extra)
        with pytest.raises(ValueError, match="expected None with packed"):
            layer(rows, rows, **extra, cu_seqlens=cu, memory_cu_seqlens=cu)
        with pytest.raises(ValueError, match="memory_cu_seqlens"):
            layer(rows, rows, cu_seqlens=cu)
    for layer in (decoder, decoder.layers[0]):
        with pytest.raises(ValueError, match="memory: expected a nested tensor"):
            layer(nested, torch.randn(2, 3, E))
        with pytest.raises(ValueError, match="tgt: expected a nested tensor"):
            layer(torch.randn(2, 3, E), nested)


# ---- caches ------------------------------------------------------------------------------------------------

CHUNKS = {"steps": (1,) * L, "chunks": (2, 1, 3), "prompt": (4, 1, 1)}


def steps_of(x: Tensor, sizes: tuple[int, ...], first: bool) -> tuple[Tensor, ...]:
    return x.split(sizes, 1 if first else 0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", ["encoder_layer", "encoder", "decoder_layer", "decoder"])
def test_stepwise_equals_full(kind: str, chunks: str, norm_first: bool, first: bool, grad: bool) -> None:
    options = dict(batch_first=first, norm_first=norm_first, dtype=torch.float64)
    ours = with_random_weights(make(kind, 0, **options)).eval()
    x, memory = padded_batch(kind, first)
    memory_padding = {}
    if memory is not None:
        lengths = torch.tensor(LENGTHS["memory"])
        memory_padding = {"memory_lengths": lengths}
        if chunks == "chunks":
            memory_padding = {
                "memory_key_padding_mask": torch.arange(S) >= lengths[:, None],
                "memory_is_causal": True,
            }
        memory = memory.masked_fill(padding_of("memory", memory, first), float("nan"))
    causal = {"is_causal" if memory is None else "tgt_is_causal": True}

    def full(layer: nn.Module, x: Tensor, memory: Tensor | None) -> Tensor:
        return layer(x, *[m for m in (memory,) if m is not None], **memory_padding, **causal)

    def stepwise(layer: nn.Module, x: Tensor, memory: Tensor | None) -> Tensor:
        cache, outputs = layer.new_cache(), []
        for step in steps_of(x, CHUNKS[chunks], first):
            others = () if "encoder" in kind else (memory if not outputs else None,)
            y, cache_ = layer(step, *others, cache=cache, **memory_padding, **causal)
            assert cache_ is cache
            outputs.append(y)
        assert cache.length == L
        return torch.cat(outputs, 1 if first else 0)

    if grad:
        got, expected = (evaluate(ours, x, memory, call=call) for call in (stepwise, full))
        agree(got, expected, 1e-12, kind)
    else:
        with torch.no_grad():
            torch.testing.assert_close(stepwise(ours, x, memory), full(ours, x, memory))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_stack_with_a_cache_is_causal_unless_told(kind: str) -> None:
    ours = make(kind, 0, batch_first=True).eval()
    x, memory = padded_batch(kind, True, torch.float32)
    memory = () if memory is None else (memory,)
    name = "is_causal" if kind == "encoder" else "tgt_is_causal"
    causal, free = ours(x, *memory, **{name: True}), ours(x, *memory)
    torch.testing.assert_close(ours(x, *memory, cache=ours.new_cache())[0], causal)
    torch.testing.assert_close(ours(x, *memory, cache=ours.new_cache(), **{name: False})[0], free)
    mask = causal_mask(L, torch.bool)
    cache = ours.new_cache()
    parts = [ours(x[:, a:b], *memory, mask[a:b, :b], cache=cache)[0] for a, b in ((0, 3), (3, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), causal)


def test_masks_behind_a_cache_are_detected() -> None:
    encoder = make("encoder", 0)
    calls = told(encoder)
    cache = encoder.new_cache()
    mask = causal_mask(L, torch.float32)
    x = torch.randn(L, B, E)
    for a, b in ((0, 2), (2, 5)):
        encoder(x[a:b], mask[a:b, :b], cache=cache)
    assert all(keywords["is_causal"] for keywords in calls)
    calls.clear()
    encoder(x[5:], torch.zeros(1, 6).masked_fill_(torch.arange(6) == 1, -torch.inf), cache=cache)
    assert not any(keywords["is_causal"] for keywords in calls)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "decoder_layer"])
def test_beams(kind: str, norm_first: bool) -> None:
    """After reordering, also to another number of rows, each beam goes on from its own past."""
    ours = make(kind, 0, batch_first=True, norm_first=norm_first, dtype=torch.float64).eval()
    x, memory = padded_batch(kind, True)
    lengths = torch.tensor(LENGTHS["memory"])
    first, second = torch.tensor([1, 1, 3, 0, 2, 0]), torch.tensor([5, 0, 0])
    name = "is_causal" if kind == "encoder" else "tgt_is_causal"

    def run(x: Tensor, index: Tensor, cache: Any = None) -> Any:
        others = () if memory is None else (memory[index],)
        padding = {} if memory is None else {"memory_lengths": lengths[index]}
        return ours(x, *others, **padding, **{name: True}, **({} if cache is None else {"cache": cache}))

    with torch.no_grad():
        cache = ours.new_cache()
        everyone = torch.arange(4)
        run(x[:, :3], everyone, cache)
        cache.reorder(first)
        then = torch.randn(6, 2, E, dtype=torch.float64)
        y, _ = run(then, first, cache)
        path = torch.cat([x[first, :3], then], 1)
        torch.testing.assert_close(y, run(path, first)[:, 3:])
        cache.reorder(second)
        last = torch.randn(3, 1, E, dtype=torch.float64)
        y, _ = run(last, first[second], cache)
        torch.testing.assert_close(y, run(torch.cat([path[second], last], 1), first[second])[:, 5:])


@pytest.mark.parametrize("kind", ["encoder_layer", "encoder", "decoder_layer", "decoder"])
@pytest.mark.parametrize("how", ["lengths", "left padding"])
def test_padded_prompts_with_a_cache(kind: str, how: str) -> None:
    """Lengths and masks are over all that the cache holds."""
    ours = with_random_weights(make(kind, 0, batch_first=True, dtype=torch.float64)).eval()
    x, memory = padded_batch(kind, True)
    others = () if memory is None else (memory,)
    causal = {"is_causal" if memory is None else "tgt_is_causal": True}
    if how == "lengths":
        lengths = torch.tensor([4, 6, 1, 2])
        padding = torch.arange(L) >= lengths[:, None]
        name = "lengths" if memory is None else "tgt_lengths"
        given = lambda b: {name: lengths.clamp(max=b)}  # noqa: E731
    else:
        padding = torch.arange(L) < torch.tensor([2, 0, 3, 1])[:, None]
        name = ("src" if memory is None else "tgt") + "_key_padding_mask"
        given = lambda b: {name: padding[:, :b]}  # noqa: E731
    x = x.masked_fill(padding[..., None], float("nan"))
    expected = ours(x, *others, **given(L), **causal)
    cache = ours.new_cache()
    parts = [
        ours(x[:, a:b], *others, **given(b), **causal, cache=cache)[0] for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    got = torch.cat(parts, 1)
    valid = ~padding[..., None]
    torch.testing.assert_close(got.where(valid, 0), expected.where(valid, 0))
    if how == "lengths":
        assert (got.masked_select(~valid) == 0).all()


def test_caches_describe_themselves() -> None:
    decoder = make("decoder", 0)
    cache = decoder.new_cache()
    assert isinstance(cache, seqkern.TransformerCache) and len(cache) == 2 and cache.length == 0
    assert isinstance(cache[0], seqkern.DecoderLayerCache) and cache[0] is not cache[1]
    decoder(torch.randn(2, B, E), torch.randn(S, B, E), cache=cache)
    assert cache.length == 2 and cache[1].multihead_attn.length == S
    assert "multihead_attn=KeyValueCache(fixed=True" in repr(cache)
    with pytest.raises(ValueError, match="index"):
        cache.reorder(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="cache"):
        decoder(torch.randn(2, B, E), None, cache=decoder.new_cache())


# ---- dropout -----------------------------------------------------------------------------------------------


@each_kind
def test_dropout(kind: str) -> None:
    """The same seed, the same numbers; another seed, others; about torch.nn's distribution."""
    options = dict(dropout=0.3, batch_first=True)
    theirs = with_random_weights(make(kind, 1, **options))
    ours = ours_like(theirs, kind, **options)
    case = Case(kind)
    inputs = case.inputs()

    def draw(layer: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return case.call(layer, *inputs).detach()

    assert torch.equal(draw(ours, 1), draw(ours, 1))
    assert not torch.equal(draw(ours, 1), draw(ours, 2))
    mine = torch.stack([draw(ours, seed) for seed in range(150)])
    its = torch.stack([draw(theirs, seed) for seed in range(150)])
    error = (mine.var(0) / 150 + its.var(0) / 150).sqrt()
    assert ((mine.mean(0) - its.mean(0)).abs() / error).mean() < 1.2  # of a standard normal 0.8
    assert 0.9 < mine.std(0).mean() / its.std(0).mean() < 1.1
    torch.testing.assert_close(draw(ours.eval(), 1), draw(theirs.eval(), 2), rtol=1e-5, atol=1e-5)


def test_dropout_with_lengths_is_dropout(route: str) -> None:
    encoder = make("encoder", 0, dropout=0.3, batch_first=True)
    x, lengths = torch.randn(4, L, E), torch.tensor(LENGTHS["src"])
    torch.manual_seed(0)
    one = encoder(x, lengths=lengths)
    torch.manual_seed(0)
    assert torch.equal(encoder(x, lengths=lengths), one)
    assert (one.masked_select(padding_of("src", x, True)) == 0).all()
    assert not torch.equal(encoder(x, lengths=lengths), one)


# ---- errors ------------------------------------------------------------------------------------------------


def bad_calls(kind: str) -> dict[str, Callable[[nn.Module], Any]]:
    """Calls that torch.nn refuses, for batch_first modules."""
    x, m = torch.randn(B, L, E), torch.randn(B, S, E)
    wide = torch.randn(B, L, E + 1)
    wrong = torch.zeros(L, L + 1)
    ints = torch.zeros(L, L, dtype=torch.int64)
    int_padding = torch.zeros(B, L, dtype=torch.int64)
    long_padding = torch.zeros(B, L + 1, dtype=torch.bool)
    if kind in ("encoder_layer", "encoder"):
        return {
            "4-D": lambda f: f(x[None]),
            "width": lambda f: f(wide),
            "mask shape": lambda f: f(x, wrong),
            "mask dtype": lambda f: f(x, ints),
            "padding dtype": lambda f: f(x, None, int_padding),
            "padding shape": lambda f: f(x, None, long_padding),
            "padding dims": lambda f: f(x[0], None, int_padding.bool()),
            "dtype": lambda f: f(x.double()),
            "no tensor": lambda f: f(None),
        }
    if kind == "transformer":
        return {
            "batch": lambda f: f(m[:2], x),
            "width of src": lambda f: f(wide, x),
            "width of tgt": lambda f: f(x, wide),
            "tgt mask shape": lambda f: f(m, x, tgt_mask=wrong),
            "memory mask shape": lambda f: f(m, x, memory_mask=wrong),
            "src padding shape": lambda f: f(m, x, src_key_padding_mask=long_padding),
            "mixed dims": lambda f: f(m[0], x),
        }
    return {
        "4-D": lambda f: f(x[None], m),
        "width": lambda f: f(wide, m),
        "width of memory": lambda f: f(x, wide),
        "batch of memory": lambda f: f(x, m[:2]),
        "mask shape": lambda f: f(x, m, wrong),
        "memory mask shape": lambda f: f(x, m, None, wrong),
        "padding dtype": lambda f: f(x, m, None, None, int_padding),
        "padding shape": lambda f: f(x, m, None, None, long_padding),
        "memory padding shape": lambda f: f(x, m, None, None, None, long_padding),
        "mixed dims": lambda f: f(x, m[0]),
        "dtype of memory": lambda f: f(x, m.double()),
    }


ERRORS = [(kind, what, norm) for kind in KINDS for what in bad_calls(kind) for norm in (False, True)]


@pytest.mark.parametrize(("kind", "what", "norm_first"), ERRORS, ids=[f"{k}-{w}-{n}" for k, w, n in ERRORS])
def test_errors(kind: str, what: str, norm_first: bool) -> None:
    options = dict(batch_first=True, norm_first=norm_first)
    classes = []
    for which in (1, 0):
        with pytest.raises(Exception) as raised:
            bad_calls(kind)[what](make(kind, which, **options))
        classes.append(raised.type)
    assert classes[1] is classes[0], raised.value


def test_memory_may_be_missing_beside_a_cache_alone() -> None:
    layer = seqkern.TransformerDecoderLayer(8, 2, 16)
    step = torch.randn(1, 3, 8)
    for decoder in (layer, seqkern.TransformerDecoder(layer, 1)):
        with pytest.raises(ValueError, match="memory: expected a tensor where there is no cache, got None"):
            decoder(step, None)
        with pytest.raises(
            ValueError, match="key: expected a tensor, as the cache is not complete; got None"
        ):
            decoder(step, None, cache=decoder.new_cache())
    attention = seqkern.MultiHeadAttention(8, 2)
    for name, key, value in (("key", None, None), ("value", step, None)):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor where there is no cache, got None"):
            attention(step, key, value)
    with pytest.raises(ValueError, match="key: expected a tensor where there is no cache"):
        attention(step[:, 0], None, None, attn_mask=torch.zeros(2, 1, 1))


@pytest.mark.parametrize("kind", ["encoder_layer", "decoder_layer", "transformer"])
def test_constructor_errors(kind: str) -> None:
    for options in (dict(activation="swish"), dict(d_model=15), dict(dropout=1.5)):
        classes = []
        for cls in reversed(CLASSES[kind]):
            with pytest.raises(Exception) as raised:
                cls(**(dict(d_model=E, nhead=N) | options))
            classes.append(raised.type)
        assert classes[1] is classes[0], raised.value


# ---- autocast, compile, transforms -------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@each_kind
def test_autocast(kind: str, norm_first: bool) -> None:
    """torch.nn's dtype, and as near to float32 as torch.nn is."""
    case = Case(kind, norm_first=norm_first, mask="causal float", padding="bool right")
    ours, theirs = case.modules()
    inputs = case.inputs()
    exact = case.call(theirs, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mine, its = case.call(ours, *inputs), case.call(theirs, *inputs)
        lengths = with_lengths(kind, True)(ours, *padded_batch(kind, True, torch.float32))
    assert mine.dtype is its.dtype is lengths.dtype
    assert (mine - exact).abs().max() <= 2 * (its - exact).abs().max()
    mine.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in ours.parameters())


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("options", ["plain", "mask", "lengths"])
@pytest.mark.parametrize("kind", ["encoder_layer", "decoder_layer", "encoder", "decoder"])
def test_compile(kind: str, options: str) -> None:
    ours = with_random_weights(make(kind, 0, batch_first=True))
    x, memory = padded_batch(kind, True, torch.float32)

    def call(layer: Callable[..., Tensor], x: Tensor, memory: Tensor | None) -> Tensor:
        if options == "lengths":
            return with_lengths(kind, True)(layer, x, memory)
        mask = causal_mask(L, torch.bool) if options == "mask" else None
        return layer(x, mask) if memory is None else layer(x, memory, mask)

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    wanted = dict(ours.named_parameters())

    def results(layer: Callable[..., Tensor]) -> Results:
        y = call(layer, x, memory)
        grads = torch.autograd.grad(y.square().sum(), list(wanted.values()))
        return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))

    agree(results(compiled), results(ours), 1e-5, f"{kind} {options}")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", ["encoder_layer", "decoder_layer"])
def test_compile_by_inductor(kind: str) -> None:
    ours = with_random_weights(make(kind, 0, batch_first=True)).eval()
    x, memory = padded_batch(kind, True, torch.float32)
    compiled = torch.compile(ours, fullgraph=True)
    with torch.no_grad():
        call = with_lengths(kind, True)
        torch.testing.assert_close(call(compiled, x, memory), call(ours, x, memory), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_functional_and_double_backward(kind: str) -> None:
    """torch.func.grad over the parameters, with lengths, as autograd gives it; and a gradient's gradient."""
    ours = with_random_weights(make(kind, 0, batch_first=True, activation="gelu", dtype=torch.float64))
    x, memory = padded_batch(kind, True)
    call = with_lengths(kind, True)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        layer = lambda *a, **k: torch.func.functional_call(ours, weights, a, k)  # noqa: E731
        return call(layer, x, memory).square().sum()

    weights = dict(ours.named_parameters())
    expected = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
    found = torch.func.grad(loss)({name: weight.detach() for name, weight in weights.items()})
    agree(found, {n: g.detach() for n, g in zip(weights, expected, strict=True)}, 1e-10, kind)
    second = torch.autograd.grad(sum(g.square().sum() for g in expected), list(weights.values()))
    assert all(g.isfinite().all() for g in second) and any(g.abs().max() > 0 for g in second)
