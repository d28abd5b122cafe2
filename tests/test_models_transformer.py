"""The attention and Transformer models beside the tutorials' own, written anew on torch.nn.

M PyTorch Masterclass (part 3), T Tutorial 07 (sequential tasks), S PyTorch sequence modeling, D deep learning
for NLP.
"""

import math
from types import ModuleType

import pytest
import torch
from compare import check_modules
from torch import Tensor, nn
from torch.nn import functional as F

import seqkern
from seqkern import models

B, S, T, V, E, HEADS = 3, 6, 5, 19, 8, 2
LENGTHS = torch.tensor([6, 2, 4])
PADDING = torch.arange(S) >= LENGTHS[:, None]
LAYERS = [seqkern.nn, nn]
both = pytest.mark.parametrize("layers", LAYERS, ids=["seqkern", "torch"])


def tokens(T: int = T) -> Tensor:
    return torch.randint(4, V, (B, T))


def padded(value: int = 1) -> Tensor:
    return tokens(S).masked_fill(PADDING, value)


def keys_of(module: nn.Module) -> set[str]:
    return set(module.state_dict())


def linear(*names: str, bias: bool = True) -> set[str]:
    return {f"{name}.{part}" for name in names for part in (("weight", "bias") if bias else ("weight",))}


def literal_sinusoids(length: int, size: int) -> Tensor:
    table = torch.empty(length, size, dtype=torch.float64)
    for t in range(length):
        for column in range(size):
            angle = t * 10000 ** (-2 * (column // 2) / size)
            table[t, column] = math.sin(angle) if column % 2 == 0 else math.cos(angle)
    return table


# ---- positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 7, 1])
def test_positional_encodings(size: int) -> None:
    exact = literal_sinusoids(50, size)
    x = torch.randn(B, T, size)
    batch_first = models.PositionalEncoding(size, 50)
    time_first = models.PositionalEncoding(size, 50, batch_first=False)
    dropped = models.DropoutPositionalEncoding(size, 0.5, max_len=50).eval()
    assert batch_first.pe.shape == (1, 50, size) and keys_of(batch_first) == {"pe"}
    assert time_first.pe.shape == (50, size) and keys_of(time_first) == {"pe"}
    assert dropped.P.shape == (1, 50, size) and not keys_of(dropped)
    for table in (batch_first.pe[0], time_first.pe, dropped.P[0]):
        torch.testing.assert_close(table.double(), exact, rtol=0, atol=1e-5)
    expected = x + exact[:T].float()
    for y in (batch_first(x), time_first(x.transpose(0, 1)).transpose(0, 1), dropped(x)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch_first(x[:, 2:], 2), batch_first(x)[:, 2:])
    assert models.PositionalEncoding(2).pe.shape == (1, 5000, 2)
    assert models.DropoutPositionalEncoding(2, 0.0).P.shape == (1, 1000, 2)


def test_positions_beyond_the_table_raise() -> None:
    message = "x: expected positions below max_len = 4, got 0 to 4"
    for encoding in (models.PositionalEncoding(E, 4), models.DropoutPositionalEncoding(E, 0.0, 4)):
        with pytest.raises(ValueError, match=message):
            encoding(torch.zeros(B, 5, E))
    with pytest.raises(ValueError, match="x: expected positions below max_len = 4, got 3 to 4"):
        models.PositionalEncoding(E, 4)(torch.zeros(B, 2, E), 3)
    with pytest.raises(
        ValueError, match="input_ids: expected at most max_position_embeddings = 4 steps, got 5"
    ):
        models.Embeddings(E, V, 4)(tokens(5))


# ---- M -----------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, embed_size, heads) -> None:
        super().__init__()
        self.embed_size, self.heads, self.head_dim = embed_size, heads, embed_size // heads
        self.values = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.keys = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.queries = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.fc_out = nn.Linear(heads * self.head_dim, embed_size)

    def forward(self, values, keys, query, mask):
        N, value_len, key_len, query_len = query.shape[0], values.shape[1], keys.shape[1], query.shape[1]
        values = self.values(values.reshape(N, value_len, self.heads, self.head_dim))
        keys = self.keys(keys.reshape(N, key_len, self.heads, self.head_dim))
        queries = self.queries(query.reshape(N, query_len, self.heads, self.head_dim))
        energy = torch.einsum("nqhd,nkhd->nhqk", [queries, keys])
        if mask is not None:
            energy = energy.masked_fill(mask == 0, float("-1e20"))
        attention = torch.softmax(energy / (self.embed_size ** (1 / 2)), dim=3)
        out = torch.einsum("nhql,nlhd->nqhd", [attention, values])
        return self.fc_out(out.reshape(N, query_len, self.heads * self.head_dim))


class Block(nn.Module):
    """M's MultiHeadAttention in block form."""

    def __init__(self, embed_size, heads) -> None:
        super().__init__()
        self.attention = SelfAttention(embed_size, heads)
        self.norm = nn.LayerNorm(embed_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(embed_size, 4 * embed_size), nn.ReLU(), nn.Linear(4 * embed_size, embed_size)
        )

    def forward(self, value, key, query, mask):
        x = self.norm(self.attention(value, key, query, mask) + query)
        return self.norm(self.feed_forward(x) + x)


class TransformerBlock(nn.Module):
    def __init__(self, embed_size, heads, forward_expansion) -> None:
        super().__init__()
        self.attention = SelfAttention(embed_size, heads)
        self.norm1 = nn.LayerNorm(embed_size)
        self.norm2 = nn.LayerNorm(embed_size)
        hidden = forward_expansion * embed_size
        self.feed_forward = nn.Sequential(
            nn.Linear(embed_size, hidden), nn.ReLU(), nn.Linear(hidden, embed_size)
        )

    def forward(self, value, key, query, mask):
        x = self.norm1(self.attention(value, key, query, mask) + query)
        return self.norm2(self.feed_forward(x) + x)


class Positions(nn.Module):
    def __init__(self, embed_size, max_length) -> None:
        super().__init__()
        self.register_buffer("pe", literal_sinusoids(max_length, embed_size).float().unsqueeze(0))


class Encoder(nn.Module):
    def __init__(self, vocab_size, embed_size, num_layers, heads, forward_expansion, max_length) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(vocab_size, embed_size)
        self.position_embedding = Positions(embed_size, max_length)
        self.layers = nn.ModuleList(
            [TransformerBlock(embed_size, heads, forward_expansion) for _ in range(num_layers)]
        )

    def forward(self, x, mask):
        out = self.word_embedding(x) + self.position_embedding.pe[:, : x.shape[1]]
        for layer in self.layers:
            out = layer(out, out, out, mask)
        return out


class DecoderBlock(nn.Module):
    def __init__(self, embed_size, heads, forward_expansion) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_size)
        self.attention = SelfAttention(embed_size, heads)
        self.transformer_block = TransformerBlock(embed_size, heads, forward_expansion)

    def forward(self, x, value, key, src_mask, trg_mask):
        query = self.norm(self.attention(x, x, x, trg_mask) + x)
        return self.transformer_block(value, key, query, src_mask)


class Decoder(nn.Module):
    def __init__(self, vocab_size, embed_size, num_layers, heads, forward_expansion, max_length) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(vocab_size, embed_size)
        self.position_embedding = Positions(embed_size, max_length)
        self.layers = nn.ModuleList(
            [DecoderBlock(embed_size, heads, forward_expansion) for _ in range(num_layers)]
        )
        self.fc_out = nn.Linear(embed_size, vocab_size)

    def forward(self, x, enc_out, src_mask, trg_mask):
        out = self.word_embedding(x) + self.position_embedding.pe[:, : x.shape[1]]
        for layer in self.layers:
            out = layer(out, enc_out, enc_out, src_mask, trg_mask)
        return self.fc_out(out)


class Transformer(nn.Module):
    def __init__(self, mask_target_padding=False) -> None:
        super().__init__()
        self.encoder = Encoder(V, E, 2, HEADS, 3, 20)
        self.decoder = Decoder(V + 1, E, 2, HEADS, 3, 20)
        self.mask_target_padding = mask_target_padding

    def make_src_mask(self, src):
        return (src != 1).unsqueeze(1).unsqueeze(2)

    def make_trg_mask(self, trg):
        N, trg_len = trg.shape
        mask = torch.tril(torch.ones((trg_len, trg_len))).expand(N, 1, trg_len, trg_len)
        return mask * (trg != 2)[:, None, None] if self.mask_target_padding else mask

    def forward(self, src, trg):
        src_mask = self.make_src_mask(src)
        return self.decoder(trg, self.encoder(src, src_mask), src_mask, self.make_trg_mask(trg))


def vanilla(layers: ModuleType, **options) -> models.VanillaTransformer:
    sizes = dict(embed_size=E, num_layers=2, forward_expansion=3, heads=HEADS, max_length=20)
    return models.VanillaTransformer(V, V + 1, 1, 2, **sizes, **options, layers=layers)


MASKS = {
    "none": None,
    "padding": ~PADDING[:, None, None],
    "integers": (~PADDING[:, None, None]).long(),
    "one for all": ~PADDING[1:2, None, None],
    "causal": torch.ones(S, S).tril().expand(B, 1, S, S),
    "of each head": torch.rand(B, HEADS, S, S, generator=torch.Generator().manual_seed(0)) < 0.7,
}
MASKS["of each head"][..., 0] = True


@both
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention(layers: ModuleType, mask: str) -> None:
    values, keys, queries = torch.randn(3, B, S, E)
    ours = models.SelfAttention(E, HEADS, layers=layers)
    (y,) = check_modules(
        *(SelfAttention(E, HEADS), ours),
        *(lambda net, d: net(values.to(d), keys.to(d), queries.to(d), MASKS[mask]), mask),
    )
    assert y.shape == (B, S, E)
    assert keys_of(ours) == linear("values", "keys", "queries", bias=False) | linear("fc_out")


@both
def test_self_attention_is_causal_without_a_mask(layers: ModuleType) -> None:
    x, ours = torch.randn(B, S, E), models.SelfAttention(E, HEADS, layers=layers)
    for mask in ("none", "padding", "of each head"):
        expected = MASKS["causal"] if MASKS[mask] is None else MASKS["causal"] * MASKS[mask]
        got = ours(x, x, x, MASKS[mask], is_causal=True)
        torch.testing.assert_close(got, ours(x, x, x, expected))
    nothing = ours(x, x, x, torch.zeros(B, 1, 1, S))
    assert torch.equal(nothing, ours.fc_out.bias.expand_as(x))


@both
def test_blocks(layers: ModuleType) -> None:
    value, key, query = torch.randn(B, S, E), torch.randn(B, S, E), torch.randn(B, T, E)
    mask = MASKS["padding"]

    def run(net: nn.Module, d: torch.dtype) -> Tensor:
        return net(value.to(d), key.to(d), query.to(d), mask)

    block = models.AttentionBlock(E, HEADS, layers=layers)
    assert block.dropout.p == 0.1
    check_modules(Block(E, HEADS), block.eval(), run, "AttentionBlock")
    attention = linear("attention.fc_out") | linear(
        *("attention.values", "attention.keys", "attention.queries"), bias=False
    )
    feed_forward = linear("feed_forward.0", "feed_forward.2")
    assert keys_of(block) == attention | feed_forward | linear("norm")
    block = models.TransformerBlock(E, HEADS, 0.0, 3, layers=layers)
    assert keys_of(block) == attention | feed_forward | linear("norm1", "norm2")
    check_modules(TransformerBlock(E, HEADS, 3), block, run, "TransformerBlock")
    block = models.DecoderBlock(E, HEADS, 3, 0.0, "cpu", layers=layers)
    check_modules(
        *(DecoderBlock(E, HEADS, 3), block),
        lambda net, d: net(query.to(d), value.to(d), key.to(d), mask, MASKS["causal"][..., :T, :T]),
        "DecoderBlock",
    )
    with pytest.raises(ValueError, match="heads: expected a divisor of embed_size = 8, got 3"):
        models.SelfAttention(E, 3, layers=layers)


@both
@pytest.mark.parametrize("mask_target_padding", [False, True])
def test_vanilla_transformer(layers: ModuleType, mask_target_padding: bool) -> None:
    ours = vanilla(layers, mask_target_padding=mask_target_padding)
    src, trg = padded(), tokens()
    trg[1, 3:] = 2
    theirs = Transformer(mask_target_padding)
    assert torch.equal(ours.make_src_mask(src), theirs.make_src_mask(src))
    assert torch.equal(ours.make_trg_mask(trg), theirs.make_trg_mask(trg).bool())
    theirs.load_state_dict(ours.state_dict())  # with the positions' table as ours has it
    (logits,) = check_modules(theirs, ours, lambda net, _: net(src, trg), "VanillaTransformer")
    assert logits.shape == (B, T, V + 1)
    assert keys_of(ours) >= {"encoder.position_embedding.pe", "decoder.layers.1.transformer_block.norm2.bias"}


@both
def test_vanilla_encoder_and_decoder_alone(layers: ModuleType) -> None:
    src, trg, enc_out = padded(), tokens(), torch.randn(B, S, E)
    encoder = models.VanillaEncoder(V, E, 1, HEADS, "cpu", 3, 0.0, 20, layers=layers)
    decoder = models.VanillaDecoder(V, E, 1, HEADS, 3, 0.0, "cpu", 20, layers=layers)
    their_encoder, their_decoder = Encoder(V, E, 1, HEADS, 3, 20), Decoder(V, E, 1, HEADS, 3, 20)
    their_encoder.load_state_dict(encoder.state_dict())
    their_decoder.load_state_dict(decoder.state_dict())
    src_mask, trg_mask = MASKS["padding"], MASKS["causal"][..., :T, :T]
    check_modules(their_encoder, encoder, lambda net, _: net(src, src_mask), "VanillaEncoder")
    check_modules(
        *(their_decoder, decoder),
        *(lambda net, d: net(trg, enc_out.to(d), src_mask, trg_mask), "VanillaDecoder"),
    )


def test_vanilla_transformer_defaults() -> None:
    model = models.VanillaTransformer(11, 12, 0, 0)
    assert len(model.encoder.layers) == len(model.decoder.layers) == 6
    assert model.encoder.layers[0].feed_forward[0].weight.shape == (2048, 512)
    assert model.encoder.layers[0].attention.values.weight.shape == (64, 64)
    assert model.encoder.position_embedding.pe.shape == (1, 100, 512)
    assert model.decoder.fc_out.weight.shape == (12, 512)


# ---- T -----------------------------------------------------------------------------------------------------


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, num_heads, d_input=None) -> None:
        super().__init__()
        self.num_heads, self.d_k = num_heads, d_model // num_heads
        d_xq, d_xk, d_xv = (d_model,) * 3 if d_input is None else d_input
        self.W_q = nn.Linear(d_xq, d_model, bias=False)
        self.W_k = nn.Linear(d_xk, d_model, bias=False)
        self.W_v = nn.Linear(d_xv, d_model, bias=False)
        self.W_h = nn.Linear(d_model, d_model)

    def forward(self, X_q, X_k, X_v):
        def split(x):
            return x.view(x.shape[0], -1, self.num_heads, self.d_k).transpose(1, 2)

        Q, K, V = split(self.W_q(X_q)), split(self.W_k(X_k)), split(self.W_v(X_v))
        A = torch.softmax(Q / math.sqrt(self.d_k) @ K.transpose(2, 3), dim=-1)
        H = (A @ V).transpose(1, 2).contiguous().view(X_q.shape[0], -1, self.num_heads * self.d_k)
        return self.W_h(H), A


