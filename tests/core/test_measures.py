"""The length of a run's path."""

import math

import pytest
import torch
from sd3_pack.sd3_core import measures
from sd3_pack.sd3_core.measures import (
    MIB,
    Meter,
    Trail,
    distance,
    path_length,
    path_ratio,
    pixel_distance,
)
from sd3_pack.sd3_core.noise import noise
from sd3_pack.sd3_core.samplers import SAMPLERS
from sd3_pack.sd3_core.schedule import Schedule
from torch.testing import assert_close

SHAPE = (2, 16, 4, 6)


def walked(velocity, sampler="euler", steps=8, start=None):
    """The points of a run over these steps."""
    trail = Trail()
    x = noise(SHAPE, 3) if start is None else start
    trail.end(SAMPLERS[sampler](velocity, x, Schedule(3.0).sigmas(steps), trail.on_step))
    return trail.points


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "ancestral" not in name])
def test_a_straight_path_has_the_ratio_one_and_the_length_of_its_velocity(sampler):
    v = noise(SHAPE, 7)
    points = walked(lambda x, sigma: v, sampler)
    assert len(points) == 9
    sigmas = Schedule(3.0).sigmas(8)
    assert_close(path_length(points), v.flatten(1).norm(dim=1) * (sigmas[0] - sigmas[-1]))
    assert_close(path_ratio(points), torch.ones(2))


def test_a_quarter_of_a_circle_has_the_ratio_of_arc_and_chord():
    """x turns by 90 degrees between noise and picture, in the plane of two of its numbers."""

    def velocity(x, sigma):
        turned = torch.zeros_like(x)
        turned[:, 0, 0, 0], turned[:, 0, 0, 1] = -x[:, 0, 0, 1], x[:, 0, 0, 0]
        return turned * (math.pi / 2)

    start = torch.zeros(SHAPE)
    start[:, 0, 0, 0] = 5.0
    points = walked(velocity, "heun", steps=400, start=start)
    arc = math.pi / 2
    assert_close(path_length(points), torch.full((2,), 5 * arc), rtol=1e-3, atol=0)
    assert_close(path_ratio(points), torch.full((2,), arc / math.sqrt(2)), rtol=1e-3, atol=0)


def test_each_picture_of_a_batch_has_its_own_path():
    one, other = noise(SHAPE, 1), noise(SHAPE, 2)
    points = [one, other, one]
    alone = [point[1:] for point in points]
    assert_close(path_length(points)[1:], path_length(alone))
    assert_close(path_length(points), 2 * distance(one, other))


def test_a_path_that_returns_is_infinitely_longer_than_straight():
    one, other = noise(SHAPE, 1), noise(SHAPE, 2)
    assert path_ratio([one, other, one]).isinf().all()


def test_a_run_without_a_step_goes_nowhere():
    points = [noise(SHAPE, 1)]
    assert_close(path_length(points), torch.zeros(2))
    assert_close(path_ratio(points), torch.ones(2))


def test_the_trail_holds_the_latents_at_the_noise_levels():
    """x at each level is the straight mixture, where the velocity is that of one picture."""
    x0, start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)), noise(SHAPE, 3)
    points = walked(lambda x, sigma: start - x0, start=start)
    for point, sigma in zip(points, Schedule(3.0).sigmas(8), strict=True):
        assert_close(point, (1 - sigma) * x0 + sigma * start, atol=1e-5, rtol=0)


def test_no_path_is_an_error():
    with pytest.raises(ValueError, match="without a point"):
        path_length([])


def test_the_distance_of_pixels_is_their_root_mean_square():
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    other = black.clone()
    other[0, :2] = 10  # half of them
    assert_close(pixel_distance(other, black), torch.tensor([10 / math.sqrt(2), 0.0]))
    white = torch.full_like(black, 255)
    assert_close(pixel_distance(black, white), torch.full((2,), 255.0))


CPU = torch.device("cpu")


@pytest.mark.skipif(not measures.reset_peak_resident(), reason="this system does not tell it")
def test_the_memory_is_the_most_since_the_meter_was_made():
    meter = Meter(CPU)
    _, before = meter.spent()
    block = torch.ones(200 * MIB // 4)
    del block
    _, most = meter.spent()
    _, after = Meter(CPU).spent()
    assert most - before == pytest.approx(200, abs=40)
    assert most - after == pytest.approx(200, abs=40)


def test_where_the_system_does_not_tell_the_memory_it_is_unknown(monkeypatch):
    monkeypatch.setattr(measures.sys, "platform", "win32")
    seconds, memory = Meter(CPU).spent()
    assert seconds >= 0
    assert memory is None


def test_where_the_system_does_not_let_it_begin_anew_it_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(measures, "PROCESS", tmp_path / "nowhere")
    assert Meter(CPU).spent()[1] is None
