"""The `fft` workflow: supervised fine-tuning of all weights or of those a method selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedModel

from mftctl.data.encoding import EncodedRecords
from mftctl.data.seen_records import save_seen, seen_records
from mftctl.errors import TrainingError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import FftResult, RetainedLosses
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import RunInputs, TrainedSupport
from mftctl.experiments.state_names import fine_tuned_state
from mftctl.masking.checkpoints.load import load_model, load_to_share
from mftctl.masking.checkpoints.outlines import StoredWeights
from mftctl.progress import Listener
from mftctl.runtime.devices import best_device, uses_bf16
from mftctl.runtime.peak_memory import peak_memory_bytes
from mftctl.runtime.process_group import shares_weights
from mftctl.runtime.processes import is_first, world_size
from mftctl.runtime.stop_request import stop_on_signal
from mftctl.training.flops import flops_per_token
from mftctl.training.image_support import freeze_unreached
from mftctl.training.inputs import TrainingInputs, prepare_training, require_same_data
from mftctl.training.interim_evaluation import interim_evaluation, measurements
from mftctl.training.loop import step_size, train, training_arguments
from mftctl.training.objectives import objective_of
from mftctl.training.reference import Reference, require_whole_reference, turn_off_dropout, with_references
from mftctl.training.retention import make_retention
from mftctl.training.schedule import announce_step, total_steps
from mftctl.training.step_scores import step_scores
from mftctl.training.update_trainer import UpdateTrainer
from mftctl.training.updates.excluded import excluded_text
from mftctl.training.updates.hft import freeze_half
from mftctl.training.updates.masked_optimizer import UpdateRule
from mftctl.training.updates.optimizers import (
    check_memory_options,
    forget_8bit_overrides,
    low_memory_optimizer,
    optimizer_name,
)
from mftctl.workflows.adapted_model import SupportMask, adapted_model, check_adapter
from mftctl.workflows.planning.memory_check import RoomOnGpu, training_on_device
from mftctl.workflows.tuned_model import save_trained

if TYPE_CHECKING:
    from peft import PeftModel


def fine_tune(
    recipe: Recipe,
    source: ModelSource,
    run: Run,
    listener: Listener,
    *,
    resume: bool = False,
    may_replace: bool = False,
) -> FftResult:
    """Fine-tunes a model and returns its folder and its losses per answer token, or per preference.

    Args:
        recipe: Provides the `fft` section, the data and the seed.
        source: The model to start from.
        run: Open run; receives metrics and checkpoints, and the model unless the run has another output path.
        listener: Receives progress updates.
        resume: Resume from the latest checkpoint of the run.
        may_replace: Whether to replace a model that mftctl wrote at the run's output path.

    Raises:
        ConfigError: The options are inconsistent, or the recipe names no data.
        DataError: A data file or record cannot be used.
        ModelError: The model cannot be loaded.
        TrainingError: The loss is no longer finite.
        DeviceMemoryError: The GPU runs out of memory.
        Interrupted: The user stopped the run; its state is saved.

    Source: MFT, section 2, equation 1; GMT, section 2 and algorithm 1. The loss is the mean over all answer tokens of
    an optimizer step, or over its preferences (Rafailov et al. 2023, arXiv 2305.18290, equation 7).
    """
    options = recipe.fft
    with training_on_device("fft", recipe, options, run, listener) as room:
        return _fine_tune(recipe, source, run, listener, room, resume=resume, may_replace=may_replace)


def _fine_tune(
    recipe: Recipe,
    source: ModelSource,
    run: Run,
    listener: Listener,
    room: RoomOnGpu,
    *,
    resume: bool,
    may_replace: bool,
) -> FftResult:
    """Runs `fine_tune` on a device that is ready."""
    options = recipe.fft
    announce_step(options, world_size(), listener)
    check_memory_options(options, best_device())
    inputs, mask = _prepared(recipe, source, run, listener)
    interim = interim_evaluation(recipe, options, inputs, source, run, listener)
    room.require(inputs)
    if is_first():
        save_seen(run.folder, inputs.records)
    model = _trainable_model(inputs, source, options, recipe.seed, listener, mask)
    if options.objective == "dpo":
        inputs = _with_references(model, inputs, options, listener)
    trained_parameters = sum(item.numel() for item in model.parameters() if item.requires_grad)
    flops = flops_per_token(model)
    trainer = _trainer(model, inputs, recipe, run, listener)
    reference = None if options.trains_adapter else inputs.checkpoint
    trainer.retention = make_retention(inputs, options, model, reference, seed=recipe.seed, listener=listener)
    records = EncodedRecords(inputs.validation, inputs.validation_examples)
    trainer.scores = step_scores(recipe, "fft", options, inputs, records, run, listener)
    try:
        with stop_on_signal(listener) as stop:
            train(trainer, run.training, stop, patience=options.patience, resume=resume, interim=interim)
    finally:
        if options.has_8bit_moments:
            forget_8bit_overrides()
    saved = save_trained(trainer.trained_model(), inputs, source, run, options, may_replace=may_replace)
    best_step, kept = trainer.state.best_global_step, trainer.kept_candidate()
    best, last = (trainer.candidate_at(step) for step in (best_step, None))
    if trainer.start_loss is None or best_step is None or best is None or last is None or kept is None:
        raise TrainingError("The training ended without a validation.", path=run.folder)
    return FftResult(
        state=fine_tuned_state(source.state, options),
        model=str(saved.folder.resolve()),
        output_refused=saved.refused,
        kept=options.keep,
        start_loss=trainer.start_loss,
        best_loss=best.loss,
        last_loss=last.loss,
        best_step=best_step,
        kept_average=kept.horizon,
        best_score=best.score,
        steps=trainer.state.global_step,
        trained_parameters=trained_parameters,
        tokens=int(trainer.state.num_input_tokens_seen),
        flops_per_token=flops,
        evaluations=measurements(run.training),
        peak_memory_bytes=peak_memory_bytes(),
        retained=_retained_losses(trainer),
        rewards=kept.rewards,
    )


def _prepared(
    recipe: Recipe, source: ModelSource, run: Run, listener: Listener
) -> tuple[TrainingInputs, SupportMask | None]:
    """The training inputs, which the run records, and the mask of the weights that an adapter trains."""
    options = recipe.fft
    inputs = prepare_training(
        recipe,
        source.model,
        max_length_tokens=options.max_length_tokens,
        data_fraction=options.data_fraction,
        adapters=True,
        seen=None if options.learn_from == "all" else seen_records(run.folder.parent, source.parents),
        learn_from=options.learn_from,
        retain_weight=options.retain_weight,
        kind=options.record_kind,
        now=run.started,
        listener=listener,
    )
    if inputs.left_out:
        listener.note(
            f"Training records: {len(inputs.train)}; left out because fine-tuning used them: {inputs.left_out}"
        )
    if options.objective == "dpo":
        require_whole_reference()
    before = RunInputs.read(run.record.inputs)
    require_same_data(before, inputs)
    mask = check_adapter(options, inputs.checkpoint, before)
    support = TrainedSupport(support_sha256=None if mask is None else mask.digest)
    run.update(inputs={**source.as_inputs(), **inputs.summary(), **support.document()})
    return inputs, mask


def _with_references(
    model: PreTrainedModel | PeftModel, inputs: TrainingInputs, options: FftOptions, listener: Listener
) -> TrainingInputs:
    """The inputs with the log-probabilities of the model before training, which is then trained without dropout."""
    turn_off_dropout(model, listener)
    reference = Reference(
        model,
        inputs.checkpoint,
        autocast=_computes_in_bf16(options),
        variant=f"{options.method == 'lora'}, {options.quantize}",
    )
    return with_references(inputs, [inputs.validation], reference, listener)[0]


def _computes_in_bf16(options: FftOptions) -> bool:
    """True if forward passes convert wider weights to bf16; with low memory they are in bf16 already."""
    return uses_bf16(options.precision) and not options.low_memory


def _retained_losses(trainer: UpdateTrainer) -> RetainedLosses | None:
    """The losses on retained data at the start and of the kept model; None without such data."""
    start, kept = trainer.candidate_at(0), trainer.kept_candidate()
    if trainer.retention is None or start is None or kept is None:
        return None
    if start.retained_loss is None or kept.retained_loss is None:
        return None
    return RetainedLosses(
        records=trainer.retention.records, start_loss=start.retained_loss, kept_loss=kept.retained_loss
    )


def _trainable_model(
    inputs: TrainingInputs,
    source: ModelSource,
    options: FftOptions,
    seed: int,
    listener: Listener,
    mask: SupportMask | None = None,
) -> PreTrainedModel | PeftModel:
    """The model with the parameters that the method trains set to trainable."""
    checkpoint = inputs.checkpoint
    if options.trains_adapter:
        return adapted_model(checkpoint, source.model, options, seed, mask, listener)
    # Updates are too small for bf16, so weights stay in fp32 or are stochastically rounded.
    dtype = torch.bfloat16 if options.low_memory else torch.float32
    if shares_weights():
        model = load_to_share(checkpoint, dtype=dtype, note=listener.note)
    else:
        model = load_model(checkpoint, dtype=dtype)
    freeze_unreached(model, inputs.train)
    if options.method == "hft":
        freeze_half(model, seed)
    return model


def _trainer(
    model: PreTrainedModel | PeftModel, inputs: TrainingInputs, recipe: Recipe, run: Run, listener: Listener
) -> UpdateTrainer:
    options = recipe.fft
    arguments = training_arguments(
        run.training.checkpoints,
        options,
        steps=total_steps(len(inputs.train), options, world_size()),
        learning_rate=options.learning_rate,
        seed=recipe.seed,
        bf16=_computes_in_bf16(options),
    )
    arguments.load_best_model_at_end = options.keep == "best"
    arguments.optim = optimizer_name(options, arguments.device)
    trainer = UpdateTrainer(model, arguments, inputs.train, inputs.validation, inputs.tokenizer, listener)
    trainer.objective = objective_of(options)
    trainer.step_size = step_size(options)
    trainer.keep_averages(options, arguments.max_steps)
    if options.low_memory:
        trainer.optimizer_cls_and_kwargs = low_memory_optimizer(arguments)
    if options.method in ("gmt", "random"):
        ratio = cast("float", options.ratio)  # always set: filled in when the recipe was read
        trainer.rule = UpdateRule(options.method, ratio, options.scope, options.unselected, seed=recipe.seed)
    if options.exclude:
        trainer.exclude = options.exclude
        listener.note(excluded_text(cast("PreTrainedModel", model), options.exclude))
    if model.device.type == "meta":
        trainer.rows = StoredWeights(inputs.checkpoint, cast("PreTrainedModel", model)).rows
    trainer.exact_norm = trainer.rule is not None  # so that the selection does not depend on rounding
    return trainer
