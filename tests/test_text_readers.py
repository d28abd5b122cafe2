"""seqkern.text's readers: records by hand, bad lines by file and line, and the counts of the real sets."""

import gzip
import sys
from pathlib import Path

import pytest

from seqkern.text import (
    CorpusError,
    Labelled,
    Pair,
    Tagged,
    download,
    easy_pairs,
    read_conll,
    read_conllu,
    read_imdb,
    read_labelled_lines,
    read_lines,
    read_names,
    read_pairs,
    read_parallel,
    read_tsv,
    read_words,
)


@pytest.fixture
def write(tmp_path):
    """write(name, text or bytes) → the path of a file, compressed where its name ends in .gz."""

    def write(name: str, content: str | bytes) -> Path:
        data = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def fails(match: str, records) -> None:
    with pytest.raises(CorpusError) as caught:
        list(records)
    assert match in str(caught.value)


# ---- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_end_at_newlines_only(write, name):
    path = write(name, "\ufeffone\r\n\ntwo\u2028\x85\x0b\x1cstill two\n three \nlast")
    assert list(read_lines(path)) == ["one", "", "two\u2028\x85\x0b\x1cstill two", " three ", "last"]


def test_lines_of_empty_files(write):
    assert list(read_lines(write("empty", ""))) == []
    assert list(read_lines(write("newline", "\n"))) == [""]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_bytes_that_are_not_utf8(write, name):
    path = write(name, b"good\nna\xc3\xafve caf\xe9 here\n")
    lines = read_lines(path)
    assert next(lines) == "good"
    fails(f"{path}:2: not utf-8: 0xe9, byte 11 of the line (invalid continuation byte)", lines)
    assert list(read_lines(path, encoding="latin-1")) == ["good", "naÃ¯ve café here"]


def test_lines_of_no_file(tmp_path):
    fails(f"corpus: no file at {tmp_path / 'nowhere'}", read_lines(tmp_path / "nowhere"))
    fails(f"corpus: no file at {tmp_path}", read_lines(tmp_path))


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: b"text", lambda data: data[:-3]])
def test_damaged_gz(tmp_path, damage):
    path = tmp_path / "a.gz"
    path.write_bytes(damage(gzip.compress(b"some text\n" * 100)))
    fails(f"{path}: not a whole .gz file", read_lines(path))


# ---- labelled texts -------------------------------------------------------------------------------


def test_tsv(write):
    assert list(read_tsv(write("a.tsv", "1\tgood film\n0\t bad \n"))) == [("1", "good film"), ("0", " bad ")]
    rows = list(read_tsv(write("b.tsv.gz", "1\t7\t12\tgood\n0\t2\t13\tbad\n")))
    assert rows == [Labelled("1", "good"), Labelled("0", "bad")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1\tgood\n\n", "2: expected 2 columns parted by tabs, got 1"),
        ("good\n", "1: expected at least 2 columns parted by tabs, got 1"),
        ("1\tgood\n1\tbad\tfilm\n", "2: expected 2 columns parted by tabs, got 3"),
        ("1\tgood\n\tfilm\n", "2: expected a label first, got none"),
    ],
)
def test_tsv_errors(write, text, complaint):
    path = write("a.tsv", text)
    fails(f"{path}:{complaint}", read_tsv(path))


def test_labelled_lines(write):
    path = write("sst", "0 one long string of cliches .\n1  two  spaces\n")
    assert list(read_labelled_lines(path)) == [("0", "one long string of cliches ."), ("1", " two  spaces")]
    path = write("trec", "4 Qui est Andr\xe9 ?\n".encode("latin-1"))
    assert list(read_labelled_lines(path, encoding="latin-1")) == [("4", "Qui est André ?")]
    path = write("bad", "0 good\nword\n")
    fails(f"{path}:2: expected a label, a space and a text, got 'word'", read_labelled_lines(path))
    path = write("bad", " good\n")
    fails(f"{path}:1: expected a label first, got none", read_labelled_lines(path))


def test_imdb_folder(write, tmp_path):
    for name, text in {
        "train/pos/10_9.txt": "very\ngood",
        "train/pos/9_7.txt": "good",
        "train/neg/0_1.txt": "bad",
        "train/neg/notes.md": "no review",
        "train/unsup/0_0.txt": "no label",
        "test/pos/0_10.txt": "best",
        "test/neg/0_2.txt": "worse",
    }.items():
        write(f"aclImdb/{name}", text)
    root = tmp_path / "aclImdb"
    assert list(read_imdb(root)) == [("0", "bad"), ("1", "good"), ("1", "very good")]
    assert list(read_imdb(root, "test")) == [("0", "worse"), ("1", "best")]
    assert list(read_imdb(root / "test")) == list(read_imdb(root, "test"))
    fails(f"corpus: no folder {root / 'dev' / 'neg'}", read_imdb(root, "dev"))
    path = write("aclImdb/train/neg/readme.txt", "")
    fails(f"{path}: expected a name such as 200_8.txt (id, rating)", read_imdb(root))


