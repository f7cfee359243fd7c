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

    @property
    def draws(self) -> int:
        """Of an epoch, before its last batch is filled up."""
        return sum(map(len, self.members))

    def batches(self, size: int) -> int:
        """Batches of an epoch."""
        return -(-self.draws // size)

    def mixes(self, size: int) -> bool:
        """Whether some batches hold pictures of several buckets."""
        return len(self.members) > 1 and any(len(group) % size for group in self.members)


@lru_cache(maxsize=4)
def epoch_order(groups: Groups, size: int, seed: int, epoch: int) -> np.ndarray:
    """Item indices of one epoch, [batches, size].

    Each bucket makes as many whole batches as it can; what is left of all of them shares the other
    batches.  Every item comes as often as its group holds it, and what the very last batch lacks is
    picked among all, by chance and anew in each epoch: no bucket gains by it.
    """
    orders = [
        group[shuffled(len(group), seed, epoch, "items", number)]
        for number, group in enumerate(groups.members)
    ]
    whole = [order[: len(order) // size * size].reshape(-1, size) for order in orders]
    together = np.concatenate([*whole, _shared(orders, size, seed, epoch)])
    order = together[shuffled(len(together), seed, epoch, "batches")]
    order.flags.writeable = False  # everyone who asks gets this one
    return order


def _shared(orders: Sequence[np.ndarray], size: int, seed: int, epoch: int) -> np.ndarray:
    """The batches [n, size] of what is left of the buckets; a bucket's items lie side by side."""
    known = [np.stack([np.full_like(one, number), one], 1) for number, one in enumerate(orders)]
    rests = [one[len(one) // size * size :] for one in known]
    # In another order in each epoch, so that other buckets share a batch.
    left = np.concatenate(
        [rests[number] for number in shuffled(len(rests), seed, epoch, "buckets")]
    )
    filled = np.resize(_woven(known, seed, epoch), (-len(left) % size, 2))
    batches = np.concatenate([left, filled]).reshape(-1, size, 2)
    for number, batch in enumerate(batches):
        batch[:] = batch[np.argsort(batch[:, 0], kind="stable")]
        if batch[0, 0] != batch[-1, 0]:
            # No bucket has places of its own in a batch: stratified times go by the place.
            batch[:] = np.roll(batch, int(chance(seed, epoch, "turn", number) * size), axis=0)
    return batches[..., 1]


def _woven(orders: Sequence[np.ndarray], seed: int, epoch: int) -> np.ndarray:
    """All orders in one, shuffled together by chance; each stays in its own order."""
    ends = np.cumsum([len(order) for order in orders])
    places = np.split(shuffled(ends[-1], seed, epoch, "fill"), ends[:-1])
    return np.concatenate(orders)[np.argsort(np.concatenate([np.sort(some) for some in places]))]