@both
@pytest.mark.parametrize("d_input", [None, (3, 4, 5)])
def test_multi_head_attention_ha(layers: ModuleType, d_input: tuple[int, int, int] | None) -> None:
    sizes = d_input or (E, E, E)
    X_q, X_k, X_v = torch.randn(B, T, sizes[0]), torch.randn(B, S, sizes[1]), torch.randn(B, S, sizes[2])
    ours = models.MultiHeadAttentionHA(E, HEADS, 0.0, d_input, layers=layers)
    H, A = check_modules(
        *(MultiHeadAttention(E, HEADS, d_input), ours),
        *(lambda net, d: net(X_q.to(d), X_k.to(d), X_v.to(d)), "MultiHeadAttentionHA"),
    )
    assert H.shape == (B, T, E) and A.shape == (B, HEADS, T, S)
    assert keys_of(ours) == linear("W_q", "W_k", "W_v", bias=False) | linear("W_h")
    torch.testing.assert_close(ours(X_q, X_k, X_v, need_weights=False)[0], H)
    assert ours(X_q, X_k, X_v, need_weights=False)[1] is None
    with pytest.raises(ValueError, match="num_heads: expected a divisor of d_model = 8, got 3"):
        models.MultiHeadAttentionHA(E, 3, 0.0, layers=layers)


