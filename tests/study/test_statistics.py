"""Intervals and verdicts."""

import math

import pytest
import torch
from sd3_pack.sd3_core.study.statistics import correlation, interval, t_quantile


def test_the_interval_of_three_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 10, 20, 120])
def test_the_quantiles_leave_five_percent_outside(freedom):
    """By integrating Student's density numerically."""
    t = torch.linspace(-1, 1, 200_001, dtype=torch.float64) * t_quantile(freedom)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = (
        math.exp(scale)
        / math.sqrt(freedom * math.pi)
        * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    )
    assert float(torch.trapezoid(density, t)) == pytest.approx(0.95, abs=3e-4)


def test_between_two_entries_the_interval_is_the_wider_one():
    assert t_quantile(11) == t_quantile(10) > t_quantile(12)
    assert t_quantile(5000) == t_quantile(120)


def test_the_mean_lies_in_nineteen_of_twenty_intervals():
    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    covered = [found.low <= 0 <= found.high for found in map(interval, draws)]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([5.0, 6.0, 7.0], "shown"),
        ([-5.0, -6.0, -7.0], "reversed"),
        ([1.0, 2.0, 3.0], "not shown"),  # -0.5 to 4.5
        ([0.0, 0.0, 0.0], "not shown"),
        ([9.0], "not shown"),  # one seed decides nothing
    ],
)
def test_the_interval_decides(values, verdict):
    assert interval(values).verdict == verdict


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_no_interval_of_nothing_and_of_what_is_no_number(values):
    with pytest.raises(ValueError, match="finite"):
        interval(values)


def test_correlation():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 2, 3, 4], [1, -1, -1, 1]) == pytest.approx(0)
    assert correlation([1, 2, 3], [7, 7, 7]) == 0
    with pytest.raises(ValueError, match="correlation"):
        correlation([1], [1])
