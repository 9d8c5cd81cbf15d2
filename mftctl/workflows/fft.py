"""The `fft` workflow: supervised fine-tuning of all weights or of those a method selects, and saving of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mftctl.data.encoding import EncodedRecords
from mftctl.data.seen_records import save_seen, seen_records
from mftctl.errors import ConfigError, OutputError, StorageError, TrainingError
from mftctl.evaluation.answer_stops import name_stops, turn_stops
from mftctl.experiments.model_origin import ModelOrigin, origin_of
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import FftResult, RetainedLosses
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.state_names import fine_tuned_state
from mftctl.experiments.training_options import FftOptions
from mftctl.files.atomic import atomic_folder, known_failures
from mftctl.files.ownership import Kind, permit_folder, write_marker
from mftctl.masking.checkpoints.carried_parts import carry_over, parts_left_out
from mftctl.masking.checkpoints.load import load_model, load_to_share
from mftctl.masking.checkpoints.load_weights import quiet_transformers, stored_dtype, whole_checkpoint
from mftctl.masking.checkpoints.locate import is_adapter
from mftctl.masking.checkpoints.outlines import StoredWeights
from mftctl.progress import Listener
from mftctl.runtime.devices import best_device, frozen_dtype, uses_bf16
from mftctl.runtime.peak_memory import peak_memory_bytes
from mftctl.runtime.process_group import shares_weights
from mftctl.runtime.processes import is_first, spreads_parameters, world_size
from mftctl.runtime.stop_request import stop_on_signal
from mftctl.runtime.torch_failures import gpu_failures
from mftctl.training.flops import flops_per_token
from mftctl.training.inputs import TrainingInputs, prepare_training, require_same_data
from mftctl.training.interim_evaluation import interim_evaluation, measurements
from mftctl.training.loop import step_size, train, training_arguments
from mftctl.training.retention import make_retention
from mftctl.training.schedule import announce_step, total_steps
from mftctl.training.step_scores import step_scores
from mftctl.training.tuned_card import write_tuned_card
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
from mftctl.workflows.planning.memory_check import RoomOnGpu, training_on_device

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fine_tune(
    recipe: Recipe,
    source: ModelSource,
    run: Run,
    listener: Listener,
    *,
    resume: bool = False,
    may_replace: bool = False,
) -> FftResult:
    """Fine-tunes a model and returns its folder and its losses per answer token.

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
    an optimizer step.
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
    inputs = prepare_training(
        recipe,
        source.model,
        max_length_tokens=options.max_length_tokens,
        data_fraction=options.data_fraction,
        adapters=True,
        seen=None if options.learn_from == "all" else seen_records(run.folder.parent, source.parents),
        learn_from=options.learn_from,
        retain_weight=options.retain_weight,
        now=run.started,
        listener=listener,
    )
    if inputs.left_out:
        listener.note(
            f"Training records: {len(inputs.train)}; left out because fine-tuning used them: {inputs.left_out}"
        )
    require_same_data(RunInputs.read(run.record.inputs), inputs)
    run.update(inputs={**source.as_inputs(), **inputs.summary()})
    interim = interim_evaluation(recipe, options, inputs, source, run, listener)
    room.require(inputs)
    if is_first():
        save_seen(run.folder, inputs.records)
    model = _trainable_model(inputs.checkpoint, source, options, recipe.seed, listener)
    trained_parameters = sum(item.numel() for item in model.parameters() if item.requires_grad)
    flops = flops_per_token(model)
    trainer = _trainer(model, inputs, recipe, run, listener)
    before = None if options.method == "lora" else inputs.checkpoint
    trainer.retention = make_retention(inputs, options, model, before, seed=recipe.seed, listener=listener)
    records = EncodedRecords(inputs.validation, inputs.validation_examples)
    trainer.scores = step_scores(recipe, "fft", options, inputs, records, run, listener)
    try:
        with stop_on_signal(listener) as stop:
            train(trainer, run.training, stop, patience=options.patience, resume=resume, interim=interim)
    finally:
        if options.has_8bit_moments:
            forget_8bit_overrides()
    saved = _save_trained(trainer.trained_model(), inputs, source, run, options, may_replace=may_replace)
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
    )


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
    checkpoint: Path, source: ModelSource, options: FftOptions, seed: int, listener: Listener
) -> PreTrainedModel | PeftModel:
    """The model with the parameters that the method trains set to trainable."""
    if options.method == "lora":
        if spreads_parameters():
            raise ConfigError(
                "LoRA trains too few weights to be worth sharding across processes.",
                key="fft.method",
                expected="a method other than lora under DeepSpeed or FSDP",
                actual="lora",
                hint="recipes/accelerate/ddp.yaml",
            )
        return _with_adapter(checkpoint, source, options, seed)
    # Updates are too small for bf16, so weights stay in fp32 or are stochastically rounded.
    dtype = torch.bfloat16 if options.low_memory else torch.float32
    if shares_weights():
        model = load_to_share(checkpoint, dtype=dtype, note=listener.note)
    else:
        model = load_model(checkpoint, dtype=dtype)
    if options.method == "hft":
        freeze_half(model, seed)
    return model


