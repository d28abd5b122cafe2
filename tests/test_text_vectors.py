"""seqkern.text.WordVectors: the three text formats, embeddings, neighbours and analogies."""

import gzip
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqkern.text import CorpusError, Vocabulary, WordVectors

LINES = "the 0.5 -1 2e-1\ncat 1 2 3\nnew york 4 5 6\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="vectors.txt"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def near(tensor, values):
    torch.testing.assert_close(tensor, torch.tensor(values), rtol=0, atol=0)
    return True


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (LINES, "glove.txt"),
        (f"3 3\n{LINES}", "word2vec.txt"),
        ("3 3\n" + LINES.replace("\n", " \n"), "fasttext.vec"),  # fastText ends its lines with a space
        (LINES, "glove.txt.gz"),
    ],
)
def test_formats(write, text, name):
    vectors = WordVectors.load(write(text, name))
    assert vectors.tokens == ["the", "cat", "new york"] and len(vectors) == 3
    assert near(vectors.vectors, [[0.5, -1.0, 0.2], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert near(vectors["cat"], [1.0, 2.0, 3.0])
    assert "new york" in vectors and "dog" not in vectors
    with pytest.raises(ValueError, match="token 'dog' has no vector among the 3"):
        vectors["dog"]


def test_only_a_vocabulary(write):
    """Other tokens' numbers are not looked at; of a token that comes twice the first vector counts."""
    path = write("3 2\nthe x y\ncat 1 2\ncat 3 4\n")
    vectors = WordVectors.load(path, only=Vocabulary(["cat", "dog"]))
    assert vectors.tokens == ["cat"] and near(vectors.vectors, [[1.0, 2.0]])
    assert WordVectors.load(path, only={"dog"}).vectors.shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("the 1 2\ncat 1\n", ":2: expected a token and 2 numbers, got 2 columns"),
        ("2 2\nthe 1 2\ncat 1\n", ":3: expected a token and 2 numbers, got 2 columns"),
        ("the\n", ":1: expected a token and numbers, got 1 columns"),
        ("the 1 2\ncat 1 b\n", ":2: could not convert string to float: 'b'"),
        ("the 1 2\ncat 1 2 3 \n\n", ":3: expected a token and 2 numbers, got 1 columns"),
        ("3 2\nthe 1 2\ncat 1 2\n", ": expected 3 vectors, as its first line says, got 2"),
        ("1 2\nthe 1 2\ncat 1 2\n", ": expected 1 vectors, as its first line says, got 2"),
    ],
)
def test_bad_files(write, text, complaint):
    path = write(text)
    with pytest.raises(CorpusError) as caught:
        WordVectors.load(path)
    assert str(caught.value) == f"{path}{complaint}"


def test_files_without_vectors(write):
    for text in ("", "0 3\n"):
        with pytest.raises(CorpusError, match=r"corpus: no vectors in .*vectors\.txt"):
            WordVectors.load(write(text))


def test_constructor_errors():
    with pytest.raises(ValueError, match=r"vectors: expected \[2, E\], got \[3, 4\]"):
        WordVectors(["a", "b"], torch.zeros(3, 4))
    with pytest.raises(ValueError, match="tokens: expected each once, got 1 repeated"):
        WordVectors(["a", "a"], torch.zeros(2, 4))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    rows=st.dictionaries(
        st.text(min_size=1).filter(lambda s: s.split() == [s]), st.tuples(finite, finite), min_size=1
    )
)
def test_save_and_load(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "v.txt"
    vectors = WordVectors(rows, torch.tensor(list(rows.values())))
    vectors.save(path)
    twin = WordVectors.load(path)
    assert twin.tokens == vectors.tokens and torch.equal(twin.vectors, vectors.vectors)


@pytest.mark.parametrize("token", ["new york", "", "a\n"])
def test_save_refuses_white_space(tmp_path, token):
    with pytest.raises(ValueError, match="tokens: expected none with white space, got"):
        WordVectors([token], torch.zeros(1, 2)).save(tmp_path / "v.txt")
    assert not (tmp_path / "v.txt").exists()


def test_embedding():
    vectors = WordVectors(["the", "cat"], torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    vocabulary = Vocabulary(["cat", "dog", "the"])
    embedding = vectors.embedding(vocabulary, padding_idx=0, generator=torch.Generator().manual_seed(0))
    weight = embedding.weight
    assert weight.shape == (5, 2) and not weight.requires_grad and embedding.padding_idx == 0
    assert near(weight[[0, 2, 4]], [[0.0, 0.0], [3.0, 6.0], [1.0, 2.0]])
    assert (weight[[1, 3]] != 0).all()  # random: <unk> and dog
    again = vectors.embedding(vocabulary, freeze=False, generator=torch.Generator().manual_seed(0))
    assert again.weight.requires_grad and again.padding_idx is None
    assert torch.equal(again.weight[1:], weight[1:])


def test_random_rows_are_like_the_others():
    g = torch.Generator().manual_seed(0)
    vectors = WordVectors(map(str, range(100)), 3 + 0.5 * torch.randn(100, 50, generator=g))
    weight = vectors.embedding(Vocabulary([f"new{i}" for i in range(100)]), generator=g).weight
    assert weight.mean().item() == pytest.approx(3, abs=0.05)
    assert weight.std().item() == pytest.approx(0.5, abs=0.05)


ROYAL = WordVectors(
    ["king", "queen", "man", "woman", "zero", "minus"],
    #  royal, female, other
    torch.tensor(
        [[3.0, 0.0, 0.1], [4.0, 4.0, 0.0], [0.1, 0.0, 2.0], [0.1, 3.0, 2.0], [0, 0, 0], [-3.0, 0.0, -0.1]]
    ),
)


def test_nearest():
    found = ROYAL.nearest("king", 2)
    assert [token for token, _ in found] == ["queen", "man"]
    assert found[0][1] == pytest.approx(12 / (math.hypot(3, 0.1) * math.hypot(4, 4)), rel=1e-5)
    assert ROYAL.nearest("king")[-1] == ("minus", pytest.approx(-1, rel=1e-5))
    assert dict(ROYAL.nearest("king"))["zero"] == 0
    assert len(ROYAL.nearest("king")) == 5  # not itself
    assert ROYAL.nearest(torch.tensor([0.0, 0.0, 5.0]), 1)[0][0] == "man"
    with pytest.raises(ValueError, match="token 'prince' has no vector among the 6"):
        ROYAL.nearest("prince")


def test_king_minus_man_plus_woman():
    ((token, cosine),) = ROYAL.analogy(["king", "woman"], ["man"])
    unit = torch.nn.functional.normalize(ROYAL.vectors, dim=1)
    query = unit[0] - unit[2] + unit[3]
    assert token == "queen"
    assert cosine == pytest.approx(float(query @ unit[1] / query.norm()), rel=1e-5)
    others = ROYAL.analogy(["king", "woman"], ["man"], k=9)
    assert {token for token, _ in others} == {"queen", "zero", "minus"}


def test_vectors_of_a_model():
    embedding = torch.nn.Embedding(4, 3)
    vectors = WordVectors(Vocabulary(["a", "b"]), embedding.weight)
    assert not vectors.vectors.requires_grad
    assert torch.equal(vectors["a"], embedding.weight[2])
