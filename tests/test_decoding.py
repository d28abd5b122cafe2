"""Greedy and beam search and sampling, beside exhaustive enumeration and a beam search written in lists."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seqkern.models import ancestral_sampling, beam_search, greedy_search, reorder_state
from seqkern.models.decoding import _largest
from seqkern.nn import DecoderState, KeyValueCache

V, EOS, MAX_LEN, PAD = 3, 2, 4, 9


class Tables:
    """A model without weights: for each of B rows a table of log p(token | all tokens so far).

    State: (row of the batch [R], the tokens so far as a number in base V [R]). rows: R of every step.
    """

    def __init__(
        self, B: int = 3, V: int = V, max_len: int = MAX_LEN, seed: int = 0, step: float = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        scores = 2 * torch.randn(B, V**max_len, V, generator=generator, dtype=torch.float64)
        if step:  # few values, so that many are equal
            scores = (scores / step).round() * step
        self.table = torch.log_softmax(scores, -1)
        self.B, self.V = B, V
        self.rows: list[int] = []

    def start(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return torch.full((self.B,), -1), (torch.arange(self.B), torch.zeros(self.B, dtype=torch.int64))

    def step(self, ids: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        row, number = state
        number = torch.where(ids < 0, 0, number * self.V + ids + 1)
        self.rows.append(len(ids))
        return self.table[row, number % self.table.shape[1]], (row, number)

    def log_probs(self, row: int, ids: list[int]) -> list[float]:
        """log p of each token after those before it."""
        found, number = [], 0
        for token in ids:
            found.append(self.table[row, number % self.table.shape[1], token].item())
            number = number * self.V + token + 1
        return found

    def after(self, row: int, ids: list[int]) -> list[float]:
        return [self.log_probs(row, [*ids, token])[-1] for token in range(self.V)]


def search(model: Tables, **options) -> list[list[tuple[list[int], float]]]:
    """beam_search's hypotheses: for each row (ids, score), the empty ones left out."""
    start, state = model.start()
    options = dict(eos_index=EOS, max_len=MAX_LEN, pad_index=PAD) | options
    found = beam_search(model.step, state, start, **options)
    assert found.ids.shape[:2] == found.lengths.shape == found.scores.shape == found.log_probs.shape
    rows = []
    for b in range(model.B):
        hypotheses = []
        for ids, length, score in zip(found.ids[b], found.lengths[b], found.scores[b], strict=True):
            assert (ids[length:] == PAD).all()
            if length:
                hypotheses.append((ids[:length].tolist(), score.item()))
            else:
                assert score == -torch.inf
        rows.append(hypotheses)
    return rows


def every_hypothesis(model: Tables, row: int, length_penalty: float) -> list[tuple[list[int], float]]:
    """All sequences that end with their only <eos>, and all of MAX_LEN without one, the best first."""
    found = []
    for length in range(1, MAX_LEN + 1):
        for ids in itertools.product(range(V), repeat=length):
            ended = EOS in ids
            if ids.index(EOS) == length - 1 if ended else length == MAX_LEN:
                score = sum(model.log_probs(row, list(ids))) / length**length_penalty
                found.append((list(ids), score))
    return sorted(found, key=lambda hypothesis: -hypothesis[1])


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
def test_a_beam_that_holds_everything_finds_the_n_best_of_all(
    length_penalty: float, early_stop: bool
) -> None:
    model = Tables(B=4)
    found = search(
        model, beam_width=V**MAX_LEN, n_best=7, length_penalty=length_penalty, early_stop=early_stop
    )
    for row, hypotheses in enumerate(found):
        expected = every_hypothesis(model, row, length_penalty)[:7]
        assert [ids for ids, _ in hypotheses] == [ids for ids, _ in expected]
        assert [score for _, score in hypotheses] == pytest.approx([score for _, score in expected])


