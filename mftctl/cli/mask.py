"""`mftctl mask`: info, diff, import, export and push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from mftctl.cli import options as opt
from mftctl.cli.delta_view import delta_info
from mftctl.cli.output import Output, pairs_table
from mftctl.cli.session import Session, mask_file_permit
from mftctl.errors import ConfigError
from mftctl.experiments.outputs import Input
from mftctl.text import counted

mask_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Inspect, compare, import, export and upload mask files.",
)

MaskFile = Annotated[Path, typer.Argument(help="Mask file.", show_default=False)]
AnyMask = Annotated[
    Path,
    typer.Argument(metavar="MASK", help="Mask file, or OWNER/NAME[@REVISION][:FILE] on the hub.", show_default=False),
]


AnyFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="Mask or delta file, or OWNER/NAME[@REVISION][:FILE] on the hub.", show_default=False
    ),
]


@mask_app.command()
def info(file: AnyFile, as_json: opt.AsJson = False) -> None:
    """Show what a mask removes, or what a delta file changes, and how it was made."""
    from dataclasses import asdict

    from mftctl.masking.delta.delta import is_delta_file
    from mftctl.masking.hub_masks import local_mask
    from mftctl.masking.mask import open_mask

    file = local_mask(file)
    if is_delta_file(file):
        document, tables = delta_info(file)
        Output(as_json=as_json).result(document, *tables)
        return
    with open_mask(file) as mask:
        for name in mask.names():
            mask.packed(name)  # also checks it
    tensors = {name: asdict(mask.records[name]) for name in mask.names()}
    document = {
        "file": str(file),
        "file_bytes": file.stat().st_size,
        "bits_a_weight": 8 * file.stat().st_size / mask.weights,
        "weights": mask.weights,
        "removed": mask.removed,
        **asdict(mask.metadata),
        "ratio": mask.ratio,  # the actual ratio, whatever was requested
        "tensors": tensors,
    }
    rows = [(name, _text(value)) for name, value in document.items() if name != "tensors" and value is not None]
    table = Table(title="Tensors", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "removed", "ratio"):
        table.add_column(column, justify="right")
    for name in mask.names():
        record = mask.records[name]
        shape = " × ".join(map(str, record.shape))
        table.add_row(escape(name), shape, f"{record.removed:,}", f"{record.removed / record.weights:.4f}")
    Output(as_json=as_json).result(document, pairs_table("Mask", rows), table)


@mask_app.command()
def diff(first: AnyMask, second: AnyMask, as_json: opt.AsJson = False) -> None:
    """Compare two masks: their overlap, and the overlap expected by chance."""
    from dataclasses import asdict

    from mftctl.masking.hub_masks import local_mask
    from mftctl.masking.mask import open_mask
    from mftctl.masking.overlap import diff as compare

    with open_mask(local_mask(first)) as one, open_mask(local_mask(second)) as other:
        found = compare(one, other)
    rows = [*found.tensors.items(), ("all", found.total)]
    document: dict[str, Any] = {
        name: {**asdict(overlap), "jaccard": overlap.jaccard, "expected_jaccard": overlap.expected_jaccard}
        for name, overlap in rows
    }
    table = Table(title=f"{escape(str(first))} vs {escape(str(second))}", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for column in ("first", "second", "both", "Jaccard", "expected by chance"):
        table.add_column(column, justify="right")
    for name, overlap in rows:
        table.add_row(
            escape(name),
            f"{overlap.removed_a:,}",
            f"{overlap.removed_b:,}",
            f"{overlap.removed_both:,}",
            f"{overlap.jaccard:.4f}",
            f"{overlap.expected_jaccard:.4f}",
            style="bold" if name == "all" else None,
        )
    console = Output(as_json=as_json)
    console.result({"tensors": document, "only_first": found.only_a, "only_second": found.only_b}, table)


@mask_app.command("import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(help="masks.pt from the reference implementation, or a MaskLLM .npz file.", show_default=False),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="The model the mask was learned on: a folder or a hub id.",
            rich_help_panel=opt.INPUT,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The mask file.", rich_help_panel=opt.INPUT)] = Path(
        "mask.bits"
    ),
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Convert masks from another implementation to a mask file.

    Never runs code contained in the file. Such files do not name their model, so the mask is tied to the given one.
    """
    with Output(as_json=as_json) as console:
        session = Session("mask", console, Path("runs"), yes=yes)
        inputs = [Input(file, "the imported file"), Input(Path(model), "the model")]
        target = session.settle_output(output, inputs, mask_file_permit)

        from mftctl.masking.checkpoints.locate import resolve_checkpoint
        from mftctl.masking.mask import save_mask
        from mftctl.workflows.mask_exchange.exchange import import_mask

        mask = import_mask(file, resolve_checkpoint(model), base_model=model)
        save_mask(mask, target, permit=mask_file_permit(session.replaces))
        document = {
            "mask": str(target),
            "model": model,
            "tensors": len(mask),
            "weights": mask.weights,
            "removed": mask.removed,
            "ratio": mask.ratio,
        }
        tensors = counted(len(mask), "tensor")
        removed = f"{mask.removed:,} of {mask.weights:,} weights in {tensors} ({mask.ratio:.2%})"
        rows = [("mask", str(output)), ("removed", removed)]
        console.result(document, pairs_table("Imported", rows))
        console.next_command("mftctl", "apply", _place(model), output, "-o", "OUT")