@both
def test_the_tutorials_sanity_values(layers: ModuleType) -> None:
    """T: d_model 512, 8 heads; the query that is like the second key."""
    mha = models.MultiHeadAttentionHA(512, 8, 0.0, layers=layers)
    K = torch.tensor([[10.0, 0, 0], [0, 10, 0], [0, 0, 10], [0, 0, 10]])[None, None]
    V = torch.tensor([[1.0, 0, 0], [10, 0, 0], [100, 5, 0], [1000, 6, 0]])[None, None]
    for query, weights, output in (
        ([0, 10, 0], [3.7266e-06, 0.99999, 3.7266e-06, 3.7266e-06], [10.004, 4.0993e-05, 0]),
        ([0, 0, 10], [1.8633e-06, 1.8633e-06, 0.5, 0.5], [550.0, 5.5, 0]),
    ):
        H, A = mha.scaled_dot_product_attention(torch.tensor(query).float()[None, None, None], K, V)
        torch.testing.assert_close(A[0, 0, 0], torch.tensor(weights), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(H[0, 0, 0], torch.tensor(output), rtol=1e-4, atol=1e-8)


@both
def test_weights_are_those_after_dropout(layers: ModuleType) -> None:
    X = torch.randn(B, 40, E)
    mha = models.MultiHeadAttentionHA(E, HEADS, 0.25, layers=layers)
    H, A = mha(X, X, X)
    V = mha.W_v(X).unflatten(2, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(H, mha.W_h((A @ V).transpose(1, 2).flatten(2)))
    share = (A == 0).float().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / A.numel()) ** 0.5
    exact = mha.eval()(X, X, X)[1]
    torch.testing.assert_close(A[A > 0], (exact / 0.75)[A > 0])
    mean = torch.stack([mha.train()(X, X, X, need_weights=False)[0] for _ in range(200)]).mean(0)
    assert (mean - mha.eval()(X, X, X)[0]).abs().max() < 0.1


class EncoderLayer(nn.Module):
    def __init__(self, d_model, num_heads, hidden) -> None:
        super().__init__()
        self.mha = MultiHeadAttention(d_model, num_heads)
        self.cnn = nn.Module()
        self.cnn.k1convL1 = nn.Linear(d_model, hidden)
        self.cnn.k1convL2 = nn.Linear(hidden, d_model)
        self.layernorm1 = nn.LayerNorm(d_model, eps=1e-6)
        self.layernorm2 = nn.LayerNorm(d_model, eps=1e-6)

    def forward(self, x):
        out1 = self.layernorm1(x + self.mha(x, x, x)[0])
        return self.layernorm2(out1 + self.cnn.k1convL2(torch.relu(self.cnn.k1convL1(out1))))


class Embeddings(nn.Module):
    def __init__(self, d_model, vocab_size, positions) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, d_model, padding_idx=1)
        self.position_embeddings = nn.Embedding(positions, d_model)
        self.LayerNorm = nn.LayerNorm(d_model, eps=1e-12)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(positions))


