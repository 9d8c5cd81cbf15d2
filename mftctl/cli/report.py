"""`mftctl report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mftctl.cli import completion
from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.cli.report_view import show
from mftctl.errors import ConfigError
from mftctl.experiments.outputs import Input, check_output
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe

if TYPE_CHECKING:
    pass

_SURFACE = "Loss surface"


def report(
    pair: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_A RUN_B",
            help="Compare two runs instead: folders, names such as 005-mask-train, or numbers.",
            autocompletion=completion.runs,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for index.html, its tables and figures.", rich_help_panel=opt.INPUT
        ),
    ] = Path("report"),
    each_seed: Annotated[
        bool, typer.Option("--each-seed", help="Show each seed on its own line instead of means.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Watch running runs until Ctrl-C; writes no files.")] = False,
    surface: Annotated[
        bool,
        typer.Option(
            "--surface",
            help="First measure the loss around FFT, continued FFT and MFT, on training and test records; resumes a "
            "stopped measurement.",
            rich_help_panel=_SURFACE,
        ),
    ] = False,
    surface_points: Annotated[
        int | None,
        typer.Option("--surface-points", help="Grid points per side; 11 by default.", rich_help_panel=_SURFACE),
    ] = None,
    surface_records: Annotated[
        int | None,
        typer.Option(
            "--surface-records",
            help="Training records and test records to measure on, each; 100 by default.",
            rich_help_panel=_SURFACE,
        ),
    ] = None,
    device: Annotated[str | None, opt.setting(Recipe, "device", "--device", panel=_SURFACE)] = None,
    runs: opt.Runs = Path("runs"),
    as_json: opt.AsJson = False,
) -> None:
    """Compare all evaluated models: did the mask help, and beyond noise?

    Reads only the run folders. Changes are relative to the fine-tuned model, paired by test sample. Writes a web page
    (index.html), Markdown, JSON, tables as LaTeX and CSV, and figures as SVG and PNG.
    """
    sizes = {"points": surface_points, "records": surface_records}
    chosen_sizes = {name: value for name, value in sizes.items() if value is not None}
    _check_together(pair or [], watch, surface, bool(chosen_sizes), device)
    with Output(as_json=as_json) as console:
        if watch:
            from mftctl.cli import watch_view

            watch_view.watch(console, runs)
        elif pair:
            from mftctl.cli.compare_view import show_comparison

            show_comparison(console, runs, pair[0], pair[1])
        else:
            output = settle_report_folder(output, runs)
            if surface:
                from mftctl.workflows.loss_surface.measure import measure_surface

                settled = load_recipe(options={} if device is None else {"device": device})
                measure_surface(runs, console, device=settled.device, **chosen_sizes)
            show(console, runs, output, each_seed=each_seed)


def _check_together(pair: list[str], watch: bool, surface: bool, has_sizes: bool, device: str | None) -> None:
    """Checks that the given options can be combined.

    Raises:
        ConfigError: They cannot.
    """
    if len(pair) not in (0, 2):
        raise ConfigError(
            "A comparison needs exactly two runs.",
            key="RUN_A RUN_B",
            expected="two runs, or none for the report of all runs",
            actual=" ".join(pair),
        )
    asked = {"RUN_A RUN_B": bool(pair), "--watch": watch, "--surface": surface}
    given = [name for name, is_given in asked.items() if is_given]
    if len(given) > 1:
        raise ConfigError(
            "These options are mutually exclusive.", expected=f"one of {', '.join(asked)}", actual=", ".join(given)
        )
    if has_sizes and not surface:
        raise ConfigError(
            "The size options of a loss surface need --surface.",
            key="--surface-points, --surface-records",
            hint="add --surface",
        )
    if device is not None and not surface:
        raise ConfigError(
            "--device applies only with --surface.",
            key="--device",
            actual=device,
            hint="add --surface",
        )


def settle_report_folder(folder: Path, runs: Path, inputs: Sequence[Input] = ()) -> Path:
    """Returns the report folder as given, or with links and dots resolved if it has any.

    Raises:
        OutputError: It would overwrite files of the user.
    """
    from mftctl.reporting.output.write import require_report_folder

    path = check_output(folder, inputs, runs)
    require_report_folder(path)
    return folder if folder.absolute() == path else path
