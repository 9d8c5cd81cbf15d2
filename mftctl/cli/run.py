"""`mftctl run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.cli.report import show
from mftctl.recipe_files import load_recipe


def run(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a built-in one, such as quickstart.")],
    sets: opt.Sets = None,
    model: opt.Model = None,
    data: opt.Data = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the report.", rich_help_panel=opt.INPUT)
    ] = Path("report"),
    runs: opt.Runs = Path("runs"),
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
) -> None:
    """Run a whole experiment from a recipe, and report it.

    Finished stages are recognised and skipped, so that the same command goes on after an interruption.
    """
    with Output(as_json=as_json) as console:
        settled = load_recipe(recipe, sets=sets or (), options=opt.given(context))
        from mftctl.protocol import run_experiment

        run_experiment(settled, recipe, runs, console)
        show(console, runs, output)