class Classifier(nn.Module):
    def __init__(self, num_layers, d_model, num_heads, hidden, vocab_size, answers, positions) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embedding = Embeddings(d_model, vocab_size, positions)
        self.encoder.enc_layers = nn.ModuleList(
            [EncoderLayer(d_model, num_heads, hidden) for _ in range(num_layers)]
        )
        self.dense = nn.Linear(d_model, answers)

    def forward(self, x):
        x = self.encoder.embedding(x)
        for layer in self.encoder.enc_layers:
            x = layer(x)
        return self.dense(x.max(dim=1).values)


@both
def test_transformer_classifier(layers: ModuleType) -> None:
    """Without lengths T's values, padding included."""
    ours = models.TransformerClassifier(
        *(2, E, HEADS, 12, V, 4), maximum_position_encoding=30, layers=layers
    ).eval()
    src = padded()
    (logits,) = check_modules(
        Classifier(2, E, HEADS, 12, V, 4, 30), ours, lambda net, _: net(src), "TransformerClassifier"
    )
    assert logits.shape == (B, 4)
    layer = (
        linear("mha.W_q", "mha.W_k", "mha.W_v", bias=False)
        | linear("mha.W_h", "cnn.k1convL1", "cnn.k1convL2", "layernorm1", "layernorm2")
    )  # fmt: skip
    assert keys_of(ours) == {
        *("encoder.embedding.word_embeddings.weight", "encoder.embedding.position_embeddings.weight"),
        *linear("encoder.embedding.LayerNorm", "dense"),
        *(f"encoder.enc_layers.{i}.{name}" for i in range(2) for name in layer),
    }


