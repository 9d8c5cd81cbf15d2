"""`mftctl validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mftctl.cli import completion
from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.cli.validate_view import validation_views
from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe
from mftctl.text import counted


def validate(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Recipe file, or the name of a built-in recipe, such as quickstart; by default only the options are "
            "checked.",
            show_default=False,
            autocompletion=completion.recipes,
        ),
    ] = None,
    sets: opt.Sets = None,
    model: opt.Model = None,
    data: opt.Data = None,
    chat_template: opt.ChatTemplate = None,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    learn: opt.LearnAnswers = None,
    bad_records: opt.BadRecords = None,
    bad_records_max: opt.BadRecordsMax = None,
    seed: opt.Seed = None,
    device: Annotated[
        str | None, opt.setting(Recipe, "device", "--device", panel=opt.GENERAL, default="this machine's")
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(
            "--device-memory",
            metavar="SIZE",
            help="Memory of the GPU to check for, such as 80GB.",
            show_default="free memory of this machine",
            rich_help_panel=opt.GENERAL,
        ),
    ] = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    no_controls: opt.NoControls = False,
    no_cache: opt.NoCache = False,
    as_json: opt.AsJson = False,
) -> None:
    """Check everything in a recipe that can be checked before training: files, labels, masks, memory, steps.

    Needs no weights: a folder with just config.json is enough. Exits with code 2 if there are problems.
    """
    with Output(as_json=as_json) as console:
        settled = load_recipe(recipe, sets=opt.sets_with(sets, no_controls=no_controls), options=opt.given(context))
        from mftctl.workflows.validate import validate as check

        result = check(settled, recipe, device_memory=device_memory)
        console.result(result.document(), *validation_views(result))
        for text in result.warnings:
            console.warn(text)
        for text in result.not_checked:
            console.note(f"Not checked: {text}")
        if problems := result.problems:
            raise ConfigError(f"The recipe has {counted(len(problems), 'problem')}.", path=recipe, problems=problems)
        if recipe is not None:
            console.next_command("mftctl", *(("run",) if settled.stages else ("fft", "--recipe")), recipe)
