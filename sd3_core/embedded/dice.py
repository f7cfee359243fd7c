"""Random choices by counters.

Python's `Random.random` gives the same numbers for the same seed in every version, which its other
methods do not promise.
"""

import random
from collections.abc import Iterable, Mapping
from typing import TypeVar

Option = TypeVar("Option")


class Dice:
    """Choices that belong to these counters alone."""

    def __init__(self, *counters: int | str):
        self.roll = random.Random("/".join(map(str, counters))).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.roll()

    def happens(self, share: float) -> bool:
        return self.roll() < share

    def among(self, options: Iterable[Option]) -> Option:
        listed = list(options)
        return listed[int(self.roll() * len(listed))]

    def weighted(self, shares: Mapping[str, float]) -> str:
        left = self.roll() * sum(shares.values())
        for name, share in shares.items():
            left -= share
            if left < 0:
                return name
        return list(shares)[-1]

    def shuffled(self, options: Iterable[Option]) -> list[Option]:
        return [option for _, option in sorted(((self.roll(), one) for one in options), key=_first)]


def _first(pair: tuple[float, object]) -> float:
    return pair[0]