@both
def test_parts_of_t_alone(layers: ModuleType) -> None:
    x, ids = torch.randn(B, S, E), tokens()
    layer = models.EncoderLayer(E, HEADS, 12, layers=layers).eval()
    assert layer.mha.dropout.p == 0.1
    check_modules(EncoderLayer(E, HEADS, 12), layer, lambda net, d: net(x.to(d)), "EncoderLayer")
    check_modules(Embeddings(E, V, 9), models.Embeddings(E, V, 9), lambda net, _: net(ids), "Embeddings")
    encoder = models.TransformerEncoder(1, E, HEADS, 12, V, 9, layers=layers).eval()
    torch.testing.assert_close(encoder(ids), encoder.enc_layers[0](encoder.embedding(ids)))
    embedding = models.TransformerClassifier(1, E, HEADS, 4, V, 2).encoder.embedding
    assert embedding.position_embeddings.weight.shape == (10000, E)
    cnn = models.CNN(E, 12)
    assert keys_of(cnn) == linear("k1convL1", "k1convL2")
    hidden = F.relu(F.linear(x, cnn.k1convL1.weight, cnn.k1convL1.bias))
    torch.testing.assert_close(cnn(x), F.linear(hidden, cnn.k1convL2.weight, cnn.k1convL2.bias))


