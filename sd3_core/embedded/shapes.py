"""The six shapes as signed distances: one formula draws them and makes the checker's templates."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ARM = 0.36  # half the width of a cross's arm, as all here in radii
BAND = (0.59, 1.03)  # inner and outer edge of a ring
TIPS = 1.2  # how far a triangle's corners lie from its centroid; twice as far as its sides
STAR = (1.18, 0.57)  # outer and inner corners of a star


@dataclass(frozen=True)
class Shape:
    """distance: (x, y) in radii from the centroid -> signed distance in radii, negative inside.

    left, top, right, bottom: its box around the centroid.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    left: float
    top: float
    right: float
    bottom: float

    @property
    def reach(self) -> float:
        """The largest distance from the centroid to a side of the box."""
        return max(-self.left, -self.top, self.right, self.bottom)


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def ring(x: Tensor, y: Tensor) -> Tensor:
    inner, outer = BAND
    return (torch.hypot(x, y) - (inner + outer) / 2).abs() - (outer - inner) / 2


def square(x: Tensor, y: Tensor) -> Tensor:
    return box(x, y, 0.9, 0.9)


def cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y, 1, ARM), box(x, y, ARM, 1))


def box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, a corner up."""
    return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - TIPS / 2


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, one up; folded ten times, a star is one straight edge."""
    outer, inner = STAR
    fold = 2 * math.pi / 5
    angle = ((torch.atan2(x, -y) + fold / 2) % fold - fold / 2).abs()
    radius = torch.hypot(x, y)
    along, across = outer - inner * math.cos(fold / 2), inner * math.sin(fold / 2)
    length = math.hypot(along, across)
    beyond = (radius * angle.cos() - outer) * across + radius * angle.sin() * along
    return beyond / length


_SIDE = TIPS * math.sqrt(3) / 2
_STAR_SIDE, _STAR_FOOT = STAR[0] * math.sin(math.radians(72)), STAR[0] * math.cos(math.radians(36))

FORMS = {
    "circle": Shape(circle, -1, -1, 1, 1),
    "square": Shape(square, -0.9, -0.9, 0.9, 0.9),
    "triangle": Shape(triangle, -_SIDE, -TIPS, _SIDE, TIPS / 2),
    "star": Shape(star, -_STAR_SIDE, -STAR[0], _STAR_SIDE, _STAR_FOOT),
    "ring": Shape(ring, -BAND[1], -BAND[1], BAND[1], BAND[1]),
    "cross": Shape(cross, -1, -1, 1, 1),
}
