"""seqkern.text.Vocabulary: order, thresholds, specials, unknown tokens, files."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqkern.text import Vocabulary, letters_only, read_imdb, read_words, word_tokenize

SENTENCES = [s.split() for s in ("the cat sat", "the dog sat down", "a cat and a dog and the cow", "")]
# the 3; a, and, cat, dog, sat 2; cow, down 1


def test_order_is_frequency_then_text():
    vocabulary = Vocabulary.build(SENTENCES)
    assert vocabulary.tokens == ["<pad>", "<unk>", "the", "a", "and", "cat", "dog", "sat", "cow", "down"]
    assert Vocabulary.build(reversed(SENTENCES)) == vocabulary
    assert list(vocabulary) == vocabulary.tokens and len(vocabulary) == 10


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"min_freq": 2}, "the a and cat dog sat"),
        ({"min_freq": 3}, "the"),
        ({"min_freq": 4}, ""),
        ({"max_size": 2}, "the a"),
        ({"max_size": 0}, ""),
        ({"max_size": 100, "min_freq": 2}, "the a and cat dog sat"),
    ],
)
def test_thresholds(options, tokens):
    assert Vocabulary.build(SENTENCES, **options).tokens == ["<pad>", "<unk>", *tokens.split()]


@pytest.mark.parametrize(
    ("specials", "default"),
    [
        (("<PAD>", "<UNK>"), "<UNK>"),
        (("<UNK>", "<PAD>"), "<UNK>"),
        (("<unk>", "<pad>", "<sos>", "<eos>"), "<unk>"),
        (("<sos>", "<eos>", "<pad>", "<unk>"), "<unk>"),
    ],
)
def test_specials_in_the_tutorials_orders(specials, default):
    vocabulary = Vocabulary.build(SENTENCES, specials=specials, default=default)
    assert [vocabulary[special] for special in specials] == list(range(len(specials)))
    assert vocabulary["unheard"] == specials.index(default)
    assert vocabulary["the"] == len(specials)
    assert vocabulary.decode([0, len(specials)]) == [specials[0], "the"]
    assert vocabulary.decode(range(len(vocabulary)), skip_specials=True)[:2] == ["the", "a"]


def test_tutorial_vocabulary():
    """M: freq_threshold 2, counted with >=; a token past it is indexed once."""
    sentences = ["this is a test", "this is another test", "and this is it"]
    vocabulary = Vocabulary.build(
        map(word_tokenize, sentences), min_freq=2, specials=("<PAD>", "<UNK>"), default="<UNK>"
    )
    assert vocabulary.tokens == ["<PAD>", "<UNK>", "is", "this", "test"]
    assert vocabulary.numericalize(word_tokenize("this is a brand new test")) == [3, 2, 1, 1, 1, 4]


def test_lookup():
    vocabulary = Vocabulary(["x", "y"])
    assert vocabulary.encode(["y", "z", "x"]) == [3, 1, 2]
    assert vocabulary.decode(torch.tensor([3, 0])) == ["y", "<pad>"]
    assert "y" in vocabulary and "z" not in vocabulary
    assert (vocabulary.token(2), vocabulary["x"]) == ("x", 2)
    for i in (-1, 4):
        with pytest.raises(ValueError, match=f"id: expected 0 to 3, got {i}"):
            vocabulary.decode([i])


def test_special_that_occurs_in_the_text():
    vocabulary = Vocabulary.build([["<unk>", "a", "<unk>", "<eos>"]])
    assert vocabulary.tokens == ["<pad>", "<unk>", "<eos>", "a"]


def test_labels_have_no_specials():
    labels = Vocabulary(["neg", "pos"], specials=(), default=None)
    assert labels.encode(["pos", "neg"]) == [1, 0]
    with pytest.raises(ValueError, match="'neutral' is not in the vocabulary of 2, which has no default"):
        labels.encode(["neutral"])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Vocabulary(["a", "b", "a"]), "tokens: expected each once, got 'a' at least twice"),
        (lambda: Vocabulary(["<pad>"]), "tokens: expected each once, got '<pad>' at least twice"),
        (
            lambda: Vocabulary([], specials=("<PAD>",)),
            r"default: expected a token or one of \('<PAD>',\), got '<unk>'",
        ),
        (lambda: Vocabulary.build([], min_freq=0), "min_freq: expected at least 1, got 0"),
        (lambda: Vocabulary.build([], max_size=-1), "max_size: expected at least 0 or None, got -1"),
        (lambda: Vocabulary.build(["a cat"]), "sentences: expected a list of tokens, got the string 'a cat'"),
        (lambda: Vocabulary([]).encode("a cat"), "tokens: expected a list of tokens, got the string 'a cat'"),
    ],
)
def test_errors(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_file(tmp_path):
    path = tmp_path / "vocabulary.json"
    Vocabulary(["ü", "\n", ""], specials=("<unk>",)).save(path)
    state = {"specials": ["<unk>"], "default": "<unk>", "tokens": ["ü", "\n", ""]}
    assert json.loads(path.read_text("utf-8")) == state
    assert '\n"ü",\n' in path.read_text("utf-8")  # a token a line


@given(
    tokens=st.lists(st.text(max_size=5), unique=True),
    specials=st.lists(st.text(st.characters(max_codepoint=0x7F), min_size=1), unique=True, min_size=1),
    with_default=st.booleans(),
)
def test_round_trips(tokens, specials, with_default, tmp_path_factory):
    tokens = [token for token in tokens if token not in specials]
    vocabulary = Vocabulary(tokens, specials=specials, default=specials[0] if with_default else None)
    path = tmp_path_factory.mktemp("vocabulary") / "v.json"
    vocabulary.save(path)
    assert Vocabulary.load(path) == vocabulary == Vocabulary.from_dict(vocabulary.to_dict())
    assert Vocabulary.load(path).specials == tuple(specials)
    assert vocabulary.decode(vocabulary.encode(tokens)) == tokens
    assert vocabulary.encode(vocabulary.decode(range(len(vocabulary)))) == list(range(len(vocabulary)))


@given(
    sentences=st.lists(st.lists(st.sampled_from("abcdefgh"))),
    min_freq=st.integers(1, 4),
    max_size=st.none() | st.integers(0, 5),
)
def test_what_build_keeps(sentences, min_freq, max_size):
    counts = Counter(token for sentence in sentences for token in sentence)
    kept = Vocabulary.build(sentences, min_freq=min_freq, max_size=max_size).tokens[2:]
    assert all(counts[token] >= min_freq for token in kept)
    assert kept == sorted(kept, key=lambda token: (-counts[token], token))
    left_out = [counts[token] for token in counts if token not in kept and counts[token] >= min_freq]
    if max_size is None:
        assert not left_out
    else:
        assert len(kept) == min(max_size, len(kept) + len(left_out))
        assert not kept or max(left_out, default=0) <= counts[kept[-1]]


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"tokens": ["a"]}', '{"tokens": 1, "specials": [], "default": null}']
)
def test_files_that_hold_something_else(tmp_path, text):
    path = tmp_path / "v.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"v\.json: not a vocabulary as Vocabulary\.save writes it"):
        Vocabulary.load(path)


def test_real_wikitext(data):
    lines = read_words(data / "wikitext2/train.txt.gz")
    assert len(Vocabulary.build(lines, specials=("<unk>", "<eos>"))) == 33278


def test_real_reviews(data):
    """M: min_freq 5."""
    reviews = (letters_only(review.text).split() for review in read_imdb(data / "imdb/train.tsv.gz"))
    vocabulary = Vocabulary.build(reviews, min_freq=5, specials=("<UNK>", "<PAD>"), default="<UNK>")
    assert vocabulary.tokens[2:7] == ["the", "and", "a", "of", "to"]
    assert len(vocabulary) > 25000
