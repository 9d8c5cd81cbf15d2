"""The `mask-train` workflow: finds which weights of a frozen model to remove, and keeps the best mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from mftctl.config import DEFAULT_RATIO, MaskTrainOptions, Recipe
from mftctl.data.encoding import Encoded
from mftctl.devices import best_device, device_for, find_device
from mftctl.errors import ConfigError, OutputError
from mftctl.interim_evaluation import interim_evaluation, measurements
from mftctl.lineage import Source, fft_learning_rate, mask_state
from mftctl.mask_validation import compare, confirm, masked, split_validation_records, validation_loss
from mftctl.masking.baselines import magnitude_mask, random_mask, row_mask
from mftctl.masking.bits import Mask, MaskMetadata, TensorRecord, mask_permit, save_mask
from mftctl.masking.checkpoint import resolve_checkpoint, target_names, tensor_digest, tensor_index
from mftctl.masking.drop import drop_mask
from mftctl.masking.frozen_prefix import reusing_prefix
from mftctl.masking.targets import MaskTarget, decoder_layers, find_targets, format_layers, parse_layers
from mftctl.memory_check import RoomOnGpu, training_on_device
from mftctl.models import load_model, load_to_share, peak_memory_bytes, restart_peak_memory
from mftctl.outlines import StoredWeights
from mftctl.prefix_reuse import batches_come_again, figures, hidden_states, token_batches_change
from mftctl.preparation import TrainingInputs, prepare_training, require_same_data
from mftctl.processes import is_first, shares_weights, world_size
from mftctl.progress import Listener, Progress
from mftctl.runs import Run
from mftctl.score_training import LearnedMask, MaskSearch, learn_mask
from mftctl.seen_records import seen_records
from mftctl.steps import announce_step
from mftctl.training import uses_bf16
from mftctl.training_flops import flops_per_token


def mask_train(
    recipe: Recipe, source: Source, run: Run, listener: Listener, *, resume: bool = False, may_replace: bool = False
) -> dict[str, Any]:
    """The result of finding a mask: where its file is, what it removes, and its losses per answer token.

    Args:
        recipe: With the `mask_train` section, the data and the seed.
        source: The fine-tuned model.
        run: Open run; gets metrics, checkpoints and the mask, which also goes to the run's output if it has one.
        listener: Hears progress.
        resume: Go on from the newest checkpoint of the run.
        may_replace: Whether a mask file at the run's output is replaced.

    Raises:
        MftError: Anything known that can go wrong.

    Source: MFT, section 2, equations 2 to 5; local masks of section 3.2, global ones of section 3.3.
    """
    options = recipe.mask_train
    if options.method == "drop":
        find_device(recipe.device)
        with device_for(run, listener, less_memory=[], device="cpu"):  # it compares files
            restart_peak_memory()
            return _drop(recipe, source, run, listener, may_replace=may_replace)
    with training_on_device("mask-train", recipe, options, run, listener) as room:
        return _search(recipe, source, run, listener, room, resume=resume, may_replace=may_replace)


def _search(
    recipe: Recipe, source: Source, run: Run, listener: Listener, room: RoomOnGpu, *, resume: bool, may_replace: bool
) -> dict[str, Any]:
    """The result of the methods that measure masks on the model."""
    options = recipe.mask_train
    inputs = prepare_mask_training(recipe, source, run, listener, options.data_fraction)
    interim = interim_evaluation(recipe, options, inputs, source, run, listener)
    room.require(inputs, split_validation_records(inputs.validation, options)[0])
    model, weights = _model_to_mask(inputs, options, listener)
    layers = parse_layers(options.layers or "all", len(decoder_layers(model)[1]))
    targets = find_targets(model, layers, options.target, options.projections)
    flops = flops_per_token(model, targets)
    target_names(targets, model, tensor_index(inputs.checkpoint))  # what cannot be written is said before the training
    deciding, confirming = split_validation_records(inputs.validation, options)
    inputs = replace(inputs, validation=deciding)
    come_again = batches_come_again(len(inputs.train), options)
    if min(layers) > 0 and not come_again and token_batches_change(len(inputs.train), options):
        listener.note(
            "Hidden states are reused in validation alone: with --batch-tokens each epoch has other micro-batches."
        )
    with (
        hidden_states(options, run.folder) as states,
        # Processes that share weights must pass the same layers, and each has seen other batches.
        reusing_prefix(model, 0 if shares_weights() else min(layers), states, listener.warn, in_training=come_again),
    ):
        search = MaskSearch(
            model,
            targets,
            options,
            inputs,
            run.training,
            listener,
            unmasked_loss=None if weights is not None else validation_loss(model, inputs, listener),
            fft_learning_rate=run.record.inputs["fft_learning_rate"],
            seed=recipe.seed,
            resume=resume,
            interim=interim,
            weights=weights,
            confirming=[] if weights is None else confirming,
        )
        if options.method == "learned":
            listener.note(f"Learning rate of the scores: {search.start.learning_rate_text(targets)}")
        found = find_mask(search)
        search = _with_whole_model(search, layers)
        confirmation = _confirmation(search, found, confirming)
        reuse = figures(states)
    metadata = _metadata(recipe, source, run, layers)
    mask = build_mask(found.keep, search.targets, search.model, inputs.checkpoint, metadata)
    return {
        "state": mask_state(options),
        "model": source.model,
        **keep_mask(mask, run, may_replace=may_replace),
        "layers": format_layers(layers),
        "layer_ratios": layer_ratios(found.keep, targets),
        **found.figures(),
        "kept": options.effective_keep if options.method == "learned" else None,
        "start_std": search.start.std if (options.method, options.effective_start) == ("learned", "normal") else None,
        "flops_per_token": flops,
        "confirmation": confirmation,
        "prefix_reuse": reuse,
        "evaluations": measurements(run.training),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _with_whole_model(search: MaskSearch, layers: list[int]) -> MaskSearch:
    """The search with a model that this process has all of; after a training that shared its weights, a new one."""
    if not shares_weights() or search.weights is not None:
        return search
    options = search.options
    model = load_frozen_model(search.inputs, options)
    return replace(search, model=model, targets=find_targets(model, layers, options.target, options.projections))


def _confirmation(search: MaskSearch, found: LearnedMask, confirming: list[Encoded]) -> dict[str, Any] | None:
    """What records that took no part in choosing the mask say of it; None where there is nothing to confirm."""
    if found.best_loss >= found.unmasked_loss:
        which = "The last mask was not" if search.options.effective_keep == "last" else "No mask was"
        search.listener.warn(
            f"{which} better than no mask on the validation data. Use the model without it, "
            "or try other layers (mftctl probe), a smaller ratio or more data."
        )
        return None
    if found.confirming is not None:
        return compare(*found.confirming, search.listener)
    return confirm(search, found.keep, confirming) if confirming else None


def prepare_mask_training(
    recipe: Recipe, source: Source, run: Run, listener: Listener, data_fraction: float
) -> TrainingInputs:
    """The data to learn a mask from: by default the records that the model was not fine-tuned on, as it says.

    The run notes it, and the learning rate that the model was fine-tuned with.

    Args:
        recipe: With the `mask_train` section, the data and the seed.
        source: The fine-tuned model.
        run: Open run, beside those that made the model.
        listener: Is told what is left out.
        data_fraction: Share of the records to learn from.

    Raises:
        MftError: The data cannot be used.
    """
    options = recipe.mask_train
    if options.method == "learned":
        announce_step(options, world_size(), listener)
    inputs = prepare_training(
        recipe,
        source.model,
        max_length_tokens=options.max_length_tokens,
        data_fraction=data_fraction,
        seen=seen_records(run.folder.parent, source.parents),
        learn_from=options.effective_learn_from,
        now=run.started,
        listener=listener,
    )
    require_same_data(run.record.inputs, inputs)
    if inputs.left_out:
        listener.note(
            f"Training records: {len(inputs.train)}; {inputs.left_out} that fine-tuning has seen are left out "
            "(--learn-from all takes them in)"
        )
    # A resumed run goes on with the rate it began with, whatever its source can still tell.
    rate = run.record.inputs.get("fft_learning_rate") or fft_learning_rate(source, recipe)
    run.update(inputs={**source.as_inputs(), **inputs.summary(), "fft_learning_rate": rate})
    return inputs


def keep_mask(mask: Mask, run: Run, *, may_replace: bool) -> dict[str, Any]:
    """Where a mask was written, in the run folder and where the user wants it, and what it removes.

    Args:
        mask: The mask.
        run: With an output or without.
        may_replace: Whether a mask file at the output is replaced.
    """
    path = run.folder / "mask.bits"
    output, refused = run.record.output, None
    if is_first():
        save_mask(mask, path)
        if output is not None:
            try:
                save_mask(mask, Path(output), permit=mask_permit(replace=may_replace))
            except OutputError as error:
                output, refused = None, str(error)
    return {
        "mask": str(path.resolve()),
        "output": output,
        **({} if refused is None else {"output_refused": refused}),
        "tensors": len(mask),
        "weights": mask.weights,
        "removed": mask.removed,
        "ratio": mask.ratio,
    }


def _drop(recipe: Recipe, source: Source, run: Run, listener: Listener, *, may_replace: bool) -> dict[str, Any]:
    """The result of going back to the weights before fine-tuning where the method says so; no model is loaded.

    Raises:
        ConfigError: The model before fine-tuning is not known.

    Source: GMT, section 4, "Analysis of Drop Strategy".
    """
    options = recipe.mask_train
    base = options.base or (source.origin if source.origin != source.model else None) or None
    if base is None:
        raise ConfigError(
            "drop needs the model before fine-tuning.",
            key="mask_train.base",
            expected="a checkpoint folder or a hub id",
            actual=f"none given, and no run in the runs folder made {source.model}",
            hint="--base MODEL",
        )
    run.update(inputs=source.as_inputs())
    mask = drop_mask(
        resolve_checkpoint(base),
        resolve_checkpoint(source.model, recipe.revision),
        options.ratio if isinstance(options.ratio, float) else DEFAULT_RATIO,
        options.strategy,
        base_model=base,
        base_revision=None,
        tuned_model=source.model,
        tuned_revision=recipe.revision,
        seed=recipe.seed,
        run_id=run.name,
        on_progress=lambda done, total: listener.progress(Progress("comparing", done, total)),
    )
    return {
        "state": mask_state(options),
        "model": source.model,
        "base": base,
        **keep_mask(mask, run, may_replace=may_replace),
        "layers": "all",
        "layer_ratios": {},
        "steps": 0,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def layer_ratios(keep: Mapping[str, torch.Tensor], targets: Sequence[MaskTarget]) -> dict[str, float]:
    """The share removed in each masked decoder layer, by its index: with a threshold it is an outcome."""
    removed: dict[int, int] = {}
    weights: dict[int, int] = {}
    for target in targets:
        bits = keep[target.name]
        removed[target.layer] = removed.get(target.layer, 0) + bits.numel() - int(bits.sum())
        weights[target.layer] = weights.get(target.layer, 0) + bits.numel()
    return {str(layer): removed[layer] / weights[layer] for layer in sorted(weights)}


def load_frozen_model(inputs: TrainingInputs, options: MaskTrainOptions) -> PreTrainedModel:
    """The model that stays as it is: fp32, or bf16 where asked for, since its weights are only read."""
    return load_model(inputs.checkpoint, dtype=_frozen_dtype(options))


def _model_to_mask(
    inputs: TrainingInputs, options: MaskTrainOptions, listener: Listener
) -> tuple[PreTrainedModel, StoredWeights | None]:
    """The frozen model; where processes share its weights during the training, without values, and these apart."""
    if not shares_weights() or options.method != "learned":
        return load_frozen_model(inputs, options), None
    model = load_to_share(inputs.checkpoint, dtype=_frozen_dtype(options), note=listener.note)
    if model.device.type != "meta":
        return model.to(best_device()), None  # type: ignore[arg-type]
    return model, StoredWeights(inputs.checkpoint, model)


def _frozen_dtype(options: MaskTrainOptions) -> torch.dtype:
    return torch.bfloat16 if uses_bf16(options.precision) else torch.float32


def find_mask(search: MaskSearch) -> LearnedMask:
    """The mask that the options ask for, measured against the unmasked model.

    Raises:
        MftError: Anything known that can go wrong.
    """
    if search.options.method == "learned":
        return learn_mask(search)
    keep = {target.name: _baseline(target, search) for target in search.targets}
    with masked(search.targets, keep):
        loss = validation_loss(search.model, search.inputs, search.listener)
    unmasked_loss = cast("float", search.unmasked_loss)  # such a model has its values
    return LearnedMask({name: bits.cpu() for name, bits in keep.items()}, unmasked_loss, loss, loss)


def _baseline(target: MaskTarget, search: MaskSearch) -> torch.Tensor:
    ratio = search.options.ratio_of(target.projection) or 0.0
    if search.options.method == "random":
        return random_mask(target, ratio, search.seed)
    return row_mask(target, ratio) if search.options.unit == "row" else magnitude_mask(target, ratio)


def build_mask(
    keep: Mapping[str, torch.Tensor],
    targets: Sequence[MaskTarget],
    model: PreTrainedModel,
    base: Path,
    metadata: MaskMetadata,
) -> Mask:
    """The mask of some projections under the names, shapes and digests of the base checkpoint's tensors.

    Args:
        keep: Bool keep mask by target name.
        targets: From `find_targets` on the model without masks.
        model: The model in memory.
        base: Its checkpoint folder.
        metadata: What the mask file says about its origin.

    Raises:
        MaskMismatchError: A parameter is not in the checkpoint.
        MaskingError: A weight is stored as several tensors.
    """
    index = tensor_index(base)
    names = target_names(targets, model, index)
    tensors, records = {}, {}
    for target, bits in keep.items():
        name = names[target]
        stored = index[name]
        tensors[name] = bits
        removed = bits.numel() - int(bits.sum())
        records[name] = TensorRecord(stored.shape, removed, tensor_digest(stored), stored.dtype)
    return Mask(tensors, records, metadata)


def _metadata(recipe: Recipe, source: Source, run: Run, layers: list[int]) -> MaskMetadata:
    options = recipe.mask_train
    ratio = options.effective_ratio
    return MaskMetadata(
        kind="weight",
        base_model=source.model,
        base_revision=recipe.revision,
        method=options.method,
        ratio=None if isinstance(ratio, dict) else ratio,
        threshold=options.effective_threshold,
        layers=format_layers(layers),
        seed=recipe.seed,
        run_id=run.name,
    )
