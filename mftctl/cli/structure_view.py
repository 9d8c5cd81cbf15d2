"""Tables of `probe --unit head` and `--unit neuron`."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from mftctl.experiments.probe_results import StructureProbe
from mftctl.experiments.run_folder import Run


def structure_tables(run: Run, result: StructureProbe) -> tuple[Table, Table]:
    """Returns the tables of a probe of heads or neurons: by layer, and the best ones."""
    title = (
        f"Predicted change of the training loss by {result.unit}, to first order: {result.change:+.4f} "
        f"over {result.units:,} ({run.record.seconds:.0f} s)"
    )
    caption = f"Best 10 %: {result.best_units:,} {result.unit}s with {result.best_share:.0%} of the predicted change"
    layers = Table(title=title, title_justify="left", caption=caption, caption_justify="left", min_width=60)
    for name in ("layer", f"{result.unit}s", "predicted", "in best 10 %", "their share"):
        layers.add_column(name, justify="right")
    for layer in result.layers:
        cells = (str(layer.layer), f"{layer.units:,}", f"{layer.change:+.4f}", f"{layer.best:,}")
        layers.add_row(*cells, f"{layer.best_share:.0%}")
    file = escape(str(run.folder / result.file))
    best = Table(title=f"Best {result.unit}s", title_justify="left", caption=f"All of them: {file}", min_width=60)
    best.caption_justify = "left"
    for name in ("layer", result.unit, "predicted"):
        best.add_column(name, justify="right")
    for item in result.best:
        best.add_row(str(item.layer), str(item.index), f"{item.change:+.5f}")
    return layers, best
