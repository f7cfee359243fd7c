"""Pictures of every kind -> the first frame, upright, in sRGB of 8 bits a channel."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

# Only these are decoded, whatever the name says: a file named .png may be PostScript inside.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
BYTES = 16  # of memory for a pixel, at most, while a picture is decoded
ROWS = 256  # whose levels are scaled at once
RULES = 1  # raise it when the same file gives other pixels than before: caches follow it

_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC's name of a colour space


@dataclass(frozen=True)
class Upright:
    """A decoded picture."""

    colour: Image.Image  # RGB
    alpha: Image.Image | None  # L; None when it is opaque everywhere
    note: str | None = None

    def on(self, background: str) -> Image.Image:
        """The colours over a ground of one colour: what lies hidden under alpha may be anything."""
        if self.alpha is None:
            return self.colour
        ground = Image.new("RGB", self.colour.size, ImageColor.getrgb(background)[:3])
        ground.paste(self.colour, mask=self.alpha)
        return ground


class Unusable(ValueError):
    """A sound picture that nothing can be learnt from."""


def decode(data: bytes) -> Upright:
    """The picture in a file's bytes.

    Raises ValueError, with a reason that follows on "skipped NAME:", for everything else.
    """
    if not data:
        raise Unusable("the file is empty")
    try:
        return _in_srgb(_eight_bit(_first_frame(data)))
    except Image.DecompressionBombError as error:
        raise ValueError(f"it is too large to be decoded ({error})") from error
    except UnidentifiedImageError as error:
        raise ValueError("it is no picture of a kind that is read here") from error
    except Unusable:
        raise
    except Exception as error:  # decoders meet damaged files with errors of every kind
        raise ValueError(f"it cannot be decoded ({str(error) or type(error).__name__})") from error


def pixels_in(file: BinaryIO) -> int:
    """How many pixels `decode` will make of a file, told from its beginning; 0 where none."""
    try:
        with Image.open(file, formats=_known()) as picture:
            return picture.width * picture.height
    except Exception:  # decode tells what is wrong
        return 0


def _known() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _first_frame(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data), formats=_known()) as picture:
        picture.load()
        try:
            return ImageOps.exif_transpose(picture)
        except Exception:  # damaged EXIF beside sound pixels: it stays as it is stored
            return picture.copy()


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Grey levels of 16 bits, or floats in 0..1, scaled to 8; Pillow itself would clip them."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    levels = np.asarray(picture)
    top = 1 if picture.mode == "F" else 65535
    if not (levels.min() >= 0 and levels.max() <= top):  # so that NaN fails too
        raise Unusable(f"its levels lie outside 0..{top}, so their range is unknown")
    eight = np.empty(levels.shape, np.uint8)
    for row in range(0, len(levels), ROWS):
        rows = slice(row, row + ROWS)
        eight[rows] = np.round(levels[rows].astype(np.float64) * (255 / top))
    scaled = Image.fromarray(eight)
    scaled.info = {key: value for key, value in picture.info.items() if key == "icc_profile"}
    return scaled


def _in_srgb(picture: Image.Image) -> Upright:
    alpha = None
    if "transparency" in picture.info or {"A", "a"} & set(picture.getbands()):
        picture, profile = picture.convert("RGBA"), picture.info.get("icc_profile")
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB")
        picture.info["icc_profile"] = profile
        lowest, highest = alpha.getextrema()
        if highest == 0:
            raise Unusable("it is transparent everywhere")
        alpha = None if lowest == 255 else alpha
    if picture.mode in ("P", "1"):
        picture = picture.convert("RGB")
    profile = picture.info.get("icc_profile")
    if not profile:
        # As it is where it is RGB: to convert it would make a copy, 4 bytes a pixel.
        return Upright(picture if picture.mode == "RGB" else picture.convert("RGB"), alpha)
    try:
        return Upright(_from_profile(picture, profile), alpha)
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError) as error:
        note = f"its colour profile cannot be used and is left out ({error})"
        return Upright(picture.convert("RGB"), alpha, note)


def _from_profile(picture: Image.Image, data: bytes) -> Image.Image:
    """The picture's colours, seen through its ICC profile, in sRGB."""
    profile = ImageCms.ImageCmsProfile(BytesIO(data))
    described: Any = profile.profile
    space = described.xcolor_space.strip()
    mode = _PROFILE_MODES.get(space)
    if mode == "RGB":  # a grey picture may carry one
        picture = picture.convert("RGB")
    if mode is None or mode != picture.mode:
        raise ValueError(f"it is for {space}, the picture is {picture.mode}")
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB")
    assert converted is not None  # it would be, were it done in place
    return converted
