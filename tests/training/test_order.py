"""The order of the pictures: complete, even, and a function of seed and step alone."""

from collections import Counter

import numpy as np
import pytest
from sd3_pack.sd3_core.training.order import Groups, chance, epoch_order, shuffled


def groups(*sizes: int) -> Groups:
    starts = np.cumsum([0, *sizes])
    return Groups(tuple(np.arange(a, b) for a, b in zip(starts, starts[1:], strict=False)))


def test_a_chance_belongs_to_its_counters():
    """Recorded: resuming under another version of anything must not change what is drawn."""
    assert chance(0, 1, 2, "caption") == 0.23762602815770884
    assert chance(0, np.int64(1), 2, "caption") == chance(0, 1, 2, "caption")
    others = {chance(seed, step, "a") for seed in range(20) for step in range(20)}
    assert len(others) == 400
    assert np.mean(list(others)) == pytest.approx(0.5, abs=0.05)


def test_a_shuffle_is_a_recorded_permutation():
    assert shuffled(8, 0, "items").tolist() == [7, 4, 1, 5, 0, 6, 2, 3]
    assert sorted(shuffled(1000, 5).tolist()) == list(range(1000))


def filled_up(held: Groups, size: int, seed: int, epoch: int) -> np.ndarray:
    """The order that runs had before buckets shared batches."""
    batches = []
    for number, group in enumerate(held.members):
        order = group[shuffled(len(group), seed, epoch, "items", number)]
        batches.append(np.resize(order, (-(-len(order) // size), size)))
    together = np.concatenate(batches)
    return together[shuffled(len(together), seed, epoch, "batches")]


@pytest.mark.parametrize(
    ("held", "size"), [((8, 4, 12), 4), ((9,), 4), ((3,), 8), ((5, 1, 7), 1), ((6, 3), 3)]
)
def test_runs_whose_buckets_fill_and_runs_of_one_bucket_keep_their_order(held, size):
    held = groups(*held)
    assert not held.mixes(size)
    for seed, epoch in ((0, 0), (3, 0), (0, 5)):
        ours = epoch_order(held, size, seed, epoch)
        assert np.array_equal(ours, filled_up(held, size, seed, epoch))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 40])
def test_an_epoch_holds_everything_as_often_as_asked_and_fills_one_batch_at_most(size):
    held = Groups((np.array([0, 0, 0, 1, 2]), np.array([3]), np.arange(4, 16), np.arange(16, 24)))
    asked = Counter(dict.fromkeys(range(24), 1))
    asked[0] = 3
    assert held.mixes(size) == (size > 1)
    for epoch in range(3):
        order = epoch_order(held, size, seed=3, epoch=epoch)
        assert order.shape == (held.batches(size), size) == (-(-26 // size), size)
        drawn = Counter(order.flatten().tolist())
        assert not asked - drawn
        assert sum((drawn - asked).values()) == -26 % size


def test_a_bucket_lies_side_by_side_in_a_batch():
    """Turned round, so that no more passes are needed than buckets, and one."""
    held = groups(5, 1, 12, 8, 3)
    bucket = np.repeat(range(5), [5, 1, 12, 8, 3])
    for epoch in range(20):
        for batch in epoch_order(held, 8, seed=1, epoch=epoch):
            changes = np.count_nonzero(np.diff(bucket[batch]))
            assert changes <= len(set(bucket[batch]))


def test_no_bucket_has_places_of_its_own_in_a_batch():
    """Stratified times belong to the places: a bucket of one must meet them all alike."""
    held = groups(1, 3)
    places = Counter(
        int(np.flatnonzero(epoch_order(held, 4, seed, 0)[0] == 0)[0]) for seed in range(800)
    )
    assert min(places[place] for place in range(4)) > 800 / 4 * 0.8


@pytest.mark.parametrize("held", [groups(5), groups(1, 2, 7), groups(1, 1, 1)])
def test_what_fills_up_is_anyone_alike(held):
    """Nine to one was the worst when each bucket filled its own batch up."""
    total, epochs = Counter(), 400
    for epoch in range(epochs):
        total.update(epoch_order(held, 9, seed=0, epoch=epoch).flatten().tolist())
    share = held.batches(9) * 9 / held.draws * epochs
    assert min(total.values()) > 0.9 * share
    assert max(total.values()) < 1.1 * share


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    held = groups(40)
    first = epoch_order(held, 4, 0, 0).copy()
    assert not np.array_equal(first, epoch_order(held, 4, 0, 1))
    assert not np.array_equal(first, epoch_order(held, 4, 1, 0))
    epoch_order.cache_clear()
    assert np.array_equal(first, epoch_order(groups(40), 4, 0, 0))
