"""Figures of `probe --fast --unit head|neuron`: where in the layers the predicted gain of a mask lies."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from mftctl.errors import RunError
from mftctl.experiments.probe_results import ProbeResult, StructureProbe
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Origin, StartingState
from mftctl.experiments.run_record import RunStatus
from mftctl.files.regular import read_regular
from mftctl.reporting.figures.probe_groups import comparable_probes, probed_model, seed_of, shared_settings
from mftctl.reporting.figures.style import COLOUR_MAP, Figure, with_own_names

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

    Changes = NDArray[np.float64]

_CELLS = 50  # per layer; more units than these are sorted and drawn in as many groups


@dataclass(frozen=True, slots=True)
class Cell:
    """A head, or neurons of one layer that rank next to each other.

    Attributes:
        layer: Index of the decoder layer.
        first: Index of the head or, of neurons, rank of the first one, best first.
        units: Number of heads or neurons.
        changes: Sum of their predicted changes, one per seed.
    """

    layer: int
    first: int
    units: int
    changes: tuple[float, ...]

    @property
    def change(self) -> float:
        """Sum of the predicted changes, averaged over seeds."""
        return fmean(self.changes)


@dataclass(frozen=True, slots=True)
class UnitMap:
    """Predicted changes of the heads or neurons of one model.

    Attributes:
        unit: `head` or `neuron`.
        runs: The probe runs, one per seed.
        is_ranked: Whether the units of a layer are sorted, best first, and grouped.
        cells: The cells by layer, from the first to the last.
    """

    unit: str
    runs: tuple[Run, ...]
    is_ranked: bool
    cells: Mapping[int, tuple[Cell, ...]]


def structure_figures(runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """A heat map of heads and one of neurons for each model and settings that were probed.

    Args:
        runs: The runs, oldest first; the latest per seed counts.

    Returns:
        The figures, and one line per run that cannot be used.
    """
    usable: dict[str, Mapping[int, Changes]] = {}
    probed, problems = [], []
    for run in runs:
        if run.record.command != "probe" or run.record.status != RunStatus.FINISHED:
            continue
        try:
            if not isinstance(run.result(ProbeResult), StructureProbe):
                continue
            usable[run.name] = predicted_changes(run)
            _ = probed_model(run), _settings(run), Origin.read(run.record.inputs)
        except (RunError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            problems.append(told(error, f"{run.folder}: the heads or neurons of this probe cannot be read"))
            continue
        probed.append(run)
    maps = [unit_map(group, usable) for group in comparable_probes(probed, _settings)]
    return with_own_names(map(_figure, maps)), problems


def predicted_changes(run: Run) -> dict[int, Changes]:
    """Reads the predicted change of each head or neuron, by layer, fp64.

    Args:
        run: A finished probe of heads or neurons.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file does not have a number for each of them, in their order.
    """
    import numpy as np

    result = run.result(StructureProbe)
    text = read_regular(run.folder / result.file).decode("utf-8")
    try:
        header, *rows = csv.reader(io.StringIO(text))
        layers, indices, changes = zip(*rows, strict=True)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{result.file}: not a table of layer, index and change") from error
    units = sum(layer.units for layer in result.layers)
    places = zip(map(int, layers), map(int, indices), strict=True)
    if (
        header != ["layer", "index", "change"]
        or len(rows) != units
        or list(places) != [(layer.layer, index) for layer in result.layers for index in range(layer.units)]
    ):
        raise ValueError(f"{result.file}: not one row for each of {units} {result.unit}s, in their order")
    values = np.array(changes, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError(f"{result.file}: a change is not a number")
    ends = np.cumsum([layer.units for layer in result.layers])
    return dict(zip((layer.layer for layer in result.layers), np.split(values, ends[:-1]), strict=True))


def unit_map(runs: Sequence[Run], changes: Mapping[str, Mapping[int, Changes]]) -> UnitMap:
    """Combines the probes of several seeds, of which the latest of each counts.

    Args:
        runs: Probes with the same settings, oldest first.
        changes: The predicted changes by layer, for each name of a run.
    """
    import numpy as np

    latest = tuple({seed_of(run): run for run in runs}.values())
    by_seed = [changes[run.name] for run in latest]
    is_ranked = max(map(len, by_seed[0].values())) > _CELLS
    cells = {}
    for layer in by_seed[0]:
        values = np.stack([seed[layer] for seed in by_seed])  # (seeds, units)
        count = values.shape[1]
        if is_ranked:
            values = values[:, values.mean(0).argsort(kind="stable")]
        firsts = np.unique([count * place // _CELLS for place in range(_CELLS)]) if is_ranked else np.arange(count)
        sums = np.add.reduceat(values, firsts, axis=1)
        cells[layer] = tuple(
            Cell(layer, first, units, tuple(own))
            for first, units, own in zip(
                firsts.tolist(), np.diff(firsts, append=count).tolist(), sums.T.tolist(), strict=True
            )
        )
    return UnitMap(latest[0].result(StructureProbe).unit, latest, is_ranked, cells)


def _settings(run: Run) -> str:
    """What all probes in one figure share, the number of heads or neurons of each layer included."""
    result = run.result(StructureProbe)
    return shared_settings(run, result.unit, [[layer.layer, layer.units] for layer in result.layers])


def _figure(found: UnitMap) -> Figure:
    record = found.runs[-1].record
    units = f"{found.unit}s"
    results = [run.result(StructureProbe) for run in found.runs]
    shares = [result.best_share for result in results]
    spread = f"{min(shares):.0%} to {max(shares):.0%}" if len(shares) > 1 else f"{shares[0]:.0%}"
    seeds = f"Mean over {len(shares)} seeds." if len(shares) > 1 else "One seed."
    ranked = f" Within a layer, {units} are sorted, best first, in groups of equal size." if found.is_ranked else ""
    caption = (
        f"{Origin.read(record.inputs).origin}, {StartingState.read(record.inputs).state}: first-order predictions from "
        f"one pass of gradients; nothing was trained, and the changes are far too optimistic.{ranked} The best 10 % of "
        f"all {results[0].units:,} {units} have {spread} of the predicted change. {seeds}"
    )
    return Figure(
        name=f"probe-{units}",
        title=f"Predicted loss change by {found.unit}",
        caption=caption,
        data=tuple(
            {
                "layer": cell.layer,
                "rank" if found.is_ranked else found.unit: cell.first,
                units: cell.units,
                "change": cell.change,
                "lowest": min(cell.changes),
                "highest": max(cell.changes),
                "seeds": len(cell.changes),
            }
            for cells in found.cells.values()
            for cell in cells
        ),
        runs=tuple(run.name for run in found.runs),
        draw=partial(_draw, found),
        height_inches=max(2.4, 1.0 + 0.16 * len(found.cells)),
    )


def _draw(found: UnitMap, canvas: Canvas) -> None:
    import numpy as np
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    columns = max(map(len, found.cells.values()))
    values = np.full((len(found.cells), columns), np.nan)
    for row, cells in zip(values, found.cells.values(), strict=True):
        row[: len(cells)] = [cell.change / cell.units for cell in cells]
    axes = canvas.subplots()
    axes.grid(visible=False)
    width = 1 / columns if found.is_ranked else 1
    start = 0.0 if found.is_ranked else -0.5
    edges = start + width * np.arange(columns + 1)
    mesh = axes.pcolormesh(
        edges, np.arange(len(values) + 1) - 0.5, np.ma.masked_invalid(values), cmap=f"{COLOUR_MAP}_r"
    )
    axes.invert_yaxis()
    step = -(-len(values) // 16)
    axes.set_yticks(range(0, len(values), step), [str(layer) for layer in found.cells][::step])
    axes.set_ylabel("decoder layer")
    if found.is_ranked:
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel(f"{found.unit}s of the layer, best first")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(found.unit)
    axes.tick_params(length=0)
    bar = canvas.colorbar(mesh, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(f"predicted change per {found.unit}")
