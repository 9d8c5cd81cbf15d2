"""The `probe` workflow: which group of decoder layers gains most from a mask."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from mftctl.atomic import write_text
from mftctl.config import MaskTrainOptions, Recipe
from mftctl.fast_probing import agreement_with_training, promised_changes
from mftctl.lineage import Source
from mftctl.mask_training import find_mask, load_frozen_model, prepare_mask_training
from mftctl.mask_validation import split_validation_records, validation_loss
from mftctl.masking.frozen_prefix import reusing_prefix
from mftctl.masking.targets import decoder_layers, find_targets, format_layers, layer_groups, parse_layers
from mftctl.memory_check import RoomOnGpu, training_on_device
from mftctl.models import peak_memory_bytes
from mftctl.prefix_reuse import figures, hidden_states
from mftctl.processes import forget_plan, is_first, shares_weights, wait_for_all
from mftctl.progress import Listener
from mftctl.regular_files import read_regular
from mftctl.runs import Run, TrainingFolder
from mftctl.score_training import LearnedMask, MaskSearch


def probe(recipe: Recipe, source: Source, run: Run, listener: Listener, *, resume: bool = False) -> dict[str, Any]:
    """The result of probing: every group's losses, best first, and the recommended layers.

    Args:
        recipe: With the `probe` and `mask_train` sections, the data and the seed.
        source: The fine-tuned model.
        run: Open run; gets one file a finished group, metrics, checkpoints and the result.
        listener: Hears progress.
        resume: Take finished groups as they are, and go on with the one that was interrupted.

    Raises:
        MftError: Anything known that can go wrong.

    Source: MFT, section 3.2, local mask fine-tuning ablation (groups of 4, 10 % of the data).
    """
    options = recipe.mask_train
    with training_on_device("probe", recipe, options, run, listener) as room:
        if recipe.probe.fast:
            return _estimate(recipe, source, run, listener, room)
        return _train_groups(recipe, source, run, listener, room, resume=resume)


def _train_groups(
    recipe: Recipe, source: Source, run: Run, listener: Listener, room: RoomOnGpu, *, resume: bool
) -> dict[str, Any]:
    """The result of training a mask of each group."""
    options = _options(recipe)
    inputs = prepare_mask_training(recipe, source, run, listener, recipe.probe.data_fraction)
    inputs = replace(inputs, validation=split_validation_records(inputs.validation, options)[0])
    room.require(inputs)
    model = load_frozen_model(inputs, options)
    is_whole = True
    unmasked_loss = validation_loss(model, inputs, listener)
    # From below upwards, so that each group enters the model where the one before it did, or above.
    groups = sorted(_groups(recipe, model), key=min)
    results = []
    with hidden_states(options, run.folder) as states:
        for number, group in enumerate(groups, start=1):
            layers = format_layers(group)
            folder = run.folder / "groups" / layers
            stored = folder / "outcome.json"
            done = " (done already)" if stored.exists() else ""
            listener.note(f"Group {number} of {len(groups)}: layers {layers}{done}")
            if not stored.exists():
                if not is_whole:  # DeepSpeed or FSDP has left this process a part of it
                    model = load_frozen_model(inputs, options)
                is_whole = not shares_weights()
                forget_plan()
                search = MaskSearch(
                    model,
                    find_targets(model, group, options.target, options.projections),
                    options,
                    inputs,
                    TrainingFolder(folder, run.resume_command),
                    listener,
                    unmasked_loss=unmasked_loss,
                    fft_learning_rate=run.record.inputs["fft_learning_rate"],
                    seed=recipe.seed,
                    resume=resume,
                )
                lowest = 0 if shares_weights() else min(group)
                with reusing_prefix(model, lowest, states, listener.warn, in_training=True):
                    found = find_mask(search)
                if is_first():
                    write_text(stored, json.dumps(_outcome(group, found), indent=2) + "\n")
            if is_first():  # also those that a kill left of a finished group
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            wait_for_all()
            results.append(json.loads(read_regular(stored)))
        reuse = figures(states)
    ranked = sorted(results, key=lambda item: item["best_loss"])
    return {
        "groups": ranked,
        "recommended_layers": ranked[0]["layers"],
        "unmasked_loss": unmasked_loss,
        "prefix_reuse": reuse,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _estimate(recipe: Recipe, source: Source, run: Run, listener: Listener, room: RoomOnGpu) -> dict[str, Any]:
    """The result of `--fast`: what a mask of each group promises, the best first among groups of one size."""
    options = _options(recipe)
    inputs = prepare_mask_training(recipe, source, run, listener, recipe.probe.data_fraction)
    room.require(inputs)
    model = load_frozen_model(inputs, options)
    groups = _groups(recipe, model)
    changes = promised_changes(
        model,
        groups,
        options,
        inputs,
        listener,
        fft_learning_rate=run.record.inputs["fft_learning_rate"],
        seed=recipe.seed,
    )
    sizes = {format_layers(group): len(group) for group in groups}
    ranked = sorted(changes, key=lambda layers: (list(sizes.values()).index(sizes[layers]), changes[layers]))
    return {
        "fast": True,
        "groups": [{"layers": layers, "size": sizes[layers], "change": changes[layers]} for layers in ranked],
        "recommended_layers": ranked[0],
        "agreement": agreement_with_training(run.folder.parent, source.model, changes),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _options(recipe: Recipe) -> MaskTrainOptions:
    options = recipe.mask_train
    return options if recipe.probe.epochs is None else options.model_copy(update={"epochs": recipe.probe.epochs})


def _groups(recipe: Recipe, model: PreTrainedModel) -> list[list[int]]:
    layer_count = len(decoder_layers(model)[1])
    wanted = parse_layers(recipe.probe.layers or "all", layer_count)
    return layer_groups(layer_count, recipe.probe_groups, wanted)


def _outcome(group: list[int], found: LearnedMask) -> dict[str, Any]:
    return {
        "layers": format_layers(group),
        "size": len(group),
        "start_loss": found.start_loss,
        "best_loss": found.best_loss,
        "change": found.best_loss - found.unmasked_loss,
        "best_step": found.best_step,
        "steps": found.steps,
    }
