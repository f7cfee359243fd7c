"""Pictures in and out: pixels as the VAE takes them, and PNG files that know how they were made."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .checkpoints.save import save_bytes

SETTINGS_KEY = "sd3_workbench"  # the PNG text chunk


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3]; truncated, not rounded, as ComfyUI saves."""
    levels = ((images.float() + 1) / 2).clamp(0, 1) * 255
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu()


def open_picture(path: str | Path) -> Image.Image:
    """The picture, turned upright by its EXIF.  Raises ValueError when it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such picture.") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error}).") from error


def read_image(path: str | Path, width: int, height: int) -> Tensor:
    """A picture scaled to cover width x height and cut around its centre: [1, 3, H, W] in -1..1."""
    picture = ImageOps.fit(_flat_rgb(open_picture(path)), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32).copy())
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def read_mask(path: str | Path, width: int, height: int) -> Tensor:
    """A mask, cut like its picture: [1, H, W] in 0..1, white where something new is drawn.

    A picture with transparency is its own mask: what is transparent is drawn anew.
    """
    picture = open_picture(path)
    if "A" in picture.getbands():
        picture = ImageOps.invert(picture.getchannel("A"))
    picture = ImageOps.fit(picture.convert("L"), (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32).copy())[None] / 255


def _flat_rgb(picture: Image.Image) -> Image.Image:
    """RGB; transparency lies on white."""
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def save_png(pixels: Tensor, path: Path, settings: dict[str, Any]) -> Path:
    """Write uint8 [H, W, 3] with its settings inside, whole or not at all; see save_bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG", pnginfo=info)
    return save_bytes(path, file.getvalue())


def read_settings(path: str | Path) -> dict[str, Any]:
    """What save_png wrote beside the pixels.  Raises ValueError when there is nothing of ours."""
    try:
        return json.loads(open_picture(path).info[SETTINGS_KEY])
    except (KeyError, ValueError) as error:
        if isinstance(error, KeyError):
            raise ValueError(
                f"{path}: holds no settings of SD3 Workbench: made elsewhere, or stripped on its "
                "way (many sites re-encode pictures)."
            ) from error
        raise
