"""`mftctl data`: show, stats and fetch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mftctl.cli import options as opt
from mftctl.cli.data_view import fetch_views, show_views, stats_views
from mftctl.cli.output import Output
from mftctl.cli.session import Session
from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe

data_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Look at training data, and fetch the data of benchmarks.",
)

_CHOICE = "Records to show"


@data_app.command()
def show(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Files or hub ids, as for --data of fft; FILE=COUNT for part of a file. By default the source run's.",
            show_default=False,
        ),
    ] = None,
    model: opt.Model = None,
    index: Annotated[
        int | None,
        typer.Option(
            "--index",
            metavar="N",
            min=1,
            help="Show the N-th record, counted from 1 in the order of the files; records that cannot be used count "
            "too, records that FILE=COUNT leaves out do not.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            metavar="N",
            min=1,
            help="Show N random records, which --seed determines.",
            show_default="the first 3",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    chat_template: opt.ChatTemplate = None,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    learn: opt.LearnAnswers = None,
    max_length_tokens: opt.MaxLength = None,
    runs: opt.Runs = Path("runs"),
    seed: opt.Seed = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    no_cache: opt.NoCache = False,
    as_json: opt.AsJson = False,
) -> None:
    """Show records as the model sees them: what is trained on, what is cut off, and why a record cannot be used."""
    if index is not None and sample is not None:
        raise ConfigError("--index and --sample are mutually exclusive.", key="--index", hint="give only one of them")
    with Output(as_json=as_json) as console:
        session = Session("data show", console, runs, options=opt.given(context, "fft"))
        recipe, source = session.settle_with_model("fft")
        from mftctl.workflows.data_show import Choice, show_data

        shown = show_data(recipe, source.model, Choice(index, sample), _max_length_tokens(recipe), console)
        console.result(asdict(shown), *show_views(shown))


@data_app.command()
def stats(
    context: typer.Context,
    model: Annotated[
        str | None,
        opt.setting(Recipe, "model", "--model", "-m", panel=opt.INPUT, default="none: nothing that needs tokens"),
    ] = None,
    data: opt.Data = None,
    val_data: opt.ValData = None,
    val_fraction: opt.ValFraction = None,
    test_data: Annotated[list[str] | None, opt.setting(Recipe, "test_data", "--test-data", panel=opt.INPUT)] = None,
    retain_data: opt.RetainData = None,
    recipe: opt.RecipeName = None,
    sets: opt.Sets = None,
    chat_template: opt.ChatTemplate = None,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    learn: opt.LearnAnswers = None,
    max_length_tokens: opt.MaxLength = None,
    runs: opt.Runs = Path("runs"),
    seed: opt.Seed = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    no_cache: opt.NoCache = False,
    as_json: opt.AsJson = False,
) -> None:
    """Show the statistics of training, validation and test data: lengths, duplicates, and overlap between them.

    A record overlaps with the training data if it is equal, has the same prompt, or shares any 13 consecutive words
    (lower-case, letters and digits only, without system prompts); a record of fewer words must share all of them.
    Without data, those of the latest run or of the built-in model are used.
    """
    with Output(as_json=as_json) as console:
        session = Session("data stats", console, runs, recipe=recipe, sets=sets, options=opt.given(context, "fft"))
        settled = session.settle()
        given = settled.data or settled.val_data or settled.test_data or settled.retain_data
        if settled.model is not None or not given:
            settled, _ = session.settle_with_model("fft")
        from mftctl.workflows.data_stats import data_stats

        found = data_stats(settled, settled.model, _max_length_tokens(settled), console)
        console.result(asdict(found), *stats_views(found))


@data_app.command()
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Benchmarks, groups such as coding, or lm-eval tasks, as for --tasks of eval.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Fetch the data of every named benchmark.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Download the data of benchmarks into the cache, so that later evaluations need no network.

    Data that is already in the cache is not downloaded again. HumanEval's problems are installed with mftctl.
    """
    if every == bool(names):
        raise ConfigError(
            "--all and benchmark names are mutually exclusive." if every else "No benchmark is named.",
            key="NAME",
            hint="mftctl data fetch gsm8k math, or mftctl data fetch --all",
        )
    with Output(as_json=as_json) as console:
        from mftctl.evaluation.benchmarks.catalog import BENCHMARKS
        from mftctl.workflows.data_fetch import fetch_data, require_all

        found = fetch_data(names or tuple(BENCHMARKS), console)
        console.result({"data": [asdict(data) for data in found]}, *fetch_views(found))
        require_all(found)


def _max_length_tokens(recipe: Recipe) -> int:
    """Returns the maximum length of fft, or that of mask-train if only that is given."""
    sections = (recipe.fft, recipe.mask_train)
    given = [section for section in sections if "max_length_tokens" in section.model_fields_set]
    return (given or sections)[0].max_length_tokens
