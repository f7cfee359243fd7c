"""Timestep densities: each draws what its pdf says, and shifts as the paper says."""

import math
from itertools import pairwise

import pytest
import torch
from sd3_pack.sd3_core.schedule import Schedule, log_snr
from sd3_pack.sd3_core.training.densities import (
    DENSITIES,
    STEEPEST_MODE,
    Beta,
    CosMap,
    LogitNormal,
    Mode,
    Truncated,
    Uniform,
    find_density,
    stratified,
)
from torch.testing import assert_close

SMOOTH = [
    Uniform(),
    LogitNormal(),
    LogitNormal(0.5, 0.6),
    LogitNormal(-1.0, 2.2),
    Mode(-1.0),
    Mode(0.0),
    Mode(1.29),
    CosMap(),
    Beta(),
    Beta(0.6, 0.6),
    Beta(2.0, 5.0),
    Truncated(LogitNormal(), 0.2, 0.9),
    Truncated(Mode(1.29), high=0.4),
    Truncated(Beta(), low=0.5),
]
STEEP = [
    Mode(1.75),
    Mode(STEEPEST_MODE),
    LogitNormal(1.0, 0.2),
    Beta(10.0, 9.5),
    Beta(0.5, 3.0),
]
EVEN = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # strata of u, their middles


def drawn(density, count=20_000):
    return density.sample(torch.rand(count, generator=torch.Generator().manual_seed(7)))


def integral(density, low=0.0, high=1.0, points=4000):
    """Midpoint rule in x with t = sin^2(pi x / 2), which tames the infinite ends of a density."""
    x_low, x_high = (2 / math.pi * math.asin(math.sqrt(t)) for t in (low, high))
    x = x_low + (torch.arange(points, dtype=torch.float64) + 0.5) / points * (x_high - x_low)
    slope = math.pi / 2 * torch.sin(math.pi * x) * (x_high - x_low) / points
    return float((density.pdf(torch.sin(math.pi / 2 * x) ** 2) * slope).sum())


@pytest.mark.parametrize("density", SMOOTH, ids=str)
def test_pdf_integrates_to_one(density):
    # a jump at the edge of a window costs half a cell, 2e-4, times its height of at most 5
    assert integral(density) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("density", SMOOTH, ids=str)
def test_histogram_agrees_with_the_pdf(density):
    t = drawn(density)
    edges = torch.linspace(0, 1, 21)
    counts = torch.histogram(t, edges)[0].tolist()
    for (low, high), count in zip(pairwise(edges.tolist()), counts, strict=True):
        expected = len(t) * integral(density, low, high, points=500)
        # binomial counts: 5 standard deviations, and the integral's own error at a window's edge
        assert abs(count - expected) <= 5 * math.sqrt(expected) + 0.002 * expected + 1


@pytest.mark.parametrize("density", SMOOTH + STEEP, ids=str)
def test_cdf_undoes_the_quantile(density):
    # for beta's table, 5.3e-8 measured; the others come to 1e-12
    assert_close(density.cdf(density.quantile(EVEN)), EVEN, atol=1e-7, rtol=0)


@pytest.mark.parametrize("density", SMOOTH + STEEP, ids=str)
def test_pdf_is_the_inverse_slope_of_the_quantile(density):
    # a difference over 2e-6 in u: 1e-6 of error in what is not steep, more where it is
    u, step = EVEN[20:-20], 1e-6
    slope = (density.quantile(u + step) - density.quantile(u - step)) / (2 * step)
    assert_close(density.pdf(density.quantile(u)) * slope, torch.ones_like(u), atol=2e-3, rtol=0)


@pytest.mark.parametrize("density", SMOOTH + STEEP, ids=str)
def test_later_u_means_later_time(density):
    assert bool((density.quantile(EVEN).diff() > 0).all())


@pytest.mark.parametrize("density", SMOOTH + STEEP + [LogitNormal(8.0, 3.0)], ids=str)
def test_times_are_float32_and_never_reach_the_ends(density):
    t = density.sample(torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-24, 1.0]))
    assert t.dtype == torch.float32
    assert bool(((t > 0) & (t < 1)).all())