def literal_beam_search(
    model: Tables, row: int, W: int, length_penalty: float, early_stop: bool, max_len: int = MAX_LEN
) -> list[tuple[list[int], float]]:
    """The search as beam_search's docstring tells it, one row, in lists."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []

    def score(total: float, length: int) -> float:
        return total / length**length_penalty

    for length in range(1, max_len + 1):
        extensions = []
        for place, (total, ids) in enumerate(live):
            for token, log_p in enumerate(model.after(row, ids)):
                extensions.append((-(total + log_p), place, -log_p, token, [*ids, token]))
        extensions.sort(key=lambda extension: extension[:4])
        for cost, *_, ids in extensions[:W]:
            if ids[-1] == EOS:
                finished.append((score(-cost, length), ids))
        live = [(-cost, ids) for cost, *_, ids in extensions if ids[-1] != EOS][:W]
        finished.sort(key=lambda hypothesis: -hypothesis[0])  # stable
        if early_stop and len(finished) >= W:
            return [(ids, total) for total, ids in finished[:W]]
    finished += [(score(total, max_len), ids) for total, ids in live]
    finished.sort(key=lambda hypothesis: -hypothesis[0])
    return [(ids, total) for total, ids in finished[:W]]


@given(
    seed=st.integers(0, 10**6),
    W=st.integers(1, 5),
    length_penalty=st.sampled_from([0.0, 0.5, 1.0, 1.7, -0.5]),
    early_stop=st.booleans(),
    step=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_beam_search_beside_lists(
    seed: int, W: int, length_penalty: float, early_stop: bool, step: float
) -> None:
    """With step 100 all is equal, with step 1 much: ties go to the better beam and the smaller id."""
    model = Tables(seed=seed, step=step)
    n_best = W if early_stop else 1  # else a row may stop before the worse of the n best are known
    found = search(model, beam_width=W, n_best=n_best, length_penalty=length_penalty, early_stop=early_stop)
    for row, hypotheses in enumerate(found):
        expected = literal_beam_search(model, row, W, length_penalty, early_stop)[:n_best]
        assert [ids for ids, _ in hypotheses] == [ids for ids, _ in expected]
        assert [score for _, score in hypotheses] == pytest.approx([score for _, score in expected])


@given(seed=st.integers(0, 10**6), W=st.integers(1, 6), length_penalty=st.sampled_from([0.0, 1.0, 3.0]))
def test_what_beam_search_returns(seed: int, W: int, length_penalty: float) -> None:
    """Nothing follows <eos>; log p is the model's; the penalty is applied once; best first, none twice."""
    model = Tables(seed=seed)
    start, state = model.start()
    found = beam_search(
        *(model.step, state, start),
        **dict(eos_index=EOS, max_len=MAX_LEN, beam_width=W, n_best=W, length_penalty=length_penalty),
    )
    for row in range(model.B):
        seen = []
        for ids, length, log_p, score in zip(*(part[row].tolist() for part in found), strict=True):
            if not length:
                continue
            ids = ids[:length]
            assert EOS not in ids[:-1]
            assert ids[-1] == EOS or length == MAX_LEN
            assert log_p == pytest.approx(sum(model.log_probs(row, ids)))
            assert score == pytest.approx(log_p / length**length_penalty)
            assert ids not in seen
            seen.append(ids)
        assert found.scores[row].tolist() == sorted(found.scores[row].tolist(), reverse=True)


@given(seed=st.integers(0, 10**6), step=st.sampled_from([0.0, 1.0, 100.0]))
def test_a_beam_of_one_is_greedy(seed: int, step: float) -> None:
    model = Tables(seed=seed, step=step)
    start, state = model.start()
    options = dict(eos_index=EOS, max_len=MAX_LEN, pad_index=PAD)
    greedy = greedy_search(model.step, state, start, **options)
    beam = beam_search(model.step, state, start, beam_width=1, length_penalty=0.0, **options).best()
    for got, expected in zip(beam, greedy, strict=True):
        assert torch.equal(got, expected)


def test_greedy_takes_the_likeliest_and_stops() -> None:
    model = Tables(B=6, seed=5)
    start, state = model.start()
    found = greedy_search(model.step, state, start, eos_index=EOS, max_len=MAX_LEN, pad_index=PAD)
    for row, ids in enumerate(found.tolist(EOS)):
        expected: list[int] = []
        while len(expected) < MAX_LEN and EOS not in expected:
            log_p = model.after(row, expected)
            expected.append(log_p.index(max(log_p)))
        assert ids == [token for token in expected if token != EOS]
        assert found.lengths[row] == len(expected)
        assert found.scores[row].item() == pytest.approx(sum(model.log_probs(row, expected)))
        assert (found.ids[row, len(expected) :] == PAD).all()
    assert found.ids.shape[1] == found.lengths.max()


