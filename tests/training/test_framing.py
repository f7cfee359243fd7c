"""Buckets: one area, many aspects."""

import pytest
from sd3_pack.sd3_core.training.framing import Framing, bucket_sizes, crop_box, nearest_bucket


@pytest.mark.parametrize(
    ("resolution", "step"), [(1024, 64), (512, 64), (64, 16), (64, 8), (100, 16)]
)
def test_buckets_keep_to_area_step_and_aspect(resolution, step):
    buckets = bucket_sizes(resolution, step)
    side = resolution // step * step
    assert buckets[0] == (side, side)
    assert len(set(buckets)) == len(buckets)
    for width, height in buckets:
        assert width % step == 0
        assert height % step == 0
        assert width * height <= resolution**2
        assert width <= 2 * height
        assert height <= 2 * width
        assert (height, width) in buckets


def test_the_sizes_that_sd3_is_known_for_are_among_them():
    buckets = bucket_sizes(1024)
    assert {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (832, 1216)} <= set(buckets)


def test_a_wider_limit_brings_wider_buckets():
    assert (1472, 704) in bucket_sizes(1024, widest=2.1)
    assert bucket_sizes(64, 16, widest=1.0) == ((64, 64),)


@pytest.mark.parametrize(("resolution", "step", "widest"), [(64, 0, 2), (32, 64, 2), (64, 16, 0.5)])
def test_impossible_buckets_are_refused(resolution, step, widest):
    with pytest.raises(ValueError, match="must be at least 1"):
        bucket_sizes(resolution, step, widest)


def test_a_picture_gets_the_bucket_of_the_nearest_aspect():
    buckets = bucket_sizes(1024)
    assert nearest_bucket(4000, 4000, buckets) == (1024, 1024)
    assert nearest_bucket(1920, 1080, buckets) == (1344, 768)
    assert nearest_bucket(1080, 1920, buckets) == (768, 1344)
    assert nearest_bucket(10000, 10, buckets) == (1408, 704)
    assert nearest_bucket(1, 1, buckets) == (1024, 1024)


def test_the_distance_is_that_of_logarithms():
    """Aspect 0.5 is as far from 1 as 2 is, and 1.4 nearer to 2 than to 1 by a hair of a log."""
    assert nearest_bucket(142, 100, ((64, 64), (128, 64))) == (128, 64)
    assert nearest_bucket(100, 142, ((64, 64), (64, 128))) == (64, 128)
    assert nearest_bucket(141, 100, ((64, 64), (128, 64))) == (64, 64)


def test_the_crop_has_the_buckets_aspect_and_lies_inside():
    assert crop_box((300, 100), (64, 64)) == (100, 0, 200, 100)
    assert crop_box((100, 300), (64, 64), (0.5, 0.0)) == (0, 0, 100, 100)
    assert crop_box((300, 100), (64, 64), (1.0, 1.0)) == (200, 0, 300, 100)
    left, top, right, bottom = crop_box((1000, 3), (96, 48))
    assert (right - left) / (bottom - top) == pytest.approx(2)


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", "hole"), ("crop", "left"), ("background", "no colour")]
)
def test_unknown_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is '{value}'"):
        Framing(64, 16, **{field: value})
