"""Draws the figures of the weights that masks remove."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mftctl.reporting.figures.removal_magnitudes import BINS, MagnitudeShares
from mftctl.reporting.figures.removal_measures import LayerShares, MaskOverlaps
from mftctl.reporting.figures.style import COLOUR_MAP, GRID, INK, drawn_text, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure as Canvas

_WIDE_LAYERS = 16  # more columns take the full width and leave no space for numbers
_SMALL = 8.0
_MAX_SCALE_FACTOR = 3.0


def draw_layer_shares(canvas: Canvas, groups: Sequence[LayerShares]) -> None:
    """Draws one heat map per group, hatched where nothing is masked, on the scale of `shared_top` if there is one."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    columns = layer_columns(groups)
    top = shared_top(groups)
    panels = _grid(canvas, len(groups), columns)
    for axes, group in zip(panels, groups, strict=True):
        shares = np.ma.masked_invalid(np.array(group.shares, dtype=float))
        rows, layers = shares.shape
        axes.grid(visible=False)
        axes.patch.set(hatch="////", facecolor="none", edgecolor=GRID)
        edges = np.arange(group.layers[0], group.layers[0] + layers + 1) - 0.5
        mesh = axes.pcolormesh(
            edges, np.arange(rows + 1) - 0.5, shares, cmap=COLOUR_MAP, vmin=0, vmax=top or _highest(group) or 1
        )
        axes.invert_yaxis()
        axes.set_yticks(range(rows), list(map(drawn_text, group.projections)))
        axes.tick_params(length=0, labelsize=_SMALL)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("layer", fontsize=_SMALL)
        _set_title(axes, group.label, len(group.seeds), group.removed_share, columns)
        if layers * columns <= _WIDE_LAYERS and not group.is_even:
            for row, column in np.argwhere(~np.ma.getmaskarray(shares)):
                colour = _ink_on(mesh, shares[row, column])
                text = _percent_text(shares[row, column])
                axes.text(group.layers[column], row, text, ha="center", va="center", color=colour, fontsize=6)
        if top is None:
            _add_bar(canvas, mesh, [axes])
    if top is not None:
        _add_bar(canvas, mesh, panels)


def shared_top(groups: Sequence[LayerShares]) -> float | None:
    """Upper end of a shared scale for all heat maps; None if their maxima are too far apart."""
    tops = [_highest(group) for group in groups]
    return max(tops) if 0 < max(tops) <= _MAX_SCALE_FACTOR * min(tops) else None


def layer_columns(groups: Sequence[LayerShares]) -> int:
    """Number of heat maps per row."""
    is_wide = len(groups[0].layers) > _WIDE_LAYERS
    return 1 if len(groups) == 1 or (is_wide and len(groups) <= 3) else 2


def _highest(group: LayerShares) -> float:
    return max(share for row in group.shares for share in row if share is not None)


def _add_bar(canvas: Canvas, mesh: QuadMesh, panels: Sequence[Axes]) -> None:
    from matplotlib.ticker import MaxNLocator

    bar = canvas.colorbar(mesh, ax=panels, pad=0.02, fraction=0.06, aspect=14 * len(panels) ** 0.5)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.yaxis.set_major_formatter(_percent)
    bar.ax.tick_params(labelsize=_SMALL)


def _percent(value: float, _: float) -> str:
    return f"{100 * value:.4g} %"


def _percent_text(share: float) -> str:
    """A percentage with up to two decimals, fewer for larger values."""
    percent = 100 * share
    return f"{percent:.{0 if percent >= 9.95 else 1 if percent >= 0.995 else 2}f}"


def _ink_on(mesh: QuadMesh, value: float) -> str:
    """White on the dark half of the colour map, black on the light half."""
    import numpy as np

    return "white" if np.asarray(mesh.norm(np.array([value]))).item() < 0.5 else "black"


