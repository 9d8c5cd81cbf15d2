"""`mftctl run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mftctl.cli import completion
from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.cli.report import settle_report_folder
from mftctl.cli.report_view import show
from mftctl.cli.run_view import experiment_tree, running_tree
from mftctl.experiments.outputs import inputs_of
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.tracking.names import warn_of_missing
from mftctl.workflows.multi_process.process_count import require_devices, settle_launch
from mftctl.workflows.run import Planned, plan_experiment, run_experiment


def run(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe file, or the name of a built-in recipe, such as quickstart.", autocompletion=completion.recipes
        ),
    ],
    sets: opt.Sets = None,
    model: opt.Model = None,
    data: opt.Data = None,
    chat_template: opt.ChatTemplate = None,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    learn: opt.LearnAnswers = None,
    bad_records: opt.BadRecords = None,
    bad_records_max: opt.BadRecordsMax = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the report.", rich_help_panel=opt.INPUT)
    ] = Path("report"),
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be run and why, then exit.", rich_help_panel=opt.GENERAL),
    ] = False,
    processes: opt.Processes = None,
    shard: opt.ShardOption = None,
    runs: opt.Runs = Path("runs"),
    seed: opt.Seed = None,
    device: opt.Device = None,
    attention: opt.Attention = None,
    track: opt.Track = None,
    no_controls: opt.NoControls = False,
    no_cache: opt.NoCache = False,
    as_json: opt.AsJson = False,
) -> None:
    """Run a whole experiment from a recipe and write its report.

    Finished stages are recognised by the settings that determine their result, and skipped: after an interruption the
    same command resumes, and after a change to the recipe only the affected stages run again.
    """
    launch = settle_launch("run", processes, shard)
    with Output(as_json=as_json) as console:
        settled = load_recipe(recipe, sets=opt.sets_with(sets, no_controls=no_controls), options=opt.given(context))
        require_devices(launch, settled.device)
        plan = plan_experiment(settled, recipe, runs, launch)
        if dry_run:
            console.result({"recipe": recipe, "tasks": _document(plan)}, experiment_tree(recipe, plan))
            return
        warn_of_missing(settled.track, console)
        output = settle_report_folder(output, runs, inputs_of(settled, recipe_name=recipe))
        run_experiment(plan, recipe, runs, console, lambda _: console.pin(running_tree(recipe, plan)))
        console.pin(None)
        show(console, runs, output)


def _document(plan: Sequence[Planned]) -> list[dict[str, Any]]:
    return [
        {
            "name": planned.job.name,
            "of": planned.job.label,
            "command": planned.job.command,
            "seed": planned.job.seed,
            "after": planned.job.after.name if planned.job.after else None,
            "state": planned.state,
            "why": planned.why,
            "run": planned.run.name if planned.run else None,
        }
        for planned in plan
    ]
