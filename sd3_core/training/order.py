"""Which pictures make a batch: a pure function of seed and step, whoever asks.

Nothing here keeps a state or touches a global generator.  Every random number is that of a counter
(seed, step or epoch, place, purpose), and comes out the same on every machine and version.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def chance(*counters: int | str) -> float:
    """A uniform number in [0, 1) that belongs to these counters alone."""
    return (_key(counters) >> 75) / 2**53  # all bits that a float below 1 has room for


def shuffled(count: int, *counters: int | str) -> np.ndarray:
    """A permutation of 0 .. count - 1 that belongs to these counters alone."""
    # numpy promises the raw stream of its bit generators for ever, that of permutation() not.
    ranks = np.random.Philox(key=_key(counters)).random_raw(count)
    return np.argsort(ranks, kind="stable")


def _key(counters: Sequence[int | str]) -> int:
    plain = [one if isinstance(one, str) else int(one) for one in counters]  # numpy's ints too
    return int.from_bytes(hashlib.sha256(repr(plain).encode()).digest()[:16], "little")


@dataclass(frozen=True, eq=False)
class Groups:
    """Item indices, an array for each bucket; an item that is repeated stands there repeatedly."""

    members: tuple[np.ndarray, ...]

    def batches(self, size: int) -> int:
        """Batches of an epoch.  A bucket fills its last batch up, so no batch mixes buckets."""
        return sum(-(-len(group) // size) for group in self.members)


@lru_cache(maxsize=4)
def epoch_order(groups: Groups, size: int, seed: int, epoch: int) -> np.ndarray:
    """Item indices of one epoch, [batches, size]; each batch lies in one bucket.

    Every item comes at least as often as its group holds it.  What a bucket lacks to a whole last
    batch is taken from its own beginning, another one in each epoch.
    """
    batches = []
    for number, group in enumerate(groups.members):
        order = group[shuffled(len(group), seed, epoch, "items", number)]
        batches.append(np.resize(order, (-(-len(order) // size), size)))  # wraps around
    together = np.concatenate(batches)
    order = together[shuffled(len(together), seed, epoch, "batches")]
    order.flags.writeable = False  # everyone who asks gets this one
    return order
