"""Places labels beside the points of a figure so that they overlap neither each other nor the points."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_CHARACTER_POINTS = 4.6
_LINE_POINTS = 9.0
_MARKER_POINTS = 4.0
_DIRECTIONS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
"""Beside the bars of a point if possible."""


@dataclass(frozen=True, slots=True)
class Label:
    """A text that belongs to a point, in the coordinates of the data."""

    text: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class PlacedLabel:
    """A label with the offset of its centre from its point, in points (1/72 inch)."""

    text: str
    x: float
    y: float
    offset_points: tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Box:
    """A rectangle by its centre and half its size, in points."""

    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: _Box) -> bool:
        """True if the rectangles share an area."""
        return abs(self.x - other.x) < self.width + other.width and abs(self.y - other.y) < self.height + other.height


def place_labels(
    labels: Iterable[Label],
    points: Iterable[tuple[float, float]],
    x: tuple[float, float],
    y: tuple[float, float],
    inches: tuple[float, float],
) -> list[PlacedLabel]:
    """The labels that have room, in the given order; the others are left out.

    Args:
        labels: The most important first.
        points: Further points that no label may hide.
        x: Ends of the horizontal axis.
        y: Ends of the vertical axis.
        inches: Approximate size of the axes.
    """
    wanted = list(labels)
    width, height = 72 * inches[0], 72 * inches[1]

    def centre(across: float, up: float) -> tuple[float, float]:
        return (across - x[0]) / (x[1] - x[0]) * width, (up - y[0]) / (y[1] - y[0]) * height

    centres = [centre(one.x, one.y) for one in wanted]
    others = [centre(*point) for point in points]
    taken = [_Box(across, up, _MARKER_POINTS, _MARKER_POINTS) for across, up in (*centres, *others)]
    placed = []
    for one, (across, up) in zip(wanted, centres, strict=True):
        half_width, half_height = _CHARACTER_POINTS * len(one.text) / 2, _LINE_POINTS / 2
        for right, above in _DIRECTIONS:
            offset = (right * (half_width + _MARKER_POINTS + 1), above * (half_height + _MARKER_POINTS))
            box = _Box(across + offset[0], up + offset[1], half_width, half_height)
            inside = half_width <= box.x <= width - half_width and half_height <= box.y <= height - half_height
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                placed.append(PlacedLabel(one.text, one.x, one.y, offset))
                break
    return placed
