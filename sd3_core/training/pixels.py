"""Pictures of every kind -> pixels as the VAE takes them, at the size of their bucket.

Hash and pixels come from one reading of the file, so that what is cached belongs to the hash it is
cached under.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..decode import RULES, decode
from ..reading import LARGEST_PICTURE, read_regular


@dataclass(frozen=True)
class Pixels:
    """What is trained on: the image [3, H, W] in -1..1, and perhaps weights of its loss."""

    image: Tensor
    mask: Tensor | None = None  # [1, H, W] in 0..1; 0 where nothing is learnt


@dataclass(frozen=True)
class FilePicture:
    """A picture on disk and how it becomes pixels."""

    path: Path
    digest: str  # SHA-256 of the file's bytes
    bucket: tuple[int, int]  # width, height
    box: tuple[float, float, float, float]  # the part that is used: left, top, right, bottom
    masked: bool = False  # its alpha weighs the loss
    background: str | None = None  # under its alpha; None where it has none

    @property
    def key(self) -> str:
        """Names the pixels: the same exactly when `read` gives the same."""
        described: dict[str, Any] = {**asdict(self), "path": None, "rules": RULES}
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def read(self) -> Pixels:
        """Decode, crop, scale.  Raises ValueError when the file is not what it was."""
        try:
            data = read_regular(self.path, LARGEST_PICTURE)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror or error}).") from error
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise ValueError(f"{self.path}: has changed since the dataset was read. Start again.")
        picture = decode(data)
        colour = picture.on(self.background or "white")
        colour = colour.resize(self.bucket, Image.Resampling.LANCZOS, box=self.box)
        image = _levels(colour).permute(2, 0, 1) / 127.5 - 1
        if picture.alpha is None or not self.masked:
            return Pixels(image)
        alpha = picture.alpha.resize(self.bucket, Image.Resampling.BILINEAR, box=self.box)
        return Pixels(image, _levels(alpha)[None] / 255)


@dataclass(frozen=True, eq=False)
class TensorPicture:
    """A picture in memory."""

    image: Tensor  # [3, H, W] in -1..1
    mask: Tensor | None = None  # [1, H, W] in 0..1

    @cached_property
    def key(self) -> str:
        """Names the pixels, as FilePicture's does."""
        digest = hashlib.sha256()
        for tensor in (self.image, self.mask):
            if tensor is not None:
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def digest(self) -> str:
        """What FilePicture tells of its file's bytes."""
        return self.key

    def read(self) -> Pixels:
        return Pixels(self.image, self.mask)


def _levels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32).copy())
