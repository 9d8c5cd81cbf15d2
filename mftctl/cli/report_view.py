"""Console output of `report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mftctl.cli.output import Output
from mftctl.text import counted, visible_line

if TYPE_CHECKING:
    from mftctl.reporting.output.text_tables import TextCell, TextTable
    from mftctl.reporting.report import Report

_MOST_TOLD = 10
_COLOURS = {"better": "green", "worse": "red"}


def show(console: Output, runs: Path, folder: Path, *, each_seed: bool = False) -> None:
    """Writes the report of a runs folder to files, and its main tables to the console."""
    from mftctl.reporting.output.write import to_document, write_report
    from mftctl.reporting.report import make_report

    made = make_report(runs, console)
    files = write_report(made, folder, console)
    console.result(to_document(made), *(table_view(table) for table in _main_tables(made, each_seed)))
    _tell(console, made)
    kinds = [file.parent.name for file in files]
    console.note(
        f"Written: {files[0]}, report.md, report.json, {kinds.count('tables')} table files,"
        f" {kinds.count('figures')} figure files"
    )
    console.next_command(*shlex.split(made.advice.command), runs=runs)


def _main_tables(made: Report, each_seed: bool) -> list[TextTable]:
    """Returns the overviews if any, otherwise the only tables there are; with each seed, all metric tables."""
    from mftctl.reporting.output.text_tables import efficiency_text, metric_text, overview_text, preferences_text

    preferences = [preferences_text(made.preferences)] if made.preferences and not each_seed else []
    if each_seed:
        return [metric_text(table, by_seed=True) for table in made.tables]
    if made.overviews:
        return [*(overview_text(overview) for overview in made.overviews), *preferences]
    if made.tables:
        return [*(metric_text(table) for table in made.tables), *preferences]
    return preferences or ([efficiency_text(made.efficiency)] if made.efficiency else [])


def _tell(console: Output, made: Report) -> None:
    """Prints the summary of a report and its warnings."""
    from mftctl.reporting.output.headlines import headlines

    for headline in headlines(made.tables):
        console.note(headline.text)
    if not made.tables:
        console.warn("No finished evaluation to compare yet; run mftctl eval")
    flagged = sum(len(row.flags) for table in made.tables for row in table.rows)
    if flagged:
        console.warn(f"{counted(flagged, 'result')} not comparable with the baseline; the report has details")
    for line in made.unfinished:
        console.note(visible_line(f"Not finished: {line}"))
    for problem in made.problems[:_MOST_TOLD]:
        console.warn(visible_line(problem))
    if len(made.problems) > _MOST_TOLD:
        console.warn(f"{counted(len(made.problems) - _MOST_TOLD, 'more warning')} in the report")
    console.note(made.advice.reason)


def table_view(table: TextTable) -> Table:
    """Returns a report table for the terminal."""
    view = Table(title=escape(table.title), title_justify="left", min_width=len(table.title))
    for column, is_numeric in zip(table.columns, table.is_numeric, strict=True):
        view.add_column(escape(column), justify="right" if is_numeric else "left", overflow="fold")
    for row in table.rows:
        view.add_row(*map(_cell_view, row))
    return view


def _cell_view(cell: TextCell) -> Text:
    text = Text(cell.text, style=_COLOURS.get(cell.verdict, ""))
    return text.append(f"\n{cell.detail}", style="dim") if cell.detail else text
