"""seqkern.train.metrics: figures computed by hand, conlleval's and seqeval's own examples, sacrebleu's."""

import math
import random

import pytest

from seqkern.train.metrics import accuracy, bits, bleu, f1, perplexity, span_f1, spans


def test_accuracy_and_f1():
    expected = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "c", "a"]
    assert accuracy(predicted, expected) == 3 / 6
    assert f1(predicted, expected, "micro") == 3 / 6
    # a: TP 2, FP 1, FN 1; b: TP 1, FP 1, FN 1; c: TP 0, FP 1, FN 1
    assert f1(predicted, expected) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert f1(["d"], ["a"]) == 0.0
    assert f1(expected, expected) == 1.0


def test_f1_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    for classes in (2, 5, 40):
        expected, predicted = ([rng.randrange(classes) for _ in range(50)] for _ in range(2))
        for average in ("macro", "micro"):
            theirs = metrics.f1_score(expected, predicted, average=average, zero_division=0)
            assert f1(predicted, expected, average) == pytest.approx(theirs)


def test_figures_refuse_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"predicted: expected 2 values, as expected has, got 1"):
        accuracy([1], [1, 2])
    with pytest.raises(ValueError, match="no value to compare with"):
        f1([], [])
    with pytest.raises(ValueError, match="average: expected 'macro' or 'micro', got 'weighted'"):
        f1([1], [1], "weighted")
    with pytest.raises(ValueError, match=r"predicted\[1\]: expected 2 tags, got 1"):
        span_f1([["O"], ["O"]], [["O"], ["O", "O"]])


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # seqeval's example
        ("O I-PER I-PER O", [("PER", 1, 3)]),  # an I- alone begins
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),  # another type begins
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("I-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER-X I-PER-X", [("PER-X", 0, 2)]),
        ("S-PER S-PER B-LOC I-LOC E-LOC I-LOC", [("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 5), ("LOC", 5, 6)]),
        ("U-PER I-PER B-LOC L-LOC", [("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 4)]),
        ("B-LOC E-LOC E-LOC", [("LOC", 0, 2), ("LOC", 2, 3)]),
        ("O O", []),
        ("", []),
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


def test_span_f1_of_seqevals_example():
    """seqeval's README: f1_score(y_true, y_pred) is 0.50."""
    expected = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predicted = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert span_f1(predicted, expected) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}


def test_span_f1_counts_over_all_sentences():
    expected = [["B-A", "O", "B-B", "I-B"], ["O"], ["B-A"]]
    predicted = [["B-A", "O", "B-A", "I-A"], ["B-A"], ["O"]]  # 1 of 3 predicted, 1 of 3 wanted
    found = span_f1(predicted, expected)
    assert found["precision"] == found["recall"] == pytest.approx(1 / 3)
    predicted[2] = ["B-A"]  # 2 of 4, 2 of 3
    found = span_f1(predicted, expected)
    assert (found["precision"], found["recall"]) == (0.5, pytest.approx(2 / 3))
    assert found["f1"] == pytest.approx(4 / 7)
    assert span_f1([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_perplexity_and_bits():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50)) == pytest.approx(50)  # a uniform model's is |V|
    assert perplexity(1000.0) == math.inf
    assert bits(math.log(8)) == pytest.approx(3)


def test_bleu():
    pytest.importorskip("sacrebleu")
    same = ["A man with an orange hat.", "Two dogs run through the tall grass."]
    assert bleu(same, same) == {"bleu": pytest.approx(1.0), "bleu_100": pytest.approx(100.0)}
    # One line; 13a splits the full stop: 7 tokens, of n-grams 6/7, 4/6, 3/5, 2/4 right; as long as wanted.
    found = bleu(["A man with an orange cap."], ["A man with an orange hat."])
    by_hand = (6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25
    assert found["bleu"] == pytest.approx(by_hand)
    shouted = [line.upper() for line in same]
    assert bleu(shouted, same)["bleu"] < 0.1
    assert bleu(shouted, same, lowercase=True)["bleu"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="expected 2 values"):
        bleu(same[:1], same)