@mask_app.command()
def export(
    mask: MaskFile,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="FILE.pt for the reference implementation (32 bits per weight), FILE.npz for MaskLLM (1 bit), or "
            "FILE.bits for a mask file encoded with --codec.",
            rich_help_panel=opt.INPUT,
        ),
    ],
    codec: Annotated[
        Literal["packed", "deflate", "ans"] | None,
        typer.Option(
            "--codec",
            help="Encoding of FILE.bits. packed: 1 bit per weight; deflate: 2 % above the entropy at a ratio of 0.1; "
            "ans: at the entropy (needs the ans extra, also for reading).",
            show_default="deflate",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Export a mask for another implementation, or as a mask file with another codec."""
    with Output(as_json=as_json) as console:
        is_mask_file = output.suffix == ".bits"
        if codec is not None and not is_mask_file:
            raise ConfigError(
                "--codec applies only to mask files.",
                key="--codec",
                expected="an output FILE.bits",
                actual=str(output),
                hint="omit --codec, or give a name such as small.bits with -o",
            )
        from mftctl.masking.mask import load_mask, save_mask
        from mftctl.workflows.mask_exchange.exchange import export_mask, export_permit

        session = Session("mask", console, Path("runs"), yes=yes)
        make_permit = mask_file_permit if is_mask_file else export_permit
        target = session.settle_output(output, [Input(mask, "the exported mask")], make_permit)
        exported, permit = load_mask(mask), make_permit(session.replaces)
        if is_mask_file:
            save_mask(exported, target, codec or "deflate", permit=permit)
        else:
            export_mask(exported, target, permit)
        document = {
            "mask": str(mask),
            "output": str(target),
            "tensors": len(exported),
            "file_bytes": target.stat().st_size,
        }
        rows = [("file", str(output)), ("tensors", str(len(exported))), ("bytes", f"{target.stat().st_size:,}")]
        console.result(document, pairs_table("Exported", rows))


@mask_app.command()
def push(
    mask: MaskFile,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    runs: opt.Runs = Path("runs"),
    as_json: opt.AsJson = False,
) -> None:
    """Upload a mask to the Hugging Face Hub, with a card.

    The card names the model, the data, the measured change and the command, as far as the runs folder knows them. A
    card that the repository already has is kept. The licence is left to you.
    """
    with Output(as_json=as_json) as console:
        from mftctl.masking.hub_masks import push_mask
        from mftctl.masking.mask import open_mask
        from mftctl.reporting.mask_card import mask_card, run_of_mask

        with open_mask(mask) as opened:
            card = mask_card(opened, repo, run_of_mask(mask, runs))
        url = push_mask(mask, card, repo, private=private)
        console.result({"mask": str(mask), "url": url}, pairs_table("Uploaded", [("mask", str(mask)), ("url", url)]))
        console.note("Set the licence in its README.md.")


def _place(model: str) -> Path | str:
    """Returns a model folder as a path, so that a leading dash does not make it an option."""
    return Path(model) if Path(model).exists() else model


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
