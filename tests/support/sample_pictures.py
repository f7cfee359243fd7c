"""Picture files of many kinds, drawn here."""

from pathlib import Path

import numpy as np
from PIL import Image
from recipe import normal


def texture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft coloured noise: no two seeds look alike."""
    coarse = normal(f"texture{seed}", (6, 6, 3), seed)
    levels = np.clip(128 + 60 * coarse, 0, 255).astype(np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def save_texture(path: Path, width: int = 48, height: int = 48, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texture(width, height, seed).save(path)
    return path


def with_hole(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """RGBA, the left half transparent over loud red."""
    pixels = np.asarray(texture(width, height, seed).convert("RGBA")).copy()
    pixels[:, : width // 2] = (255, 0, 0, 0)
    return Image.fromarray(pixels)
