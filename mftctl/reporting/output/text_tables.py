"""The report's tables as text, shared by the terminal, Markdown, LaTeX and the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mftctl.experiments.state_names import FFT
from mftctl.reporting.efficiency import Efficiency
from mftctl.reporting.file_names import slug
from mftctl.reporting.frontier import Frontier
from mftctl.reporting.overview import Cell, Column, Overview
from mftctl.reporting.paired_change import LOWER_IS_BETTER, Change
from mftctl.reporting.preferences import PreferenceRow
from mftctl.reporting.state_tables import MetricTable, Row, is_retained


@dataclass(frozen=True, slots=True)
class TextCell:
    """One table cell.

    Attributes:
        text: The main text.
        detail: Smaller text below it, such as an interval.
        verdict: `better` or `worse` for a change beyond noise; empty otherwise.
        runs: Names of the runs that the number comes from.
    """

    text: str
    detail: str = ""
    verdict: str = ""
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table with its heading.

    Attributes:
        name: File name without an extension, such as `loss-on-test`.
        title: The heading.
        columns: Column headings; the first is for the row's name.
        rows: Rows with one cell per column.
        is_numeric: One flag per column: True if it holds numbers.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[TextCell, ...], ...]
    is_numeric: tuple[bool, ...]


CONTROL_HEADER = "change against the strongest control [95 %]"
_NO_CONTROL = (TextCell(""), TextCell(""))


def metric_text(table: MetricTable, *, by_seed: bool = False) -> TextTable:
    """All states for one metric, each with its change, interval and verdict.

    Args:
        table: The comparison table.
        by_seed: Whether to add one line per seed below a state with several seeds.
    """
    has_controls = any(row.against_control is not None for row in table.rows)
    rows = []
    for row in table.rows:
        cells = _metric_row(row.state, value_text(row), row.change, row, row.runs, _control_cells(row))
        if row.change is not None and table.has_several_baselines:
            cells = (*cells[:2], replace(cells[2], detail=_against(row.against)), *cells[3:])
        rows.append(cells)
        for single in row.by_seed if by_seed and len(row.by_seed) > 1 else ():
            name, value = f"  seed {single.seed}", f"{single.value:.4f}"
            rows.append(_metric_row(name, value, single.change, row, (single.run,), _NO_CONTROL))
    columns = ("state", "value", change_header(table), "verdict", CONTROL_HEADER, "verdict")
    shown = len(columns) if has_controls else 4
    return TextTable(
        slug(f"{table.metric} on {table.dataset} {Path(table.origin).name}"),
        title(table),
        columns[:shown],
        tuple(row[:shown] for row in rows),
        (False, True, True, False, True, False)[:shown],
    )


def _metric_row(
    name: str, value: str, change: Change | None, row: Row, runs: tuple[str, ...], control: tuple[TextCell, ...]
) -> tuple[TextCell, ...]:
    change_text, verdict_text = change_texts(change, is_baseline=row.is_baseline)
    verdict = "" if change is None or change.verdict == "within noise" else change.verdict
    return (
        TextCell(name),
        TextCell(value, runs=runs),
        TextCell(change_text, verdict=verdict, runs=runs),
        TextCell(verdict_text, verdict=verdict),
        *control,
    )


def _against(baselines: Iterable[str]) -> str:
    return f"against {', '.join(baselines)}"


def _control_cells(row: Row) -> tuple[TextCell, ...]:
    """The change against the strongest control, with the control's name, and the verdict."""
    found = row.against_control
    if found is None:
        return _NO_CONTROL
    change_text, verdict_text = change_texts(found.change, is_baseline=False)
    verdict = "" if found.change.verdict == "within noise" else found.change.verdict
    return (
        TextCell(change_text, detail=_against([found.control]), verdict=verdict, runs=row.runs),
        TextCell(verdict_text, verdict=verdict),
    )


def flag_lines(table: MetricTable) -> list[tuple[str, str]]:
    """Every difference from the baseline that affects comparability, as pairs of states and flag."""
    states: dict[str, list[str]] = {}
    for row in table.rows:
        for flag in row.flags:
            states.setdefault(flag, []).append(row.state)
    return [(", ".join(names), flag) for flag, names in states.items()]


def overview_text(overview: Overview) -> TextTable:
    """All states on all data, with a mark on changes beyond noise."""
    rows = []
    for state, cells in overview.rows:
        against = {cell.against for cell in cells if cell is not None and cell.change is not None}
        shown = [*map(_overview_cell, cells)]
        detail = ""
        if overview.has_several_baselines and len(against) == 1:
            detail = _against(*against)
        elif overview.has_several_baselines:
            shown = [_with_baseline(text, cell) for text, cell in zip(shown, cells, strict=True)]
        rows.append((TextCell(state, detail), *shown))
    return TextTable(
        slug(f"all states of {Path(overview.origin).name}"),
        overview_title(overview),
        ("state", *map(column_text, overview.columns)),
        tuple(rows),
        (False, *(True for _ in overview.columns)),
    )


def _with_baseline(text: TextCell, cell: Cell | None) -> TextCell:
    if cell is None or cell.change is None:
        return text
    return replace(text, detail=f"{text.detail} {_against(cell.against)}")


def _overview_cell(cell: Cell | None) -> TextCell:
    if cell is None:
        return TextCell("")
    return TextCell(
        cell_text(cell), "" if cell.change is None else interval_text(cell.change), _verdict(cell), cell.runs
    )


