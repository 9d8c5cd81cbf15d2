"""`mftctl mask info` and `mftctl mask diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mftctl.cli import options as opt
from mftctl.cli.output import Output, pairs_table

mask_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Look into mask files and compare them.",
)

MaskFile = Annotated[Path, typer.Argument(help="Mask file.", show_default=False)]


@mask_app.command()
def info(file: MaskFile, as_json: opt.AsJson = False) -> None:
    """Show what a mask removes, and where it comes from."""
    from dataclasses import asdict

    from mftctl.masking.bits import load_mask

    mask = load_mask(file)
    tensors = {name: asdict(mask.records[name]) for name in mask.names()}
    document = {
        "file": str(file),
        "file_bytes": file.stat().st_size,
        "bits_a_weight": 8 * file.stat().st_size / mask.weights,
        "weights": mask.weights,
        "removed": mask.removed,
        "ratio": mask.ratio,
        **asdict(mask.metadata),
        "tensors": tensors,
    }
    rows = [(name, _text(value)) for name, value in document.items() if name != "tensors" and value is not None]
    table = Table(title="Tensors", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "removed", "ratio"):
        table.add_column(column, justify="right")
    for name in mask.names():
        record = mask.records[name]
        numel = mask[name].numel()
        shape = " × ".join(map(str, record.shape))
        table.add_row(escape(name), shape, f"{record.removed:,}", f"{record.removed / numel:.4f}")
    Output(as_json=as_json).result(document, pairs_table("Mask", rows), table)


@mask_app.command()
def diff(first: MaskFile, second: MaskFile, as_json: opt.AsJson = False) -> None:
    """Compare two masks: what both remove, and how much of that chance would give."""
    from dataclasses import asdict

    from mftctl.masking.bits import load_mask
    from mftctl.masking.comparison import diff as compare

    found = compare(load_mask(first), load_mask(second))
    rows = [*found.tensors.items(), ("all", found.total)]
    document: dict[str, Any] = {
        name: {**asdict(overlap), "jaccard": overlap.jaccard, "expected_jaccard": overlap.expected_jaccard}
        for name, overlap in rows
    }
    table = Table(title=f"{escape(str(first))} against {escape(str(second))}", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for column in ("first", "second", "both", "Jaccard", "by chance"):
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


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
