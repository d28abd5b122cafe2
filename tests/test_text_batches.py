"""seqkern.text's padding, collating, one-hot and the sampler of batches of like length."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from seqkern.text import BucketSampler, collate, collate_offsets, collate_pairs, one_hot, pad_sequences


def equal(tensor, values, dtype=torch.int64):
    expected = torch.tensor(values, dtype=dtype)
    return tensor.dtype == dtype and tensor.shape == expected.shape and torch.equal(tensor, expected)


# ---- padding and collating ------------------------------------------------------------------------


def test_pad_sequences():
    sequences = [[1, 2, 3], [4], []]
    assert equal(pad_sequences(sequences), [[1, 2, 3], [4, 0, 0], [0, 0, 0]])
    assert equal(pad_sequences(sequences, max_len=2), [[1, 2], [4, 0], [0, 0]])
    assert equal(pad_sequences(sequences, max_len=4, pad_val=9), [[1, 2, 3, 9], [4, 9, 9, 9], [9, 9, 9, 9]])
    assert equal(pad_sequences([torch.tensor([1, 2]), [3]]), [[1, 2], [3, 0]])
    assert pad_sequences([]).shape == (0, 0)
    assert pad_sequences([[], []]).shape == (2, 0)
    assert pad_sequences([[1]], max_len=0).shape == (1, 0)
    with pytest.raises(ValueError, match="max_len: expected at least 0 or None, got -1"):
        pad_sequences(sequences, max_len=-1)


def test_collate():
    batch = [([1, 2], 0), ([], 1), (torch.tensor([3, 4, 5]), 1)]
    ids, lengths, labels = collate(batch, pad=7)
    assert equal(ids, [[1, 2, 7], [7, 7, 7], [3, 4, 5]])
    assert equal(lengths, [2, 0, 3]) and equal(labels, [0, 1, 1])


def test_collate_sorts_and_cuts():
    batch = [([1], 0), ([2, 3, 4], 1), ([5], 2), ([6, 7, 8, 9], 3)]
    ids, lengths, labels = collate(batch, max_len=3, sort=True)
    assert equal(ids, [[6, 7, 8], [2, 3, 4], [1, 0, 0], [5, 0, 0]])  # equally long ones keep their order
    assert equal(lengths, [3, 3, 1, 1]) and equal(labels, [3, 1, 0, 2])
    nn.utils.rnn.pack_padded_sequence(ids, lengths, batch_first=True)  # which wants sorted lengths
    assert equal(collate(batch, max_len=9)[0], [[1, 0, 0, 0], [2, 3, 4, 0], [5, 0, 0, 0], [6, 7, 8, 9]])
    with pytest.raises(ValueError, match="max_len: expected at least 0 or None, got -2"):
        collate(batch, max_len=-2)


def test_collate_of_real_labels():
    _, _, labels = collate([([1], 0.5), ([2], 1.0)])
    assert equal(labels, [0.5, 1.0], torch.float32)


def test_collate_pairs():
    batch = [([1], [2, 3]), ([4, 5], [6]), ([], [])]
    ids, lengths, targets, target_lengths = collate_pairs(batch, pad=1, target_pad=-100)
    assert equal(ids, [[1, 1], [4, 5], [1, 1]]) and equal(lengths, [1, 2, 0])
    assert equal(targets, [[2, 3], [6, -100], [-100, -100]]) and equal(target_lengths, [2, 1, 0])
    ids, lengths, targets, target_lengths = collate_pairs(batch, max_len=1, sort=True)
    assert equal(ids, [[4], [1], [0]]) and equal(lengths, [1, 1, 0])
    assert equal(targets, [[6], [2], [0]]) and equal(target_lengths, [1, 1, 0])


def test_collate_offsets_feeds_embedding_bag():
    ids, offsets, labels = collate_offsets([([1, 2, 3], 0), ([], 1), ([3], 0)])
    assert equal(ids, [1, 2, 3, 3]) and equal(offsets, [0, 3, 3]) and equal(labels, [0, 1, 0])
    bag = nn.EmbeddingBag.from_pretrained(torch.tensor([[0.0], [1.0], [2.0], [6.0]]))
    assert bag(ids, offsets).tolist() == [[3.0], [0.0], [6.0]]


@given(sequences=st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5))
def test_lengths_say_where_the_padding_is(sequences):
    ids, lengths, _ = collate([(ids, 0) for ids in sequences])
    assert [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)] == sequences
    assert int((ids != 0).sum()) == int(lengths.sum())
    assert ids.shape == (len(sequences), max(map(len, sequences), default=0))


def test_one_hot():
    assert equal(one_hot(torch.tensor([2, 0]), 3), [[0, 0, 1], [1, 0, 0]], torch.float32)
    hot = one_hot(torch.tensor([[1], [0]]), 2, dtype=torch.float64)
    assert equal(hot, [[[0, 1]], [[1, 0]]], torch.float64)
    assert equal(one_hot(torch.tensor(1), 2), [0, 1], torch.float32)
    assert one_hot(torch.empty(0, 2, dtype=torch.int64), 4).shape == (0, 2, 4)
    for ids, wrong in (([0, 3], 3), ([-1, 3], -1)):
        with pytest.raises(ValueError, match=f"ids: expected 0 to 2, got {wrong}"):
            one_hot(torch.tensor(ids), 3)


# ---- batches of like length -----------------------------------------------------------------------

sizes = dict(
    lengths=st.lists(st.integers(0, 20), max_size=40),
    batch_size=st.integers(1, 7),
    pool=st.integers(1, 3),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)


@given(shuffle=st.booleans(), **sizes)
def test_every_index_once(lengths, batch_size, pool, seed, epoch, shuffle):
    sampler = BucketSampler(lengths, batch_size, pool=pool, seed=seed, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert list(sampler) == batches


@given(**sizes)
def test_drop_last(lengths, batch_size, pool, seed, epoch):
    sampler = BucketSampler(lengths, batch_size, pool=pool, seed=seed, drop_last=True)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(lengths) // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    indices = [i for batch in batches for i in batch]
    assert len(set(indices)) == len(indices)


@given(replicas=st.integers(1, 4), drop_last=st.booleans(), **sizes)
def test_ranks_share_the_batches_of_one(lengths, batch_size, pool, seed, epoch, replicas, drop_last):
    options = dict(pool=pool, seed=seed, drop_last=drop_last)
    alone = BucketSampler(lengths, batch_size * replicas, **options)
    ranks = [
        BucketSampler(lengths, batch_size, num_replicas=replicas, rank=rank, **options)
        for rank in range(replicas)
    ]
    for sampler in (alone, *ranks):
        sampler.set_epoch(epoch)
    assert all(len(sampler) == len(alone) for sampler in ranks)
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert len({len(part) for part in parts}) == 1  # no rank waits for another
        together = [i for part in parts for i in part]
        assert set(together) == set(whole)
        assert len(together) - len(whole) == -len(whole) % replicas


def test_batches_by_hand():
    lengths = [5, 1, 4, 2, 3, 6, 0]
    assert list(BucketSampler(lengths, 2, shuffle=False)) == [[6, 1], [3, 4], [2, 0], [5]]
    assert list(BucketSampler(lengths, 2, shuffle=False, pool=2)) == [[1, 3], [2, 0], [6, 4], [5]]
    assert list(BucketSampler(lengths, 2, shuffle=False, drop_last=True)) == [[1, 3], [4, 2], [0, 5]]
    assert list(BucketSampler(lengths, 1, shuffle=False, num_replicas=2, rank=1)) == [[1], [4], [0], [5]]
    assert list(BucketSampler([], 2)) == []


def test_little_is_padding():
    lengths = torch.randint(1, 200, (5000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)

    sampler = BucketSampler(lengths, 32)
    assert padded(sampler) < 1.02 < 1.8 < padded(torch.randperm(5000).split(32))


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = BucketSampler([1] * 100, 10, seed=seed)
        sampler.set_epoch(epoch)
        return str(list(sampler))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first


@given(stop=st.integers(0, 10), **sizes)
def test_resuming_goes_on(lengths, batch_size, pool, seed, epoch, stop):
    make = partial(BucketSampler, lengths, batch_size, pool=pool, seed=seed)
    sampler = make()
    sampler.set_epoch(epoch)
    wanted = list(sampler)
    before = [batch for batch, _ in zip(sampler, range(min(stop, len(wanted))), strict=False)]
    resumed = make()
    resumed.load_state_dict(sampler.state_dict(position=len(before)))
    resumed.set_epoch(epoch)
    assert before + list(resumed) == wanted
    assert list(resumed) == wanted  # only the first iteration begins in the middle


def test_state_counts_the_batches_handed_out():
    sampler = BucketSampler(range(10), 2, seed=3)
    sampler.set_epoch(4)
    batches = iter(sampler)
    next(batches), next(batches)
    state = {"epoch": 4, "position": 2, "samples": 10, "global_batch": 2, "pool": 100, "seed": 3}
    assert sampler.state_dict() == state | {"shuffle": True, "drop_last": False}
    sampler.set_epoch(5)
    assert sampler.state_dict()["position"] == 0


def test_state_of_another_number_of_ranks():
    """2 ranks of 3 go on where 3 ranks of 2 stopped."""
    sampler = BucketSampler(range(20), 2, num_replicas=3)
    state = sampler.state_dict(position=1)
    rest = list(BucketSampler(range(20), 6))[1:]
    found = []
    for rank in range(2):
        twin = BucketSampler(range(20), 3, num_replicas=2, rank=rank)
        twin.load_state_dict(state)
        found.append(list(twin))
    assert [sorted(set(a + b)) for a, b in zip(*found, strict=True)] == [sorted(batch) for batch in rest]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"pool": 0}, "pool: expected at least 1, got 0"),
        ({"num_replicas": 0}, "num_replicas: expected at least 1, got 0"),
        ({"num_replicas": 2, "rank": 2}, "rank: expected 0 to 1 of 2 replicas, got 2"),
    ],
)
def test_sampler_errors(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        BucketSampler([1, 2], **{"batch_size": 1, **options})


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (BucketSampler([1] * 9, 2), "samples: expected 9, that of this sampler, got 8"),
        (BucketSampler([1] * 8, 3), "global_batch: expected 3, that of this sampler, got 2"),
        (BucketSampler([1] * 8, 2, seed=1), "seed: expected 1, that of this sampler, got 0"),
    ],
)
def test_state_of_another_sampler(other, complaint):
    with pytest.raises(ValueError, match=complaint):
        other.load_state_dict(BucketSampler([1] * 8, 2).state_dict())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader(num_workers):
    samples = [([i] * (1 + i % 5), i % 2) for i in range(1, 24)]
    sampler = BucketSampler([len(ids) for ids, _ in samples], 4)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)
    assert len(loader) == 6
    seen = []
    for ids, lengths, labels in loader:
        seen += ids[:, 0].tolist()
        assert torch.equal(lengths, 1 + ids[:, 0] % 5) and torch.equal(labels, ids[:, 0] % 2)
    assert sorted(seen) == list(range(1, 24))