def test_imdb_file(write):
    path = write("train.tsv.gz", "1\t7\t12\tgood\n0\t2\t13\tbad\n")
    assert list(read_imdb(path)) == [("1", "good"), ("0", "bad")]
    path = write("train.tsv", "1\tgood\npos\tgood\n")
    fails(f"{path}:2: expected the label 0 or 1, got 'pos'", read_imdb(path))


def test_names(write, tmp_path):
    write("names/Polish.txt", "Łuczak\nNowak \n")
    write("names/Irish.txt", "O'Neal\n")
    write("names/LICENSE", "MIT\n")
    found = [("Irish", "O'Neal"), ("Polish", "Łuczak"), ("Polish", "Nowak")]
    assert list(read_names(tmp_path / "names")) == found
    path = write("names/Polish.txt", "Nowak\n \n")
    fails(f"{path}:2: expected a name, got a blank line", read_names(tmp_path / "names"))
    fails(f"corpus: no folder with .txt files at {tmp_path / 'x'}", read_names(tmp_path / "x"))


# ---- pairs of sentences ---------------------------------------------------------------------------


def test_parallel(write):
    german, english = write("a.de.gz", "Ein Hut.\n\nJa.\n"), write("a.en", "A hat.\n\nYes.")
    assert list(read_parallel(german, english)) == [("Ein Hut.", "A hat."), ("", ""), ("Ja.", "Yes.")]


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2), (0, 1)])
def test_parallel_files_of_different_lengths(write, lengths):
    source, target = (write(f"{i}.txt", "word\n" * n) for i, n in enumerate(lengths))
    pairs = read_parallel(source, target)
    assert [next(pairs) for _ in range(min(lengths))] == [Pair("word", "word")] * min(lengths)
    fails(f"{source} has {lengths[0]} lines, {target} {lengths[1]}", pairs)


def test_pairs(write):
    path = write("fra.txt", "Go.\tVa !\nHi.\tSalut !\tCC-BY 2.0\n")
    assert list(read_pairs(path)) == [Pair("Go.", "Va !"), Pair("Hi.", "Salut !")]
    path = write("fra.txt", "Go.\tVa !\nHi.\n")
    fails(f"{path}:2: expected 2 or 3 columns parted by tabs, got 1", read_pairs(path))


def test_easy_pairs():
    pairs = [
        Pair("I'm OK.", "Ça va."),
        Pair("He is here!", "Il est là !"),
        Pair("He isn't here!", "Il n'est pas là !"),
        Pair("I see.", "Je vois."),
        Pair("She's one two three four five six.", "Elle est ici."),  # 9 words, the stop among them
        Pair("She's one two three four five six seven.", "Elle est ici."),
        Pair("You are here.", "un deux trois quatre cinq six sept huit neuf dix"),
    ]
    assert list(easy_pairs(pairs)) == [
        ("i m ok .", "ca va ."),
        ("he is here !", "il est la !"),
        ("he isn t here !", "il n est pas la !"),
        ("she s one two three four five six .", "elle est ici ."),
    ]


# ---- tagged sentences -----------------------------------------------------------------------------


def test_conll(write):
    path = write("a.conll", "\n\nEU\tB-ORG\nrejects\tO\n\t\n \nNew\tB-LOC\nYork\tI-LOC\n")
    found = [Tagged(["EU", "rejects"], ["B-ORG", "O"]), Tagged(["New", "York"], ["B-LOC", "I-LOC"])]
    assert list(read_conll(path, bio=True)) == found
    path = write("b.conll.gz", "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\n. . O O\n")
    assert list(read_conll(path)) == [Tagged(["EU", "."], ["B-ORG", "O"])]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("EU\n", "1: expected at least 2 columns, got 1"),
        ("EU\tO\n\na\tb\tO\n", "3: expected 2 columns, got 3"),
        ("EU\tO\nx\t\n", "2: expected a token and a tag, got 'x' and ''"),
        ("EU\tO\nx\tORG\n", "2: expected a tag O, B-… or I-…, got 'ORG'"),
        ("EU\tO\nx\tB-\n", "2: expected a tag O, B-… or I-…, got 'B-'"),
        ("EU\tO\nx\tI-ORG\n", "2: expected I-ORG after B-ORG or I-ORG only, got it after O"),
        ("EU\tB-LOC\nx\tI-ORG\n", "2: expected I-ORG after B-ORG or I-ORG only, got it after B-LOC"),
        ("EU\tB-ORG\n\nx\tI-ORG\n", "3: expected I-ORG after B-ORG or I-ORG only, got it after O"),
    ],
)
def test_conll_errors(write, text, complaint):
    path = write("a.conll", text)
    fails(f"{path}:{complaint}", read_conll(path, bio=True))


