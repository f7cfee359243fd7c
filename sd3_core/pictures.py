"""Pictures in and out: pixels as the VAE takes them, and PNG files that know how they were made."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from .checkpoints.save import save_bytes
from .decode import Upright, decode
from .plain_text import as_json
from .reading import LARGEST_PICTURE, read_regular
from .sizes import Fit

SETTINGS_KEY = "sd3_workbench"  # the PNG text chunk


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3]; truncated, not rounded, as ComfyUI saves."""
    levels = ((images.float() + 1) / 2).clamp(0, 1) * 255
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu()


def to_levels(images: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 -> float [B, H, W, 3] in 0..255: the inverse of read_image."""
    return ((images + 1) * 127.5).round().permute(0, 2, 3, 1)


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture that stands upright.  Raises ValueError as read_image."""
    return _read(path).colour.size


def read_image(path: str | Path, fit: Fit | None = None) -> Tensor:
    """A picture as it is, or fitted to the size that is drawn.

    [1, 3, H, W] in -1..1; transparency lies on white.  Raises ValueError when it cannot be read.
    """
    picture = _read(path).on("white")
    if fit is not None:
        picture = picture.resize(fit.size, Image.Resampling.LANCZOS, box=fit.box)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32).copy())
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def read_mask(path: str | Path, fit: Fit) -> Tensor:
    """A mask, lying over its whole picture and cut like it: [1, H, W] in 0..1, white where
    something new is drawn.

    A picture with transparent parts is its own mask: they are drawn anew.
    """
    picture = _read(path)
    mask = picture.colour if picture.alpha is None else ImageOps.invert(picture.alpha)
    across, down = (mine / its for mine, its in zip(mask.size, fit.picture, strict=True))
    left, top, right, bottom = fit.box
    box = (
        left * across,
        top * down,
        min(right * across, mask.width),
        min(bottom * down, mask.height),
    )
    mask = mask.convert("L").resize(fit.size, Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.asarray(mask, dtype=np.float32).copy())[None] / 255


def _read(path: str | Path) -> Upright:
    try:
        return decode(read_regular(path, LARGEST_PICTURE))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error


def save_png(pixels: Tensor, path: Path, settings: dict[str, Any]) -> Path:
    """Write uint8 [H, W, 3] with its settings inside, whole or not at all; see save_bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(SETTINGS_KEY, as_json(settings))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG", pnginfo=info)
    return save_bytes(path, file.getvalue())


def read_png(path: str | Path) -> tuple[np.ndarray, Any]:
    """What save_png wrote: uint8 [H, W, 3] and the settings.

    Raises ValueError when the file is no PNG or carries nothing of ours.
    """
    try:
        data = io.BytesIO(read_regular(path, LARGEST_PICTURE))
        with Image.open(data, formats=["PNG"]) as picture:
            picture.load()
            text = picture.info.get(SETTINGS_KEY)
            pixels = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as PNG ({error.strerror or error}).") from error
    except (Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as PNG ({error}).") from error
    if text is None:
        raise ValueError(
            f"{path}: holds no settings of SD3 Workbench: made elsewhere, or stripped on its way "
            "(many sites re-encode pictures)."
        )
    try:
        return pixels, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its settings are damaged ({error}).") from error
