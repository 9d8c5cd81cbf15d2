"""The `mask-train` workflow: finds which weights of a frozen model to remove and keeps the best mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from mftctl.data.encoding import Encoded, EncodedRecords
from mftctl.errors import ConfigError
from mftctl.evaluation.losses import mean_loss
from mftctl.experiments.mask_results import Confirmation, DroppedMask, MaskTrainResult
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.model_source import ModelSource, known_base
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import mask_state
from mftctl.masking.checkpoints.apply_in_memory import target_names
from mftctl.masking.checkpoints.delta_mask import drop_mask
from mftctl.masking.checkpoints.earlier_weights import pair_targets, read_base
from mftctl.masking.checkpoints.load import load_to_share
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.outlines import StoredWeights
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.masking.delta.soft_file import stored_dtypes
from mftctl.masking.mask import Mask
from mftctl.masking.targets import MaskTarget, decoder_layers, find_targets, masked_layer_indices
from mftctl.progress import Listener, Progress
from mftctl.runtime.devices import best_device, find_device, frozen_dtype
from mftctl.runtime.peak_memory import peak_memory_bytes, restart_peak_memory
from mftctl.runtime.process_group import shares_weights
from mftctl.training.flops import flops_per_token
from mftctl.training.held_out import compare, confirm, split_validation_records, validation_losses
from mftctl.training.image_support import first_reusing_layer, require_images_for_projector
from mftctl.training.inputs import TrainingInputs
from mftctl.training.interim_evaluation import interim_evaluation
from mftctl.training.learn_mask import find_mask
from mftctl.training.mask_search import (
    FoundMask,
    MaskSearch,
    MaskTrainingInputs,
    load_frozen_model,
    prepare_mask_training,
)
from mftctl.training.objectives import objective_of
from mftctl.training.prefix_cache import (
    batches_come_again,
    hidden_states,
    prefix_reuse,
    reusing_prefix,
    token_batches_change,
)
from mftctl.training.reference import Reference, require_whole_reference, turn_off_dropout, with_references
from mftctl.training.retention import make_retention
from mftctl.training.step_scores import StepScores, step_scores
from mftctl.workflows.budget import ratios_in_budget
from mftctl.workflows.mask_result import SearchedMask, keep_mask, mask_of, written_mask
from mftctl.workflows.model_before import model_before, model_before_measured
from mftctl.workflows.planning.memory_check import RoomOnGpu, training_on_device


def mask_train(
    recipe: Recipe,
    source: ModelSource,
    run: Run,
    listener: Listener,
    *,
    resume: bool = False,
    may_replace: bool = False,
) -> MaskTrainResult:
    """Finds a mask and returns its file, a summary of what it removes, and its losses per answer token.

    Args:
        recipe: Provides the `mask_train` section, the data and the seed.
        source: The fine-tuned model.
        run: Open run; receives metrics, checkpoints and the mask, which is also copied to the run's output path.
        listener: Receives progress updates.
        resume: Resume from the latest checkpoint of the run.
        may_replace: Whether to replace a mask file at the run's output path.

    Raises:
        ConfigError: The options are inconsistent, or the recipe names no data.
        DataError: A data file or record cannot be used.
        ModelError: The model cannot be loaded.
        MaskingError: The chosen layers or projections cannot be masked.
        MaskMismatchError: The model before fine-tuning does not match the model, or has the same weights.
        TrainingError: The loss is no longer finite.
        DeviceMemoryError: The GPU runs out of memory.
        Interrupted: The user stopped the run; its state is saved.

    Source: MFT, section 2, equations 2 to 5; local masks of section 3.2, global ones of section 3.3. Learned delta
        masks are ours.
    """
    options = recipe.mask_train
    if options.method == "drop":
        find_device(recipe.device)
        with device_for(run, listener, less_memory=[], device="cpu"):  # only compares files
            restart_peak_memory()
            return _drop(recipe, source, run, listener, may_replace=may_replace)
    if options.base is not None and options.kind == "weight" and not options.retain_weight:
        listener.warn("The model before fine-tuning (mask_train.base) has no effect on a mask of kind weight.")
    with training_on_device("mask-train", recipe, options, run, listener) as room:
        searched = _search(recipe, source, run, listener, room, resume=resume)
        return written_mask(searched, recipe, source, run, may_replace=may_replace)


def learn_delta_mask(recipe: Recipe, source: ModelSource, run: Run, listener: Listener) -> Mask:
    """Learns a delta mask for another command, which writes no file of its own.

    Args:
        recipe: Provides the `mask_train` section, of kind `delta`, the data and the seed.
        source: The fine-tuned model.
        run: Open run; receives metrics and checkpoints.
        listener: Receives progress updates.

    Raises:
        MftError: As for `mask_train`.
    """
    with training_on_device("mask-train", recipe, recipe.mask_train, run, listener) as room:
        return mask_of(_search(recipe, source, run, listener, room, resume=False), recipe, source, run)


def _search(
    recipe: Recipe, source: ModelSource, run: Run, listener: Listener, room: RoomOnGpu, *, resume: bool
) -> SearchedMask:
    """Runs the methods that evaluate masks on the model."""
    options = recipe.mask_train
    if options.objective == "dpo":
        require_whole_reference()
    base = model_before_measured(options, source)
    base_folder = None if base is None else resolve_checkpoint(base)
    before = _model_to_retain(options, source) if base_folder is None else base_folder
    prepared = prepare_mask_training(recipe, source, run, listener, options.data_fraction, options.retain_weight)
    inputs = prepared.inputs
    interim = interim_evaluation(recipe, options, inputs, source, run, listener)
    room.require(inputs, split_validation_records(inputs.validation, options)[0])
    require_images_for_projector(options, inputs.train)
    model, weights = _model_to_mask(inputs, options, listener)
    layers = masked_layer_indices(options.layers or "all", len(decoder_layers(model)[1]), options.target)
    targets = find_targets(model, layers, options.target, options.masked_projections)
    flops = flops_per_token(model, targets)
    target_names(targets, model, tensor_index(inputs.checkpoint))  # reports what cannot be written before training
    pairs = None if base_folder is None else pair_targets(targets, model, base_folder, inputs.checkpoint)
    dtypes = stored_dtypes(targets, model, inputs.checkpoint) if options.mask == "soft" else {}
    ratios = _ratios(model, targets, options, prepared, run, listener, has_values=weights is None)
    scores = _step_scores(recipe, inputs, weights, run, listener)
    inputs, confirming = _split(inputs, model, options, listener)
    retention = make_retention(inputs, options, model, before, seed=recipe.seed, listener=listener)
    # Processes that share weights must run the same layers, but each has seen different batches.
    reusing = 0 if shares_weights() else first_reusing_layer(layers, inputs.train, listener)
    come_again = _batches_come_again(len(inputs.train), reusing, options, listener)
    with (
        hidden_states(options, run.folder) as states,
        reusing_prefix(model, reusing, states, listener.warn, in_training=come_again),
    ):
        unmasked = None if weights is not None else validation_losses(model, inputs, listener, objective_of(options))
        search = MaskSearch(
            model,
            targets,
            options,
            inputs,
            run.training,
            listener,
            unmasked_loss=None if unmasked is None else mean_loss(unmasked),
            fft_learning_rate=prepared.fft_learning_rate,
            seed=recipe.seed,
            resume=resume,
            interim=interim,
            weights=weights,
            confirming=[] if weights is None else confirming,
            scores=scores,
            unmasked_score=None if scores is None else scores.unmasked(model),
            base=None if pairs is None else read_base(targets, pairs),
            retention=retention,
            unmasked_retained_loss=None if retention is None or weights is not None else retention.loss(model),
            ratios=ratios,
            stored_dtypes=dtypes,
            unmasked_rewards=None if unmasked is None else objective_of(options).rewards(unmasked),
        )
        if options.method == "learned":
            listener.note(f"Learning rate of the scores: {search.start.learning_rate_text(targets)}")
        found = find_mask(search)
        search = _with_whole_model(search, layers)
        confirmation = _confirmation(search, found, confirming)
        reuse = prefix_reuse(states)
    return SearchedMask(search, found, layers, base, pairs, flops, confirmation, reuse)


def _model_to_retain(options: MaskTrainOptions, source: ModelSource) -> Path | None:
    """The model before fine-tuning that `--retain-weight` compares with; None without it."""
    if not options.retain_weight:
        return None
    return resolve_checkpoint(known_base(source, options.base, key="mask_train.base", what="--retain-weight"))


def _split(
    inputs: TrainingInputs, model: PreTrainedModel, options: MaskTrainOptions, listener: Listener
) -> tuple[TrainingInputs, Sequence[Encoded]]:
    """The inputs with the validation records that decide, and those that confirm.

    Preferences are given their log-probabilities under the model, which is then run without dropout.
    """
    deciding, confirming = split_validation_records(inputs.validation, options)
    if options.objective != "dpo":
        return replace(inputs, validation=deciding), confirming
    turn_off_dropout(model, listener)
    known, parts = with_references(inputs, [deciding, confirming], Reference(model, inputs.checkpoint), listener)
    return known, parts[1]


def _ratios(
    model: PreTrainedModel,
    targets: list[MaskTarget],
    options: MaskTrainOptions,
    prepared: MaskTrainingInputs,
    run: Run,
    listener: Listener,
    *,
    has_values: bool,
) -> dict[str, float]:
    """With ratio auto, the ratio of each target, by name; otherwise empty.

    Raises:
        ConfigError: The processes share their weights, so that their gradients cannot be computed before training.
    """
    if options.shared_budget is None:
        return {}
    if not has_values:
        raise ConfigError(
            "The estimate of ratio auto needs whole weights in each process.",
            key="mask_train.ratio",
            expected="a number, or one process, or --shard ddp or zero2",
            actual="auto with sharded weights",
        )
    return ratios_in_budget(
        model, targets, options, prepared.inputs, options.shared_budget, run.folder / "ratios.json", listener
    )


def _step_scores(
    recipe: Recipe, inputs: TrainingInputs, weights: StoredWeights | None, run: Run, listener: Listener
) -> StepScores | None:
    """The scores that decide between masks; None if the loss does.

    Raises:
        ConfigError: The processes share their weights, so that the unmasked model cannot be scored.
    """
    options = recipe.mask_train
    deciding = split_validation_records(inputs.validation, options)[0]
    examples = split_validation_records(inputs.validation_examples, options)[0]
    scores = step_scores(recipe, "mask_train", options, inputs, EncodedRecords(deciding, examples), run, listener)
    if scores is not None and weights is not None:
        raise ConfigError(
            "A score of the unmasked model needs whole weights in each process.",
            key="mask_train.best_by",
            expected="loss, or one process, or --shard ddp or zero2",
            actual=f"{options.best_by} with sharded weights",
        )
    return scores


def _batches_come_again(records: int, reusing: int, options: MaskTrainOptions, listener: Listener) -> bool:
    """True if training repeats its batches, so that their hidden states can be reused; notes why not."""
    come_again = batches_come_again(records, options)
    if reusing and not come_again and token_batches_change(records, options):
        listener.note(
            "Hidden states are reused only in validation: with --batch-tokens, micro-batches differ between epochs."
        )
    return come_again


def _with_whole_model(search: MaskSearch, layers: list[int]) -> MaskSearch:
    """The search with a model held whole in this process; reloaded after training that sharded its weights."""
    if not shares_weights() or search.weights is not None:
        return search
    options = search.options
    model = load_frozen_model(search.inputs, options)
    return replace(search, model=model, targets=find_targets(model, layers, options.target, options.masked_projections))


def _confirmation(search: MaskSearch, found: FoundMask, confirming: Sequence[Encoded]) -> Confirmation | None:
    """The mask's effect on records not used to choose it; None where there is nothing to confirm."""
    if found.best_loss >= found.unmasked_loss:
        which = "The last mask did not beat" if search.options.keeps_last else "No mask beat"
        has_ratio = search.options.blocks is None and search.options.mask == "hard"
        fewer = "a smaller ratio" if has_ratio else "fewer layers"
        search.listener.warn(
            f"{which} the unmasked model on the validation data. Use the model without a mask, "
            f"or try other layers (mftctl probe), {fewer} or more data."
        )
        return None
    if found.confirming is not None:
        return compare(*found.confirming, search.listener)
    return confirm(search, found.mask, confirming) if confirming else None


