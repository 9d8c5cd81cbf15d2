"""`mftctl apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftctl.cli import options as opt
from mftctl.cli.output import Output, pairs_table
from mftctl.cli.session import Session
from mftctl.errors import ConfigError
from mftctl.experiments.model_source import MASK_MAKERS, ModelSource, newest_source, source_of_mask
from mftctl.experiments.outputs import inputs_of
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.recording import recorded
from mftctl.experiments.results import ApplyResult
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import known_state
from mftctl.files.ownership import Kind, permit_folder
from mftctl.text import counted


def apply(
    base: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder or hub id.", show_default="from the latest mask-train or delta run"),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Argument(
            help="Mask or delta file, or OWNER/NAME[@REVISION][:FILE] on the hub.",
            show_default="from the latest mask-train or delta run",
        ),
    ] = None,
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
    tuned: Annotated[
        str | None,
        typer.Option(
            "--tuned",
            help="The fine-tuned checkpoint, for a delta mask (mask-train --kind delta, --method drop).",
            show_default="the one named in the mask file",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="OWNER/NAME",
            help="Also upload the new checkpoint to the hub.",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="--push: make a new repository private.", rich_help_panel=opt.INPUT)
    ] = False,
    runs: opt.Runs = Path("runs"),
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Apply a mask or a delta file to a model and write an ordinary checkpoint that any server can load.

    Streams the weights, so memory use does not grow with the model. Refuses a model that the mask was not learned on,
    or that the delta file was not made from.
    """
    with Output(as_json=as_json) as console:
        if private and push is None:
            raise ConfigError(
                "--private applies only to a repository that --push creates.",
                key="--private",
                expected="--push OWNER/NAME as well",
                actual="no --push",
            )
        if mask is not None:
            from mftctl.masking.hub_masks import local_mask

            mask = local_mask(mask)
        source = _source(base, mask, tuned, runs)
        if base is None:
            console.note(f"Mask: {source.mask} ({source.state}, on {source.model})")
        session = Session("apply", console, runs, yes=yes)
        recipe = load_recipe(base=source.config)
        if output is not None:
            models = (source.model, source.mask, source.origin, base, tuned)
            output = session.settle_output(
                output,
                inputs_of(recipe, models=models),
                lambda agreed: permit_folder(Kind.MODEL, replace=agreed),
            )
        run = session.create(recipe, source, output=output)
        with recorded(run):
            from mftctl.workflows import apply as applying

            result = applying.apply(source, run, console, base=base, replace=session.replaces)
            run.finish(result)
        show(console, run, result)
        if push is not None:
            from mftctl.masking.hub_masks import push_model

            console.note(f"Uploaded to {push_model(Path(result.model), push, private=private)}")
        words: list[str | Path] = [] if base is None else [Path(result.model), "--data", "FILE"]
        console.next_command("mftctl", "eval", *words, runs=runs)


def show(console: Output, run: Run, result: ApplyResult) -> None:
    """Prints the result of applying a mask."""
    made = known_state(result.state)
    rows = [
        ("model", result.model),
        (
            "changed" if result.changed is not None else "reset" if made is not None and made.resets else "removed",
            f"{counted(result.changed or result.removed, 'weight')} in {counted(result.tensors_masked, 'tensor')}",
        ),
        ("written", f"{result.bytes_written / 1e6:,.1f} MB"),
    ]
    console.result(
        {"run": str(run.folder), **result.document()}, pairs_table(f"Applied in {run.record.seconds:.1f} s", rows)
    )


def _source(base: str | None, mask: Path | None, tuned: str | None, runs: Path) -> ModelSource:
    if base is not None and mask is not None:
        return source_of_mask(_masked_model(base, mask, tuned), str(mask), runs)
    if base is not None:
        raise ConfigError(
            "apply needs a mask as well as a base model.",
            key="MASK",
            actual="only a base model",
            hint="BASE MASK -o OUT",
        )
    newest = newest_source(runs, *MASK_MAKERS)
    if newest is None:
        raise ConfigError(
            "apply needs a base model and a mask.",
            expected="mftctl apply BASE MASK -o OUT",
            actual=f"none given, and no finished mask-train or delta run in {runs}",
            hint="mftctl mask-train",
        )
    return newest


def _masked_model(base: str, mask: Path, tuned: str | None) -> str:
    """Returns the model to mask: the base, or for a delta mask the tuned model that it partly reverts to the base."""
    from mftctl.masking.delta.delta import is_delta_file
    from mftctl.masking.mask import open_mask

    kind = "delta file"
    if not is_delta_file(mask):
        with open_mask(mask) as opened:
            metadata = opened.metadata
        if metadata.kind == "delta":
            return tuned or metadata.tuned_model or base
        kind = f"{metadata.kind} mask"
    if tuned is not None:
        raise ConfigError(
            "--tuned applies only to delta masks (mask-train --kind delta, --method drop).",
            key="--tuned",
            expected="a delta mask",
            actual=f"{mask}, a {kind}",
            hint="omit --tuned",
        )
    return base
