"""Intervals over seeds, and the rule that turns one into a verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Student's t, 97.5 %, by degrees of freedom; between entries the next lower one is used, which
# widens the interval.
T_QUANTILES = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip

RULE = (
    "A claim is a difference, turned so that it is above 0 where what is said holds. It is "
    "measured once for each seed, with all else equal; of these numbers the 95 % interval of the "
    "mean is taken (Student's t; of correlations by Fisher's transformation). Wholly above 0: "
    "shown. Wholly below 0: reversed. Else: not shown. A seed changes an arm's first weights, its "
    "batches and the noise it draws from, and for the shipped model that noise alone; prompts "
    "stay. Each interval is of one claim, and claims share arms: of twenty differences that are "
    "nothing, one is expected to be called shown or reversed."
)

Verdict = Literal["shown", "not shown", "reversed", "not measured"]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int  # seeds

    @property
    def verdict(self) -> Verdict:
        """See RULE.  An interval that touches 0 decides nothing."""
        if self.low > 0:
            return "shown"
        return "reversed" if self.high < 0 else "not shown"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its 95 % interval; of one value alone it is infinite.

    Raises ValueError for no value, and for one that is not finite.
    """
    count = len(values)
    if not count or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval of {list(values)}: give finite numbers, at least one.")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def interval_of_correlations(values: Sequence[float]) -> Interval:
    """As interval, taken of atanh and turned back, so that it stays between -1 and 1."""
    most = 1 - 1e-9  # atanh(1) is infinite
    found = interval([math.atanh(min(max(value, -most), most)) for value in values])
    mean, low, high = map(math.tanh, (found.mean, found.low, found.high))
    return Interval(mean, low, high, found.count)


def t_quantile(freedom: int) -> float:
    return T_QUANTILES[max(known for known in T_QUANTILES if known <= freedom)]


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; 0 where one of them does not vary.  Raises ValueError below two points."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"a correlation of {len(x)} and {len(y)} numbers.")
    middle_x, middle_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    across = math.fsum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    spread_x = math.fsum((a - middle_x) ** 2 for a in x)
    spread_y = math.fsum((b - middle_y) ** 2 for b in y)
    return across / math.sqrt(spread_x * spread_y) if spread_x and spread_y else 0.0