# ---- S and D -----------------------------------------------------------------------------------------------


class Simple(nn.Module):
    """S's; with time_first D's."""

    def __init__(self, d_model, layer, num_layers, outputs, time_first=False) -> None:
        super().__init__()
        self.d_model, self.time_first = d_model, time_first
        self.embedding = nn.Embedding(V, d_model)
        self.pos_encoder = Positions(d_model, 40)
        if time_first:
            self.pos_encoder.pe = self.pos_encoder.pe[0]
        self.transformer_encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.fc = nn.Linear(d_model, outputs)

    def forward(self, src, mask=None):
        x = self.embedding(src) * math.sqrt(self.d_model)
        if self.time_first:
            x = x + self.pos_encoder.pe[: len(src)].unsqueeze(1)
            return self.fc(self.transformer_encoder(x, mask))
        x = x + self.pos_encoder.pe[:, : src.shape[1]]
        return self.fc(self.transformer_encoder(x, mask).mean(dim=1))


@both
@pytest.mark.parametrize("masked", [False, True])
def test_simple_transformer(layers: ModuleType, masked: bool) -> None:
    src = padded()
    mask = torch.ones(S, S, dtype=torch.bool).triu(1) if masked else None
    ours = models.SimpleTransformer(V, E, HEADS, 2, 12, 3, 0.0, max_len=40, layers=layers)
    theirs = Simple(E, nn.TransformerEncoderLayer(E, HEADS, 12, 0.0, batch_first=True), 2, 3)
    theirs.load_state_dict(ours.state_dict())
    (logits,) = check_modules(theirs, ours, lambda net, _: net(src, mask), f"SimpleTransformer {masked}")
    assert logits.shape == (B, 3)
    assert models.SimpleTransformer(V, E, HEADS, 1, 12, 3).pos_encoder.pe.shape == (1, 5000, E)


@both
@pytest.mark.parametrize("causal", [True, False])
def test_transformer_model(layers: ModuleType, causal: bool) -> None:
    src = tokens().T
    mask = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    options = dict(dim_feedforward=12, dropout=0.0, max_len=40)
    ours = models.TransformerModel(V, E, HEADS, 2, causal=causal, **options, layers=layers)
    theirs = Simple(E, nn.TransformerEncoderLayer(E, HEADS, 12, 0.0), 2, V, time_first=True)
    theirs.load_state_dict(ours.state_dict())

    def run(net: nn.Module, _: torch.dtype) -> Tensor:
        return net(src, mask) if isinstance(net, Simple) else net(src)

    (logits,) = check_modules(theirs, ours, run, f"TransformerModel {causal}")
    assert logits.shape == (T, B, V)
    default = models.TransformerModel(V, E, HEADS, 1)
    assert default.causal and default.pos_encoder.pe.shape == (5000, E)
    assert default.transformer_encoder.layers[0].linear1.out_features == 2048
    if not causal:
        with pytest.raises(ValueError, match="causal: expected True, to decode step by step, got False"):
            ours.initial_state()


# ---- padding and causality ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["TransformerClassifier", "SimpleTransformer", "TransformerModel"])
def test_padded_batches_equal_rows_one_by_one(layers: ModuleType, name: str) -> None:
    time_first = name == "TransformerModel"
    if name == "TransformerClassifier":
        model = models.TransformerClassifier(2, E, HEADS, 12, V, 4, layers=layers)
    elif name == "SimpleTransformer":
        model = models.SimpleTransformer(V, E, HEADS, 2, 12, 3, layers=layers)
    else:
        model = models.TransformerModel(V, E, HEADS, 2, dim_feedforward=12, layers=layers)
    model.eval()
    src = padded()
    together = model(src.T if time_first else src, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS):
        row = src[b : b + 1, :length]
        if time_first:
            torch.testing.assert_close(together[:length, b : b + 1], model(row.T))
        else:
            torch.testing.assert_close(together[b : b + 1], model(row))
    assert not torch.allclose(together, model(src.T if time_first else src))


