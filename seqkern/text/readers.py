"""Data sets in the standard formats, record by record: labelled texts, pairs of sentences, tagged sentences.

Every reader streams, takes plain files and .gz alike, and raises CorpusError with file and line where a line
is not what the format says. Labels and tags are strings, as in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from seqkern.text.files import CorpusError, bad_line, read_lines
from seqkern.text.tokenization import normalize_string


class Labelled(NamedTuple):
    """A text of a class."""

    label: str
    text: str


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


class Tagged(NamedTuple):
    """A sentence's tokens, and as many tags."""

    tokens: list[str]
    tags: list[str]


# ---- labelled texts -------------------------------------------------------------------------------


def read_tsv(path: str | Path, *, encoding: str = "utf-8") -> Iterator[Labelled]:
    """Lines `label TAB text`; of more columns the first and the last: `label TAB rating TAB id TAB text`.

    Raises:   CorpusError: a line without a tab or without a label; another number of columns than line 1's
    """
    columns = None
    for number, line in enumerate(read_lines(path, encoding=encoding), 1):
        fields = line.split("\t")
        if len(fields) != (columns or max(len(fields), 2)):
            expected = columns or "at least 2"
            raise bad_line(path, number, f"expected {expected} columns parted by tabs, got {len(fields)}")
        columns = len(fields)
        yield _labelled(path, number, fields[0], fields[-1])


def read_labelled_lines(path: str | Path, *, encoding: str = "utf-8") -> Iterator[Labelled]:
    """Lines `label text`, parted by one space: SST-2, and TREC with encoding="latin-1".

    Raises:   CorpusError: a line without a space or without a label
    """
    for number, line in enumerate(read_lines(path, encoding=encoding), 1):
        label, space, text = line.partition(" ")
        if not space:
            raise bad_line(path, number, f"expected a label, a space and a text, got {line[:60]!r}")
        yield _labelled(path, number, label, text)


def _labelled(path: str | Path, number: int, label: str, text: str) -> Labelled:
    if not label.strip():
        raise bad_line(path, number, "expected a label first, got none")
    return Labelled(label, text)


def read_imdb(path: str | Path, split: str = "train") -> Iterator[Labelled]:
    """Reviews of IMDB, label "0" (negative) or "1" (positive).

    Args:     path: the folder aclImdb (or its train or test): the negative reviews by their ids, then the
              positive ones, so shuffle before cutting off a part; or a file as read_tsv reads it
              split: "train" or "test", in the folder
    Raises:   CorpusError: no such folder or file, a file's name other than ID_RATING.txt, another label
    """
    path = Path(path)
    if path.is_dir():
        yield from _read_imdb_folder(path, split)
        return
    for number, review in enumerate(read_tsv(path), 1):
        if review.label not in ("0", "1"):
            raise bad_line(path, number, f"expected the label 0 or 1, got {review.label!r}")
        yield review


def _read_imdb_folder(root: Path, split: str) -> Iterator[Labelled]:
    if not (root / "pos").is_dir():
        root /= split
    for label, folder in (("0", root / "neg"), ("1", root / "pos")):
        if not folder.is_dir():
            raise CorpusError(f"corpus: no folder {folder}")
        files = []
        for file in folder.glob("*.txt"):
            name = re.fullmatch(r"(\d+)_(\d+)", file.stem)
            if name is None:
                raise CorpusError(f"{file}: expected a name such as 200_8.txt (id, rating)")
            files.append((int(name[1]), file))
        for _, file in sorted(files):
            yield Labelled(label, " ".join(read_lines(file)))


def read_names(path: str | Path) -> Iterator[Labelled]:
    """A folder of names, a file for each language (English.txt, …), a name a line; the label is the language.

    Raises:   CorpusError: no such folder, no .txt in it, a blank line
    """
    path = Path(path)
    files = sorted(path.glob("*.txt"))
    if not files:
        raise CorpusError(f"corpus: no folder with .txt files at {path}")
    for file in files:
        for number, name in enumerate(read_lines(file), 1):
            if not name.strip():
                raise bad_line(file, number, "expected a name, got a blank line")
            yield Labelled(file.stem, name.strip())


# ---- pairs of sentences ---------------------------------------------------------------------------


def read_parallel(source: str | Path, target: str | Path) -> Iterator[Pair]:
    """Two files whose lines translate each other, such as train.de and train.en.

    Raises:   CorpusError: files of different numbers of lines (both are told)
    """
    counts = [0, 0]
    for lines in zip_longest(read_lines(source), read_lines(target)):
        counts = [count + (line is not None) for count, line in zip(counts, lines, strict=True)]
        if counts[0] == counts[1]:
            yield Pair(*lines)
    if counts[0] != counts[1]:
        lengths = f"{source} has {counts[0]} lines, {target} {counts[1]}"
        raise CorpusError(f"corpus: parallel files of different lengths: {lengths}")


