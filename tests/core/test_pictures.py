"""Pictures in and out."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.pictures import (
    open_picture,
    read_image,
    read_mask,
    read_settings,
    save_png,
    to_uint8,
)


def test_pixels_are_truncated_as_the_recording_says(golden):
    """Float noise may move a value that sits on an integer by one."""
    expected, _ = golden("vae_ch32_48x80")
    recorded = expected["decoded_uint8"].permute(0, 2, 3, 1).int()
    difference = to_uint8(expected["decoded"]).int() - recorded
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 1e-3


def test_levels_beyond_the_range_are_clamped():
    levels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(levels)[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255]


def test_a_picture_returns_with_its_settings(tmp_path):
    pixels = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3)
    save_png(pixels, tmp_path / "a.png", {"prompt": "(ä:1.2) 猫 \\(x\\)"})
    assert read_settings(tmp_path / "a.png") == {"prompt": "(ä:1.2) 猫 \\(x\\)"}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(torch.zeros(2, 2, 3, dtype=torch.uint8), path, {"old": True})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"a\.png: cannot be written: No space left"):
        save_png(torch.ones(2, 2, 3, dtype=torch.uint8), path, {"old": False})
    assert read_settings(path) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_pictures_are_scaled_to_cover_and_cut_around_the_centre(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 10, 10)
    assert image.shape == (1, 3, 10, 10)
    assert image.min() == image.max() == 1.0


def test_a_turned_photo_stands_upright(tmp_path):
    photo = Image.new("RGB", (4, 2), "red")
    exif = photo.getexif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (2, 4)


def test_transparency_lies_on_white_and_is_the_mask(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:, 3] = 255  # the left half is transparent, the right black
    Image.fromarray(pixels).save(tmp_path / "hole.png")
    image = read_image(tmp_path / "hole.png", 8, 8)
    assert image[..., :4].min() == 1.0
    assert image[..., 4:].max() == -1.0
    mask = read_mask(tmp_path / "hole.png", 8, 8)
    assert mask[0, 0].tolist() == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_no_picture_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as a picture"):
        read_image(tmp_path / "x.png", 8, 8)


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no such picture"):
        read_image(tmp_path / "nowhere.png", 8, 8)
