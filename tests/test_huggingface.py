"""attn_implementation="seqkern": the results of "eager" in Hugging Face models, and no mask is lost."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")

from seqkern.integrations import huggingface  # noqa: E402
from seqkern.integrations.huggingface import attention, attention_mask  # noqa: E402

VOCABULARY, B, L = 100, 4, 20

# Sizes, dropout off, ids of special tokens within the vocabulary.
COMMON = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GPT2 = dict(n_embd=32, n_head=4, n_layer=2, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
DISTIL = dict(dim=32, n_heads=4, n_layers=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0)
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES | QUIET),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | dict(num_key_value_heads=2)),
    "mistral": (
        *("MistralForCausalLM", "MistralConfig"),
        SIZES | dict(num_key_value_heads=2, sliding_window=6, head_dim=8),
    ),
    "bart": (
        *("BartForConditionalGeneration", "BartConfig"),
        dict(
            **dict(d_model=32, encoder_layers=1, decoder_layers=1, dropout=0.0, decoder_start_token_id=2),
            **dict(encoder_attention_heads=4, decoder_attention_heads=4),
            **dict(encoder_ffn_dim=64, decoder_ffn_dim=64),
        ),
    ),
}
each = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    huggingface.register()


def make(name: str, implementation: str) -> nn.Module:
    model, config, options = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)._from_config(
        getattr(transformers, config)(**COMMON, **options), attn_implementation=implementation
    )


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows of 20, 12, 5 and 20 tokens, padded on the right or the left."""
    lengths = torch.tensor([[20], [12], [5], [20]])
    place = torch.arange(L) if side == "right" else torch.arange(L).flip(0)
    mask = (place < lengths).long()
    return torch.randint(3, VOCABULARY, (B, L)) * mask, mask


def results(model: nn.Module, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Logits of what is not padding, and every gradient of a loss on them."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    if logits.dim() == 3 and mask is not None:
        logits = logits[mask.bool()]
    model.zero_grad()
    nn.functional.cross_entropy(logits.flatten(0, -2), logits.flatten(0, -2).argmin(-1)).backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "side"),
    # bart's decoder takes its tokens from the ids, and has no mask: left padding is not for it.
    [
        (name, side)
        for name in MODELS
        for side in ("right", "left", "none")
        if (name, side) != ("bart", "left")
    ],
)
def test_logits_and_gradients_are_those_of_eager(name: str, side: str) -> None:
    ids, mask = padded("right" if side == "none" else side)
    if side == "none":
        ids, mask = torch.randint(3, VOCABULARY, (B, L)), None
    assert_close(results(make(name, "seqkern"), ids, mask), results(make(name, "eager").train(), ids, mask))


@each
def test_the_mask_counts(name: str) -> None:
    """Padded tokens change nothing that is not padding."""
    model = make(name, "seqkern").eval()
    ids, mask = padded("right")
    other = torch.where(mask.bool(), ids, 7)
    a, b = (model(input_ids=x, attention_mask=mask).logits for x in (ids, other))
    if name == "bart":  # its decoder reads the ids, shifted, without a mask: compare what the encoder gives
        a, b = (model.get_encoder()(x, attention_mask=mask).last_hidden_state for x in (ids, other))
    if a.dim() == 3:
        a, b = a[mask.bool()], b[mask.bool()]
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, model(input_ids=other).logits.flatten(0, -2)[: a.shape[0], : a.shape[-1]])


@pytest.mark.parametrize("name", ("gpt2", "llama", "mistral"))
@pytest.mark.parametrize("beams", (1, 3))
def test_generation_is_that_of_eager(name: str, beams: int) -> None:
    """Prefill, then a token at a time from the cache, of a batch padded on the left."""
    ids, mask = padded("left")
    options = dict(max_new_tokens=12, do_sample=False, num_beams=beams, pad_token_id=0)
    got, expected = (
        make(name, implementation).eval().generate(ids, attention_mask=mask, **options)
        for implementation in ("seqkern", "eager")
    )
    assert torch.equal(got, expected)


