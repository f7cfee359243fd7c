"""Pictures of every kind become the same kind of pixels, or say why not."""

import hashlib
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from sample_pictures import texture, with_hole
from sd3_pack.sd3_core.decode import decode
from sd3_pack.sd3_core.training.pixels import FilePicture, TensorPicture


def encoded(picture, kind="PNG", **options) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def file_picture(path, data: bytes, bucket=(16, 16), **options) -> FilePicture:
    path.write_bytes(data)
    picture = decode(data).colour
    digest = hashlib.sha256(data).hexdigest()
    return FilePicture(path, digest, bucket, (0, 0, picture.width, picture.height), **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    kind = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    colour = decode(encoded(texture(20, 30).convert(mode), kind)).colour
    assert (colour.mode, colour.size) == ("RGB", (20, 30))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    levels = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    colour = decode(encoded(Image.fromarray(levels), kind)).colour
    expected = np.round(levels / 257).astype(int)
    assert np.abs(np.asarray(colour)[..., 0] - expected).max() <= 1


def test_floats_in_the_unit_range_are_levels_and_others_are_refused():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    grey = np.asarray(decode(encoded(Image.fromarray(ramp), "TIFF")).colour)[..., 0]
    assert grey.min() == 0
    assert grey.max() == 255
    for wrong in (ramp * 300, ramp - 1, ramp * np.nan):
        with pytest.raises(ValueError, match="range is unknown"):
            decode(encoded(Image.fromarray(wrong), "TIFF"))


def test_a_cmyk_photo_keeps_its_colours():
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK")
    assert np.asarray(decode(encoded(red, "JPEG")).colour)[4, 4].tolist() == pytest.approx(
        [255, 0, 0], abs=6
    )


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_photos_are_turned_upright(orientation):
    upright = texture(32, 16)
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    stored = upright.transpose(back.get(orientation, Image.Transpose.ROTATE_270))
    exif = stored.getexif()
    exif[0x0112] = orientation
    read = decode(encoded(stored, "PNG", exif=exif)).colour
    assert np.array_equal(np.asarray(read), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_does_not_cost_the_picture():
    data = encoded(texture(16, 16), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode(data).colour.size == (16, 16)


def test_colours_are_seen_through_their_profile():
    """In a profile with red and green exchanged, what is stored as red means green."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = bytearray(srgb)
    tags = {
        srgb[entry : entry + 4]: entry
        for entry in range(132, 132 + 12 * int.from_bytes(srgb[128:132], "big"), 12)
    }
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    exchanged[red + 4 : red + 12] = srgb[green + 4 : green + 12]
    exchanged[green + 4 : green + 12] = srgb[red + 4 : red + 12]
    stored = Image.new("RGB", (4, 4), (255, 0, 0))
    colour = decode(encoded(stored, icc_profile=bytes(exchanged))).colour
    assert np.asarray(colour)[0, 0].tolist() == pytest.approx([0, 255, 0], abs=12)
    untouched = decode(encoded(stored, icc_profile=srgb)).colour
    assert np.asarray(untouched)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=2)


def test_a_grey_picture_may_carry_a_profile_for_colours():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = decode(encoded(texture(8, 8).convert("L"), icc_profile=srgb))
    assert picture.note is None
    assert picture.colour.mode == "RGB"


@pytest.mark.parametrize("profile", [b"nonsense", b"\0" * 200])
def test_a_damaged_profile_is_left_out_and_noted(profile):
    picture = decode(encoded(texture(8, 8), icc_profile=profile))
    assert "colour profile" in (picture.note or "")
    assert np.array_equal(np.asarray(picture.colour), np.asarray(texture(8, 8)))


def test_an_animation_is_its_first_frame():
    frames = [texture(16, 16, seed).quantize() for seed in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first = np.asarray(frames[0].convert("RGB")).astype(int)
    assert np.abs(np.asarray(decode(data).colour) - first).max() <= 2


@pytest.mark.parametrize("kind", ["RGBA", "palette", "LA"])
def test_transparency_is_found_in_every_kind(kind):
    picture = with_hole(16, 16)
    data = {
        "RGBA": lambda: encoded(picture),
        "palette": lambda: encoded(
            picture.quantize(), transparency=picture.quantize().getpixel((0, 0))
        ),
        "LA": lambda: encoded(picture.convert("LA")),
    }[kind]()
    alpha = decode(data).alpha
    assert alpha is not None
    assert (alpha.getpixel((0, 0)), alpha.getpixel((15, 0))) == (0, 255)


def test_what_alpha_hides_does_not_show():
    picture = decode(encoded(with_hole()))
    assert picture.on("white").getpixel((0, 0)) == (255, 255, 255)
    assert picture.on("#102030").getpixel((0, 0)) == (16, 32, 48)


def test_full_opacity_is_no_mask():
    assert decode(encoded(texture(8, 8).convert("RGBA"))).alpha is None


def truncated_jpeg() -> bytes:
    return encoded(texture(64, 64), "JPEG")[:700]


def bomb() -> bytes:
    """A PNG header that promises 60000 x 60000 pixels."""
    data = bytearray(encoded(Image.new("L", (1, 1))))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 2_000_000, zip=True)
    return encoded(Image.new("L", (1, 1)), pnginfo=info)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"not a picture", "no picture of a kind"),
        (truncated_jpeg(), "cannot be decoded"),
        (encoded(texture(32, 32))[:-300], "cannot be decoded"),
        (bomb(), "too large"),
        (text_bomb(), "cannot be decoded"),
        (encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 0))), "transparent everywhere"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a kind"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "bomb", "text bomb", "transparent", "postscript"],
)
def test_what_cannot_be_used_says_why(data, reason):
    with pytest.raises(ValueError, match=reason):
        decode(data)


def test_random_damage_never_raises_anything_else():
    whole = [encoded(texture(24, 24), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")]
    generator = np.random.Generator(np.random.PCG64(1))
    for data in whole * 8:
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 6):
            damaged[place] = generator.integers(0, 256)
        with suppress(ValueError):
            assert decode(bytes(damaged)).colour.mode == "RGB"


def test_reading_scales_the_box_to_the_bucket(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    data = encoded(Image.fromarray(wide))
    (tmp_path / "a.png").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    pixels = FilePicture(tmp_path / "a.png", digest, (20, 20), (10, 0, 20, 10)).read()
    assert pixels.image.shape == (3, 20, 20)
    assert pixels.image[:, :, 6:-6].min() == 1.0  # at the edges the filter sees the neighbours
    assert pixels.mask is None


def test_alpha_weighs_the_loss_where_it_is_asked_to(tmp_path):
    data = encoded(with_hole(32, 32))
    masked = file_picture(tmp_path / "a.png", data, masked=True, background="black").read()
    assert masked.mask is not None
    assert masked.mask.shape == (1, 16, 16)
    assert masked.mask[0, :, :7].max() == 0
    assert masked.mask[0, :, 9:].min() == 1
    assert masked.image[:, :, :5].max() == -1.0
    plain = file_picture(tmp_path / "a.png", data, background="black").read()
    assert plain.mask is None
    torch.testing.assert_close(plain.image, masked.image, rtol=0, atol=0)


def test_a_file_that_changed_since_is_refused(tmp_path):
    picture = file_picture(tmp_path / "a.png", encoded(texture(8, 8)))
    (tmp_path / "a.png").write_bytes(encoded(texture(8, 8, seed=1)))
    with pytest.raises(ValueError, match=r"a\.png: has changed"):
        picture.read()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.png: cannot be read"):
        picture.read()


def test_the_key_names_the_pixels_and_not_the_place(tmp_path):
    data = encoded(texture(16, 16))
    one = file_picture(tmp_path / "a.png", data)
    assert one.key == file_picture(tmp_path / "b.png", data).key
    others = [
        file_picture(tmp_path / "a.png", data, bucket=(16, 8)),
        file_picture(tmp_path / "a.png", data, masked=True),
        file_picture(tmp_path / "a.png", data, background="black"),
        file_picture(tmp_path / "c.png", encoded(texture(16, 16, seed=2))),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5


def test_tensors_are_keyed_by_their_values():
    image = torch.zeros(3, 8, 8)
    mask = torch.ones(1, 8, 8)
    assert TensorPicture(image).key == TensorPicture(image.clone()).key
    keys = {TensorPicture(image).key, TensorPicture(image + 1).key, TensorPicture(image, mask).key}
    assert len(keys | {TensorPicture(image.reshape(3, 4, 16)).key}) == 4
