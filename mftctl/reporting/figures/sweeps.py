"""Sweep figures: each metric by the option that a recipe varies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mftctl.errors import RunError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.results import MadeState
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Parents
from mftctl.experiments.state_names import STATE_ORDER
from mftctl.reporting.figures.style import (
    INK,
    Figure,
    LineStyle,
    drawn_text,
    legend_height_inches,
    numbered_style,
    put_legend,
    style_of,
    with_own_names,
)
from mftctl.reporting.figures.training_histories import DECIDES_NOTHING
from mftctl.reporting.file_names import slug
from mftctl.reporting.state_tables import MetricTable, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_SECTIONS = {"fft": "fft", "mask-train": "mask_train"}


@dataclass(frozen=True, slots=True)
class _Option:
    """A swept option.

    Attributes:
        name: File name of the figure.
        title: Title of the figure.
        label: Label of the axis.
        key: Key in the recipe section.
        methods: Values of `mask_train.method` or `fft.method` that the option applies to.
    """

    name: str
    title: str
    label: str
    key: str
    methods: tuple[str, ...]

    def value(self, command: str, section: Mapping[str, Any]) -> float | None:
        """The effective value; None if this option has no effect.

        Raises:
            ValueError: The section is not valid in this version.
        """
        if section.get("method") not in self.methods:
            return None
        if self.key != "ratio":
            return float(section[self.key])
        options = MaskTrainOptions if command == "mask-train" else FftOptions
        ratio = options.model_validate(section).ratio
        return ratio if isinstance(ratio, float) else None


# `random` is a mask in one section and an update in the other; the command distinguishes them.
_OPTIONS = {
    "mask-train": (
        _Option("mask-ratio", "Mask ratio", "share removed", "ratio", ("learned", "random", "magnitude")),
        _Option("data-share", "Data fraction", "share of the training data", "data_fraction", ("learned",)),
        _Option("drop-rate", "Drop rate", "share of changes undone", "ratio", ("drop",)),
    ),
    "fft": (_Option("update-ratio", "Update ratio", "share not updated per step", "ratio", ("gmt", "random")),),
}


@dataclass(frozen=True, slots=True)
class _Point:
    """An evaluated state for one metric, with the settings that made it.

    Attributes:
        row: The row of the table.
        state: Name of the state without its variant.
        value: Value of the swept option.
        settings: All other relevant settings, by seed.
    """

    row: Row
    state: str
    value: float
    settings: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _SweptLine:
    """States that differ only in the swept option, by its value."""

    label: str
    style: LineStyle
    points: tuple[_Point, ...]


@dataclass(frozen=True, slots=True)
class _Panel:
    """One metric of a figure."""

    table: MetricTable
    lines: tuple[_SweptLine, ...]
    baselines: tuple[Row, ...]

    def bar(self, row: Row) -> tuple[float, float, float]:
        """Position of a state and the ends of its bar: the paired interval, or else the spread over seeds.

        If the seeds differ from the baseline's, the state is placed at the baseline's line plus its change, since the
        change is measured against the baseline of its own seeds.
        """
        value = row.value
        if row.change is None:
            around = row.spread or 0.0
            return value, value - around, value + around
        if len(self.baselines) == 1 and set(self.baselines[0].seeds) != set(row.seeds):
            value = self.baselines[0].value + row.change.value
        return value, value + row.change.low - row.change.value, value + row.change.high - row.change.value


def sweep_figures(tables: Sequence[MetricTable], runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """One figure per swept option, model and dataset, with one panel per metric.

    Args:
        tables: The comparison tables.
        runs: The runs of the same folder, oldest first.

    Returns:
        The figures, and one line per run that cannot be used.

    Source: MFT, figures 4, 5, 8 and 9; GMT, figures 2 and 3.
    """
    by_name = {run.name: run for run in runs if isinstance(run.record.config, dict)}
    figures, problems = [], []
    for command, options in _OPTIONS.items():
        for option in options:
            ordered = sorted(tables, key=lambda table: (table.origin, table.dataset))
            for (origin, dataset), group in groupby(ordered, key=lambda table: (table.origin, table.dataset)):
                panels, unreadable = _panels(list(group), command, option, by_name)
                problems += unreadable
                if panels:
                    figures.append(_figure(option, origin, dataset, panels))
    return with_own_names(figures), list(dict.fromkeys(problems))


def _panels(
    tables: Sequence[MetricTable], command: str, option: _Option, by_name: Mapping[str, Run]
) -> tuple[list[_Panel], list[str]]:
    """The metrics for which this option was swept, and one line per state whose runs cannot be read."""
    panels, problems = [], []
    for table in tables:
        points, unreadable = _points(table.rows, command, option, by_name)
        problems += unreadable
        if lines := _lines(points):
            against = {name for line in lines for point in line.points for name in point.row.against}
            baselines = tuple(row for row in table.rows if row.state in against)
            panels.append(_Panel(table, lines, baselines))
    return panels, problems


def _points(
    rows: Sequence[Row], command: str, option: _Option, by_name: Mapping[str, Run]
) -> tuple[list[_Point], list[str]]:
    """The rows that belong to this option as points, and one line per row whose runs cannot be read."""
    points, problems = [], []
    for row in rows:
        try:
            point = _point(row, command, option, by_name)
        except (RunError, KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"the run that made this state cannot be read: {first_fault(error)}"
            problems.append(f"{', '.join(row.runs)}: left out of the sweep figures: {reason}")
            continue
        if point is not None:
            points.append(point)
    return points, problems


def _point(row: Row, command: str, option: _Option, by_name: Mapping[str, Run]) -> _Point | None:
    """The row as a point of a sweep; None if it does not belong to this option.

    Raises:
        KeyError: The run that made it is missing, or its record is incomplete.
        ValueError: Its options are not valid in this version.
    """
    values, settings = set(), {}
    state = row.state
    for seed, name in zip(row.seeds, row.runs, strict=True):
        state = by_name[name].result(MadeState).state
        made_by = _made_by(by_name[name])
        if not made_by:
            return None
        if not made_by[-1].endswith(command):
            return None
        record = by_name[made_by[-1]].record
        section = dict(record.config[_SECTIONS[command]])
        values.add(option.value(command, section))
        for key in (option.key, *DECIDES_NOTHING):
            section.pop(key, None)
        data = {key: record.config.get(key) for key in ("data", "val_data")}
        settings[seed] = {**section, **data, "started from": made_by[:-1]}
    [*one] = values
    if len(one) != 1 or one[0] is None:
        return None
    return _Point(row, state, one[0], settings)


def _made_by(evaluation: Run) -> list[str]:
    return [name for name in Parents.read(evaluation.record.inputs).parents if not name.endswith("-apply")]


def _lines(points: Sequence[_Point]) -> tuple[_SweptLine, ...]:
    """Points grouped into lines of at least two values; of points with equal values, the one with the most seeds."""
    groups: list[list[_Point]] = []
    for point in points:
        for group in groups:
            if _differ_in_the_option_alone(group[0], point):
                group.append(point)
                break
        else:
            groups.append([point])
    swept = []
    for group in groups:
        by_value: dict[float, _Point] = {}
        for point in sorted(group, key=lambda point: len(point.row.seeds)):
            by_value[point.value] = point
        if len(by_value) > 1:
            swept.append([by_value[value] for value in sorted(by_value)])
    lines = []
    for number, line in enumerate(swept):
        alike = [other for other in swept if other[0].state == line[0].state]
        style = style_of(line[0].state) if alike[0] is line else numbered_style(len(STATE_ORDER) + 1 + number)
        lines.append(_SweptLine(_label(line, alike), style, tuple(line)))
    return tuple(lines)


def _differ_in_the_option_alone(one: _Point, other: _Point) -> bool:
    shared = one.settings.keys() & other.settings.keys()
    return one.state == other.state and bool(shared) and all(one.settings[s] == other.settings[s] for s in shared)


def _label(line: Sequence[_Point], alike: Sequence[Sequence[_Point]]) -> str:
    """The state, with the settings that distinguish it from other lines of the same state."""
    state = line[0].state
    if len(alike) == 1:
        return state
    settings = [next(iter(other[0].settings.values())) for other in alike]
    own = next(iter(line[0].settings.values()))
    keys = [key for key in own if len({json.dumps(other.get(key)) for other in settings}) > 1]
    told = [f"{key}={own[key]}" for key in keys if not isinstance(own[key], list | dict)]
    return f"{state} ({', '.join(told[:2]) or line[0].row.runs[0]})"


def _figure(option: _Option, origin: str, dataset: str, panels: Sequence[_Panel]) -> Figure:
    points = [point for panel in panels for line in panel.lines for point in line.points]
    seeds = sorted({len(point.row.seeds) for point in points})
    samples = sorted({panel.table.rows[0].samples for panel in panels})
    sentences = [
        f"{origin} on {dataset}, n = {' and '.join(map(str, samples))}.",
        _bar_caption([point.row for point in points]),
        _baseline_caption(panels),
        f"Seeds per point: {' to '.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))}.",
        "All values were tested on the same data, so the best result is partly luck.",
    ]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    labels = {line.label for panel in panels for line in panel.lines} | {
        row.state for panel in panels for row in panel.baselines
    }
    return Figure(
        name=f"{option.name}-{slug(dataset)}",
        title=f"{option.title}: {dataset}",
        caption=" ".join(sentences),
        data=tuple(_numbers(option, panels)),
        runs=tuple(dict.fromkeys(name for point in points for name in point.row.runs)),
        draw=partial(_draw, option, tuple(panels), columns),
        height_inches=0.3 + 2.7 * rows + legend_height_inches(list(labels)),
    )


def _bar_caption(rows: Sequence[Row]) -> str:
    parts = []
    if any(row.change is not None for row in rows):
        parts.append(
            "paired 95 % interval over test samples of the difference from the baseline (within noise if it reaches "
            "the baseline)"
        )
    if any(row.change is None and row.spread is not None for row in rows):
        parts.append("standard deviation over seeds if there is no baseline to pair with")
    return f"Bars: {'; '.join(parts)}." if parts else "No bars: single seed and no baseline to pair with."


def _baseline_caption(panels: Sequence[_Panel]) -> str:
    rows = [row for panel in panels for row in panel.baselines]
    if not rows:
        return "No baseline was measured, or several fit equally well."
    band = "; band: standard deviation over seeds" if any(row.spread for row in rows) else ""
    return f"Horizontal line: {', '.join(dict.fromkeys(row.state for row in rows))}{band}."


def _numbers(option: _Option, panels: Sequence[_Panel]) -> list[dict[str, Any]]:
    numbers = []
    for panel in panels:
        for row in panel.baselines:
            numbers.append(
                {"metric": panel.table.metric, "state": row.state, "value": row.value, "runs": list(row.runs)}
            )
        for line in panel.lines:
            for point in line.points:
                drawn_at, low, high = panel.bar(point.row)
                numbers.append(
                    {
                        "metric": panel.table.metric,
                        "state": line.label,
                        option.key: point.value,
                        "value": point.row.value,
                        "drawn_at": drawn_at,
                        "low": low,
                        "high": high,
                        "seeds": len(point.row.seeds),
                        "runs": list(point.row.runs),
                    }
                )
    return numbers


def _draw(option: _Option, panels: Sequence[_Panel], columns: int, canvas: Canvas) -> None:
    rows = -(-len(panels) // columns)
    grid = canvas.subplots(rows, columns, squeeze=False)
    flat = [axes for row in grid for axes in row]
    handles: dict[str, Any] = {}
    for axes, panel in zip(flat, panels, strict=False):
        _draw_panel(axes, panel)
        axes.set_xlabel(option.label)
        axes.set_ylabel(panel.table.metric.replace("_", " "))
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in flat[len(panels) :]:
        axes.remove()
    put_legend(canvas, handles)


def _draw_panel(axes: Axes, panel: _Panel) -> None:
    for row in panel.baselines:
        axes.axhline(row.value, color=INK, linewidth=1.0, label=drawn_text(row.state))
        if row.spread:
            axes.axhspan(row.value - row.spread, row.value + row.spread, color=INK, alpha=0.1, linewidth=0)
    every = [point.value for line in panel.lines for point in line.points]
    # Bars of several lines at the same value would overlap.
    shift = 0.008 * (max(every) - min(every))
    for number, line in enumerate(panel.lines):
        aside = shift * (number - (len(panel.lines) - 1) / 2)
        bars = [panel.bar(point.row) for point in line.points]
        axes.errorbar(
            [point.value + aside for point in line.points],
            [value for value, _, _ in bars],
            yerr=[[value - low for value, low, _ in bars], [high - value for value, _, high in bars]],
            label=drawn_text(line.label),
            capsize=2.0,
            elinewidth=0.9,
            **line.style.keywords(),
        )
    # The interval of a change can extend below the lowest possible score.
    if axes.get_ylim()[0] < 0 <= min(point.row.value for line in panel.lines for point in line.points):
        axes.set_ylim(bottom=0)