def read_pairs(path: str | Path) -> Iterator[Pair]:
    """Lines `sentence TAB translation`, as Tatoeba's eng-fra; a third column (its source) is left out.

    Raises:   CorpusError: a line of fewer or more columns
    """
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split("\t")
        if len(fields) not in (2, 3):
            raise bad_line(path, number, f"expected 2 or 3 columns parted by tabs, got {len(fields)}")
        yield Pair(*fields[:2])


# "he is" and its like stand for "he isn t", too.
_EASY_BEGINNINGS = (
    *("i am ", "i m ", "he is", "he s ", "she is", "she s "),
    *("you are", "you re ", "we are", "we re ", "they are", "they re "),
)


def easy_pairs(pairs: Iterable[Pair], *, max_length: int = 10) -> Iterator[Pair]:
    """Pairs (English, other) for a quick start: normalised, fewer than `max_length` words on either side, the
    English one beginning "i am", "he is", "they re" and the like. Of eng-fra's 142,787 pairs: 10,922.

    Source: PyTorch tutorial "NLP From Scratch: Translation", filterPairs
    """
    for pair in pairs:
        english = normalize_string(pair.source)
        if english.startswith(_EASY_BEGINNINGS):
            other = normalize_string(pair.target)
            if len(english.split(" ")) < max_length and len(other.split(" ")) < max_length:
                yield Pair(english, other)


# ---- tagged sentences -----------------------------------------------------------------------------

# Universal Dependencies' ten columns, https://universaldependencies.org/format.html
_CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


def read_conll(path: str | Path, *, bio: bool = False, encoding: str = "utf-8") -> Iterator[Tagged]:
    """CoNLL columns: a token a line, its tag in the last column; blank lines between sentences.

    Columns are parted by tabs, or, in a line without one, by spaces; CoNLL-2003's -DOCSTART- lines are left
    out. A line of blanks and tabs is blank.

    Args:     bio: checks that tags are O, B-… or I-…, and I-X only after B-X or I-X
    Raises:   CorpusError: a line of one column, another number of columns than before, a tag against BIO
    """
    tokens: list[str] = []
    tags: list[str] = []
    columns = None
    for number, line in enumerate(read_lines(path, encoding=encoding), 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if tokens:
                yield Tagged(tokens, tags)
                tokens, tags = [], []
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) != (columns or max(len(fields), 2)):
            raise bad_line(path, number, f"expected {columns or 'at least 2'} columns, got {len(fields)}")
        columns = len(fields)
        token, tag = fields[0], fields[-1]
        if not token or not tag:
            raise bad_line(path, number, f"expected a token and a tag, got {token!r} and {tag!r}")
        if bio and (complaint := _against_bio(tag, tags[-1] if tags else "O")):
            raise bad_line(path, number, complaint)
        tokens.append(token)
        tags.append(tag)
    if tokens:
        yield Tagged(tokens, tags)


def _against_bio(tag: str, before: str) -> str | None:
    prefix, dash, kind = tag.partition("-")
    if tag != "O" and not (prefix in ("B", "I") and dash and kind):
        return f"expected a tag O, B-… or I-…, got {tag!r}"
    if prefix == "I" and before not in (f"B-{kind}", f"I-{kind}"):
        return f"expected {tag} after B-{kind} or I-{kind} only, got it after {before}"
    return None


def read_conllu(path: str | Path, *, column: str = "upos") -> Iterator[Tagged]:
    """CoNLL-U: words with their tags; comments, multiword tokens (1-2) and empty nodes (5.1) are left out.

    Args:     column: the tags': "lemma", "upos", "xpos", "feats", "head", "deprel", "deps" or "misc"
    Raises:   ValueError: another column
              CorpusError: a line of other than 10 columns, word ids other than 1, 2, … in a sentence
    """
    if column not in _CONLLU_COLUMNS[2:]:
        raise ValueError(f"column: expected one of {_CONLLU_COLUMNS[2:]}, got {column!r}")
    place = _CONLLU_COLUMNS.index(column)
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(read_lines(path), 1):
        if line.startswith("#"):
            continue
        if not line.strip():
            if tokens:
                yield Tagged(tokens, tags)
                tokens, tags = [], []
            continue
        fields = line.split("\t")
        if len(fields) != len(_CONLLU_COLUMNS):
            raise bad_line(path, number, f"expected {len(_CONLLU_COLUMNS)} columns, got {len(fields)}")
        if re.fullmatch(r"\d+-\d+|\d+\.\d+", fields[0]):
            continue
        if fields[0] != str(len(tokens) + 1):
            raise bad_line(path, number, f"expected the word id {len(tokens) + 1}, got {fields[0]!r}")
        tokens.append(fields[1])
        tags.append(fields[place])
    if tokens:
        yield Tagged(tokens, tags)


# ---- downloads ------------------------------------------------------------------------------------


def download(path: str, name: str | None = None, *, split: str = "train", revision: str | None = None) -> Any:
    """The rows (dicts) of a data set of the Hugging Face Hub, by the package datasets, which keeps a copy.

    Raises:   ImportError: without the package datasets;  what datasets raises, without a network
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("downloads need datasets and a network: pip install datasets") from error
    return load_dataset(path, name, split=split, revision=revision)
