"""From text to tokens: cleaning, and the tokenisers that need no training."""

from __future__ import annotations

import re
import string
import unicodedata

_URL = re.compile(r"https?://\S+|www\.\S+", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z!][^<>]*>")  # of lower-case text; "3 < 4" has none
_PUNCTUATION_AND_DIGITS = re.compile(rf"[{re.escape(string.punctuation)}\d]")
_NO_LETTERS = re.compile(r"[^a-z]+")

# torchtext.data.utils, "basic_english": in this order, on lower-case text.
_BASIC_ENGLISH = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"'", " '  "),
        (r'"', ""),
        (r"\.", " . "),
        (r"<br />", " "),
        (r",", " , "),
        (r"\(", " ( "),
        (r"\)", " ) "),
        (r"!", " ! "),
        (r"\?", " ? "),
        (r"[;:]", " "),
    )
]


def clean_text(text: str) -> str:
    """M's cleaning: lower case, without URLs, HTML tags, ASCII punctuation and digits, single spaces.

    A URL or a tag parts words; punctuation and digits do not: "it's<br />42nd" → "its nd".
    """
    text = _TAG.sub(" ", _URL.sub(" ", text.lower()))
    return " ".join(_PUNCTUATION_AND_DIGITS.sub("", text).split())


def letters_only(text: str) -> str:
    """M's cleaning of IMDB: lower case, without HTML tags, any run of others than a–z as one space.

    Empty where the text has no such letter.
    """
    return _NO_LETTERS.sub(" ", _TAG.sub(" ", text.lower())).strip()


def word_tokenize(text: str) -> list[str]:
    """M's tokeniser: what whitespace parts."""
    return text.split()


def basic_english(text: str) -> list[str]:
    """torchtext's "basic_english": lower case; .,()!?' are tokens; quotes, ; : and <br /> go.

    Source: torchtext.data.utils._basic_english_normalize
    """
    text = text.lower()
    for pattern, replacement in _BASIC_ENGLISH:
        text = pattern.sub(replacement, text)
    return text.split()


def unicode_to_ascii(text: str) -> str:
    """Letters without their accents (NFD without its marks): "Ślusàrski" → "Slusarski"; "ß" stays.

    Source: PyTorch tutorial "NLP From Scratch", unicodeToAscii
    """
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def normalize_string(text: str) -> str:
    """Lower case, no accents, letters and .!? only, the latter as words: "Où est-ce?" → "ou est ce ?"

    Source: PyTorch tutorial "NLP From Scratch: Translation", normalizeString
    """
    text = unicode_to_ascii(text.lower().strip())
    text = re.sub(r"([.!?])", r" \1", text)
    return re.sub(r"[^a-zA-Z.!?]+", " ", text).strip()
