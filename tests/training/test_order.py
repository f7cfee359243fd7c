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


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_an_epoch_holds_everything_and_no_batch_mixes_buckets(size):
    held = groups(5, 1, 12, 8)
    order = epoch_order(held, size, seed=3, epoch=0)
    assert order.shape == (held.batches(size), size)
    assert set(order.flatten()) == set(range(26))
    for batch in order:
        assert any(set(batch) <= set(group) for group in held.members)


def test_only_what_fills_a_last_batch_comes_twice():
    order = epoch_order(groups(5, 8), 4, seed=0, epoch=0)
    counts = Counter(order.flatten().tolist())
    assert sorted(counts[item] for item in range(5)) == [1, 1, 2, 2, 2]
    assert all(counts[item] == 1 for item in range(5, 13))


def test_what_fills_up_changes_from_epoch_to_epoch():
    held = groups(5)
    total = Counter()
    for epoch in range(60):
        total.update(epoch_order(held, 4, seed=0, epoch=epoch).flatten().tolist())
    assert sum(total.values()) == 60 * 8
    assert min(total.values()) > 60 * 8 / 5 * 0.85


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    held = groups(40)
    first = epoch_order(held, 4, 0, 0).copy()
    assert not np.array_equal(first, epoch_order(held, 4, 0, 1))
    assert not np.array_equal(first, epoch_order(held, 4, 1, 0))
    epoch_order.cache_clear()
    assert np.array_equal(first, epoch_order(groups(40), 4, 0, 0))