def draw_magnitude_shares(canvas: Canvas, groups: Sequence[MagnitudeShares], done: str) -> None:
    """Draws one small chart per group: a line, a band from the lowest to the highest seed, and the chance level.

    Args:
        canvas: The canvas to draw on.
        groups: One or more groups.
        done: The effect of the masks on weights: `removed` or `reset`.
    """
    import numpy as np

    columns = magnitude_columns(groups)
    middles = (np.arange(BINS) + 0.5) / BINS
    for axes, group in zip(_grid(canvas, len(groups), columns), groups, strict=True):
        style = style_of(group.state)
        axes.axhline(group.flat, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="a random mask")
        axes.plot(middles, group.shares, **style.keywords(), markersize=3, clip_on=False)
        if len(group.seeds) > 1:
            axes.fill_between(middles, group.lowest, group.highest, color=style.color, alpha=0.25, linewidth=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.1 * max(*group.highest, group.flat, 1e-9))
        axes.xaxis.set_major_formatter(_percent)
        axes.yaxis.set_major_formatter(_percent)
        axes.tick_params(labelsize=_SMALL)
        _set_title(axes, group.label, len(group.seeds), group.flat, columns)
    canvas.axes[0].legend(loc="best")
    canvas.supxlabel("weights, smallest to largest", fontsize=9)
    canvas.supylabel(f"share {done}", fontsize=9)


def magnitude_columns(groups: Sequence[MagnitudeShares]) -> int:
    """Number of charts per row."""
    return 1 if len(groups) == 1 else 2


def draw_overlaps(canvas: Canvas, overlaps: MaskOverlaps, done: str) -> None:
    """Draws a table with a number in each cell: measured overlap below the diagonal, chance level above it.

    Args:
        canvas: The canvas to draw on.
        overlaps: Overlaps of at least two masks.
        done: The effect of the masks on weights: `removed` or `reset`.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm

    count = len(overlaps.labels)
    values = np.full((count, count), np.nan)
    for pair in overlaps.pairs:
        values[pair.second, pair.first], values[pair.first, pair.second] = pair.jaccard, pair.by_chance
    axes = canvas.subplots()
    axes.grid(visible=False)
    edges = np.arange(count + 1) - 0.5
    # Square-root scale: one pair in full agreement would leave all other pairs the same dark colour.
    norm = PowerNorm(0.5, 0, float(np.nanmax(values)) or 1.0)
    cells = np.ma.masked_invalid(values)
    mesh = axes.pcolormesh(edges, edges, cells, cmap=COLOUR_MAP, norm=norm, edgecolors="white", linewidth=1)
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        colour = _ink_on(mesh, value)
        axes.text(column, row, _cell_text(value), ha="center", va="center", color=colour, fontsize=7.5)
    axes.plot([-0.5, count - 0.5], [-0.5, count - 0.5], color=INK, linewidth=1)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=_SMALL)
    numbers = [str(number + 1) for number in range(count)]
    axes.set_xticks(range(count), numbers)
    axes.set_yticks(
        range(count),
        [
            f"{textwrap.fill(label, 27, break_on_hyphens=False)}  {number}"
            for label, number in zip(overlaps.labels, numbers, strict=True)
        ],
    )
    axes.set_title("above the diagonal: expected by chance", loc="right", fontsize=_SMALL)
    axes.set_xlabel(f"below the diagonal: {done} by both / by either", loc="left", fontsize=_SMALL)


def _cell_text(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value else "0"


def _grid(canvas: Canvas, count: int, columns: int) -> list[Axes]:
    rows = -(-count // columns)
    return [canvas.add_subplot(rows, columns, place + 1) for place in range(count)]


def _set_title(axes: Axes, label: str, seeds: int, removed_share: float, columns: int) -> None:
    several = f", {seeds} seeds" if seeds > 1 else ""
    lines = textwrap.wrap(f"{label}{several}: {100 * removed_share:.2g} %", 84 // columns, break_on_hyphens=False)
    axes.set_title("\n".join(lines), loc="left", fontsize=_SMALL)
