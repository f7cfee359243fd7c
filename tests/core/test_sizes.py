"""The size that is drawn, and how a picture and its mask come to it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sd3_pack.sd3_core.pictures import picture_size, read_image, read_mask, to_levels
from sd3_pack.sd3_core.sizes import Fit, Sides

SIDES = Sides(factor=8, most=384, native_pixels=128 * 128)


def noisy(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


@pytest.mark.parametrize(
    ("wanted", "picture", "expected"),
    [
        ((None, None), (128, 256), (128, 256)),
        ((None, None), (130, 259), (128, 256)),
        ((None, None), (8, 15), (8, 8)),
        ((None, None), (391, 391), (384, 384)),
        ((64, 64), (128, 256), (64, 64)),
        ((64, None), (128, 256), (64, 128)),
        ((None, 64), (128, 256), (32, 64)),
        ((None, 64), (1000, 667), (96, 64)),
        ((8, None), (300, 10), (8, 8)),
    ],
)
def test_the_size_is_the_wanted_one_else_the_pictures_own(wanted, picture, expected):
    assert SIDES.with_picture(wanted, picture, "a.png") == expected


def test_without_a_picture_the_models_own_square_is_drawn():
    assert SIDES.without_picture((None, None)) == (128, 128)
    assert SIDES.without_picture((64, None)) == (64, 128)


@pytest.mark.parametrize(
    ("picture", "hint"),
    [
        ((5, 5), "--width 128 --height 128"),
        ((7, 300), "--width 16 --height 384"),
        ((3000, 2000), "--width 160 --height 104"),
    ],
)
def test_a_picture_that_cannot_be_drawn_at_its_size_is_refused_with_one_that_can(picture, hint):
    with pytest.raises(ValueError, match=rf"a\.png is \d+ x \d+ pixels.* 8 to 384.*{hint}"):
        SIDES.with_picture((None, None), picture, "a.png")
    width, height = (int(number) for number in hint.split()[1::2])
    assert SIDES.with_picture((width, height), picture, "a.png") == (width, height)


def test_a_picture_far_from_what_the_model_was_made_for_is_told():
    assert SIDES.note_on_own("a.png", (128, 256)) == ""
    assert "4 times" in SIDES.note_on_own("a.png", (256, 256))
    assert "0.25 times" in SIDES.note_on_own("a.png", (64, 64))
    assert "--width 128 --height 128" in SIDES.note_on_own("a.png", (256, 256))


@pytest.mark.parametrize("size", [(64, 64), (128, 72), (40, 200), (130, 259), (256, 520)])
@pytest.mark.parametrize("picture", [(130, 259), (300, 200), (57, 91), (128, 128)])
def test_a_picture_of_another_size_is_scaled_to_cover_it(tmp_path, picture, size):
    """Bit for bit as Pillow's own fit; so it was drawn before pictures kept their own size."""
    noisy(*picture).save(tmp_path / "a.png")
    expected = np.asarray(ImageOps.fit(noisy(*picture), size, Image.Resampling.LANCZOS))
    read = to_levels(read_image(tmp_path / "a.png", Fit.of(picture, size)))[0]
    assert np.array_equal(read.numpy(), expected)
    grey = noisy(*picture).convert("L")
    grey.save(tmp_path / "mask.png")
    expected = np.asarray(ImageOps.fit(grey, size, Image.Resampling.BILINEAR))
    mask = read_mask(tmp_path / "mask.png", Fit.of(picture, size))[0] * 255
    assert np.array_equal(mask.round().numpy(), expected)


@pytest.mark.parametrize("picture", [(130, 259), (128, 263), (135, 257), (128, 256)])
def test_a_picture_a_little_too_large_is_cut_and_no_pixel_changes(tmp_path, picture):
    noisy(*picture).save(tmp_path / "a.png")
    read = to_levels(read_image(tmp_path / "a.png", Fit.of(picture, (128, 256))))[0]
    left, top = (picture[0] - 128) // 2, (picture[1] - 256) // 2
    whole = np.asarray(noisy(*picture), dtype=np.float32)
    assert np.array_equal(read.numpy(), whole[top : top + 256, left : left + 128])


@pytest.mark.parametrize("size", [(128, 256), (128, 128), (64, 128), (256, 128)])
def test_a_mask_of_another_aspect_lies_over_the_whole_picture(tmp_path, size):
    """A band from a quarter to three quarters of the picture is one wherever the picture goes."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 16, 64, 48))
    mask.save(tmp_path / "mask.png")
    picture = Image.new("RGB", (128, 256))
    picture.paste("white", (0, 64, 128, 192))
    picture.save(tmp_path / "a.png")
    fit = Fit.of((128, 256), size)
    painted = read_mask(tmp_path / "mask.png", fit)[0] > 0.5
    there = to_levels(read_image(tmp_path / "a.png", fit))[0, ..., 0] > 127.5
    assert painted.any()
    differ = (painted != there).nonzero()
    assert len(differ) <= 2 * size[0]  # a row at either edge, where the two kinds of scaling round


def test_a_mask_is_cut_with_its_picture(tmp_path):
    mask = Image.new("L", (130, 259))
    mask.paste(255, (3, 10, 60, 100))
    mask.save(tmp_path / "mask.png")
    read = read_mask(tmp_path / "mask.png", Fit.of((130, 259), (128, 256)))[0] * 255
    assert torch.equal(read, torch.from_numpy(np.asarray(mask, np.float32)[1:257, 1:129].copy()))


def test_what_becomes_of_a_picture_is_one_sentence():
    def note(picture, size):
        return Fit.of(picture, size).note("a.png")

    assert note((128, 256), (128, 256)) == ""
    assert note((130, 259), (128, 256)) == (
        "a.png is 130 x 259 pixels: cut around its centre to 128 x 256."
    )
    assert note((128, 256), (64, 128)) == "a.png is 128 x 256 pixels: scaled to 64 x 128."
    assert note((128, 256), (64, 64)) == (
        "a.png is 128 x 256 pixels: scaled to 64 x 64 and cut around its centre, 50% of it."
    )
    fit = Fit.of((128, 256), (128, 256))
    assert fit.note_on_mask("m.png", (64, 128)) == ""
    assert "64 x 64 pixels, its picture 128 x 256" in fit.note_on_mask("m.png", (64, 64))


def test_a_turned_photo_has_the_size_at_which_it_stands_upright(tmp_path):
    photo = Image.new("RGB", (64, 32))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == (32, 64)
