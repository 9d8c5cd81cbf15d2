"""`mftctl probe --fast --unit head|neuron`: where the expected gain of a mask lies inside the layers."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Literal

import torch

from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.probe_results import HeadOrNeuron, LayerOfUnits, StructureProbe
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_folder import Run
from mftctl.files.atomic import write_text
from mftctl.masking.heads_and_neurons import Units, heads_of, neurons_of
from mftctl.masking.targets import decoder_layers, find_targets, parse_layers
from mftctl.progress import Listener
from mftctl.runtime.peak_memory import peak_memory_bytes
from mftctl.runtime.processes import is_first
from mftctl.training.mask_search import load_frozen_model, prepare_mask_training
from mftctl.workflows.fast_probe import promised_masks
from mftctl.workflows.planning.memory_check import RoomOnGpu

_BEST_SHARE = 0.1
_SHOWN = 20


def structure_probe(
    recipe: Recipe, source: ModelSource, run: Run, listener: Listener, room: RoomOnGpu
) -> StructureProbe:
    """Predicts how a mask of each attention head or MLP neuron would change the loss; returns a summary.

    The mask is the one that `probe --fast` assumes for each tensor, so the changes of a layer's heads add up to the
    change of its attention, and those of its neurons to the change of its MLP. All of them are written to a file in the
    run folder.

    Args:
        recipe: Provides the `probe` and `mask_train` sections, the data and the seed.
        source: The fine-tuned model.
        run: Open run; receives the file.
        listener: Receives progress updates.
        room: Checks the memory.

    Raises:
        MaskingError: A projection is fused with others, so that its weights cannot be assigned to heads or neurons.
    """
    options, unit = recipe.mask_train, recipe.probe.unit
    is_head = unit == "head"
    prepared = prepare_mask_training(recipe, source, run, listener, recipe.probe.data_fraction)
    room.require(prepared.inputs)
    model = load_frozen_model(prepared.inputs, options)
    layers = parse_layers(recipe.probe.layers or "all", len(decoder_layers(model)[1]))
    targets = find_targets(model, layers, "attn" if is_head else "mlp", options.masked_projections)
    units: Units = heads_of(model, targets) if is_head else neurons_of(targets)
    changes = {
        layer: torch.zeros(units.count(layer), dtype=torch.float64)
        for layer in dict.fromkeys(target.layer for target in targets)
    }
    promised = promised_masks(
        model,
        targets,
        options,
        prepared.inputs,
        listener,
        fft_learning_rate=prepared.fft_learning_rate,
        seed=recipe.seed,
    )
    for mask in promised:
        changes[mask.target.layer] -= units.sums(mask.target, mask.gains.where(mask.removed, 0.0))
    found = [
        HeadOrNeuron(layer=layer, index=index, change=change)
        for layer, values in changes.items()
        for index, change in enumerate(values.tolist())
    ]
    file = "heads.csv" if is_head else "neurons.csv"
    if is_first():
        _write(run.folder / file, found)
    return _summary("head" if is_head else "neuron", file, found)


def _summary(unit: Literal["head", "neuron"], file: str, found: list[HeadOrNeuron]) -> StructureProbe:
    """The result: totals, a summary of each layer, and the best units.

    Args:
        unit: `head` or `neuron`.
        file: Name of the file with all of them.
        found: All of them, in the order of the model, which decides between equal ones.
    """
    ranked = sorted(found, key=lambda item: item.change)
    best = ranked[: math.ceil(_BEST_SHARE * len(ranked))]
    total = math.fsum(item.change for item in found)

    def share(items: list[HeadOrNeuron]) -> float:
        return math.fsum(item.change for item in items) / total if items and total else 0.0

    layers = []
    for layer in dict.fromkeys(item.layer for item in found):
        own = [item for item in found if item.layer == layer]
        chosen = [item for item in best if item.layer == layer]
        layers.append(
            LayerOfUnits(
                layer=layer,
                units=len(own),
                change=math.fsum(item.change for item in own),
                best=len(chosen),
                best_share=share(chosen),
            )
        )
    return StructureProbe(
        fast=True,
        unit=unit,
        file=file,
        units=len(found),
        change=total,
        best_units=len(best),
        best_share=share(best),
        layers=layers,
        best=ranked[:_SHOWN],
        peak_memory_bytes=peak_memory_bytes(),
    )


def _write(path: Path, found: list[HeadOrNeuron]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "index", "change"])
    writer.writerows([item.layer, item.index, repr(item.change)] for item in found)
    write_text(path, text.getvalue())
