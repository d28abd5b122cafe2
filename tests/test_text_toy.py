"""seqkern.text.toy: the corpora made by rule are what their rules say, and the same in every process."""

import subprocess
import sys
from collections import Counter

import pytest

from seqkern.text import toy

MAKERS = [toy.sentiment, toy.questions, toy.entities, toy.parts_of_speech, toy.translations]


@pytest.mark.parametrize("make", MAKERS)
def test_deterministic(make):
    records = make(50)
    assert len(records) == 50
    assert make(50) == records != make(50, seed=1)
    assert make(20) == records[:20]


def test_the_same_in_every_process():
    names = ", ".join(f"toy.{make.__name__}(50)" for make in MAKERS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from seqkern.text import toy; print([{names}])"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{[make(50) for make in MAKERS]}\n"


def test_sentiment():
    praise, blame = set(toy._PRAISE), set(toy._BLAME)
    for label, text in toy.sentiment(300):
        for clause in text.removesuffix(" .").split(" and "):
            words = clause.split()
            assert ((words[-1] in praise) != ("not" in words)) == (label == "1")
            assert words[-1] in praise | blame
    assert 120 < sum(label == "1" for label, _ in toy.sentiment(300)) < 180


def test_questions():
    labels = Counter(label for label, _ in toy.questions(400))
    assert labels.keys() == {"person", "place", "number", "description"} and min(labels.values()) > 70
    assert all("{" not in text and text.endswith(" ?") for _, text in toy.questions(400))


def test_names():
    counts = Counter(name.label for name in toy.names())
    assert len(counts) == 6 and set(counts.values()) == {25}
    assert len({name.text for name in toy.names()}) == 150


def test_entities():
    for tokens, tags in toy.entities(300):
        assert len(tokens) == len(tags)
        assert not any(token.isupper() for token in tokens)
        for before, tag in zip(["O", *tags], tags, strict=False):
            assert not tag.startswith("I-") or before[2:] == tag[2:]
    kinds = {tag for _, tags in toy.entities(300) for tag in tags}
    assert kinds == {"O"} | {f"{b}-{kind}" for b in "BI" for kind in ("person", "place", "organisation")}


def test_parts_of_speech():
    tags = {}
    for sentence in toy.parts_of_speech(500):
        for token, tag in zip(*sentence, strict=True):
            tags.setdefault(token, set()).add(tag)
    assert tags["light"] == {"NOUN", "VERB", "ADJ"} and tags["watch"] == {"NOUN", "VERB"}
    assert tags["."] == {"PUNCT"} and tags["the"] == {"DET"}


def test_translations():
    pairs = toy.translations(500)
    nouns = {german: english for german, _, english in toy._PEOPLE + toy._OBJECTS}
    for german, english in pairs:
        found = [nouns[word] for word in german.split() if word in nouns]
        assert len(found) == 2 and [word for word in english.split() if word in found] == found
    turned = [pair for pair in pairs if pair.target.split()[0] in ("Today", "Now", "Often")]
    assert 150 < len(turned) < 250
    assert all(pair.source.split()[1] in dict(toy._VERBS) for pair in turned)
    assert all(" a old " not in pair.target for pair in pairs)


def test_prose_is_english():
    texts = toy.prose()
    assert len({text.name for text in texts}) == len(texts) > 50
    words = " ".join(text.text for text in texts).split()
    assert len(words) > 50_000 and Counter(words).most_common(1)[0][0] == "the"