@both
@torch.no_grad()  # there torch.nn's encoder gives NaN for a row of padding alone
def test_empty_rows_are_finite(layers: ModuleType) -> None:
    lengths, src = torch.tensor([6, 0, 4]), padded()
    simple = models.SimpleTransformer(V, E, HEADS, 2, 12, 3, layers=layers).eval()
    assert torch.equal(simple(src, lengths=lengths)[1], simple.fc.bias)
    classifier = models.TransformerClassifier(2, E, HEADS, 12, V, 4, layers=layers).eval()
    assert torch.equal(classifier(src, lengths)[1], classifier.dense.bias)
    src[1] = 1
    model, tgt = translator(layers), tokens()
    translated = model(src, tgt)
    assert translated.isfinite().all()
    ours = translator(seqkern.nn)
    ours.load_state_dict(model.state_dict())
    torch.testing.assert_close(translated, ours(src, tgt))


@both
def test_vanilla_padding_equals_rows_one_by_one(layers: ModuleType) -> None:
    model, src, trg = vanilla(layers), padded(), tokens()
    together = model(src, trg)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(together[b : b + 1], model(src[b : b + 1, :length], trg[b : b + 1]))


def translator(layers: ModuleType, **options) -> models.TranslationTransformer:
    sizes = dict(d_model=E, nhead=HEADS, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=12)
    return models.TranslationTransformer(V, V, **sizes, **options, layers=layers).eval()


@both
@pytest.mark.parametrize("name", ["VanillaTransformer", "TransformerModel", "TranslationTransformer"])
def test_a_later_token_changes_no_earlier_output(layers: ModuleType, name: str) -> None:
    src, trg = padded(), tokens()
    if name == "TransformerModel":
        model = models.TransformerModel(V, E, HEADS, 2, dim_feedforward=12, layers=layers).eval()
    else:
        model = (vanilla if name == "VanillaTransformer" else translator)(layers)

    def logits(trg: Tensor) -> Tensor:
        return model(trg.T).transpose(0, 1) if name == "TransformerModel" else model(src, trg)

    before = logits(trg)
    for t in range(1, T):
        changed = trg.clone()
        changed[:, t] = (trg[:, t] - 3) % (V - 4) + 4
        after = logits(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, t], before[:, t])


# ---- the Transformer to train ------------------------------------------------------------------------------


