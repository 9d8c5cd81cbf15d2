"""`mftctl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.reporting.comparison import MetricTable
from mftctl.reporting.overview import Overview


def report(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of report.md and report.json.", rich_help_panel=opt.INPUT)
    ] = Path("report"),
    runs: opt.Runs = Path("runs"),
    as_json: opt.AsJson = False,
) -> None:
    """Compare all evaluated states: did it help, and is that more than noise?

    Reads the run folders only. Each change is against the fine-tuned model, paired by test sample.
    """
    with Output(as_json=as_json) as console:
        show(console, runs, output)


def show(console: Output, runs: Path, folder: Path) -> None:
    """Writes the report of a runs folder, to its files and to the console."""
    from mftctl.reporting.comparison import compare_runs
    from mftctl.reporting.files import to_document, write_report
    from mftctl.reporting.overview import overviews

    tables, problems = compare_runs(runs)
    files = write_report(tables, problems, folder)
    views = [*map(_view_overview, overviews(tables)), *map(_view, tables)]
    console.result(to_document(tables, problems), *views)
    for problem in problems:
        console.warn(problem)
    console.note(f"Written: {', '.join(str(file) for file in files)}")
    console.next_command(_advice(tables))


def _view_overview(overview: Overview) -> Table:
    from mftctl.reporting.files import cell_text, column_text, overview_title

    view = Table(title=overview_title(overview), title_justify="left")
    view.add_column("state", overflow="fold")
    for column in overview.columns:
        view.add_column(escape(column_text(column)), justify="right", overflow="fold")
    for state, cells in overview.rows:
        view.add_row(escape(state), *map(cell_text, cells))
    return view


def _view(table: MetricTable) -> Table:
    from mftctl.reporting.files import change_header, change_texts, title, value_text

    colours = {"better": "green", "worse": "red"}
    view = Table(title=title(table), title_justify="left")
    view.add_column("state", overflow="fold")
    view.add_column("value", justify="right")
    view.add_column(change_header(table), justify="right", overflow="fold")
    view.add_column("verdict")
    for row in table.rows:
        change, verdict = change_texts(row, table)
        view.add_row(
            escape(row.state),
            value_text(row),
            change,
            verdict,
            style=colours.get(verdict.split()[0] if verdict else ""),
        )
    return view


def _advice(tables: list[MetricTable]) -> str:
    states = {row.state for table in tables for row in table.rows}
    if not any(state.startswith(("MFT", "masked")) for state in states):
        return "mftctl mask-train"
    return "mftctl mask-train --layers all, or a recipe of mftctl run that compares more"
