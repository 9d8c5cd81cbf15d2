"""Frontier figures: the loss on a model's own domain against the loss on data to retain, for all states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import FFT, INTERPOLATED, PRE_TRAINED
from mftctl.reporting.figures.frontier_families import Family, families
from mftctl.reporting.figures.frontier_labels import Label, place_labels
from mftctl.reporting.figures.frontier_paths import SharePath, share_paths
from mftctl.reporting.figures.style import (
    GRID,
    INK,
    Figure,
    drawn_text,
    legend_height_inches,
    put_legend,
    style_of,
    with_own_names,
)
from mftctl.reporting.file_names import slug
from mftctl.reporting.frontier import Frontier, FrontierPoint, frontiers
from mftctl.reporting.state_tables import MetricTable, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_WIDTH_INCHES = 6.4
_PLOT_INCHES = 4.0
_NOT_DOMINATED = "not dominated"
_FAR = 3.0
"""States this many times as far from the best as three quarters of all states would squeeze the others."""


@dataclass(frozen=True, slots=True)
class _Window:
    """The part of the plane that is drawn.

    Attributes:
        x: Ends of the axis of the model's own domain.
        y: Ends of the axis of the data to retain.
    """

    x: tuple[float, float]
    y: tuple[float, float]

    def contains(self, x: float, y: float) -> bool:
        """True if a point is drawn."""
        return self.x[0] <= x <= self.x[1] and self.y[0] <= y <= self.y[1]


def frontier_figures(tables: Sequence[MetricTable], runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """One figure per file of a model's own domain and per data to retain.

    Args:
        tables: The comparison tables.
        runs: The runs of the same folder, oldest first.

    Returns:
        The figures, and one line per state or run that they leave out.
    """
    found, problems = frontiers(tables)
    by_name = {run.name: run for run in runs}
    figures = []
    for frontier in found:
        shown = families(frontier, by_name)
        paths, unreadable = share_paths(frontier, runs, by_name)
        problems += unreadable
        figures.append(_figure(frontier, shown, paths))
    return with_own_names(figures), list(dict.fromkeys(problems))


def _figure(frontier: Frontier, shown: Sequence[Family], paths: Sequence[SharePath]) -> Figure:
    window = _window(frontier)
    labels = [drawn_text(family.label) for family in shown] + [path.label for path in paths]
    return Figure(
        name=f"frontier-{slug(frontier.dataset)}",
        title=f"Frontier of learning and forgetting: {frontier.dataset}",
        caption=" ".join(_sentences(frontier, window, paths)),
        data=tuple(_numbers(shown, paths)),
        runs=tuple(dict.fromkeys([*_measured_by(frontier), *(name for path in paths for name in path.runs)])),
        draw=partial(_draw, frontier, tuple(shown), tuple(paths), window),
        width_inches=_WIDTH_INCHES,
        height_inches=_PLOT_INCHES + legend_height_inches([*labels, _NOT_DOMINATED]),
    )


def _measured_by(frontier: Frontier) -> Iterator[str]:
    """The evaluation runs of a frontier."""
    for point in frontier.points:
        yield from (*point.in_domain.runs, *point.retained.runs)


def _sentences(frontier: Frontier, window: _Window, paths: Sequence[SharePath]) -> Iterator[str]:
    one, other = frontier.points[0].in_domain.samples, frontier.points[0].retained.samples
    yield (
        f"{frontier.origin}: loss per answer token on {frontier.dataset} (n = {one}) and on held-out data to retain "
        f"(n = {other}); lower is better for both."
    )
    names = ", ".join(point.state for point in frontier.not_dominated)
    yield f"Not dominated, which means that no other state has one loss lower and the other no higher: {names}."
    rows = [row for point in frontier.points for row in (point.in_domain, point.retained)]
    bars = []
    if any(row.change is not None for row in rows):
        bars.append(f"paired 95 % interval of the difference from {frontier.baseline}")
    if any(row.change is None and row.spread is not None for row in rows):
        bars.append("standard deviation over seeds without such an interval")
    yield f"Bars: {'; '.join(bars)}." if bars else "No bars: single seed and no baseline to pair with."
    base = _base(frontier)
    if base is not None:
        yield (
            f"Dotted line: the retained loss before fine-tuning, {base.retained.value:.4f}, at a loss of "
            f"{base.in_domain.value:.4f} on {frontier.dataset}."
        )
    if paths:
        yield "Dashed: interpolation at several shares, whose first loss is on validation data instead."
    outside = [
        f"{point.state} ({point.in_domain.value:.4f}, {point.retained.value:.4f})"
        for point in frontier.points
        if point.state != PRE_TRAINED and not window.contains(point.in_domain.value, point.retained.value)
    ]
    if outside:
        yield f"Outside the axes: {', '.join(outside)}."


def _base(frontier: Frontier) -> FrontierPoint | None:
    return next((point for point in frontier.points if point.state == PRE_TRAINED), None)


def _window(frontier: Frontier) -> _Window:
    """The window that shows all tuned states except those far away, and the retained loss before fine-tuning."""
    points = [point for point in frontier.points if point.state != PRE_TRAINED] or list(frontier.points)
    x = _range([point.in_domain for point in points], [])
    base = _base(frontier)
    y = _range([point.retained for point in points], [] if base is None else [base.retained.value])
    return _Window(x, y)


def _range(rows: Sequence[Row], always: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis.

    Args:
        rows: The states, drawn with their bars; those far above the lowest are left out.
        always: Losses to show in any case.
    """
    ordered = sorted(row.value for row in rows)
    quarter = ordered[(3 * (len(ordered) - 1) + 3) // 4] - ordered[0]
    near = [row for row in rows if row.value - ordered[0] <= _FAR * quarter]
    low = min([*(row.value - _bar(row)[0] for row in near), *always])
    high = max([*(row.value + _bar(row)[1] for row in near), *always])
    around = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - around, high + around


def _bar(row: Row) -> tuple[float, float]:
    """Lengths of the bar below and above a value: of the paired interval, or else the spread over seeds."""
    if row.change is None:
        around = row.spread or 0.0
        return around, around
    return row.change.value - row.change.low, row.change.high - row.change.value


def _numbers(shown: Sequence[Family], paths: Sequence[SharePath]) -> Iterator[Mapping[str, Any]]:
    for family in shown:
        for member in family.members:
            point = member.point
            bars = {"in_domain": _bar(point.in_domain), "retained": _bar(point.retained)}
            yield {
                "state": point.state,
                "line": family.label,
                "ratio": member.ratio,
                "retain_weight": member.retain_weight,
                "in_domain_loss": point.in_domain.value,
                "in_domain_low": point.in_domain.value - bars["in_domain"][0],
                "in_domain_high": point.in_domain.value + bars["in_domain"][1],
                "retained_loss": point.retained.value,
                "retained_low": point.retained.value - bars["retained"][0],
                "retained_high": point.retained.value + bars["retained"][1],
                "dominated": point.is_dominated,
                "seeds": len(point.retained.seeds),
                "runs": list(dict.fromkeys((*point.in_domain.runs, *point.retained.runs))),
            }
    for path in paths:
        for share in path.shares:
            yield {
                "state": path.label,
                "share": share.share,
                "validation_loss": share.loss,
                "retained_loss": share.retained_loss,
                "runs": list(path.runs),
            }


def _draw(
    frontier: Frontier, shown: Sequence[Family], paths: Sequence[SharePath], window: _Window, canvas: Canvas
) -> None:
    axes = canvas.subplots()
    axes.set_xlim(*window.x)
    axes.set_ylim(*window.y)
    axes.set_xlabel(f"loss on {frontier.dataset}")
    axes.set_ylabel("retained loss")
    best = frontier.not_dominated
    axes.plot(
        [point.in_domain.value for point in best],
        [point.retained.value for point in best],
        drawstyle="steps-post",
        color=GRID,
        alpha=0.5,
        linewidth=4.0,
        label=_NOT_DOMINATED,
        zorder=1,
    )
    base = _base(frontier)
    if base is not None:
        axes.axhline(base.retained.value, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    for path in paths:
        style = style_of(INTERPOLATED)
        x, y = [share.loss for share in path.shares], [share.retained_loss for share in path.shares]
        axes.plot(x, y, color=style.color, linestyle="--", linewidth=1.0, marker=".", label=path.label, zorder=2)
    for family in shown:
        if any(window.contains(one.point.in_domain.value, one.point.retained.value) for one in family.members):
            _draw_family(axes, family)
    points = [(point.in_domain.value, point.retained.value) for point in frontier.points]
    size = (5.4, _PLOT_INCHES - 0.6)
    for placed in place_labels(_labels(frontier, shown, paths, window), points, window.x, window.y, size):
        axes.annotate(
            drawn_text(placed.text),
            (placed.x, placed.y),
            xytext=placed.offset_points,
            textcoords="offset points",
            fontsize=8.0,
            color=INK,
            va="center",
            ha="center",
            zorder=5,
        )
    put_legend(canvas, dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))


def _draw_family(axes: Axes, family: Family) -> None:
    rows = [(member.point.in_domain, member.point.retained) for member in family.members]
    horizontal, vertical = [_bar(one) for one, _ in rows], [_bar(other) for _, other in rows]
    style = family.style.keywords() | ({} if len(rows) > 1 else {"linestyle": "none"})
    axes.errorbar(
        [one.value for one, _ in rows],
        [other.value for _, other in rows],
        xerr=[[low for low, _ in horizontal], [high for _, high in horizontal]],
        yerr=[[low for low, _ in vertical], [high for _, high in vertical]],
        label=drawn_text(family.label),
        elinewidth=0.7,
        zorder=4 if family.label == FFT else 3,
        **style,
    )


def _labels(
    frontier: Frontier, shown: Sequence[Family], paths: Sequence[SharePath], window: _Window
) -> Iterator[Label]:
    """The labels, the most important first: what cannot be placed is left out."""
    for point in frontier.points:
        if point.state == FFT and window.contains(point.in_domain.value, point.retained.value):
            yield Label(FFT, point.in_domain.value, point.retained.value)
    base = _base(frontier)
    if base is not None:
        middle = (window.x[0] + 3 * window.x[1]) / 4
        yield Label("before fine-tuning", middle, base.retained.value)
    for family in shown:
        for member in family.members if len(family.members) > 1 else ():
            x, y = member.point.in_domain.value, member.point.retained.value
            if window.contains(x, y):
                yield Label(member.text, x, y)
    for path in paths:
        for share in path.shares:
            if window.contains(share.loss, share.retained_loss):
                yield Label(f"{share.share:g}", share.loss, share.retained_loss)
