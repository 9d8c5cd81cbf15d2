"""Loss surface figures: contours on train and test records, with the three models that span the plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mftctl.errors import RunError
from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import MeasuredSurface
from mftctl.reporting.figures.style import COLOUR_MAP, INK, Figure, style_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

_COMMAND = "surface"
_LOSSES = ("train_loss", "test_loss")
_FEWEST_CELLS = 16
_CORNERS = 3
_BANDS = 9


@dataclass(frozen=True, slots=True)
class SurfacePoint:
    """The loss per answer token at one point of the plane, in nats; infinite if it is not a number.

    Attributes:
        x: Distance from FFT towards continued FFT, in the norm over all weights.
        y: Distance from FFT at right angles to x, on the side of MFT.
        train_loss: Loss on training records.
        test_loss: Loss on test records.
        mark: State with exactly these weights; None for a grid point.
    """

    x: float
    y: float
    train_loss: float
    test_loss: float
    mark: str | None = None


@dataclass(frozen=True, slots=True)
class Surface:
    """The results of a surface run.

    Attributes:
        run: Name of the run.
        corners: Names of the three runs whose models span the plane, FFT first.
        side: Number of grid points per side.
        records: Number of training and test records.
        marks: The three models.
        cells: The measured grid points; an unfinished run has only some of them.
    """

    run: str
    corners: tuple[str, ...]
    side: int
    records: tuple[int, int]
    marks: tuple[SurfacePoint, ...]
    cells: tuple[SurfacePoint, ...]

    @property
    def is_complete(self) -> bool:
        """True if the whole grid has been measured."""
        return len(self.cells) == self.side**2


def surface_figures(runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """One figure per measured triple of models, from the run with the most points (the latest of equals).

    Args:
        runs: The runs, oldest first.

    Returns:
        The figures, and one line per surface run that cannot be used.

    Source: MFT, figures 6 and 10.
    """
    best: dict[tuple[str, ...], Surface] = {}
    found, problems = surfaces(runs)
    for surface in found:
        known = best.get(surface.corners)
        if known is None or len(surface.cells) >= len(known.cells):
            best[surface.corners] = surface
    return [_figure(surface) for surface in best.values()], problems


def surfaces(runs: Sequence[Run]) -> tuple[list[Surface], list[str]]:
    """The results of surface runs, including unfinished runs with enough points to draw.

    Args:
        runs: The runs, oldest first.

    Returns:
        The surfaces, and one line per surface run that cannot be used.
    """
    found, problems = [], []
    for run in runs:
        if run.record.command != _COMMAND:
            continue
        try:
            surface = _read(run)
        except (RunError, ValueError, KeyError, TypeError) as error:
            problems.append(told(error, f"{run.name}: its loss surface cannot be read"))
            continue
        problem = _problem(surface)
        if problem is None:
            found.append(surface)
        else:
            problems.append(f"{run.name}: {problem}")
    return found, problems


def _problem(surface: Surface) -> str | None:
    """The reason why a surface cannot be drawn; None if it can."""
    if len(surface.marks) != len(surface.corners) or len(surface.cells) < _FEWEST_CELLS:
        return (
            f"{len(surface.cells)} of {surface.side**2} points of the loss surface are measured, too few for a figure; "
            "mftctl report --surface continues it"
        )
    if len(surface.corners) != _CORNERS or not _spans_a_plane(surface.cells):
        return "the points of its loss surface do not span a plane"
    flat = [name.replace("_", " ") for name in _LOSSES if len(_levels(surface, name)) < 2]
    return f"constant over the whole plane: {' and '.join(flat)}" if flat else None


def _spans_a_plane(cells: Sequence[SurfacePoint]) -> bool:
    """True if the points do not all lie on one line."""
    import numpy as np

    places = np.array([[cell.x, cell.y] for cell in cells])
    sizes = np.ptp(places, axis=0)
    return bool(sizes.all()) and int(np.linalg.matrix_rank((places - places[0]) / sizes)) == 2


def _read(run: Run) -> Surface:
    inputs = MeasuredSurface.read(run.record.inputs)
    lines = [_point(line) for line in run.training.metrics()]
    return Surface(
        run.name,
        tuple(corner.run for corner in inputs.corners),
        inputs.points,
        (inputs.train_records, inputs.test_records),
        tuple(point for point in lines if point.mark is not None),
        tuple(point for point in lines if point.mark is None),
    )


def _point(line: MetricsLine) -> SurfacePoint:
    if not line.is_place or line.x is None or line.y is None:
        raise ValueError(f"line {line.step} is not a point of the surface")
    train_loss, test_loss = (math.inf if loss is None else loss for loss in (line.train_loss, line.test_loss))
    return SurfacePoint(float(line.x), float(line.y), train_loss, test_loss, line.mark)


def _figure(surface: Surface) -> Figure:
    train, test = surface.records
    part = "" if surface.is_complete else f" {len(surface.cells)} of them are measured so far."
    return Figure(
        name=f"loss-surface-{surface.run}",
        title=f"Loss in the plane through {_names(surface)}",
        caption=(
            f"Loss per answer token, lower (darker) is better, on {train} training records of {surface.corners[0]} and "
            f"on {test} test records, at {surface.side} × {surface.side} points.{part} The axes are distances in "
            "weight space: x from FFT to continued FFT, y the component towards MFT that is orthogonal to x. "
            f"Each axis and each half has its own scale. Each colour covers 1/{_BANDS} of the grid, so "
            "contour lines are not evenly spaced. Train and test loss of the models themselves: "
            f"{'; '.join(map(_losses_text, surface.marks))}. The plane shows two of very many directions: it cannot "
            "show whether a path outside it connects two models, or how wide a valley is in other directions."
        ),
        data=tuple(_row(point) for point in (*surface.marks, *surface.cells)),
        runs=(surface.run, *surface.corners),
        draw=partial(_draw, surface),
        width_inches=5.6,
        height_inches=3.4,
    )


def _names(surface: Surface) -> str:
    *first, last = (str(point.mark) for point in surface.marks)
    return f"{', '.join(first)} and {last}"


def _losses_text(point: SurfacePoint) -> str:
    return f"{point.mark} {point.train_loss:.4g} and {point.test_loss:.4g}"


def _row(point: SurfacePoint) -> dict[str, Any]:
    losses = {name: getattr(point, name) for name in _LOSSES}
    shown = {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
    return {"state": point.mark, "x": point.x, "y": point.y, **shown}


def _draw(surface: Surface, canvas: Canvas) -> None:
    halves = canvas.subplots(1, 2, sharex=True, sharey=True)
    for axes, name, count in zip(halves, _LOSSES, surface.records, strict=True):
        _draw_contours(axes, surface, name)
        for point in surface.marks:
            _draw_mark(axes, point)
        axes.set_title(f"{name.split('_')[0]} loss ({count} records)")
        axes.set_xlabel(f"towards {surface.marks[1].mark}")
        axes.locator_params(nbins=5)
        axes.grid(visible=False)
    halves[0].set_ylabel(f"towards {surface.marks[2].mark}")


def _draw_contours(axes: Axes, surface: Surface, name: str) -> None:
    import numpy as np
    from matplotlib.colors import BoundaryNorm

    across = np.array([cell.x for cell in surface.cells])
    upwards = np.array([cell.y for cell in surface.cells])
    losses, levels = _drawn_losses(surface, name), _levels(surface, name)
    bands = BoundaryNorm(levels, 256, extend="both")
    axes.tricontourf(across, upwards, losses, levels=levels, cmap=COLOUR_MAP, norm=bands, extend="both")
    # White is visible on the dark bands, ink on the light ones.
    colours = ["white" if number <= len(levels) / 2 else INK for number in range(len(levels))]
    lines = axes.tricontour(across, upwards, losses, levels=levels, colors=colours, linewidths=0.6)
    axes.clabel(lines, fmt="%.3g", fontsize=8)


def _drawn_losses(surface: Surface, name: str) -> NDArray[np.float64]:
    """The loss at each grid point; the highest finite loss replaces values that are not finite."""
    import numpy as np

    losses = [getattr(cell, name) for cell in surface.cells]
    highest = max(filter(math.isfinite, losses), default=0.0)
    return np.minimum(np.array(losses, dtype=np.float64), highest)


def _levels(surface: Surface, name: str) -> NDArray[np.float64]:
    """Contour levels at quantiles, so that each band covers an equal share of the plane."""
    import numpy as np

    shares = np.linspace(0, 1, _BANDS + 1)[1:-1]
    return np.unique(np.quantile(_drawn_losses(surface, name), shares))


def _draw_mark(axes: Axes, point: SurfacePoint) -> None:
    style = style_of(str(point.mark))
    axes.plot(point.x, point.y, style.marker, color=style.color, markersize=11, markeredgecolor="white")
    axes.annotate(
        str(point.mark),
        (point.x, point.y),
        xytext=(0, 10),
        textcoords="offset points",
        horizontalalignment="center",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        zorder=5,  # above the contour labels
    )
