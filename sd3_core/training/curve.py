"""The loss of a run as a picture."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..checkpoints.save import save_bytes

WIDTH, HEIGHT = 960, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 30, 40  # margins
PALE, DARK, MEASURED = (190, 205, 225), (40, 90, 160), (215, 90, 30)
INK, LINES = (60, 60, 60), (228, 228, 228)

Points = list[tuple[float, float]]  # (step, loss), or (noise level, density)


def draw_curve(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a run's log as a PNG; nothing without a step in it."""
    image = curve_image(lines)
    if image is not None:
        data = BytesIO()
        image.save(data, format="PNG", compress_level=1)
        save_bytes(path, data.getvalue())


def curve_image(lines: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """A run's log: each step's loss pale, its running mean, the validation loss as dots."""
    losses = _points(lines, "loss")
    measured = _points(lines, "validation_loss")
    if not losses:
        return None
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    frame = Frame(losses, measured)
    frame.draw_axes(draw)
    draw.line([frame.place(point) for point in thinned(losses)], fill=PALE)
    draw.line([frame.place(point) for point in thinned(smoothed(losses))], fill=DARK, width=2)
    for point in measured:
        x, y = frame.place(point)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=MEASURED)
    draw.text((LEFT, 8), f"loss {losses[-1][1]:.4g}", fill=DARK)
    if measured:
        draw.text((LEFT + 120, 8), f"validation {measured[-1][1]:.4g}", fill=MEASURED)
    return image


def density_image(points: Points, title: str) -> Image.Image:
    """A density over noise levels 0 ... 1, as points (level, density)."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    frame = Frame(points, [(0.0, 0.0)])
    frame.draw_axes(draw)
    draw.line([frame.place(point) for point in points], fill=DARK, width=2)
    draw.text((LEFT, 8), title, fill=DARK)
    return image


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    found = ((line["step"], line.get(name)) for line in lines)
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def smoothed(points: Points) -> Points:
    """The running mean over about a fiftieth of the run."""
    window = max(1, len(points) // 50)
    mean, result = points[0][1], []
    for step, value in points:
        mean += (value - mean) / min(window, len(result) + 1)
        result.append((step, mean))
    return result


def thinned(points: Points) -> Points:
    """At most about two points for each column of the picture, extremes kept."""
    size = -(-len(points) // WIDTH)
    if size <= 1:
        return points
    kept: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=_loss), max(part, key=_loss)})
    return kept


def _loss(point: tuple[float, float]) -> float:
    return point[1]


class Frame:
    """Where steps and losses lie in the picture."""

    def __init__(self, losses: Points, measured: Points):
        values = sorted(value for _, value in (*losses, *measured))
        self.last = max(1.0, losses[-1][0])
        # a few spikes may leave the picture, so that they do not flatten the rest
        self.low = values[0]
        self.high = max(values[int(0.995 * (len(values) - 1))], *(v for _, v in measured), self.low)
        if self.high <= self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        part = (self.high - min(point[1], self.high)) / (self.high - self.low)
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / self.last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * part

    def draw_axes(self, draw: ImageDraw.ImageDraw) -> None:
        for value in ticks(self.low, self.high):
            y = self.place((0, value))[1]
            draw.line((LEFT, y, WIDTH - RIGHT, y), fill=LINES)
            draw.text((8, y - 6), f"{value:.4g}", fill=INK)
        for step in ticks(0, self.last):
            x = self.place((step, self.low))[0]
            draw.line((x, TOP, x, HEIGHT - BOTTOM), fill=LINES)
            draw.text((x - 10, HEIGHT - BOTTOM + 8), f"{step:g}", fill=INK)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]