def _with_adapter(checkpoint: Path, source: ModelSource, options: FftOptions, seed: int) -> PeftModel:
    """A frozen model, in its compute dtype or in 4 bits per weight, with an adapter in fp32."""
    from mftctl.masking.checkpoints.adapters import load_adapter
    from mftctl.masking.checkpoints.quantization import load_quantized
    from mftctl.training.updates.lora import add_adapter

    dtype, device = frozen_dtype(options.precision), best_device()
    quantize = options.quantize is not None
    if is_adapter(checkpoint):
        with gpu_failures("loading the model"):
            adapted = load_adapter(checkpoint, dtype=dtype, trainable=True, quantize=quantize, device=device)
            return adapted.to(device)
    if quantize:
        with gpu_failures("loading the model"):
            return add_adapter(load_quantized(checkpoint, device), options, base=source.model, seed=seed)
    return add_adapter(load_model(checkpoint, dtype=dtype), options, base=source.model, seed=seed)


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
        bf16=uses_bf16(options.precision) and not options.low_memory,  # whose weights are in bf16 already
    )
    arguments.load_best_model_at_end = options.keep == "best"
    arguments.optim = optimizer_name(options, arguments.device)
    trainer = UpdateTrainer(model, arguments, inputs.train, inputs.validation, inputs.tokenizer, listener)
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


def _finished(model: PreTrainedModel | PeftModel, checkpoint: Path, options: FftOptions) -> PreTrainedModel | PeftModel:
    """The model to write, in the requested dtype; for LoRA only the adapter, unless the merged model is requested."""
    dtype = _DTYPES.get(options.save_dtype) or stored_dtype(checkpoint)
    if options.method == "lora":
        if not options.merge:
            return model
        from mftctl.training.updates.lora import merge_adapter

        model = merge_adapter(cast("PeftModel", model), dtype)
    whole = cast("PreTrainedModel", model)
    if options.low_memory:
        whole.to("cpu")  # type: ignore[arg-type] # the GPU that held the training may lack memory for wider weights
    whole.to(dtype)  # type: ignore[arg-type]
    return whole


def _lora_files(model: PeftModel, inputs: TrainingInputs, options: FftOptions) -> dict[str, str]:
    """Text files written with LoRA weights: a model card, and for an adapter how its base was quantised."""
    from mftctl.masking.checkpoints.quantization import QUANTIZATION, QUANTIZED_FILE, has_quantized_base
    from mftctl.training.tuned_card import write_lora_card

    checkpoint = inputs.checkpoint
    quantized = options.quantize is not None or (is_adapter(checkpoint) and has_quantized_base(checkpoint))
    held = "nf4 with double quantisation, computing in bf16" if quantized else str(frozen_dtype(options.precision))[6:]
    card = write_lora_card(
        cast("LoraConfig", model.peft_config["default"]),
        merged=options.merge,
        held=held,
        quantized=quantized,
        template=inputs.template_text(),
    )
    return {"README.md": card, **({QUANTIZED_FILE: QUANTIZATION} if quantized and not options.merge else {})}