class PreNorm(nn.Module):
    """TranslationTransformer on torch.nn's layers, with masks."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        options = dict(dim_feedforward=12, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(
            *(nn.TransformerEncoderLayer(E, HEADS, **options), 2, nn.LayerNorm(E)), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(E, HEADS, **options), 2, nn.LayerNorm(E)
        )
        self.src_embedding = nn.Embedding(V, E, padding_idx=1)
        self.tgt_embedding = nn.Embedding(V, E, padding_idx=1)
        self.positions = Positions(E, 1024)
        self.out = nn.Linear(E, V)
        if tied:
            self.out.weight = self.tgt_embedding.weight

    def forward(self, src, tgt, lengths):
        beyond = torch.arange(src.shape[1]) >= lengths[:, None]
        x, y = self.src_embedding(src) * math.sqrt(E), self.tgt_embedding(tgt) * math.sqrt(E)
        x, y = x + self.positions.pe[:, : x.shape[1]], y + self.positions.pe[:, : y.shape[1]]
        memory = self.encoder(x, src_key_padding_mask=beyond)
        causal = torch.ones(len(y[0]), len(y[0]), dtype=torch.bool).triu(1)
        return self.out(self.decoder(y, memory, causal, memory_key_padding_mask=beyond))


@both
@pytest.mark.parametrize("tied", [True, False])
def test_translation_transformer(layers: ModuleType, tied: bool) -> None:
    ours = translator(layers, tie_weights=tied, dropout=0.0)
    theirs = PreNorm(tied)
    theirs.load_state_dict(ours.state_dict())
    src, tgt = padded(), tokens()
    (logits,) = check_modules(
        theirs, ours, lambda net, _: net(src, tgt, LENGTHS), f"TranslationTransformer {tied}"
    )
    assert logits.shape == (B, T, V)
    torch.testing.assert_close(ours(src, tgt), logits)  # lengths as pad_index says


@both
def test_translation_transformer_of_padding(layers: ModuleType) -> None:
    model, src, tgt = translator(layers), padded(), tokens()
    lengths = torch.tensor([5, 1, 3])
    together = model(src, tgt, LENGTHS, lengths)
    for b in range(B):
        alone = model(src[b : b + 1, : LENGTHS[b]], tgt[b : b + 1, : lengths[b]])
        torch.testing.assert_close(together[b : b + 1, : lengths[b]], alone)
    valid = torch.arange(T) < lengths[:, None]
    torch.testing.assert_close(model(src, tgt, LENGTHS, lengths, valid_only=True), together[valid])


def test_translation_transformer_options() -> None:
    torch.manual_seed(0)
    ours = translator(seqkern.nn, share_embeddings=True, pad_index=0)
    torch.manual_seed(0)
    twin = translator(nn, share_embeddings=True, pad_index=0)
    for (name, got), expected in zip(ours.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name  # the same seed gives the same weights
    assert ours.src_embedding is ours.tgt_embedding and ours.out.weight is ours.src_embedding.weight
    assert not ours.src_embedding.weight[0].any()
    first, second = (layer.linear1.weight for layer in ours.encoder.layers)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"share_embeddings: expected one vocabulary, so .* got 19 and 20"):
        models.TranslationTransformer(V, V + 1, E, HEADS, share_embeddings=True)


# ---- decoding ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["VanillaTransformer", "TranslationTransformer"])
def test_decoding(layers: ModuleType, name: str) -> None:
    """Step by step, cached or not, equals the full forward; of a beam, too; padding changes nothing."""
    model = (vanilla if name == "VanillaTransformer" else translator)(layers)
    src = padded()
    options = dict(max_len=7, eos_index=5)
    greedy = model.decode(src, **options)
    beam = model.decode(src, LENGTHS, beam_width=3, n_best=2, length_penalty=0.5, **options)
    one = model.decode(src, beam_width=1, n_best=1, **options).best()
    assert torch.equal(one.ids, greedy.ids)
    torch.testing.assert_close(one.log_probs, greedy.log_probs)
    for b, length in enumerate(LENGTHS):
        row = src[b : b + 1, :length]
        for ids, n, log_p in [
            (greedy.ids[b], greedy.lengths[b], greedy.log_probs[b]),
            *zip(beam.ids[b], beam.lengths[b], beam.log_probs[b], strict=True),
        ]:
            tgt = torch.cat([torch.tensor([2]), ids[:n]]).unsqueeze(0)
            with torch.no_grad():
                logits = model(row, tgt[:, :-1])[0]
            log_probs = torch.log_softmax(logits, -1).gather(1, ids[:n, None])
            torch.testing.assert_close(log_p, log_probs.sum())
    assert (beam.scores[:, 0] >= beam.scores[:, 1]).all()


@both
def test_cached_steps_of_the_language_model(layers: ModuleType) -> None:
    model = models.TransformerModel(V, E, HEADS, 2, dim_feedforward=12, layers=layers).eval()
    src = tokens().T
    state, found = model.initial_state(), []
    with torch.no_grad():
        for ids in src:
            log_probs, state = model.step(ids, state)
            found.append(log_probs)
        expected = torch.log_softmax(model(src), -1)
    torch.testing.assert_close(torch.stack(found), expected)
    start = torch.full((B,), 2)
    beam = models.beam_search(
        *(model.step, model.initial_state(), start),
        **dict(eos_index=5, max_len=6, beam_width=4, n_best=4),
        reorder=model.reorder,
    )
    for b in range(B):
        for ids, n, log_p in zip(beam.ids[b], beam.lengths[b], beam.log_probs[b], strict=True):
            with torch.no_grad():
                logits = model(torch.cat([start[:1], ids[: n - 1]]).unsqueeze(1))[:, 0]
            torch.testing.assert_close(log_p, torch.log_softmax(logits, -1).gather(1, ids[:n, None]).sum())


@both
def test_generate(layers: ModuleType) -> None:
    """The likeliest token after each prefix, whatever the mode; <eos> repeats; seeds repeat."""
    model = models.TransformerModel(V, E, HEADS, 2, dim_feedforward=12, layers=layers)
    for P in (1, 3):
        prompt = tokens(P)
        found = model.generate(prompt, 6, top_k=1)
        assert found.shape == (B, P + 6) and torch.equal(found[:, :P], prompt) and model.training
        with torch.no_grad():
            expected = model.eval()(found[:, :-1].T)[P - 1 :].argmax(2).T
        assert torch.equal(found[:, P:], expected)
        ended = model.train().generate(prompt, 6, top_k=1, eos_idx=int(expected[0, 1]))
        assert (ended[0, P + 1 :] == expected[0, 1]).all() and ended.shape == found.shape

    def draw(seed: int) -> Tensor:
        return model.generate(prompt, 9, 1.5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    with pytest.raises(
        ValueError, match=r"start_tokens: expected \[B, P\] with P of at least 1, got \(3, 0\)"
    ):
        model.generate(tokens(0))


def test_a_step_costs_no_prefix() -> None:
    """TranslationTransformer's cache: each step runs one position, and memory is projected once."""
    model, seen = translator(seqkern.nn), []
    model.decoder.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], args[1] is None)))
    model.decode(padded(), max_len=5, eos_index=-1)
    assert seen == [(1, False), *[(1, True)] * 4]
