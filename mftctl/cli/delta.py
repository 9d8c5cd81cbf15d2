"""`mftctl delta`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mftctl.cli import options as opt
from mftctl.cli.output import Output, pairs_table
from mftctl.cli.session import Session
from mftctl.errors import StorageError
from mftctl.experiments.combined_results import DeltaResult, KeptDelta
from mftctl.experiments.delta_options import DeltaOptions
from mftctl.experiments.model_source import known_base, model_for_training, source_of_model
from mftctl.experiments.outputs import inputs_of
from mftctl.experiments.run_folder import Run
from mftctl.files.atomic import Permit
from mftctl.workflows.command_run import run_to_end
from mftctl.workflows.multi_process.process_count import Launch

_STORED = "What to store"


def delta(
    context: typer.Context,
    before: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE",
            help="The model before fine-tuning: a checkpoint folder or hub id.",
            show_default="that of the latest fft run",
        ),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Argument(metavar="TUNED", help="The fine-tuned model.", show_default="that of the latest fft run"),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The delta file; a copy is kept in the run folder.", rich_help_panel=opt.INPUT
        ),
    ] = Path("change.delta"),
    data: opt.Data = None,
    val_data: opt.ValData = None,
    recipe: opt.RecipeName = None,
    sets: opt.Sets = None,
    ratio: Annotated[float | None, opt.setting(DeltaOptions, "ratio", "--ratio", panel=_STORED)] = None,
    select: Annotated[str | None, opt.setting(DeltaOptions, "select", "--select", panel=_STORED)] = None,
    mask: Annotated[str | None, opt.setting(DeltaOptions, "mask", "--mask", panel=_STORED, metavar="FILE")] = None,
    values: Annotated[str | None, opt.setting(DeltaOptions, "values", "--values", panel=_STORED)] = None,
    rescale: Annotated[bool | None, opt.setting(DeltaOptions, "rescale", "--rescale", panel=_STORED)] = None,
    exclude: Annotated[
        Any, opt.setting(DeltaOptions, "exclude", "--exclude", panel=_STORED, parser=opt.names, metavar="PART,...")
    ] = None,
    codec: Annotated[str | None, opt.setting(DeltaOptions, "codec", "--codec", panel=_STORED)] = None,
    runs: opt.Runs = Path("runs"),
    seed: opt.Seed = None,
    device: opt.Device = None,
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Store what fine-tuning changed in a model as a small file.

    mftctl apply BASE FILE restores the fine-tuned model, bit for bit unless changes were left out or rounded.
    Streams the weights, one tensor at a time. Tokenizer, chat template and configuration are stored where they differ.
    """
    with Output(as_json=as_json) as console:
        source = model_for_training(tuned, runs, "delta") if tuned is None else source_of_model(tuned, runs)
        chosen = opt.given(context, "delta")
        session = Session("delta", console, runs, recipe=recipe, sets=sets, options=chosen, yes=yes)
        settled = session.settle(source)
        base = before or known_base(source, settled.delta.base, key="BASE", what="A delta file")
        session = Session(
            "delta", console, runs, recipe=recipe, sets=sets, options={**chosen, "delta.base": base}, yes=yes
        )
        settled = session.settle(source)
        if tuned is None:
            console.note(f"Model: {source.model} ({source.state}), before: {base}")
        models = (source.model, source.mask, source.origin)
        target = session.settle_output(output, inputs_of(settled, models=models, recipe_name=recipe), delta_file_permit)
        run = session.create(settled, source, output=target)
        run_to_end(run, settled, source, console, Launch(), may_replace=session.replaces)
        result = run.result(DeltaResult)
        show(console, run, result)
        require_at_output(result)
        console.next_command("mftctl", "eval", base, "--mask", output, "--data", "FILE", runs=runs)


def delta_file_permit(agreed: bool) -> Permit:
    """Returns a permit that lets a delta file be replaced if the user agreed."""
    from mftctl.masking.delta.spool import delta_permit

    return delta_permit(replace=agreed)


def require_at_output(result: KeptDelta) -> None:
    """Checks that the file was written to the requested output.

    Raises:
        StorageError: It is only in the run folder, as something else has appeared at the output meanwhile.
    """
    if result.output_refused is not None:
        raise StorageError(
            "The result was not written to the output, where another file has appeared meanwhile.",
            path=result.mask,
            actual=result.output_refused,
            hint="copy it from the run folder, where it is complete",
        )


def show(console: Output, run: Run, result: DeltaResult) -> None:
    """Prints the result."""
    share = result.file_bytes / result.checkpoint_bytes
    rows = [
        ("file", result.output or result.mask),
        ("bytes", f"{result.file_bytes:,}, {share:.2%} of the checkpoint"),
        ("changed", f"{result.kept:,} of {result.weights:,} weights in {result.tensors:,} tensors"),
        ("values", result.values),
    ]
    if result.files:
        rows.append(("files", ", ".join(result.files)))
    if result.left_out:
        rows.append(("left out", f"the changes of {len(result.left_out):,} tensors"))
    title = f"Stored in {run.record.seconds:.1f} s"
    console.result({"run": str(run.folder), **result.document()}, pairs_table(title, rows))
