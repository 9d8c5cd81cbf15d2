"""Legends below a figure, in as many columns as there is room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_ROW_INCHES = 0.18
# Of labels in the legend's font, on a figure of the usual width.
_LONGEST = {3: 22, 2: 40}


def legend_height_inches(labels: Sequence[str]) -> float:
    """How much the legend adds to the height of a figure.

    Args:
        labels: Of the legend.
    """
    return _ROW_INCHES * -(-len(labels) // _columns(labels))


def put_legend(canvas: Canvas, handles: Mapping[str, Any]) -> None:
    """Puts the legend below all axes.

    Args:
        canvas: With a constrained layout.
        handles: What matplotlib drew, by label; none needs no legend.
    """
    labels = list(handles)
    if not labels:
        return
    canvas.legend(list(handles.values()), labels, loc="outside lower center", ncols=_columns(labels), handlelength=3.2)


def _columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return next((columns for columns, length in _LONGEST.items() if longest <= length), 1)