def test_static_cache() -> None:
    """A cache longer than what it holds."""
    ids, mask = padded("left")
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation="static", pad_token_id=0)
    got, expected = (
        make("llama", implementation).eval().generate(ids, attention_mask=mask, **options)
        for implementation in ("seqkern", "eager")
    )
    assert torch.equal(got, expected)


def test_several_tokens_with_a_cache() -> None:
    """A prompt that goes on where a cache ends: its first token attends to all of the cache."""
    ids, _ = padded("right")
    logits = []
    for implementation in ("seqkern", "eager"):
        model = make("gpt2", implementation).eval()
        cache = model(ids[:, :8], use_cache=True).past_key_values
        logits.append(model(ids[:, 8:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits)


def test_packed_sequences() -> None:
    """Several sequences in one row, told by their positions, do not see each other."""
    ids = torch.randint(3, VOCABULARY, (1, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    got, expected = (
        make("llama", implementation).eval()(ids, position_ids=positions).logits
        for implementation in ("seqkern", "eager")
    )
    torch.testing.assert_close(got, expected)


# ---- the two functions -------------------------------------------------------------------------------------


def heads(n: int = 4, length: int = 6) -> Tensor:
    return torch.randn(2, n, length, 8)


def expected_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def test_shapes_and_grouped_queries() -> None:
    q, k, v = heads(4), heads(2), heads(2)
    out, weights = attention(nn.Identity(), q, k, v, None, is_causal=False)
    assert out.shape == (2, 6, 4, 8) and out.is_contiguous() and weights is None
    torch.testing.assert_close(out, expected_attention(q, k, v, torch.ones(6, 6, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("flag", "of_module", "causal"),
    ((True, False, True), (False, True, False), (None, True, True), (None, False, False), (None, None, True)),
)
def test_causal_where_the_interface_says_so(flag: bool | None, of_module: bool | None, causal: bool) -> None:
    """The argument before the module's attribute before the default."""
    module = nn.Identity()
    if of_module is not None:
        module.is_causal = of_module
    q, k, v = heads(), heads(), heads()
    everything = torch.ones(6, 6, dtype=torch.bool)
    out, _ = attention(module, q, k, v, None, is_causal=flag)
    torch.testing.assert_close(out, expected_attention(q, k, v, everything.tril() if causal else everything))
    one, _ = attention(module, q[:, :, :1], k, v, None, is_causal=flag)  # the newest token sees all
    torch.testing.assert_close(one, expected_attention(q[:, :, :1], k, v, everything[:1]))


@pytest.mark.parametrize("padding", ("right", "left", "middle"))
@pytest.mark.parametrize("pattern", ("causal", "bidirectional"))
@pytest.mark.parametrize("use", ("whole", "sliced", "changed", "bias"))
def test_mask_and_note_agree(padding: str, pattern: str, use: str) -> None:
    """By its note, or read element by element, after a slice, a change in place or with a bias added."""
    from transformers import masking_utils

    function = getattr(masking_utils, f"{pattern}_mask_function")
    known = {"right": [1, 1, 1, 1, 0, 0], "left": [0, 0, 1, 1, 1, 1], "middle": [1, 0, 0, 1, 1, 1]}[padding]
    given = torch.tensor([known, [1] * 6])
    mask = attention_mask(
        2, 6, 6, mask_function=function, attention_mask=given.bool(), allow_is_causal_skip=True
    )
    assert hasattr(mask, "_seqkern_note")
    allowed = given.bool()[:, None, None, :].expand(2, 1, 6, 6)
    if pattern == "causal":
        allowed = allowed & torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(mask, allowed)
    q, k, v = heads(), heads(), heads()
    options = {}
    if use == "sliced":
        q, mask, allowed = q[:, :, 2:], mask[:, :, 2:], allowed[:, :, 2:]
    elif use == "changed":
        mask = mask.clone() if not mask.is_contiguous() else mask
        mask[:, :, 3, 0] = False
        allowed = allowed.clone()
        allowed[:, :, 3, 0] = False
    elif use == "bias":
        options["position_bias"] = torch.randn(1, 4, 6, 6)
    out, _ = attention(nn.Identity(), q, k, v, mask, **options)
    scores = q @ k.mT / 8**0.5 + options.get("position_bias", 0)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


@pytest.mark.parametrize("mask", (None, "bool", "float"))
@pytest.mark.parametrize("is_causal", (True, False))
def test_position_bias(mask: str | None, is_causal: bool) -> None:
    q, k, v, bias = heads(), heads(), heads(), torch.randn(1, 4, 6, 6)
    allowed = torch.ones(6, 6, dtype=torch.bool)
    given = None
    if mask is not None:
        allowed = torch.rand(2, 1, 6, 6) < 0.7
        allowed[..., 0] = True
        given = allowed if mask == "bool" else torch.zeros(2, 1, 6, 6).masked_fill(~allowed, -torch.inf)
    elif is_causal:
        allowed = allowed.tril()
    out, _ = attention(nn.Identity(), q, k, v, given, is_causal=is_causal, position_bias=bias)
    scores = (q @ k.mT / 8**0.5 + bias).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2))


@pytest.mark.parametrize("option", ("softcap", "s_aux"))
def test_what_the_kernels_lack_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf'{option}: not supported by attn_implementation="seqkern"'):
        attention(nn.Identity(), heads(), heads(), heads(), None, **{option: torch.tensor(30.0)})


def test_weights_are_not_promised() -> None:
    with pytest.warns(
        UserWarning, match='output_attentions: attn_implementation="seqkern" returns no weights'
    ):
        attention(nn.Identity(), heads(), heads(), heads(), None, output_attentions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(nn.Identity(), heads(), heads(), heads(), None)


def test_compiled() -> None:
    """One graph, the same numbers."""
    model = make("bert", "seqkern").eval()
    ids, mask = padded("right")
    expected = model(ids, attention_mask=mask).logits
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, expected)


# ---- the tutorials' three uses of a pretrained model, from a checkpoint at hand ----------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a small BERT and its tokenizer, as a download would leave it."""

    def save(name: str, words: list[str]):
        folder = tmp_path_factory.mktemp(name)
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        make(name, "eager").save_pretrained(folder)
        return folder

    return save


WORDS = ["a", "bad", "film", "good", "is", "not", "really", "the", "this", "was"]
TEXTS = ["this film was good", "the film is bad", "a really really good film", "not good"]


def test_fine_tuning(checkpoint) -> None:
    """BERT for two labels, AdamW, three epochs: the loss of "eager" step by step, and it falls."""
    folder = checkpoint("bert", WORDS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = torch.tensor([1, 0, 1, 0])
    losses = {}
    for implementation in ("seqkern", "eager"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, attn_implementation=implementation
        ).train()
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        losses[implementation] = []
        for _ in range(3):
            loss = model(**batch, labels=labels).loss
            losses[implementation].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses["seqkern"] == pytest.approx(losses["eager"], rel=1e-3)
    assert losses["seqkern"][-1] < losses["seqkern"][0]


def test_inference(checkpoint) -> None:
    """DistilBERT's confidence in each sentence, alone and in a padded batch."""
    folder = checkpoint("distilbert", WORDS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="seqkern"
    )
    model.eval()

    def confidence(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            return model(**batch).logits.softmax(-1)

    together = confidence(TEXTS)
    torch.testing.assert_close(together, torch.cat([confidence([text]) for text in TEXTS]))
    torch.testing.assert_close(together.sum(1), torch.ones(4))


def test_word_vectors(checkpoint) -> None:
    """last_hidden_state of texts padded to max_length, as "eager" gives it."""
    folder = checkpoint("bert", WORDS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    vectors = []
    for implementation in ("seqkern", "eager"):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=implementation).eval()
        with torch.no_grad():
            vectors.append(model(**batch).last_hidden_state[batch["attention_mask"].bool()])
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)
