"""The `mask-train` workflow: learns which weights of a frozen model to remove, and keeps the best mask."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mftctl.config import MaskTrainOptions, Recipe
from mftctl.data.batching import pad_token_id
from mftctl.errors import ConfigError, TrainingError
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.lineage import MASK_STATES, Source
from mftctl.masking.baselines import magnitude_mask, random_mask
from mftctl.masking.bits import Mask, MaskMetadata, TensorRecord, save_mask
from mftctl.masking.checkpoint import checkpoint_names, tensor_digest, tensor_index
from mftctl.masking.layers import Indicator, attach_masks, detach_masks, initial_scores, masked_layers, score_scale
from mftctl.masking.targets import MaskTarget, decoder_layers, find_targets, format_layers, parse_layers
from mftctl.models import load_model, peak_memory_bytes
from mftctl.preparation import TrainingInputs, prepare_training
from mftctl.progress import Listener, Progress
from mftctl.runs import Run, TrainingFolder
from mftctl.training import (
    SftTrainer,
    stop_on_signal,
    total_steps,
    train,
    training_arguments,
    uses_bf16,
    warmup_steps,
)

_SCORES_FILE = "scores.safetensors"


@dataclass(frozen=True, slots=True)
class LearnedMask:
    """A mask in memory, and what validation says of it.

    Attributes:
        keep: Bool keep mask of each target, by module name, on the CPU.
        unmasked_loss: Validation loss per answer token without a mask.
        start_loss: The same with the mask of the initial scores.
        best_loss: The same with this mask.
        best_step: The optimizer step it was found at; 0 is the start.
        steps: Optimizer steps taken.
        tokens: Tokens trained on.
        learning_rate: The peak learning rate; the largest where it differs between tensors. None without training.
    """

    keep: dict[str, torch.Tensor]
    unmasked_loss: float
    start_loss: float
    best_loss: float
    best_step: int = 0
    steps: int = 0
    tokens: int = 0
    learning_rate: float | None = None


def mask_train(recipe: Recipe, source: Source, run: Run, listener: Listener, *, resume: bool = False) -> dict[str, Any]:
    """The result of learning a mask: where its file is, what it removes, and its losses per answer token.

    Args:
        recipe: With the `mask_train` section, the data and the seed.
        source: The fine-tuned model.
        run: Open run; gets metrics, checkpoints and the mask, which also goes to the run's output if it has one.
        listener: Hears progress.
        resume: Go on from the newest checkpoint of the run.

    Raises:
        MftError: Anything known that can go wrong.

    Source: MFT, section 2, equations 2 to 5; local masks of section 3.2.
    """
    options = recipe.mask_train
    inputs = prepare_training(recipe, source.model, max_length_tokens=options.max_length_tokens)
    run.update(inputs={**source.as_inputs(), **inputs.summary()})
    model = load_frozen_model(inputs, options)
    layers = parse_layers(options.layers or "all", len(decoder_layers(model)[1]))
    targets = find_targets(model, layers, options.target)
    learned = find_mask(
        model,
        targets,
        options,
        inputs,
        run.training,
        listener,
        unmasked_loss=validation_loss(model, inputs, listener),
        seed=recipe.seed,
        resume=resume,
    )
    mask = build_mask(learned.keep, model, inputs.checkpoint, _metadata(recipe, source, run, layers))
    path = run.folder / "mask.bits"
    save_mask(mask, path)
    if run.record.output:
        save_mask(mask, Path(run.record.output))
    shutil.rmtree(run.training.checkpoints, ignore_errors=True)
    if learned.best_loss >= learned.unmasked_loss:
        listener.warn(
            "No mask was better than no mask on the validation data. Use the model without it, "
            "or try other layers (mftctl probe), a smaller ratio or more data."
        )
    return {
        "state": MASK_STATES[options.method],
        "model": source.model,
        "mask": str(path.resolve()),
        "output": run.record.output,
        "layers": format_layers(layers),
        "tensors": len(mask),
        "weights": mask.weights,
        "removed": mask.removed,
        "ratio": mask.ratio,
        "unmasked_loss": learned.unmasked_loss,
        "start_loss": learned.start_loss,
        "best_loss": learned.best_loss,
        "best_step": learned.best_step,
        "steps": learned.steps,
        "tokens": learned.tokens,
        "learning_rate": learned.learning_rate,
        "helps": learned.best_loss < learned.unmasked_loss,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def load_frozen_model(inputs: TrainingInputs, options: MaskTrainOptions) -> PreTrainedModel:
    """The model that stays as it is: fp32, or bf16 where asked for, since its weights are only read."""
    return load_model(inputs.checkpoint, dtype=torch.bfloat16 if uses_bf16(options.precision) else torch.float32)


def find_mask(
    model: PreTrainedModel,
    targets: list[MaskTarget],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    folder: TrainingFolder,
    listener: Listener,
    *,
    unmasked_loss: float,
    seed: int,
    resume: bool,
) -> LearnedMask:
    """The mask that the options ask for, measured against the unmasked model.

    Args:
        model: Unmasked; left unmasked, its weights untouched.
        targets: The projections that carry the mask.
        options: Method, ratio and training options.
        inputs: Encoded data.
        folder: Gets metrics and checkpoints.
        listener: Hears progress.
        unmasked_loss: Validation loss of the unmasked model.
        seed: Decides the random start and the order of the data.
        resume: Go on from the newest checkpoint of the run.

    Raises:
        MftError: Anything known that can go wrong.
    """
    if options.method == "learned":
        return _learn(
            model, targets, options, inputs, folder, listener, unmasked_loss=unmasked_loss, seed=seed, resume=resume
        )
    ratio = options.effective_ratio or 0.0
    keep = {
        target.name: random_mask(target, ratio, seed) if options.method == "random" else magnitude_mask(target, ratio)
        for target in targets
    }
    indicator = Indicator(ratio=None, threshold=0.5)
    attach_masks(model, targets, {name: mask.float() for name, mask in keep.items()}, indicator)
    loss = validation_loss(model, inputs, listener)
    detach_masks(model)
    return LearnedMask({name: mask.cpu() for name, mask in keep.items()}, unmasked_loss, loss, loss)


def build_mask(keep: Mapping[str, torch.Tensor], model: PreTrainedModel, base: Path, metadata: MaskMetadata) -> Mask:
    """The mask of some modules under the names, shapes and digests of the base checkpoint's tensors.

    Args:
        keep: Bool keep mask by module name.
        model: The model in memory.
        base: Its checkpoint folder.
        metadata: What the mask file says about its origin.

    Raises:
        MaskMismatchError: A parameter is not in the checkpoint.
    """
    index = tensor_index(base)
    names = checkpoint_names([f"{name}.weight" for name in keep], index, model.base_model_prefix)
    tensors, records = {}, {}
    for module, bits in keep.items():
        name = names[f"{module}.weight"]
        stored = index[name]
        tensors[name] = bits
        removed = bits.numel() - int(bits.sum())
        records[name] = TensorRecord(stored.shape, removed, tensor_digest(stored), stored.dtype)
    return Mask(tensors, records, metadata)


def auto_learning_rate(travel: float, scale: float, steps: int, warmup: int) -> float:
    """The peak learning rate with which Adam, moving a score by one learning rate a step, goes `travel` scales in all.

    Args:
        travel: Distance in units of `scale`.
        scale: Typical size of the scores at the start.
        steps: Optimizer steps of the linear schedule.
        warmup: Steps of its warm-up.

    Source: PAPERS.md, "Measured in miniature": what matters is (sum of lr over steps) / (1 / sqrt(fan_in)).
    """
    rising = sum(step / warmup for step in range(min(warmup, steps)))
    falling = sum((steps - step) / (steps - warmup) for step in range(warmup, steps))
    return travel * scale / (rising + falling)


class MaskTrainer(SftTrainer):
    """Trains scores: a learning rate that fits each tensor, checkpoints without the frozen weights."""

    learning_rates: Mapping[str, float]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the scores, one parameter group for each learning rate."""
        if self.optimizer is None:
            groups: dict[float, list[torch.nn.Parameter]] = {}
            for name, module in masked_layers(self._masked_model()):
                groups.setdefault(self.learning_rates[name], []).append(module.scores)
            self.optimizer = torch.optim.AdamW(
                [{"params": scores, "lr": rate} for rate, scores in groups.items()],
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def scores(self) -> dict[str, torch.Tensor]:
        """A copy of all scores on the CPU, by module name."""
        return {
            name: module.scores.detach().to("cpu", copy=True).contiguous()
            for name, module in masked_layers(self._masked_model())
        }

    def load_scores(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Puts scores back in place."""
        with torch.no_grad():
            for name, module in masked_layers(self._masked_model()):
                module.scores.copy_(scores[name])

    def _masked_model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.scores(), folder / _SCORES_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_scores(load_file(Path(resume_from_checkpoint) / _SCORES_FILE))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _learn(
    model: PreTrainedModel,
    targets: list[MaskTarget],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    folder: TrainingFolder,
    listener: Listener,
    *,
    unmasked_loss: float,
    seed: int,
    resume: bool,
) -> LearnedMask:
    """Trains the scores; the starting mask is among the candidates for the best."""
    indicator = Indicator(options.effective_ratio, options.threshold, options.ranking)
    attach_masks(model, targets, _start_scores(targets, options, seed), indicator)
    steps = total_steps(len(inputs.train), options)
    rates = {target.name: _learning_rate(target, options, steps) for target in targets}
    arguments = training_arguments(
        folder.checkpoints, options, steps=steps, learning_rate=max(rates.values()), seed=seed, bf16=False
    )
    trainer = MaskTrainer(model, arguments, inputs.train, inputs.validation, inputs.tokenizer, listener)
    trainer.learning_rates = rates
    try:
        with stop_on_signal(listener) as stop:
            train(trainer, folder, stop, patience=options.patience, resume=resume)
        start_loss, best_loss = trainer.start_loss, trainer.state.best_metric
        best_step = trainer.state.best_global_step
        if start_loss is None or best_loss is None or best_step is None:
            raise TrainingError("The training ended without a validation.", path=folder.folder)
        if start_loss <= best_loss:
            trainer.load_scores(_start_scores(targets, options, seed))
            best_loss, best_step = start_loss, 0
        keep = {name: module.keep().cpu() for name, module in masked_layers(model)}
    finally:
        detach_masks(model)
    return LearnedMask(
        keep,
        unmasked_loss,
        start_loss,
        best_loss,
        best_step,
        trainer.state.global_step,
        int(trainer.state.num_input_tokens_seen),
        max(rates.values()),
    )


def _start_scores(targets: list[MaskTarget], options: MaskTrainOptions, seed: int) -> dict[str, torch.Tensor]:
    return {
        target.name: initial_scores(target, options.start, constant=options.start_value, seed=seed)
        for target in targets
    }


def _learning_rate(target: MaskTarget, options: MaskTrainOptions, steps: int) -> float:
    if options.learning_rate != "auto":
        return options.learning_rate
    scale = score_scale(target.module)
    if options.start == "constant":
        scale = abs(options.start_value - (options.threshold or 0.0))
    if scale == 0.0:
        raise ConfigError(
            "learning_rate auto cannot scale to scores that start on the threshold.",
            key="mask_train.learning_rate",
            expected="a number, or a start_value other than the threshold",
            actual=options.start_value,
        )
    return auto_learning_rate(options.travel, scale, steps, warmup_steps(steps, options))


def validation_loss(model: PreTrainedModel, inputs: TrainingInputs, listener: Listener) -> float:
    """The loss per answer token on the validation data, of the model as it is."""
    return mean_loss(
        sample_losses(
            model,
            inputs.validation,
            pad_token_id=pad_token_id(inputs.tokenizer),
            on_progress=lambda done, total: listener.progress(Progress("validating", done, total)),
        )
    )


def _metadata(recipe: Recipe, source: Source, run: Run, layers: list[int]) -> MaskMetadata:
    options = recipe.mask_train
    return MaskMetadata(
        kind="weight",
        base_model=source.model,
        base_revision=recipe.revision,
        method=options.method,
        ratio=options.effective_ratio,
        threshold=options.threshold,
        layers=format_layers(layers),
        seed=recipe.seed,
        run_id=run.name,
    )
