"""`mftctl average`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mftctl.cli import options as opt
from mftctl.cli.output import Output, pairs_table
from mftctl.cli.session import Session, inherited
from mftctl.experiments.combined_results import AverageResult
from mftctl.experiments.model_source import combined_source, source_of_model
from mftctl.experiments.outputs import inputs_of
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.recording import recorded
from mftctl.experiments.run_folder import Run
from mftctl.files.ownership import Kind, permit_folder
from mftctl.masking.checkpoints.average_weights import settled_weights


def average(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT", help="Two or more checkpoint folders or hub ids.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the new checkpoint.",
            show_default="model/ in the run folder",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
    weights: Annotated[
        Any,
        typer.Option(
            "--weights",
            parser=opt.numbers,
            metavar="W,W,...",
            help="One number per checkpoint; they are divided by their sum. A negative one moves away from it.",
            show_default="equal",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
    runs: opt.Runs = Path("runs"),
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Average checkpoints of the same model into an ordinary checkpoint.

    Streams the weights, so memory use does not grow with the model. The sum is computed in fp32 and rounded once.
    Refuses checkpoints that differ in tensors, data type, tokenizer or chat template. All other files are those of the
    first checkpoint.
    """
    with Output(as_json=as_json) as console:
        settled_weights(weights, len(checkpoints))
        sources = [source_of_model(checkpoint, runs) for checkpoint in checkpoints]
        combined = combined_source(sources)
        session = Session("average", console, runs, yes=yes)
        recipe = load_recipe(base=inherited(combined))
        if output is not None:
            models = [*checkpoints, *(source.origin for source in sources)]
            output = session.settle_output(
                output,
                inputs_of(recipe, models=models),
                lambda agreed: permit_folder(Kind.MODEL, replace=agreed),
            )
        run = session.create(recipe, combined, output=output)
        with recorded(run):
            from mftctl.workflows import average as averaging

            result = averaging.average(sources, weights, run, console, replace=session.replaces)
            run.finish(result)
        show(console, run, result, checkpoints)
        console.next_command("mftctl", "eval", Path(result.model), "--data", "FILE", runs=runs)


def show(console: Output, run: Run, result: AverageResult, checkpoints: list[str]) -> None:
    """Prints the result of averaging."""
    rows = [
        ("model", result.model),
        ("averaged", f"{result.tensors_averaged} tensors of {len(checkpoints)} checkpoints"),
        *(("", f"{weight:.4g} * {name}") for name, weight in zip(checkpoints, result.weights, strict=True)),
        ("written", f"{result.bytes_written / 1e6:,.1f} MB"),
    ]
    console.result(
        {"run": str(run.folder), **result.document()}, pairs_table(f"Averaged in {run.record.seconds:.1f} s", rows)
    )