def test_the_ends_of_u_are_no_outliers():
    first, neighbour = LogitNormal().sample(torch.tensor([0.0, 2**-24])).tolist()
    assert first == neighbour == pytest.approx(0.005, abs=1e-3)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 1.4)])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_shifting_logit_normal_moves_its_mean_by_the_logarithm(mean, std, shift):
    plain, moved = LogitNormal(mean, std), LogitNormal(mean + math.log(shift), std)
    u = EVEN.float()
    # three float32 roundings: of t, in the shift, of the result
    assert_close(Schedule(shift).sigma(plain.sample(u)), moved.sample(u), atol=0, rtol=5e-7)
    t = plain.quantile(EVEN)
    sigma = shift * t / (1 + (shift - 1) * t)
    slope = shift / (1 + (shift - 1) * t) ** 2  # d sigma / d t
    assert_close(plain.pdf(t) / slope, moved.pdf(sigma), atol=0, rtol=1e-9)


def test_the_paper_s_default_has_mean_noise_level_0714():
    sigma = Schedule(3.0).sigma(LogitNormal().sample(EVEN))
    assert float(sigma.mean()) == pytest.approx(0.714, abs=5e-4)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29, STEEPEST_MODE])
def test_mode_is_the_paper_s_formula_read_backwards(scale):
    u = 1 - EVEN
    paper = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    assert_close(Mode(scale).quantile(EVEN), paper, atol=1e-12, rtol=0)
    assert_close(paper.flip(0), 1 - paper, atol=1e-12, rtol=0)  # backwards is the same law


@pytest.mark.parametrize("scale", [-0.9, 0.5, 1.29, 1.75])
def test_mode_s_pdf_at_the_ends_and_in_the_middle(scale):
    ends, middle = 1 / (1 + scale), 1 / (1 - scale * (math.pi / 2 - 1))
    pdf = Mode(scale).pdf(torch.tensor([0.0, 0.5, 1.0]))
    assert_close(pdf, torch.tensor([ends, middle, ends], dtype=torch.float64), atol=0, rtol=1e-6)


def test_mode_s_pdf_at_the_paper_s_best_scale():
    low, middle, _ = Mode(1.29).pdf(torch.tensor([0.0, 0.5, 1.0])).tolist()
    assert (round(low, 3), round(middle, 2)) == (0.437, 3.79)


def test_mode_is_infinite_at_its_bounds_and_nowhere_negative():
    assert Mode(-1.0).pdf(torch.tensor([0.0])).item() > 1e6
    assert Mode(STEEPEST_MODE).pdf(torch.tensor([0.5])).item() > 1e6
    assert bool((Mode(STEEPEST_MODE).pdf(torch.linspace(0, 1, 1001)) > 0).all())


def test_cosmap_s_pdf_at_the_ends_and_in_the_middle():
    ends, middle = CosMap().pdf(torch.tensor([0.0, 0.5])).tolist()
    assert (round(ends, 3), round(middle, 3)) == (0.637, 1.273)


def test_cosmap_has_the_cosine_schedule_s_log_snr():
    cosine = 2 * torch.log(torch.cos(math.pi * EVEN / 2) / torch.sin(math.pi * EVEN / 2))
    # float32 next to t = 1 leaves 1e-7 / 8e-4 of 1 - t
    assert_close(log_snr(CosMap().sample(EVEN)).double(), cosine, atol=2e-4, rtol=0)


def test_beta_of_ones_is_uniform():
    assert_close(Beta(1.0, 1.0).quantile(EVEN), EVEN, atol=1e-8, rtol=0)


def test_beta_s_default_favours_noise():
    # Beta(1.5, 1): cdf t^1.5, mean 0.6
    assert_close(Beta().quantile(EVEN), EVEN ** (2 / 3), atol=1e-8, rtol=0)
    assert float(Beta().sample(EVEN).mean()) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(("a", "b"), [(1.5, 1.0), (0.5, 3.0), (2.0, 5.0), (10.0, 9.5), (0.6, 0.6)])
