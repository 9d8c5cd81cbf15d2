"""`mftctl interpolate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mftctl.cli import options as opt
from mftctl.cli.output import Output, pairs_table
from mftctl.cli.session import Session
from mftctl.experiments.combined_results import InterpolateResult, ShareLoss
from mftctl.experiments.recipe import InterpolateOptions
from mftctl.experiments.run_folder import Run
from mftctl.files.ownership import Kind, permit_folder
from mftctl.workflows.command_run import run_to_end
from mftctl.workflows.multi_process.process_count import Launch


def interpolate(
    context: typer.Context,
    model: opt.Model = None,
    data: opt.Data = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the interpolated model.",
            show_default="model/ in the run folder",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
    base: Annotated[str | None, opt.setting(InterpolateOptions, "base", "--base", panel=opt.INPUT)] = None,
    val_data: opt.ValData = None,
    val_fraction: opt.ValFraction = None,
    retain_data: opt.RetainData = None,
    recipe: opt.RecipeName = None,
    sets: opt.Sets = None,
    shares: Annotated[
        Any,
        opt.setting(
            InterpolateOptions,
            "shares",
            "--shares",
            panel=opt.METHOD,
            parser=opt.numbers,
            metavar="S,S,...",
            default=",".join(f"{share:g}" for share in InterpolateOptions().shares),
        ),
    ] = None,
    chat_template: opt.ChatTemplate = None,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    learn: opt.LearnAnswers = None,
    bad_records: opt.BadRecords = None,
    bad_records_max: opt.BadRecordsMax = None,
    runs: opt.Runs = Path("runs"),
    seed: opt.Seed = None,
    device: opt.Device = None,
    attention: opt.Attention = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    no_cache: opt.NoCache = False,
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Choose by validation how far to go from the model before fine-tuning to the fine-tuned one.

    Measures the validation loss of base + share * (tuned - base) for each share, and writes the model with the lowest.
    Nothing is trained. The validation records are those of fft, truncated as set by fft.max_length_tokens.
    """
    with Output(as_json=as_json) as console:
        chosen = opt.given(context, "interpolate")
        session = Session("interpolate", console, runs, recipe=recipe, sets=sets, options=chosen, yes=yes)
        run, settled, source = session.open_training(
            resume=False, output=output, permit=lambda agreed: permit_folder(Kind.MODEL, replace=agreed)
        )
        run_to_end(run, settled, source, console, Launch(), may_replace=session.replaces)
        result = run.result(InterpolateResult)
        show(console, run, result)
        session.end(result)
        console.next_command("mftctl", "eval", runs=runs)


def show(console: Output, run: Run, result: InterpolateResult) -> None:
    """Prints the result of an interpolation."""
    rows = [
        ("validation loss" if number == 0 else "", f"{entry.loss:.4f} at share {entry.share:g}{_retained(entry)}")
        for number, entry in enumerate(result.losses)
    ]
    rows += [
        ("kept", f"share {result.share:g} of the change from {result.base}"),
        ("model", result.model),
        ("peak memory", f"{result.peak_memory_bytes / 1e9:.2f} GB"),
    ]
    title = f"{result.state.capitalize()} in {run.record.seconds:.0f} s"
    console.result({"run": str(run.folder), **result.document()}, pairs_table(title, rows))


def _retained(entry: ShareLoss) -> str:
    return "" if entry.retained_loss is None else f", retained loss {entry.retained_loss:.4f}"
