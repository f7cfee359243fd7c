"""The grid as one picture, each column and row under the value it stands for."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .axes import Layout, written

LEAST, MOST = 128, 8192  # pixels of a cell's shorter side, and of the whole picture's longer one
GAP = 4  # between cells
GROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
MARK = (220, 80, 20)  # around the reference


def labelled(layout: Layout, pictures: Sequence[Tensor]) -> Tensor:
    """The first picture of every cell, with the axes' names and values: uint8 [H, W, 3].

    pictures: uint8 [B, H, W, 3] of each cell, all of one size.  Small ones are enlarged by a whole
    factor, large ones shrunk where the whole would pass MOST.  The reference has a frame.
    """
    rows = 1 if layout.y is None else len(layout.y.values)
    width, height = cell_size(
        pictures[0].shape[2], pictures[0].shape[1], len(layout.x.values), rows
    )
    font = font_of(max(12, min(width, height) // 12))
    beside = [] if layout.y is None else [written(value).split("+") for value in layout.y.values]
    above = [wrapped(written(value), width, font) for value in layout.x.values]
    line = text_height(font)
    names = [] if layout.y is None else [[layout.y.name]]
    left = GAP + max((widest(part, font) + 3 * GAP for part in [*beside, *names]), default=0)
    top = GAP + line * (1 + max(map(len, above))) + GAP
    size = (left + len(layout.x.values) * (width + GAP), top + rows * (height + GAP))
    sheet = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((left, GAP), layout.x.name, FAINT, font)
    if layout.y is not None:
        draw.text((GAP, top - line - GAP), layout.y.name, FAINT, font)
    for column, lines in enumerate(above):
        middle = left + column * (width + GAP) + width // 2
        write(draw, middle, GAP + line, lines, font)
    for row, lines in enumerate(beside):
        middle = top + row * (height + GAP) + (height - line * len(lines)) // 2
        write(draw, left // 2, middle, lines, font)
    for cell, own in zip(layout.cells, pictures, strict=True):
        row, column = divmod(cell.number - 1, len(layout.x.values))
        x, y = left + column * (width + GAP), top + row * (height + GAP)
        sheet.paste(resized(own[0], width, height), (x, y))
        if cell.number == layout.reference:
            draw.rectangle((x - 2, y - 2, x + width + 1, y + height + 1), outline=MARK, width=2)
    return torch.from_numpy(np.asarray(sheet).copy())


def cell_size(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """At which a picture of this size is shown."""
    factor = math.ceil(LEAST / min(width, height))
    room = MOST / max(columns * width, rows * height)
    scale = room if room < 1 else min(factor, math.floor(room))
    return max(1, round(width * scale)), max(1, round(height * scale))


def resized(picture: Tensor, width: int, height: int) -> Image.Image:
    """picture: uint8 [H, W, 3]."""
    image = Image.fromarray(picture.cpu().numpy())
    if image.size == (width, height):
        return image
    way = Image.Resampling.NEAREST if width > image.width else Image.Resampling.LANCZOS
    return image.resize((width, height), way)


@cache
def font_of(size: int) -> Font:
    return ImageFont.load_default(size)


def text_height(font: Font) -> int:
    _, _, _, bottom = font.getbbox("Ag_")
    return math.ceil(bottom) + 3


def widest(lines: Sequence[str], font: Font) -> int:
    return max(math.ceil(font.getlength(line)) for line in lines)


def wrapped(text: str, width: int, font: Font) -> list[str]:
    """A value above its column: a set that is too long takes a line for each member."""
    return [text] if font.getlength(text) <= width else text.split("+")


def write(
    draw: ImageDraw.ImageDraw,
    middle: int,
    top: int,
    lines: Sequence[str],
    font: Font,
) -> None:
    """Lines centred around `middle`, the first at `top`."""
    for number, line in enumerate(lines):
        left = middle - math.ceil(font.getlength(line)) // 2
        draw.text((left, top + number * text_height(font)), line, INK, font)