@dataclass(frozen=True, slots=True)
class GoesWith:
    """Files and settings written along with weights and tokenizer.

    Attributes:
        beside: Text files by name; they replace files of the same name written by libraries.
        origin: How the model was produced.
        checkpoint: The checkpoint it was produced from.
        stop_ids: Tokens that end an answer.
    """

    beside: Mapping[str, str]
    origin: ModelOrigin
    checkpoint: Path
    stop_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Saved:
    """Location of a saved model.

    Attributes:
        folder: Its folder.
        refused: Reason why it is not at the run's output path; None if it is, or if no path was given.
    """

    folder: Path
    refused: str | None = None


def _save_trained(
    model: PreTrainedModel | PeftModel | None,
    inputs: TrainingInputs,
    source: ModelSource,
    run: Run,
    options: FftOptions,
    *,
    may_replace: bool,
) -> _Saved:
    """Writes the trained model with its card; a process that does not hold it only returns its folder."""
    if model is None:
        return _Saved(Path(run.record.output or run.folder / "model"))
    state = fine_tuned_state(source.state, options)
    if options.method == "lora":
        beside = _lora_files(cast("PeftModel", model), inputs, options)
    else:
        beside = {"README.md": write_tuned_card(state, base=source.model, template=inputs.template_text())}
    finished = _finished(model, inputs.checkpoint, options)
    goes_with = GoesWith(
        beside,
        origin_of(state, source.model, source.origin),
        whole_checkpoint(inputs.checkpoint),
        sorted(turn_stops(inputs.tokenizer).token_ids),
    )
    return _save(finished, inputs.tokenizer, run, goes_with, may_replace=may_replace)


def _save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    goes_with: GoesWith,
    *,
    may_replace: bool,
) -> _Saved:
    """Writes the model to the run's output path, or to the run folder if that path has since been taken."""
    refused = None
    if run.record.output is not None:
        output = Path(run.record.output)
        try:
            save_model(model, tokenizer, output, goes_with, replace=may_replace)
        except OutputError as error:
            refused = str(error)
        else:
            return _Saved(output)
    save_model(model, tokenizer, run.folder / "model", goes_with, replace=True)
    return _Saved(run.folder / "model", refused)


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    goes_with: GoesWith,
    *,
    replace: bool = False,
) -> None:
    """Writes a checkpoint with its tokenizer, whole or not at all.

    Args:
        model: The model to write.
        tokenizer: Its tokenizer.
        folder: New or empty, unless a model written by mftctl is to be replaced.
        goes_with: What else to write.
        replace: Whether to replace such a model.

    Raises:
        OutputError: The folder holds something that may not be replaced.
        StorageError: The model cannot be written.
    """
    try:
        with (
            known_failures(folder),
            atomic_folder(folder, permit_folder(Kind.MODEL, replace=replace)) as temporary,
        ):
            with quiet_transformers():
                model.save_pretrained(str(temporary))
            tokenizer.save_pretrained(temporary)
            if isinstance(model, PreTrainedModel):
                parts = parts_left_out(goes_with.checkpoint, model)
                if parts:
                    carry_over(goes_with.checkpoint, temporary, parts)
                name_stops(temporary, goes_with.stop_ids)
            for name, text in goes_with.beside.items():
                (temporary / name).write_text(text, encoding="utf-8")
            write_marker(temporary, Kind.MODEL, goes_with.origin.as_document())
    except SafetensorError as error:  # also raised if the disk is full
        raise StorageError(
            "The model could not be written.", path=folder, actual=str(error), hint="free some space"
        ) from error
