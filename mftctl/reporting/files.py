"""The report's files: Markdown to read, JSON to compute with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mftctl.atomic import write_text
from mftctl.reporting.comparison import LOWER_IS_BETTER, MetricTable, Row
from mftctl.reporting.overview import Cell, Column, Overview, overviews


def write_report(tables: Sequence[MetricTable], problems: Sequence[str], folder: Path) -> list[Path]:
    """The files written: `report.md` and `report.json`, replaced where they exist."""
    markdown, document = folder / "report.md", folder / "report.json"
    write_text(markdown, to_markdown(tables, problems))
    write_text(document, json.dumps(to_document(tables, problems), indent=2) + "\n")
    return [markdown, document]


def to_document(tables: Sequence[MetricTable], problems: Sequence[str]) -> dict[str, object]:
    """The report as plain data."""
    return {
        "overviews": [asdict(overview) for overview in overviews(tables)],
        "tables": [asdict(table) for table in tables],
        "problems": list(problems),
    }


def to_markdown(tables: Sequence[MetricTable], problems: Sequence[str]) -> str:
    """The report as Markdown: an overview where there are several figures, then one table a metric."""
    parts = ["# mftctl report", ""]
    for overview in overviews(tables):
        parts += [f"## {overview_title(overview)}", "", f"| state | {' | '.join(map(column_text, overview.columns))} |"]
        parts += [f"|---|{'---:|' * len(overview.columns)}"]
        parts += [f"| {state} | {' | '.join(map(cell_text, cells))} |" for state, cells in overview.rows]
        parts += [""]
    for table in tables:
        parts += [f"## {title(table)}", "", f"| state | value | {change_header(table)} | verdict | runs |"]
        parts += ["|---|---:|---:|---|---|"]
        for row in table.rows:
            cells = (row.state, value_text(row), *change_texts(row, table), ", ".join(row.runs))
            parts += [f"| {' | '.join(cells)} |"]
        parts += [""]
    parts += [NOTE]
    if problems:
        parts += ["", "Left out:", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(parts) + "\n"


NOTE = (
    "The interval is the paired 95 % bootstrap interval over test samples. A change whose interval holds 0 is within"
    " noise. ± is the standard deviation over seeds. p is that of McNemar's exact test, for scores of 0 and 1 of one"
    " seed, and of its extension to sums over several; corrected by Holm's method for the number of benchmarks. In an"
    " overview, * marks a change whose interval leaves out 0."
)


def overview_title(overview: Overview) -> str:
    """What an overview is of."""
    return f"All states of {Path(overview.origin).name}"


def column_text(column: Column) -> str:
    """The heading of a column, with the domain where it has one."""
    name = f"{column.dataset}, {column.metric}"
    return name if column.domain is None else f"{column.domain}: {name}"


def cell_text(cell: Cell | None) -> str:
    """The value, with its change against the baseline and a mark where that is more than noise; empty without one."""
    if cell is None:
        return ""
    if cell.change is None:
        return f"{cell.value:.4f}"
    return f"{cell.value:.4f} ({cell.change.value:+.4f}{'' if cell.change.verdict == 'within noise' else '*'})"


def title(table: MetricTable) -> str:
    """What a table is about."""
    direction = "lower" if table.metric in LOWER_IS_BETTER else "higher"
    return f"{table.metric} on {table.dataset}, {direction} is better ({Path(table.origin).name})"


def change_header(table: MetricTable) -> str:
    """The heading of the column of changes."""
    return f"change against {table.baseline} [95 %]"


def value_text(row: Row) -> str:
    """The value, with its spread over seeds where there are several."""
    return f"{row.value:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}")


def change_texts(row: Row, table: MetricTable) -> tuple[str, str]:
    """The change with an arrow and its interval, and the verdict; empty for the baseline."""
    if row.change is None:
        return "", "" if row.is_baseline else "not comparable"
    arrow = "↑" if row.change.value > 0 else "↓" if row.change.value < 0 else "="
    interval = f"[{row.change.low:+.4f}, {row.change.high:+.4f}]"
    verdict = row.change.verdict
    if row.change.p_value is not None:
        corrected = row.change.corrected_p_value
        several = "" if corrected == row.change.p_value else f", corrected {corrected:.2g}"
        verdict += f" (p = {row.change.p_value:.2g}{several})"
    return f"{arrow} {row.change.value:+.4f} {interval}", verdict
