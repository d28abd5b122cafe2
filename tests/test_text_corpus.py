"""seqkern.text: files, their split, characters and the windows of truncated BPTT."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from texts import some_texts, write_some_texts

from seqkern.text import (
    CharCorpus,
    CharVocabulary,
    CorpusError,
    Text,
    Windows,
    WordCorpus,
    basic_english,
    read_texts,
    read_words,
    split,
    standard_library,
)


@pytest.fixture
def folder(tmp_path):
    return write_some_texts(tmp_path / "corpus")


# ---- files and their split ------------------------------------------------------------------------


def test_split_is_disjoint_complete_and_depends_on_names_only():
    texts = some_texts()
    train, held = split(texts, 0.2)
    assert sorted(t.name for t in train + held) == sorted(t.name for t in texts)
    assert 1 <= len(held) <= 20
    assert split(list(reversed(texts)), 0.2) == (train, held)
    # A file keeps its side when others come and go.
    fewer_train, fewer_held = split(texts[::2], 0.2)
    assert set(fewer_train) <= set(train) and set(fewer_held) <= set(held)


def test_split_is_the_same_in_every_process():
    """By sha256, whose digests of these letters begin 18, 25, 2e, 3e, 3f | aa, ca, cd."""
    train, held = split([Text(name, name) for name in "abcdefgh"], 0.3)
    assert ([t.name for t in held], [t.name for t in train]) == (["d", "f", "c", "b", "e"], ["h", "a", "g"])


def test_split_leaves_both_sides_something():
    for n in (2, 3):
        for share in (0.001, 0.999):
            train, held = split(some_texts(n), share)
            assert train and held and len(train) + len(held) == n


def test_split_cuts_a_single_file():
    train, held = split([Text("a", "0123456789")], 0.2)
    assert (train[0].text, held[0].text) == ("01234567", "89")


def test_standard_library_is_real_text():
    texts = standard_library()
    assert sum(len(text.text) for text in texts) > 1_000_000
    assert "argparse.py" in {text.name for text in texts}
    assert not any("test" in Path(text.name).parts for text in texts)


def test_read_texts_passes_over_what_is_not_text(folder):
    (folder / "image.png").write_bytes(b"\x89PNG\0\xff")
    (folder / "zeros.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").write_text(" \n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "übung.txt").write_text("schön", encoding="utf-8")
    names = [text.name for text in read_texts(folder)]
    assert len(names) == 41 and "übung.txt" in names
    assert read_texts(folder / "übung.txt") == [Text("übung.txt", "schön")]


def test_read_texts_reads_gz_and_makes_line_ends_one(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffone\r\ntwo\rthree\n".encode()))
    assert read_texts(tmp_path) == [Text("a.txt.gz", "one\ntwo\nthree\n")]
    (tmp_path / "b.gz").write_bytes(b"no gz")
    with pytest.raises(CorpusError, match=r"b\.gz: not a whole \.gz file"):
        read_texts(tmp_path)


def test_read_texts_tells_what_is_not_utf8(folder):
    """Other encodings are not passed over in silence."""
    (folder / "latin.txt").write_bytes("good\ngood again\nund schön\n".encode("latin-1"))
    for path in (folder, folder / "latin.txt"):
        with pytest.raises(CorpusError, match=r"latin\.txt:3: not utf-8: 0xf6, byte 8 of the line"):
            read_texts(path)


def test_read_texts_errors(tmp_path):
    with pytest.raises(CorpusError, match=r"no file or folder at .*nowhere"):
        read_texts(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="holds no UTF-8 text"):
        read_texts(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(CorpusError, match="holds no UTF-8 text"):
        read_texts(tmp_path / "empty")


# ---- characters and windows -----------------------------------------------------------------------


def test_vocabulary_round_trip():
    text = "def f(x):\n\treturn 'ü→😀'\n"
    vocabulary = CharVocabulary.of(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == torch.int64 and len(ids) == len(text)
    assert vocabulary.decode(ids) == text
    assert len(vocabulary) == len(set(text)) + 2
    assert vocabulary.encode("").shape == (0,)


def test_vocabulary_unknown_characters():
    vocabulary = CharVocabulary.of("aaabbc", min_share=0.2)
    assert vocabulary.characters == "ab"
    assert vocabulary.encode("abcü").tolist() == [2, 3, 0, 0]
    assert vocabulary.decode(vocabulary.encode("abcü")) == "ab��"
    assert vocabulary.decode([vocabulary.BOUNDARY, 2]) == "a"


def test_corpus_takes_its_vocabulary_from_the_training_files():
    texts = some_texts()
    name = split(texts, 0.2)[1][0].name
    texts = [replace(text, text=text.text + "§") if text.name == name else text for text in texts]
    corpus = CharCorpus.from_texts(texts, held_out=0.2)
    assert "§" not in corpus.vocabulary.characters
    assert sum((ids == corpus.vocabulary.UNKNOWN).sum() for ids in corpus.held_out) == 1
    train, held = split(texts, 0.2)
    assert corpus.vocabulary.decode(corpus.train) == "".join(text.text for text in train)
    assert [corpus.vocabulary.decode(ids) for ids in corpus.held_out[1:]] == [text.text for text in held[1:]]
    assert all(ids[0] == corpus.vocabulary.BOUNDARY for ids in [corpus.train, *corpus.held_out])


def test_corpus_of_limited_size():
    corpus = CharCorpus.from_texts(some_texts(), held_out=0.2, max_characters=1000)
    assert len(corpus.vocabulary.decode(corpus.train)) == 1000
    assert sum(len(corpus.vocabulary.decode(ids)) for ids in corpus.held_out) == 100


def test_word_corpus_by_hand():
    train = [["a", "b", "a", "<eos>"], ["<eos>"], ["<unk>", "c", "b", "<eos>"]]
    corpus = WordCorpus.from_lines(train, [[["c", "d", "<eos>"]], []])
    assert corpus.vocabulary.tokens == ["<unk>", "<eos>", "a", "b", "c"]
    assert corpus.train.tolist() == [2, 3, 2, 1, 1, 0, 4, 3, 1]
    assert [ids.tolist() for ids in corpus.held_out] == [[4, 0, 1], []]
    assert all(ids.dtype == torch.int64 for ids in [corpus.train, *corpus.held_out])
    rare = WordCorpus.from_lines(iter(train), min_freq=2, max_size=1)
    assert rare.vocabulary.tokens == ["<unk>", "<eos>", "a"]
    assert rare.train.tolist() == [2, 0, 2, 1, 1, 0, 0, 0, 1]
    with pytest.raises(CorpusError, match="corpus: no tokens to learn from"):
        WordCorpus.from_lines([[]])


def test_word_corpus_of_texts():
    texts = some_texts()
    corpus = WordCorpus.from_texts(texts, held_out=0.2)
    train, held = split(texts, 0.2)

    def lines(text):
        return text.text.removesuffix("\n").split("\n")

    words = [word for text in train for line in lines(text) for word in [*line.split(), "<eos>"]]
    assert corpus.vocabulary.decode(corpus.train) == words
    assert len(corpus.held_out) == len(held)
    lower = WordCorpus.from_texts([Text("a", "One, two.\nThree.\n")], tokenize=basic_english, held_out=0.5)
    assert lower.vocabulary.decode(lower.train) == ["one", ",", "two", "<eos>"]
    assert lower.vocabulary.decode(lower.held_out[0]) == ["<unk>", "<eos>", "<unk>", "<unk>", "<eos>"]


@pytest.mark.parametrize("N", [17, 63, 129, 1000])
def test_windows_are_contiguous(N):
    stream = torch.arange(N)
    B, T = 3, 4
    windows = Windows(stream, B, T)
    rows = [[] for _ in range(B)]
    for i in range(len(windows)):
        inputs, targets = windows[i]
        assert inputs.shape == targets.shape == (T, B)
        assert torch.equal(targets, inputs + 1)
        for b in range(B):
            rows[b] += inputs[:, b].tolist()
    for b, row in enumerate(rows):
        start = b * (N // B)
        assert row == list(range(start, start + len(row)))
        assert N // B - T <= len(row) + 1 <= N // B
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_windows_of_too_short_a_stream():
    assert len(Windows(torch.arange(15), 3, 4)) == 1
    with pytest.raises(CorpusError, match=r"14 ids are too few for 3 rows of 4 steps \(at least 15\)"):
        Windows(torch.arange(14), 3, 4)


# ---- real data ------------------------------------------------------------------------------------


def test_real_characters(data):
    corpus = CharCorpus.from_texts(read_texts(data / "tinyshakespeare/train.txt.gz"), held_out=0.1)
    assert (len(corpus.train) - 2, len(corpus.held_out[0]) - 1) == (903469, 100385)  # less the boundaries
    assert len(corpus.vocabulary) - 2 == 65


def test_real_words(data):
    train, *others = (read_words(data / f"wikitext2/{part}.txt.gz") for part in ("train", "valid", "test"))
    corpus = WordCorpus.from_lines(train, others)
    assert len(corpus.vocabulary) == 33278
    assert [len(ids) for ids in [corpus.train, *corpus.held_out]] == [2088628, 217646, 245569]
    assert corpus.vocabulary.decode(corpus.train[:2]) == ["<eos>", "="]
    assert Windows(corpus.train, B=20, T=35)[0][0].shape == (35, 20)
