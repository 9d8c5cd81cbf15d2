"""`mftctl delta merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mftctl.cli import options as opt
from mftctl.cli.delta import delta_file_permit
from mftctl.cli.output import Output, pairs_table
from mftctl.cli.session import Session
from mftctl.experiments.combined_results import MergeResult
from mftctl.experiments.delta_options import DeltaValues
from mftctl.experiments.model_source import source_of_model
from mftctl.experiments.outputs import inputs_of
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.recording import recorded
from mftctl.experiments.run_folder import Run
from mftctl.files.ownership import Kind, permit_folder


def merge(
    deltas: Annotated[list[Path], typer.Argument(metavar="DELTA", help="Two or more delta files of the same base.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="FILE.delta for a delta file, or a folder for a checkpoint.",
            rich_help_panel=opt.INPUT,
        ),
    ] = Path("merged.delta"),
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="Their base.", show_default="the one named in the first file", rich_help_panel=opt.INPUT
        ),
    ] = None,
    method: Annotated[
        Literal["ties", "sum"],
        typer.Option(
            "--method",
            help="ties: for each weight, average the changes in the direction that wins; sum: add all changes.",
            rich_help_panel=opt.METHOD,
        ),
    ] = "ties",
    weights: Annotated[
        Any,
        typer.Option(
            "--weights",
            parser=opt.numbers,
            metavar="W,W,...",
            help="One number per delta file, which multiplies its changes.",
            show_default="1 each",
            rich_help_panel=opt.METHOD,
        ),
    ] = None,
    scale: Annotated[
        float, typer.Option("--scale", help="Factor of the merged changes.", rich_help_panel=opt.METHOD)
    ] = 1.0,
    values: Annotated[
        DeltaValues,
        typer.Option("--values", help="Values of the merged delta file, as for delta.", rich_help_panel=opt.METHOD),
    ] = "exact",
    runs: opt.Runs = Path("runs"),
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Merge the changes of several delta files onto their base.

    Changes that only one file makes to a weight stay as they are. Refuses files of different bases.
    """
    with Output(as_json=as_json) as console:
        from mftctl.masking.delta.delta import open_delta
        from mftctl.masking.delta.merge import settle_plan

        plan = settle_plan(weights, len(deltas), method, scale)
        if base is None:
            with open_delta(deltas[0]) as first:
                base = first.contents.metadata.base.model
        source = source_of_model(base, runs)
        session = Session("delta-merge", console, runs, yes=yes)
        recipe = load_recipe()
        from mftctl.workflows import delta_merge as merging

        is_delta = merging.makes_delta(output)
        inputs = inputs_of(recipe, models=[base, *map(str, deltas)])
        make_permit = delta_file_permit if is_delta else _model_permit
        target = session.settle_output(output, inputs, make_permit)
        run = session.create(recipe, source, output=target)
        with recorded(run):
            result = merging.merge_deltas(deltas, source, plan, values, target, run, console, replace=session.replaces)
            run.finish(result)
        _show(console, run, result)
        words: list[str | Path] = [base, "--mask", output] if is_delta else [Path(result.model)]
        console.next_command("mftctl", "eval", *words, "--data", "FILE", runs=runs)


def _model_permit(agreed: bool) -> Any:
    return permit_folder(Kind.MODEL, replace=agreed)


def _show(console: Output, run: Run, result: MergeResult) -> None:
    rows = [
        ("file" if result.mask else "model", result.mask or result.model),
        ("changed", f"{result.kept:,} weights in {result.tensors:,} tensors"),
        ("conflicts", f"{result.conflicts:,} weights changed in different directions"),
        ("written", f"{result.bytes_written / 1e6:,.1f} MB"),
    ]
    document = {"run": str(run.folder), **result.document()}
    console.result(document, pairs_table(f"Merged in {run.record.seconds:.1f} s", rows))
