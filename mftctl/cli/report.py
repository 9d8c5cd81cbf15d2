"""`mftctl report`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.config import Recipe
from mftctl.errors import ConfigError
from mftctl.outputs import Input, check_output
from mftctl.recipe_files import load_recipe
from mftctl.visible_text import visible_line

if TYPE_CHECKING:
    from mftctl.reporting.report import Report
    from mftctl.reporting.text_tables import TextCell, TextTable

_SURFACE = "Loss surface"
_MOST_TOLD = 10
_COLOURS = {"better": "green", "worse": "red"}


def report(
    pair: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_A RUN_B", help="Compare two runs instead: folders, names such as 005-mask-train, or numbers."
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder of index.html, its tables and its figures.", rich_help_panel=opt.INPUT
        ),
    ] = Path("report"),
    each_seed: Annotated[
        bool, typer.Option("--each-seed", help="Show each seed of a mean in a line of its own.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow the runs that are worked on, until Ctrl-C; writes no files.")
    ] = False,
    surface: Annotated[
        bool,
        typer.Option(
            "--surface",
            help="First measure the loss around FFT, continued FFT and MFT, on training and test records; a run that "
            "was stopped is taken up again.",
            rich_help_panel=_SURFACE,
        ),
    ] = False,
    surface_points: Annotated[
        int | None,
        typer.Option("--surface-points", help="Points a side of the grid; 11 by default.", rich_help_panel=_SURFACE),
    ] = None,
    surface_records: Annotated[
        int | None,
        typer.Option(
            "--surface-records",
            help="Records to measure on, of each of the two; 100 by default.",
            rich_help_panel=_SURFACE,
        ),
    ] = None,
    device: Annotated[str | None, opt.setting(Recipe, "device", "--device", panel=_SURFACE)] = None,
    runs: opt.Runs = Path("runs"),
    as_json: opt.AsJson = False,
) -> None:
    """Compare all evaluated states: did it help, and is that more than noise?

    Reads the run folders only. Each change is against the fine-tuned model, paired by test sample. Writes a page to
    read (index.html), Markdown, JSON, tables for LaTeX and CSV, and figures as SVG and PNG.
    """
    sizes = {"points": surface_points, "records": surface_records}
    chosen_sizes = {name: value for name, value in sizes.items() if value is not None}
    _check_together(pair or [], watch, surface, bool(chosen_sizes), device)
    with Output(as_json=as_json) as console:
        if watch:
            from mftctl.cli import following_view

            following_view.watch(console, runs)
        elif pair:
            from mftctl.cli.run_comparison_view import show_comparison

            show_comparison(console, runs, pair[0], pair[1])
        else:
            output = settle_report_folder(output, runs)
            if surface:
                from mftctl.loss_surface import measure_surface

                settled = load_recipe(options={} if device is None else {"device": device})
                measure_surface(runs, console, device=settled.device, **chosen_sizes)
            show(console, runs, output, each_seed=each_seed)


def _check_together(pair: list[str], watch: bool, surface: bool, has_sizes: bool, device: str | None) -> None:
    """Nothing, if what was asked for goes together.

    Raises:
        ConfigError: It does not.
    """
    if len(pair) not in (0, 2):
        raise ConfigError(
            "A comparison is of two runs.",
            key="RUN_A RUN_B",
            expected="two, or none for the report of all runs",
            actual=" ".join(pair),
        )
    asked = {"RUN_A RUN_B": bool(pair), "--watch": watch, "--surface": surface}
    given = [name for name, is_given in asked.items() if is_given]
    if len(given) > 1:
        raise ConfigError("These do not go together.", expected=f"one of {', '.join(asked)}", actual=", ".join(given))
    if has_sizes and not surface:
        raise ConfigError(
            "The size of a loss surface is given, and none is asked for.",
            key="--surface-points, --surface-records",
            hint="add --surface",
        )
    if device is not None and not surface:
        raise ConfigError(
            "A device is given, and nothing is to be computed on it.",
            key="--device",
            actual=device,
            hint="add --surface",
        )


def settle_report_folder(folder: Path, runs: Path, inputs: Sequence[Input] = ()) -> Path:
    """Where a report goes: the folder as given, or without its links and dots where it has some.

    Raises:
        OutputError: It would touch what is the user's.
    """
    from mftctl.reporting.files import require_report_folder

    path = check_output(folder, inputs, runs)
    require_report_folder(path)
    return folder if folder.absolute() == path else path


def show(console: Output, runs: Path, folder: Path, *, each_seed: bool = False) -> None:
    """Writes the report of a runs folder to its files, and its main table to the console."""
    from mftctl.reporting.files import to_document, write_report
    from mftctl.reporting.report import make_report

    made = make_report(runs, console)
    files = write_report(made, folder, console)
    console.result(to_document(made), *(table_view(table) for table in _main_tables(made, each_seed)))
    _tell(console, made)
    kinds = [file.parent.name for file in files]
    console.note(
        f"Written: {files[0]} (to read), report.md, report.json, {kinds.count('tables')} files of tables,"
        f" {kinds.count('figures')} of figures"
    )
    console.next_command(*shlex.split(made.advice.command), runs=runs)


def _main_tables(made: Report, each_seed: bool) -> list[TextTable]:
    """The overview where there is one, else the only table there can be; with each seed, all tables."""
    from mftctl.reporting.text_tables import efficiency_text, metric_text, overview_text

    if each_seed:
        return [metric_text(table, by_seed=True) for table in made.tables]
    if made.overviews:
        return [overview_text(overview) for overview in made.overviews]
    if made.tables:
        return [metric_text(table) for table in made.tables]
    return [efficiency_text(made.efficiency)] if made.efficiency else []


def _tell(console: Output, made: Report) -> None:
    """What the report comes to, and what to look at in it."""
    from mftctl.reporting.headlines import headlines

    for headline in headlines(made.tables):
        console.note(headline.text)
    if not made.tables:
        console.warn("No finished evaluation, so nothing is compared yet: mftctl eval")
    flagged = sum(len(row.flags) for table in made.tables for row in table.rows)
    if flagged:
        console.warn(f"{flagged} times a state was made in another way than its comparison; the report says how")
    for line in made.unfinished:
        console.note(visible_line(f"Not finished: {line}"))
    for problem in made.problems[:_MOST_TOLD]:
        console.warn(visible_line(problem))
    if len(made.problems) > _MOST_TOLD:
        console.warn(f"{len(made.problems) - _MOST_TOLD} more like these are in the report")
    console.note(made.advice.reason)


def table_view(table: TextTable) -> Table:
    """A table of the report for the terminal."""
    view = Table(title=escape(table.title), title_justify="left", min_width=len(table.title))
    for column, is_numeric in zip(table.columns, table.is_numeric, strict=True):
        view.add_column(escape(column), justify="right" if is_numeric else "left", overflow="fold")
    for row in table.rows:
        view.add_row(*map(_cell_view, row))
    return view


def _cell_view(cell: TextCell) -> Text:
    text = Text(cell.text, style=_COLOURS.get(cell.verdict, ""))
    return text.append(f"\n{cell.detail}", style="dim") if cell.detail else text
