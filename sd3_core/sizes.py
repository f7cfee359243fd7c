"""What size is drawn, and how a picture to start from comes to it.

Sizes are (width, height) in pixels.
"""

import math
from dataclasses import dataclass

Size = tuple[int, int]

FAR_FROM_NATIVE = 2.5  # times the pixels that a model was made for, or as many times fewer


@dataclass(frozen=True)
class Sides:
    """What a model says of the width and height of a picture."""

    factor: int  # both are multiples of it
    most: int  # pixels
    native_pixels: int  # width times height that it was made for

    def without_picture(self, wanted: tuple[int | None, int | None]) -> Size:
        """As wanted, else the model's own square.  Raises ValueError for what cannot be drawn."""
        side = min(math.isqrt(self.native_pixels), self.most)
        width, height = (side if pixels is None else pixels for pixels in wanted)
        return self.check("width", width), self.check("height", height)

    def with_picture(self, wanted: tuple[int | None, int | None], picture: Size, name: str) -> Size:
        """As wanted, one side alone with the picture's aspect, else the picture's own size.

        Raises ValueError for what cannot be drawn.
        """
        width, height = wanted
        if width is None and height is None:
            return self.own(picture, name)
        if width is None:
            width = self.rounded((height or 0) * picture[0] / picture[1])
        elif height is None:
            height = self.rounded(width * picture[1] / picture[0])
        return self.without_picture((width, height))

    def own(self, picture: Size, name: str) -> Size:
        """The picture's size, cut to multiples of the factor."""
        cut = picture[0] // self.factor * self.factor, picture[1] // self.factor * self.factor
        if not 0 < min(cut) <= max(cut) <= self.most:
            raise ValueError(
                f"{name} is {times(picture)} pixels, and this model draws {self.factor} to "
                f"{self.most} a side: name the size to scale it to, such as "
                f"{self.scaling(picture)}."
            )
        return cut

    def note_on_own(self, name: str, picture: Size) -> str:
        """Of a picture that is drawn at its own size; empty where that suits the model."""
        share = picture[0] * picture[1] / self.native_pixels
        if 1 / FAR_FROM_NATIVE <= share <= FAR_FROM_NATIVE:
            return ""
        return (
            f"{name} has {share:.2g} times the pixels that this model was made for; "
            f"{self.scaling(picture)} scales it."
        )

    def scaling(self, picture: Size) -> str:
        """The flags that bring a picture to the size that the model was made for."""
        grown = math.sqrt(self.native_pixels / (picture[0] * picture[1]))
        width, height = (self.rounded(pixels * grown) for pixels in picture)
        return f"--width {width} --height {height}"

    def rounded(self, pixels: float) -> int:
        """The nearest side that can be drawn."""
        return min(max(1, round(pixels / self.factor)) * self.factor, self.most)

    def check(self, name: str, pixels: int) -> int:
        """A width or height the networks can draw, itself."""
        if pixels < self.factor or pixels % self.factor:
            raise ValueError(
                f"{name} is {pixels}; it must be a multiple of {self.factor}. "
                f"Try {self.rounded(pixels)}."
            )
        if pixels > self.most:
            raise ValueError(
                f"{name} is {pixels}; this model draws at most {self.most} pixels a side."
            )
        return pixels


@dataclass(frozen=True)
class Fit:
    """How a picture comes to the size that is drawn.

    box: the part of it that is drawn on: left, top, right, bottom.
    """

    picture: Size
    size: Size
    box: tuple[float, float, float, float]

    @staticmethod
    def of(picture: Size, size: Size, multiple: int = 8) -> "Fit":
        """Around its centre; scaled to cover the size.

        A picture that only goes beyond the size by less than `multiple` is cut as it is, as ComfyUI
        does before it encodes: no pixel of it changes.
        """
        surplus = [mine - drawn for mine, drawn in zip(picture, size, strict=True)]
        if all(0 <= pixels < multiple for pixels in surplus):
            left, top = (pixels // 2 for pixels in surplus)
            return Fit(picture, size, (left, top, left + size[0], top + size[1]))
        aspect = size[0] / size[1]
        across = min(picture[0], aspect * picture[1])
        down = min(picture[1], picture[0] / aspect)
        left, top = (picture[0] - across) / 2, (picture[1] - down) / 2
        return Fit(picture, size, (left, top, left + across, top + down))

    def note(self, name: str) -> str:
        """What becomes of the picture, in a sentence; empty where it is drawn on as it is."""
        if self.picture == self.size:
            return ""
        mine, drawn = times(self.picture), times(self.size)
        left, top, right, bottom = self.box
        if (right - left, bottom - top) == self.size:
            return f"{name} is {mine} pixels: cut around its centre to {drawn}."
        gone = 1 - (right - left) * (bottom - top) / (self.picture[0] * self.picture[1])
        cut = f" and cut around its centre, {gone:.0%} of it" if gone >= 0.005 else ""
        return f"{name} is {mine} pixels: scaled to {drawn}{cut}."

    def note_on_mask(self, name: str, mask: Size) -> str:
        """Empty where the mask, of this size, has the picture's aspect."""
        if round(mask[0] * self.picture[1] / self.picture[0]) == mask[1]:
            return ""
        return (
            f"{name} is {times(mask)} pixels, its picture {times(self.picture)}: the mask is "
            "stretched over the whole picture."
        )


def times(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
