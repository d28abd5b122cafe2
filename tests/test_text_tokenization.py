"""seqkern.text's cleaning, tokenisers and byte-pair encoding."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqkern.text import (
    BytePairEncoding,
    basic_english,
    clean_text,
    letters_only,
    normalize_string,
    toy,
    unicode_to_ascii,
    word_tokenize,
)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Visit https://a.b/c?d=1 or WWW.x.org NOW!!", "visit or now"),
        ("<p class='x'>It's<br />the 42nd\ttime...</p>", "its the nd time"),
        ("3 < 4 and 5 > 2", "and"),  # no tag
        ("A  b\n\nC", "a b c"),
        ("one</B><!-- no -->two<I", "one twoi"),
        ("über-cool", "übercool"),
        ("123 ?!", ""),
    ],
)
def test_clean_text(text, cleaned):
    assert clean_text(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("I don't like it.<br /><br />Not 1 bit!", "i don t like it not bit"),
        ("naïve", "na ve"),
        ("10/10 !!!", ""),
    ],
)
def test_letters_only(text, cleaned):
    assert letters_only(text) == cleaned


def test_word_tokenize():
    assert word_tokenize(" The cat,\tsat.\n") == ["The", "cat,", "sat."]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # torchtext's own tests
        ("Basic English Normalization for a Line of Text", "basic english normalization for a line of text"),
        ("Basic 'normalization' for a line of \"text\".", "basic ' normalization ' for a line of text ."),
        ("It's;well:(so-so),no?Yes!<br />End", "it ' s well ( so-so ) , no ? yes ! end"),
        ("a<br/>b", "a<br/>b"),
        ("", ""),
    ],
)
def test_basic_english(text, tokens):
    assert basic_english(text) == tokens.split()


def test_unicode_to_ascii():
    assert unicode_to_ascii("Ślusàrski") == "Slusarski"
    assert unicode_to_ascii("O'Néàl ß") == "O'Neal ß"


def test_normalize_string():
    assert normalize_string(" Où est-ce?  Là!") == "ou est ce ? la !"
    assert normalize_string("«Ça va», dit-il.") == "ca va dit il ."


# ---- byte-pair encoding ---------------------------------------------------------------------------

TEXTS = ["low low low low low", "lower lower", "newest newest newest newest newest newest", "widest"] * 2


@pytest.fixture(scope="module")
def encoding():
    pytest.importorskip("tokenizers")
    return BytePairEncoding.train(TEXTS, vocab_size=300)


def test_specials_come_first(encoding):
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert [encoding[special] for special in specials] == [0, 1, 2, 3, 4]
    assert 5 + 256 < len(encoding) <= 300
    assert "[PAD]" in encoding and "[EOS]" not in encoding
    with pytest.raises(ValueError, match=r"unit '\[EOS\]' is not among the \d+ of this encoding"):
        encoding["[EOS]"]


def test_frequent_words_become_units(encoding):
    assert encoding.tokens("low newest") == ["low", "Ġnewest"]
    assert encoding.encode("low newest") == [encoding["low"], encoding["Ġnewest"]]
    assert encoding.encode("") == [] and encoding.decode([]) == ""


@given(text=st.text(max_size=30))
def test_decoding_undoes_encoding(encoding, text):
    assert encoding.decode(encoding.encode(text)) == text


def test_batches(encoding):
    texts = ["low", "", "ein größerer Hut\n 😀", "[PAD] is text here"]
    ids = encoding.encode_batch(texts)
    assert ids == [encoding.encode(text) for text in texts]
    assert encoding.decode_batch(ids) == texts
    assert encoding["[PAD]"] not in ids[3]
    assert encoding.decode([encoding["[CLS]"], *ids[0], encoding["[PAD]"]]) == "low"
    with pytest.raises(ValueError, match=r"id: expected 0 to \d+, got 300"):
        encoding.decode([300])


def test_save_and_load(encoding, tmp_path):
    path = tmp_path / "tokenizer.json"
    encoding.save(path)
    for twin in (BytePairEncoding.load(path), BytePairEncoding.from_dict(encoding.to_dict())):
        assert len(twin) == len(encoding)
        assert twin.encode("lowest [PAD] 😀") == encoding.encode("lowest [PAD] 😀")
        assert twin.decode(twin.encode("lowest [PAD] 😀")) == "lowest [PAD] 😀"
    (tmp_path / "bad.json").write_text(json.dumps({"tokens": []}))
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer\.json"):
        BytePairEncoding.load(tmp_path / "bad.json")


def test_training_is_deterministic(encoding):
    sentences = [pair.source for pair in toy.translations(200)]
    first, second = (BytePairEncoding.train(iter(sentences), vocab_size=350) for _ in range(2))
    assert first.to_dict() == second.to_dict()


def test_units_of_characters():
    """M's: spaces and punctuation part words; unknown characters are [UNK]."""
    pytest.importorskip("tokenizers")
    encoding = BytePairEncoding.train(TEXTS, vocab_size=60, byte_level=False)
    assert encoding.tokens("low, newest") == ["low", "[UNK]", "newest"]
    assert encoding.encode("§") == [0]
    translation = BytePairEncoding.train(
        TEXTS, vocab_size=60, byte_level=False, specials=["<unk>", "<pad>", "<sos>", "<eos>"], default="<unk>"
    )
    assert [translation[special] for special in ("<unk>", "<pad>", "<sos>", "<eos>")] == [0, 1, 2, 3]
    assert translation.encode("§") == [0]


def test_training_errors():
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"default: expected one of the specials .*'<pad>'.*, got '\[UNK\]'"):
        BytePairEncoding.train(TEXTS, specials=["<pad>"])
    with pytest.raises(ValueError, match="vocab_size: expected room for 5 specials and 256 bytes, got 200"):
        BytePairEncoding.train(TEXTS, vocab_size=200)


def test_without_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"byte-pair encoding needs tokenizers: .*'seqkern\[text\]'"):
        BytePairEncoding.train(TEXTS)


def test_import_loads_no_optional_package():
    code = (
        "import sys, seqkern.text; unwanted = {'tokenizers', 'datasets', 'seqkern.models', 'seqkern.train'}; "
        "print(sorted(unwanted & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
