"""Pictures in and out."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.pictures import (
    read_image,
    read_mask,
    read_png,
    save_png,
    to_levels,
    to_uint8,
)
from sd3_pack.sd3_core.sizes import Fit


def test_pixels_are_truncated_as_the_recording_says(golden):
    """Float noise may move a value that sits on an integer by one."""
    expected, _ = golden("vae_ch32_48x80")
    recorded = expected["decoded_uint8"].permute(0, 2, 3, 1).int()
    difference = to_uint8(expected["decoded"]).int() - recorded
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 1e-3


def test_levels_are_the_inverse_of_reading(tmp_path):
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0))
    save_png(pixels.to(torch.uint8), tmp_path / "a.png", {})
    assert torch.equal(to_levels(read_image(tmp_path / "a.png"))[0], pixels.float())


def test_levels_beyond_the_range_are_clamped():
    levels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(levels)[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255]


def test_a_picture_returns_with_its_settings(tmp_path):
    pixels = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3)
    save_png(pixels, tmp_path / "a.png", {"prompt": "(ä:1.2) 猫 \\(x\\)"})
    read, settings = read_png(tmp_path / "a.png")
    assert settings == {"prompt": "(ä:1.2) 猫 \\(x\\)"}
    assert np.array_equal(read, pixels.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(torch.zeros(2, 2, 3, dtype=torch.uint8), path, {"old": True})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"a\.png: cannot be written: No space left"):
        save_png(torch.ones(2, 2, 3, dtype=torch.uint8), path, {"old": False})
    assert read_png(path)[1] == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_pictures_are_scaled_to_cover_and_cut_around_the_centre(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", Fit.of((30, 10), (10, 10)))
    assert image.shape == (1, 3, 10, 10)
    assert image.min() == image.max() == 1.0


def test_a_turned_photo_stands_upright(tmp_path):
    photo = Image.new("RGB", (64, 32), "black")
    photo.paste("white", (0, 0, 32, 32))
    exif = photo.getexif()
    exif[0x0112] = 6  # orientation: turn clockwise by 90 degrees, so the left comes to the top
    photo.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "turned.jpg")
    assert image[..., :28, :].min() > 0.9
    assert image[..., 36:, :].max() < -0.9


def test_sixteen_bits_keep_their_levels(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    assert len(image[0, 0, 0].unique()) == 64


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_a_mask_means_the_same_in_every_mode(tmp_path, mode):
    mask = Image.new("L", (16, 8), "black")
    mask.paste("white", (0, 0, 8, 8))
    mask.convert(mode).save(tmp_path / "mask.png")
    read = read_mask(tmp_path / "mask.png", Fit.of((16, 8), (16, 8)))
    assert read[0, 0].tolist() == [1.0] * 8 + [0.0] * 8


def test_transparency_lies_on_white_and_is_the_mask(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:, 3] = 255  # the left half is transparent, the right black
    Image.fromarray(pixels).save(tmp_path / "hole.png")
    image = read_image(tmp_path / "hole.png")
    assert image[..., :4].min() == 1.0
    assert image[..., 4:].max() == -1.0
    mask = read_mask(tmp_path / "hole.png", Fit.of((8, 8), (8, 8)))
    assert mask[0, 0].tolist() == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_no_picture_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png: (it|the file) "):
        read_image(tmp_path / "x.png")


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png: cannot be read \(No such file"):
        read_image(tmp_path / "nowhere.png")
