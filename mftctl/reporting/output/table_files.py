"""The report's tables as LaTeX and CSV files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mftctl.reporting.file_names import own_name, slug
from mftctl.reporting.frontier import Frontier
from mftctl.reporting.output.text_tables import (
    TextTable,
    efficiency_text,
    frontier_text,
    metric_text,
    overview_text,
    preferences_text,
)
from mftctl.reporting.overview import Overview
from mftctl.reporting.paired_change import Change
from mftctl.reporting.state_tables import MetricTable, Row
from mftctl.text import visible_line

if TYPE_CHECKING:
    from mftctl.reporting.report import Report

_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First characters of cells that a spreadsheet evaluates, including their full-width forms."""
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_ARGUMENT = re.compile(r"^(?=[\[*])", re.MULTILINE)
_IN_LATEX = {"±": r"$\pm$", "×": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$"}


def table_files(report: Report) -> dict[str, str]:
    """Contents of `<name>.tex` and `<name>.csv` for every table, by file name."""
    files: dict[str, str] = {}
    taken: set[str] = set()
    for text, rows in _tables(report):
        name = own_name(text.name, taken)  # models or datasets may share a name
        files[f"{name}.tex"] = to_latex(text)
        files[f"{name}.csv"] = to_csv(rows)
    return files


def _tables(report: Report) -> Iterator[tuple[TextTable, list[dict[str, Any]]]]:
    for overview in report.overviews:
        yield overview_text(overview), list(_overview_rows(overview))
    for frontier in report.frontiers:
        yield frontier_text(frontier), list(_frontier_rows(frontier))
    for table in report.tables:
        yield metric_text(table), list(_metric_rows(table))
    if report.preferences:
        rows = [{**asdict(row), "seeds": tuple(map(str, row.seeds))} for row in report.preferences]
        yield preferences_text(report.preferences), rows
    if report.efficiency:
        yield efficiency_text(report.efficiency), [asdict(item) for item in report.efficiency]


def answer_files(report: Report) -> dict[str, str]:
    """All changed answers as JSON lines, by file name: one file for each state and seed that changed any."""
    taken: set[str] = set()
    return {
        f"{own_name(slug(f'{changes.dataset} {changes.state} seed {changes.seed}'), taken)}.jsonl": changes.lines()
        for changes in report.answers
        if changes.won or changes.lost
    }


def to_latex(table: TextTable) -> str:
    """The table for the booktabs package; the interval of a change has its own cell."""
    from pandas import DataFrame

    rows = [[visible_line(f"{cell.text.strip()} {cell.detail}").strip() for cell in row] for row in table.rows]
    style = DataFrame(rows, columns=list(map(visible_line, table.columns))).style.hide(axis="index")
    style = style.format(escape="latex").format_index(axis=1, escape="latex")
    columns = "".join("r" if numeric else "l" for numeric in table.is_numeric)
    text: str = style.to_latex(hrules=True, column_format=columns)
    for character, command in _IN_LATEX.items():
        text = text.replace(character, command)
    # The start of a row must not be read as an argument of the line break before it.
    return _ARGUMENT.sub("{}", text)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row with a header, at full precision; several values in a cell are separated by `;`."""
    from pandas import DataFrame

    flat = [{key: _csv_cell(value) for key, value in row.items()} for row in rows]
    text: str = DataFrame(flat).to_csv(index=False, lineterminator="\n")
    return text


def _csv_cell(value: Any) -> Any:
    """A value for a spreadsheet; an apostrophe precedes text that would be taken for a formula."""
    text = ";".join(value) if isinstance(value, tuple) else value
    if not isinstance(text, str):
        return text
    is_formula = text.lstrip().startswith(_FORMULA) and not _NUMBER.fullmatch(text)
    return f"'{visible_line(text)}" if is_formula else visible_line(text)


def _metric_rows(table: MetricTable) -> Iterator[dict[str, Any]]:
    """One row per state, and one per seed if a state has several."""
    for row in table.rows:
        common = {"origin": table.origin, "dataset": table.dataset, "metric": table.metric, "state": row.state}
        yield {
            **common,
            "seed": "mean" if row.spread is not None else str(row.seeds[0]),
            "value": row.value,
            "standard_deviation": row.spread,
            "standard_error": row.standard_error,
            "samples": row.samples,
            **_change_values(row.change),
            "against": row.against,
            **_control_values(row),
            "runs": row.runs,
        }
        for single in row.by_seed if len(row.by_seed) > 1 else ():
            yield {
                **common,
                "seed": str(single.seed),
                "value": single.value,
                "samples": row.samples,
                **_change_values(single.change),
                "against": row.against,
                "runs": (single.run,),
            }


def _overview_rows(overview: Overview) -> Iterator[dict[str, Any]]:
    for state, cells in overview.rows:
        for column, cell in zip(overview.columns, cells, strict=True):
            if cell is not None:
                yield {
                    "origin": overview.origin,
                    "state": state,
                    **asdict(column),
                    "value": cell.value,
                    "standard_deviation": cell.spread,
                    **_change_values(cell.change),
                    "against": cell.against,
                    "runs": cell.runs,
                }


def _frontier_rows(frontier: Frontier) -> Iterator[dict[str, Any]]:
    for point in frontier.points:
        yield {
            "origin": frontier.origin,
            "dataset": frontier.dataset,
            "state": point.state,
            "loss": point.in_domain.value,
            "standard_deviation": point.in_domain.spread,
            "retained_loss": point.retained.value,
            "retained_standard_deviation": point.retained.spread,
            **{f"retained_{key}": value for key, value in _change_values(point.retained.change).items()},
            "retained_against": point.retained.against,
            "dominated": point.is_dominated,
            "runs": tuple(dict.fromkeys((*point.in_domain.runs, *point.retained.runs))),
        }


def _control_values(row: Row) -> dict[str, Any]:
    found = row.against_control
    if found is None:
        return {}
    values = {f"{key}_against_control": value for key, value in _change_values(found.change).items()}
    return {"control": found.control, **values}


def _change_values(change: Change | None) -> dict[str, Any]:
    names = ("value", "low", "high", "verdict", "p_value", "corrected_p_value")
    keys = ("change", "change_low", "change_high", "verdict", "p_value", "corrected_p_value")
    return {key: None if change is None else getattr(change, name) for key, name in zip(keys, names, strict=True)}