def frontier_text(frontier: Frontier) -> TextTable:
    """The losses of each state on both domains, with the change on the data to retain."""
    has_several_baselines = sum(point.retained.is_baseline for point in frontier.points) > 1
    rows = []
    for point in frontier.points:
        retained = point.retained
        against = _against(retained.against) if retained.change is not None and has_several_baselines else ""
        change, verdict = change_texts(retained.change, is_baseline=retained.is_baseline)
        beyond = "" if retained.change is None or retained.change.verdict == "within noise" else retained.change.verdict
        rows.append(
            (
                TextCell(point.state),
                TextCell(value_text(point.in_domain), runs=point.in_domain.runs),
                TextCell(value_text(retained), runs=retained.runs),
                TextCell(change, against, beyond, retained.runs if change else ()),
                TextCell(verdict, verdict=beyond),
                TextCell("yes" if point.is_dominated else "no"),
            )
        )
    name = Path(frontier.origin).name
    return TextTable(
        slug(f"frontier {frontier.dataset} {name}"),
        f"Learning and forgetting: loss on {frontier.dataset} and retained loss ({name})",
        (
            "state",
            f"loss on {frontier.dataset}",
            "retained loss",
            f"retained change against {frontier.baseline} [95 %]",
            "verdict",
            "dominated",
        ),
        tuple(rows),
        (False, True, True, True, False, False),
    )


def efficiency_text(entries: Sequence[Efficiency]) -> TextTable:
    """The cost of each training, with its speed relative to FFT of the same model."""
    base = {item.origin: item.tokens_per_second for item in entries if item.state == FFT}
    origins = {item.origin for item in entries}
    rows = []
    for item in entries:
        name = item.state if len(origins) == 1 else f"{item.state} ({Path(item.origin).name})"
        ratio = f" ({item.tokens_per_second / base[item.origin]:.2f}×)" if base.get(item.origin) else ""
        numbers = (
            f"{item.samples_per_second:,.2f}",
            f"{item.tokens_per_second:,.0f}{ratio}",
            f"{item.tokens:,}",
            "" if item.flops is None else f"{item.flops:.3g}",
            f"{item.peak_memory_bytes / 1e9:.2f}",
            f"{item.seconds:,.0f}",
        )
        rows.append((TextCell(name), *(TextCell(number, runs=item.runs if number else ()) for number in numbers)))
    columns = ("state", "samples/s", "tokens/s (× FFT)", "tokens", "FLOPs", "peak memory, GB", "total seconds")
    return TextTable("efficiency", "Training cost", columns, tuple(rows), (False, *(True,) * 6))


def preferences_text(rows: Sequence[PreferenceRow]) -> TextTable:
    """The validation of each training on preferences."""
    origins = {row.origin for row in rows}
    cells = []
    for row in rows:
        name = row.state if len(origins) == 1 else f"{row.state} ({Path(row.origin).name})"
        numbers = (
            f"{row.loss:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}"),
            f"{row.accuracy:.1%}" + ("" if row.accuracy_spread is None else f" ± {100 * row.accuracy_spread:.1f}"),
            f"{row.margin:+.4f}",
            f"{row.chosen:+.4f}",
            f"{row.rejected:+.4f}",
        )
        cells.append((TextCell(name), *(TextCell(number, runs=row.runs) for number in numbers)))
    columns = ("state", "validation loss", "reward accuracy", "margin", "chosen reward", "rejected reward")
    return TextTable("preferences", "Preferences", columns, tuple(cells), (False, *(True,) * 5))


def overview_title(overview: Overview) -> str:
    """The heading of an overview."""
    return f"All states of {Path(overview.origin).name}"


def column_text(column: Column) -> str:
    """The heading of a column, with the domain if it has one."""
    name = f"{column.dataset}, {column.metric}"
    if is_retained(column.dataset, is_benchmark=column.domain is not None):
        name = f"retained {column.metric}"
    return name if column.domain is None else f"{column.domain}: {name}"


def cell_text(cell: Cell) -> str:
    """The value, with its change against the baseline and a mark if the change is beyond noise."""
    value = f"{cell.value:.4f}" + ("" if cell.spread is None else f" ± {cell.spread:.4f}")
    return value if cell.change is None else f"{value} ({cell.change.value:+.4f}{'*' if _verdict(cell) else ''})"


def _verdict(cell: Cell) -> str:
    if cell.change is None or cell.change.verdict == "within noise":
        return ""
    return cell.change.verdict


def title(table: MetricTable) -> str:
    """The heading of a metric table."""
    direction = "lower" if table.metric in LOWER_IS_BETTER else "higher"
    measured = f"Retained {table.metric}" if table.is_retained else f"{table.metric} on {table.dataset}"
    return f"{measured}, {direction} is better ({Path(table.origin).name})"


def change_header(table: MetricTable) -> str:
    """The heading of the change column."""
    return f"change against {table.baseline} [95 %]"


def value_text(row: Row) -> str:
    """The value, with its spread if there are several seeds."""
    return f"{row.value:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}")


def change_texts(change: Change | None, *, is_baseline: bool) -> tuple[str, str]:
    """The change with an arrow and its interval, and the verdict; empty for the baseline."""
    if change is None:
        return "", "" if is_baseline else "not comparable"
    arrow = "↑" if change.value > 0 else "↓" if change.value < 0 else "="
    verdict = change.verdict
    if change.p_value is not None:
        corrected = change.corrected_p_value
        several = "" if corrected in (None, change.p_value) else f", corrected {corrected:.2g}"
        verdict += f" (p = {change.p_value:.2g}{several})"
    return f"{arrow} {change.value:+.4f} {interval_text(change)}", verdict


def interval_text(change: Change) -> str:
    """The 95 % interval of a change."""
    return f"[{change.low:+.4f}, {change.high:+.4f}]"
