"""The figures by which the tasks are judged; plain Python numbers in, plain Python numbers out.

Span F1 follows conlleval, as seqeval does by default. seqeval itself is not a dependency: its source package
on PyPI asks, in order to build, for what no longer builds; the rules are the few lines of `spans`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["accuracy", "bits", "bleu", "f1", "perplexity", "span_f1", "spans"]


def accuracy(predicted: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """The share of equal pairs, in 0…1.

    Raises:   ValueError: no pair, or not as many predictions as expected values
    """
    _check(predicted, expected)
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def f1(predicted: Sequence[Hashable], expected: Sequence[Hashable], average: str = "macro") -> float:
    """F1 = 2·TP / (2·TP + FP + FN) of single-label classification, in 0…1.

    "macro" is the mean over the classes that occur on either side; "micro" counts all decisions together,
    which with one label per example is the accuracy.

    Raises:   ValueError: no pair, not as many predictions as expected values, or another average
    """
    _check(predicted, expected)
    if average not in ("macro", "micro"):
        raise ValueError(f"average: expected 'macro' or 'micro', got {average!r}")
    right = Counter(e for p, e in zip(predicted, expected, strict=True) if p == e)
    sizes = Counter(predicted) + Counter(expected)  # of a class: 2·TP + FP + FN
    if average == "micro":
        return 2 * right.total() / sizes.total()
    return sum(2 * right[label] / size for label, size in sizes.items()) / len(sizes)


def _check(predicted: Sequence[object], expected: Sequence[object]) -> None:
    if len(predicted) != len(expected):
        raise ValueError(f"predicted: expected {len(expected)} values, as expected has, got {len(predicted)}")
    if not expected:
        raise ValueError("expected: no value to compare with")


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities (type, first, last + 1) that a sequence of BIO tags marks, by conlleval's rules.

    An entity begins at B-x, and at an I-x that follows O or another type: what a tagger without constraints
    gives is read kindly, as conlleval does. BIOES and BIOUL tags are read, too.

    >>> spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    found, first, kind = [], None, ""
    before = ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, type_ = tag.partition("-")
        inside = prefix not in ("O", "B", "S", "U") and before[0] not in ("O", "E", "L", "S", "U")
        if not (inside and before[1] == type_):  # whatever was open ends here
            if first is not None:
                found.append((kind, first, i))
            first, kind = (None, "") if prefix == "O" else (i, type_)
        before = (prefix, type_)
    return found


def span_f1(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of the entities that sentences of tags mark, all counted together (micro).

    An entity is right if its type and both its ends are. What cannot be computed (nothing predicted, nothing
    to find) is 0.

    Raises:   ValueError: not as many sentences, or a sentence of another length
    """
    _check(predicted, expected)
    right = guessed = wanted = 0
    for i, (p, e) in enumerate(zip(predicted, expected, strict=True)):
        if len(p) != len(e):
            raise ValueError(f"predicted[{i}]: expected {len(e)} tags, got {len(p)}")
        ours, theirs = set(spans(p)), set(spans(e))
        right, guessed, wanted = right + len(ours & theirs), guessed + len(ours), wanted + len(theirs)
    return {
        "precision": right / guessed if guessed else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "f1": 2 * right / (guessed + wanted) if guessed + wanted else 0.0,
    }


def perplexity(nats: float) -> float:
    """exp of a mean cross-entropy in nats: 1 at best, |V| for a uniform model; inf where that overflows."""
    return math.exp(nats) if nats < 709 else math.inf


def bits(nats: float) -> float:
    """A mean cross-entropy in bits: of characters, bits per character."""
    return nats / math.log(2)


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False
) -> dict[str, float]:
    """Corpus BLEU of detokenised lines against one reference each: sacrebleu's, tokenised by 13a.

    Returns:  bleu in 0…1, and bleu_100, the same × 100
    Raises:   ValueError: no line, or not as many; ImportError without sacrebleu
    """
    _check(hypotheses, references)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'seqkern[text]'") from error
    score = BLEU(tokenize="13a", lowercase=lowercase, force=True).corpus_score(
        list(hypotheses), [list(references)]
    )
    return {"bleu": score.score / 100, "bleu_100": score.score}