def test_no_step_runs_once_all_have_ended() -> None:
    def step(ids: Tensor, calls: list) -> tuple[Tensor, list]:
        calls.append(len(ids))
        log_p = torch.full((len(ids), 4), -5.0)
        log_p[:, EOS] = -0.1
        return log_p, calls

    calls: list[int] = []
    start = torch.zeros(3, dtype=torch.int64)
    found = greedy_search(step, calls, start, eos_index=EOS, max_len=50)
    assert calls == [3]
    assert found.ids.tolist() == [[EOS]] * 3
    calls = []
    beam_search(
        *(step, calls, start), eos_index=EOS, max_len=50, beam_width=2, reorder=lambda state, _: state
    )
    assert len(calls) < 5


def test_rows_that_have_stopped_leave_the_batch() -> None:
    """Fewer rows run, and each row's result is what it is alone."""
    model = Tables(B=5, seed=11)
    options = dict(beam_width=3, n_best=3)
    together = search(model, **options)
    assert model.rows == [5, 15, 15, 9]
    for row in range(5):
        alone = Tables(B=1)
        alone.table = model.table[row : row + 1]
        assert search(alone, **options) == [together[row]]


def test_going_on_finds_what_stopping_early_missed() -> None:
    """Twenty models: the best score is never worse, and on some it is better."""
    better = 0
    for seed in range(20):
        early, late = (search(Tables(seed=seed), beam_width=2, early_stop=stop) for stop in (True, False))
        for one, other in zip(early, late, strict=True):
            assert other[0][1] >= one[0][1] - 1e-12
            better += other[0][1] > one[0][1] + 1e-12
    assert better


def test_a_long_sequence_that_can_still_win_is_waited_for() -> None:
    """<eos> at once scores -0.6; the other token, unlikely at first and sure later, -5.02 / 20."""

    def step(ids: Tensor, state: None) -> tuple[Tensor, None]:
        later = torch.tensor([-0.001, -9.0]).expand(len(ids), 2)
        return torch.where((ids < 0).unsqueeze(1), torch.tensor([-5.0, -0.6]), later), None

    start, options = torch.full((1,), -1), dict(eos_index=1, max_len=20, early_stop=False)
    found = beam_search(step, None, start, beam_width=2, **options).best()
    assert found.ids.tolist() == [[0] * 20]
    assert found.scores.item() == pytest.approx((-5 - 19 * 0.001) / 20)
    short = beam_search(step, None, start, beam_width=2, length_penalty=0.0, **options).best()
    assert short.ids.tolist() == [[1]]


def test_more_places_than_hypotheses() -> None:
    """A vocabulary of <eos> alone has one hypothesis; the other places are empty."""

    def step(ids: Tensor, state: None) -> tuple[Tensor, None]:
        return torch.zeros(len(ids), 1), None

    start = torch.zeros(2, dtype=torch.int64)
    found = beam_search(
        *(step, None, start), eos_index=0, max_len=5, beam_width=3, n_best=3, early_stop=False, pad_index=7
    )
    assert found.lengths.tolist() == [[1, 0, 0]] * 2
    assert found.ids.tolist() == [[[0], [7], [7]]] * 2
    assert found.tolist(0) == [[[], [], []]] * 2


def test_an_empty_batch() -> None:
    start = torch.zeros(0, dtype=torch.int64)
    assert greedy_search(lambda *_: 1 / 0, None, start, eos_index=0, max_len=5).ids.shape == (0, 0)
    found = beam_search(lambda *_: 1 / 0, None, start, eos_index=0, max_len=5, beam_width=3, n_best=2)
    assert found.ids.shape == (0, 2, 0)
    assert found.best().scores.shape == (0,)


@given(data=st.data(), R=st.integers(1, 4), N=st.integers(1, 12), levels=st.integers(1, 4))
def test_largest_is_the_head_of_a_stable_sort(data: st.DataObject, R: int, N: int, levels: int) -> None:
    k = data.draw(st.integers(1, N))
    numbers = data.draw(st.lists(st.integers(0, levels), min_size=R * N, max_size=R * N))
    x = torch.tensor(numbers, dtype=torch.float32).view(R, N)
    x[x == 0] = -torch.inf
    values, indices = _largest(x, k)
    expected = x.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k])
    finite = values > -torch.inf
    assert torch.equal(indices[finite], expected.indices[:, :k][finite])


def test_sums_are_wide() -> None:
    """In bfloat16 1000 steps of log p = -1/128 would sum to something else."""

    def step(ids: Tensor, state: None) -> tuple[Tensor, None]:
        return torch.full((len(ids), 2), -1 / 128, dtype=torch.bfloat16), None

    start = torch.zeros(1, dtype=torch.int64)
    for search_ in (greedy_search, partial(beam_search, length_penalty=0.0)):
        found = search_(step, None, start, eos_index=5, max_len=1000)
        assert found.scores.flatten().tolist() == [-1000 / 128]


