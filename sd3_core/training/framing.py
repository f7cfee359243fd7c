"""How pictures of any size meet the sizes they are trained in: about one area, many aspects."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import ImageColor

from ..errors import quoted
from .order import chance
from .pixels import FilePicture
from .scan import Facts

ALPHA = ("mask", "composite")
CROPS = ("centre", "random")


@dataclass(frozen=True)
class Framing:
    """What read_dataset says of it.  Raises ValueError for what makes no sense."""

    resolution: int
    bucket_step: int = 64
    widest: float = 2.0
    alpha: str = "mask"
    background: str = "white"
    crop: str = "centre"
    crop_seed: int = 0

    def __post_init__(self) -> None:
        if self.alpha not in ALPHA:
            raise ValueError(f"alpha is {quoted(self.alpha)}; choose {' or '.join(ALPHA)}.")
        if self.crop not in CROPS:
            raise ValueError(f"crop is {quoted(self.crop)}; choose {' or '.join(CROPS)}.")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(
                f"background is {quoted(self.background)}; expected a colour such as white or "
                "#808080."
            ) from error
        _ = self.buckets

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        return bucket_sizes(self.resolution, self.bucket_step, self.widest)

    def check_bucket(self, bucket: tuple[int, int]) -> None:
        """Raises ValueError for a bucket, chosen by hand, that a model could not be trained in."""
        width, height = bucket
        if width % self.bucket_step or height % self.bucket_step or min(bucket) < 1:
            raise ValueError(
                f"bucket {width}x{height}: sides must be multiples of {self.bucket_step}"
            )
        if width * height > self.resolution**2:
            raise ValueError(f"bucket {width}x{height}: larger than {self.resolution}² pixels")

    def frame(
        self, path: Path, facts: Facts, bucket: tuple[int, int] | None, owner: str = ""
    ) -> FilePicture:
        """The part of a picture that is trained on, and its size; bucket None: the nearest.

        owner: digest that decides a random crop's place; pictures of one owner are cut alike.
        """
        bucket = bucket or nearest_bucket(facts.width, facts.height, self.buckets)
        place = (0.5, 0.5)
        if self.crop == "random":
            place = tuple(chance(self.crop_seed, owner or facts.digest, axis) for axis in "xy")
        return FilePicture(
            path,
            facts.digest,
            bucket,
            crop_box((facts.width, facts.height), bucket, (place[0], place[1])),
            masked=facts.transparent and self.alpha == "mask",
            background=self.background if facts.transparent else None,
        )


def bucket_sizes(
    resolution: int, step: int = 64, widest: float = 2.0
) -> tuple[tuple[int, int], ...]:
    """All (width, height) of at most resolution² pixels of which one side cannot grow.

    Sides are multiples of `step`, aspects lie between 1:widest and widest:1.  The square comes
    first, then from tall to wide.  Raises ValueError.
    """
    if step < 1 or resolution < step:
        raise ValueError(
            f"resolution is {resolution} and bucket_step {step}: the step must be at least 1 and "
            "at most the resolution."
        )
    if not 1 <= widest <= resolution:
        raise ValueError(f"the widest aspect is {widest}; it must be at least 1 (a square).")
    side = resolution // step * step
    found = set()
    for width in range(step, math.isqrt(int(resolution**2 * widest)) + 1, step):
        height = resolution**2 // width // step * step
        if height and max(width, height) <= widest * min(width, height):
            found |= {(width, height), (height, width)}
    found.discard((side, side))
    return ((side, side), *sorted(found, key=lambda size: size[0] / size[1]))


def nearest_bucket(
    width: int, height: int, buckets: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """The bucket whose aspect is nearest on a log scale; the larger one of two alike."""

    def distance(bucket: tuple[int, int]) -> tuple[float, int]:
        wide, tall = bucket
        return round(abs(math.log(width * tall / (height * wide))), 9), -wide * tall

    return min(buckets, key=distance)


def crop_box(
    size: tuple[int, int], bucket: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> tuple[float, float, float, float]:
    """The part of a picture that has the bucket's aspect: left, top, right, bottom in pixels.

    place: where the part lies in the picture, 0 (left, top) to 1; (0.5, 0.5) is the centre.
    """
    width, height = size
    inside_width = min(width, height * bucket[0] / bucket[1])
    inside_height = min(height, width * bucket[1] / bucket[0])
    left, top = (width - inside_width) * place[0], (height - inside_height) * place[1]
    return left, top, min(left + inside_width, width), min(top + inside_height, height)