def test_beta_agrees_with_scipy(a, b):
    stats = pytest.importorskip("scipy.stats", reason="scipy, the live oracle, is missing")
    oracle = stats.beta(a, b)
    t = EVEN.numpy()
    assert_close(Beta(a, b).cdf(EVEN), torch.from_numpy(oracle.cdf(t)), atol=1e-10, rtol=0)
    assert_close(Beta(a, b).pdf(EVEN), torch.from_numpy(oracle.pdf(t)), atol=0, rtol=1e-10)


@pytest.mark.parametrize("density", [Uniform(), LogitNormal(), Mode(1.29), Beta()], ids=str)
def test_a_window_is_what_remains_when_draws_outside_are_thrown_away(density):
    kept = drawn(density)
    kept = kept[(kept >= 0.3) & (kept <= 0.6)]
    held = Truncated(density, 0.3, 0.6)
    assert float(drawn(held).min()) >= 0.3
    assert float(drawn(held).max()) <= 0.6 + 1e-7  # 0.6 in float32
    # standard error of a mean of n uniform-like draws on a width of 0.3: 0.087 / sqrt(n)
    tolerance = 5 * 0.1 / math.sqrt(len(kept))
    assert float(kept.mean()) == pytest.approx(float(held.sample(EVEN).mean()), abs=tolerance)


@pytest.mark.parametrize("density", [LogitNormal(), Mode(1.29), CosMap(), Beta(2.0, 5.0)], ids=str)
def test_a_window_over_all_times_changes_nothing(density):
    assert torch.equal(Truncated(density).sample(EVEN), density.sample(EVEN))


def test_stratified_draws_visit_every_stratum_once():
    u = torch.rand(64, generator=torch.Generator().manual_seed(0))
    spread = stratified(u, torch.arange(64), 64)
    assert torch.equal((spread * 64).floor(), torch.arange(64.0))


def test_stratified_draws_have_a_steadier_mean():
    u = torch.rand(500, 16, generator=torch.Generator().manual_seed(0))
    spread = stratified(u, torch.arange(16), 16)
    plain_std = LogitNormal().sample(u).mean(dim=1).std()
    assert LogitNormal().sample(spread).mean(dim=1).std() < plain_std / 5


def test_densities_are_found_by_name_with_their_parameters():
    assert find_density("logit_normal") == LogitNormal(0.0, 1.0)
    assert find_density(" logit_normal( 0.5,0.6 ) ") == LogitNormal(0.5, 0.6)
    assert find_density("logit_normal(-1)") == LogitNormal(-1.0, 1.0)
    assert find_density("mode(1.75)") == Mode(1.75)
    assert find_density("beta()") == Beta()
    assert {find_density(name) for name in DENSITIES} == {make() for make in DENSITIES.values()}


@pytest.mark.parametrize("text", ["lognorm", "", "mode(1", "uniform(1) x", "__class__"])
def test_an_unknown_density_is_answered_with_the_choice(text):
    with pytest.raises(ValueError, match=r"uniform, logit_normal\(mean, std\), mode\(scale\)"):
        find_density(text)


@pytest.mark.parametrize("text", ["mode(one)", "mode(1, 2)", "uniform(1)", "beta(1,,2)"])
def test_wrong_parameters_are_answered_with_the_spelling(text):
    with pytest.raises(ValueError, match=r"it is written (mode\(scale\)|uniform|beta\(a, b\))\."):
        find_density(text)


@pytest.mark.parametrize(
    "text",
    [
        "mode(-1.01)",
        "mode(1.76)",
        "mode(nan)",
        "logit_normal(0, 0)",
        "logit_normal(0, -1)",
        "logit_normal(inf, 1)",
        "logit_normal(0, nan)",
        "beta(0, 1)",
        "beta(1, 11)",
        "beta(nan, 1)",
    ],
)
def test_parameters_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="must"):
        find_density(text)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1)])
def test_an_impossible_window_is_refused(low, high):
    with pytest.raises(ValueError, match="the range must rise"):
        Truncated(Uniform(), low, high)


def test_a_window_that_is_hardly_ever_drawn_is_refused():
    with pytest.raises(ValueError, match="hardly ever draws"):
        Truncated(LogitNormal(), 0.0, 0.001)