def _drop(recipe: Recipe, source: ModelSource, run: Run, listener: Listener, *, may_replace: bool) -> DroppedMask:
    """Resets part of the weights to their values before fine-tuning; no model is loaded.

    Raises:
        ConfigError: The model before fine-tuning is unknown.

    Source: GMT, section 4, "Analysis of Drop Strategy".
    """
    options = recipe.mask_train
    base = model_before(options, source)
    run.update(inputs=source.as_inputs())
    mask = drop_mask(
        resolve_checkpoint(base),
        resolve_checkpoint(source.model, recipe.revision),
        cast("float", options.ratio),  # the recipe refuses a ratio by projection for drop
        options.strategy,
        rescale=options.rescale,
        base_model=base,
        base_revision=None,
        tuned_model=source.model,
        tuned_revision=recipe.revision,
        seed=recipe.seed,
        run_id=run.name,
        on_progress=lambda done, total: listener.progress(Progress("comparing", done, total)),
    )
    return DroppedMask(
        **keep_mask(mask, run, may_replace=may_replace).document(),
        state=mask_state(options),
        model=source.model,
        base=base,
        layers="all",
        layer_ratios={},
        steps=0,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _model_to_mask(
    inputs: TrainingInputs, options: MaskTrainOptions, listener: Listener
) -> tuple[PreTrainedModel, StoredWeights | None]:
    """The frozen model; where processes share its weights in training, without values, which come separately."""
    if not shares_weights() or options.method != "learned":
        return load_frozen_model(inputs, options), None
    model = load_to_share(inputs.checkpoint, dtype=frozen_dtype(options.precision), note=listener.note)
    if model.device.type != "meta":
        return model.to(best_device()), None  # type: ignore[arg-type]
    return model, StoredWeights(inputs.checkpoint, model)