CONLLU = """\
# text = Don't go.
1-2	Don't	_	_	_	_	_	_	_	_
1	Do	do	AUX	VB	_	3	aux	_	_
2	n't	not	PART	RB	_	3	advmod	_	_
3	go	go	VERB	VB	_	0	root	_	_
3.1	went	go	VERB	_	_	_	_	_	_
4	.	.	PUNCT	.	_	3	punct	_	_

# text = Yes
1	Yes	yes	INTJ	UH	_	0	root	_	_
"""


def test_conllu(write):
    path = write("a.conllu", CONLLU)
    first, second = read_conllu(path)
    assert first == Tagged(["Do", "n't", "go", "."], ["AUX", "PART", "VERB", "PUNCT"])
    assert second == Tagged(["Yes"], ["INTJ"])
    assert [tags for _, tags in read_conllu(path, column="head")] == [["3", "3", "0", "3"], ["0"]]
    with pytest.raises(ValueError, match=r"column: expected one of .*'upos'.*, got 'tag'"):
        next(read_conllu(path, column="tag"))


def test_conllu_errors(write):
    path = write("a.conllu", CONLLU.replace("3	go", "5	go"))
    fails(f"{path}:5: expected the word id 3, got '5'", read_conllu(path))
    path = write("a.conllu", CONLLU.replace("	UH", ""))
    fails(f"{path}:10: expected 10 columns, got 9", read_conllu(path))


def test_words(write):
    path = write("a.txt", " = Title = \n\n the <unk> end \n")
    assert list(read_words(path)) == [
        ["=", "Title", "=", "<eos>"],
        ["<eos>"],
        ["the", "<unk>", "end", "<eos>"],
    ]


def test_download_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="downloads need datasets and a network: pip install datasets"):
        download("stanfordnlp/imdb")


# ---- real data ------------------------------------------------------------------------------------


def test_real_reviews(data):
    reviews = list(read_imdb(data / "imdb/train.tsv.gz"))
    assert len(reviews) == 25000
    assert sum(review.label == "1" for review in reviews) == 12500
    assert reviews[0].text.startswith("Michael Stearns plays Mike, a sexually frustrated individual")


def test_real_labelled_lines(data):
    for name, count in (("dev", 872), ("train", 6920)):
        found = list(read_labelled_lines(data / f"sst2/stsa.binary.{name}"))
        assert len(found) == count and {label for label, _ in found} == {"0", "1"}
    for name, count in (("test", 500), ("train", 5452)):
        found = list(read_labelled_lines(data / f"trec/TREC.{name}.all", encoding="latin-1"))
        assert len(found) == count and {label for label, _ in found} == set("012345")
    fails("TREC.train.all:", read_labelled_lines(data / "trec/TREC.train.all"))  # it is not UTF-8


def test_real_names(data):
    names = list(read_names(data / "names"))
    assert len({name.label for name in names}) == 18
    assert sum(name.label == "Russian" for name in names) == 9384
    assert len(names) == 20050


def test_real_pairs(data):
    pairs = list(read_pairs(data / "eng-fra/fra.txt.gz"))
    assert len(pairs) == 142787 and pairs[0] == ("Go.", "Va !")


def test_real_easy_pairs(data):
    assert len(list(easy_pairs(read_pairs(data / "eng-fra/fra.txt.gz")))) == 10922


def test_real_parallel(data):
    raw, tok = data / "multi30k/raw", data / "multi30k/tok"
    assert sum(1 for _ in read_parallel(raw / "train.de.gz", raw / "train.en.gz")) == 29000
    pairs = list(read_parallel(tok / "val.lc.norm.tok.de", tok / "val.lc.norm.tok.en"))
    assert len(pairs) == 1014
    fails("has 29000 lines", read_parallel(raw / "train.de.gz", raw / "val.en.gz"))


@pytest.mark.parametrize(
    ("name", "sentences", "tokens", "tags"),
    [
        ("wnut17/wnut17train.conll", 3394, 62730, 13),
        ("wnut17/emerging.dev.conll", 1009, 15733, 13),
        ("wnut17/emerging.test.annotated", 1287, 23394, 13),
        ("ncbi_disease/train.tsv.gz", 5424, 135701, 3),
        ("ncbi_disease/devel.tsv", 923, 23969, 3),
        ("ncbi_disease/test.tsv", 940, 24497, 3),
    ],
)
def test_real_entities(data, name, sentences, tokens, tags):
    found = list(read_conll(data / name, bio=True))
    counts = len(found), sum(len(s.tokens) for s in found), len({tag for s in found for tag in s.tags})
    assert counts == (sentences, tokens, tags)


@pytest.mark.parametrize(
    ("part", "sentences", "words"), [("train", 12544, 204577), ("dev", 2001, 25147), ("test", 2077, 25094)]
)
def test_real_treebank(data, part, sentences, words):
    found = list(read_conllu(data / f"ud_english_ewt/en_ewt-ud-{part}.conllu.gz"))
    assert (len(found), sum(len(sentence.tokens) for sentence in found)) == (sentences, words)
    assert len({tag for sentence in found for tag in sentence.tags}) == 17