# ---- sampling ----------------------------------------------------------------------------------------------


def test_samples_follow_the_model() -> None:
    """Of 4,000 rows alike: the frequency of each hypothesis within five deviations of its probability."""
    rows = 4000
    model = Tables(B=1, seed=2)
    model.table, model.B = model.table.expand(rows, -1, -1), rows
    start, state = model.start()
    generator = torch.Generator().manual_seed(0)
    found = ancestral_sampling(
        model.step, state, start, eos_index=EOS, max_len=MAX_LEN, generator=generator, pad_index=PAD
    )
    drawn = [tuple(ids[:length]) for ids, length in zip(found.ids.tolist(), found.lengths, strict=True)]
    total = 0.0
    for ids, log_p in every_hypothesis(model, 0, 0.0):
        p = torch.tensor(log_p).exp().item()
        total += p
        deviation = (p * (1 - p) / rows) ** 0.5
        assert abs(drawn.count(tuple(ids)) / rows - p) <= 5 * deviation + 1 / rows, ids
    assert total == pytest.approx(1)
    for row in range(5):
        assert found.log_probs[row].item() == pytest.approx(sum(model.log_probs(row, list(drawn[row]))))


def test_sampling_of_one_token_is_greedy_and_seeds_repeat() -> None:
    model = Tables(B=8, seed=3)
    start, state = model.start()
    options = dict(eos_index=EOS, max_len=MAX_LEN, pad_index=PAD)
    greedy = greedy_search(model.step, state, start, **options)
    one = ancestral_sampling(model.step, state, start, top_k=1, **options)
    assert torch.equal(one.ids, greedy.ids)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = ancestral_sampling(model.step, state, start, temperature=2.0, generator=generator, **options)
        return found.ids

    assert torch.equal(draw(1), draw(1))
    assert any(draw(1).shape != draw(seed).shape or not torch.equal(draw(1), draw(seed)) for seed in (2, 3))


# ---- states and errors -------------------------------------------------------------------------------------


def test_reorder_state() -> None:
    index = torch.tensor([2, 0, 0])
    x, h = torch.arange(6).view(3, 2), torch.arange(12).view(2, 3, 2)
    cache = KeyValueCache()
    with torch.no_grad():
        cache.update(*[torch.arange(3.0).view(3, 1, 1, 1)] * 2)
    state = {"x": [x, None, 5], "decoder": DecoderState(x), "cache": cache, "name": "a"}
    moved = reorder_state(state, index)
    assert torch.equal(moved["x"][0], x[index])
    assert moved["x"][1:] == [None, 5] and moved["name"] == "a"
    assert isinstance(moved["decoder"], DecoderState) and torch.equal(moved["decoder"].hidden, x[index])
    assert moved["cache"] is cache and cache.key.flatten().tolist() == [2, 0, 0]
    found = reorder_state((h, h), index, dim=1)
    assert isinstance(found, tuple) and torch.equal(found[0], h[:, index])
    with pytest.raises(TypeError, match=r"state: expected tensors, or what can be reordered, got set"):
        reorder_state((x, {1}), index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 0}, "max_len: expected at least 1, got 0"),
        ({"beam_width": 0}, "beam_width: expected at least 1, got 0"),
        ({"n_best": 4}, "n_best: expected 1 to beam_width = 3, got 4"),
        ({"n_best": 0}, "n_best: expected 1 to beam_width = 3, got 0"),
        ({"start": torch.zeros(2)}, r"start: expected \[B\] int64, got \(2,\) torch.float32"),
        ({"start": torch.zeros(2, 1, dtype=torch.int64)}, r"start: expected \[B\] int64, got \(2, 1\)"),
    ],
)
def test_wrong_arguments_raise_before_any_step(options: dict, message: str) -> None:
    def step(*_) -> None:
        raise AssertionError("a step ran")

    given = dict(start=torch.zeros(2, dtype=torch.int64), max_len=3, beam_width=3) | options
    with pytest.raises(ValueError, match=message):
        beam_search(step, None, eos_index=0, **given)
    if "start" in options or "max_len" in options:
        with pytest.raises(ValueError, match=message):
            greedy_search(step, None, given["start"], eos_index=0, max_len=given["max_len"])
