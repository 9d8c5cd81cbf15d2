"""`mftctl delta export` and `mftctl delta import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mftctl.cli import options as opt
from mftctl.cli.delta import delta_file_permit
from mftctl.cli.output import Output, pairs_table
from mftctl.cli.session import Session
from mftctl.experiments.outputs import Input
from mftctl.files.atomic import Permit
from mftctl.files.ownership import Kind, permit_folder
from mftctl.text import counted


def export(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Delta file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.", rich_help_panel=opt.INPUT)],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Its base.", show_default="the one named in the file", rich_help_panel=opt.INPUT),
    ] = None,
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Export a delta file of linear layers as a Super-Tuning adapter of peft.

    An adapter changes the same share of each layer; layers that change less are padded with entries whose change
    is 0. peft adds values in the base's data type, which may round differently from the delta file; such weights
    are counted.
    """
    with Output(as_json=as_json) as console:
        session = Session("delta", console, Path("runs"), yes=yes)

        from mftctl.masking.checkpoints.locate import resolve_checkpoint
        from mftctl.masking.delta.adapter import export_adapter
        from mftctl.masking.delta.delta import open_delta
        from mftctl.masking.delta.records import NamedModel

        with open_delta(delta) as opened:
            named = opened.contents.metadata.base if base is None else NamedModel(base)
            inputs = [Input(delta, "the exported delta file"), Input(Path(named.model), "the base")]
            target = session.settle_output(output, inputs, _adapter_permit)
            folder = resolve_checkpoint(named.model, named.revision)
            permit = _adapter_permit(session.replaces)
            done = export_adapter(opened, folder, target, permit, base_model=named)
        document = {
            "delta": str(delta),
            "output": str(target),
            "layers": done.layers,
            "entries": done.entries,
            "filled": done.filled,
            "inexact": done.inexact,
            "bytes": done.bytes_written,
        }
        rows = [
            ("adapter", str(output)),
            ("entries", f"{done.entries:,} in {counted(done.layers, 'layer')}, {done.filled:,} of them padding"),
            ("rounded", f"{counted(done.inexact, 'weight')} differently from the delta file"),
            ("bytes", f"{done.bytes_written:,}"),
        ]
        console.result(document, pairs_table("Exported", rows))


def import_(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Its base: a folder or a hub id.",
            show_default="the one named in the adapter",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The delta file.", rich_help_panel=opt.INPUT)] = Path(
        "change.delta"
    ),
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Convert a Super-Tuning adapter of peft to a delta file.

    The changed weights are those that peft computes when it merges the adapter, bit for bit.
    """
    with Output(as_json=as_json) as console:
        from mftctl.masking.checkpoints.locate import adapter_base, resolve_checkpoint
        from mftctl.masking.delta.adapter import import_adapter
        from mftctl.masking.delta.records import NamedModel

        base = adapter_base(adapter) if model is None else model
        session = Session("delta", console, Path("runs"), yes=yes)
        inputs = [Input(adapter, "the adapter"), Input(Path(base), "the base")]
        target = session.settle_output(output, inputs, delta_file_permit)
        contents = import_adapter(
            adapter,
            resolve_checkpoint(base),
            target,
            base_model=NamedModel(base),
            permit=delta_file_permit(session.replaces),
        )
        kept = sum(record.kept for record in contents.tensors.values())
        document = {
            "delta": str(target),
            "model": base,
            "tensors": len(contents.tensors),
            "kept": kept,
            "file_bytes": target.stat().st_size,
        }
        rows = [
            ("file", str(output)),
            ("changed", f"{counted(kept, 'weight')} in {counted(len(contents.tensors), 'tensor')}"),
            ("bytes", f"{target.stat().st_size:,}"),
        ]
        console.result(document, pairs_table("Imported", rows))
        console.next_command("mftctl", "apply", base, output, "-o", "OUT")


def _adapter_permit(agreed: bool) -> Permit:
    return permit_folder(Kind.MODEL, replace=agreed)
