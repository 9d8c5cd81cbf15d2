"""Trains the scores of a frozen model and keeps the best mask that they select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mftctl.errors import TrainingError
from mftctl.evaluation.losses import RecordLoss, mean_loss
from mftctl.experiments.mask_results import Flips
from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.results import RetainedLosses
from mftctl.masking.baselines import magnitude_mask, random_mask, row_mask
from mftctl.masking.checkpoints.outlines import Rows, StoredWeights
from mftctl.masking.full_tensor import whole_shape
from mftctl.masking.layers import attach_masks, detach_masks, keep_no_products, masked_layers
from mftctl.masking.soft_mask import LEAST_TEMPERATURE, SoftRule
from mftctl.masking.targets import MaskTarget
from mftctl.runtime.peak_memory import free_unreachable
from mftctl.runtime.stop_request import stop_on_signal
from mftctl.training.held_out import masked, validation_loss
from mftctl.training.loop import step_size, train, training_arguments
from mftctl.training.mask_search import FoundMask, MaskSearch
from mftctl.training.score_trainer import ScoreTrainer

_USUAL_EPSILON = 1e-8
_SMALL_EPSILON = 1e-20
_SOFT_SHARE: Final = 0.5
"""Share of the steps of a hardened soft mask at temperature 1."""


def learn_mask(search: MaskSearch) -> FoundMask:
    """Trains scores and returns the best mask, with the initial mask among the candidates, or the last one.

    Args:
        search: Has options for the method `learned`.

    Raises:
        Interrupted: The user stopped it; the state is saved.
        TrainingError: The loss is no longer finite, or another process was lost.
        DeviceMemoryError: The GPU runs out of memory.
        StorageError: A checkpoint cannot be written.

    Source: MFT, section 2, equations 2 to 5.
    """
    try:
        return _train(search)
    finally:
        detach_masks(search.model)
        # A trainer contains reference cycles; without this, its scores and moments would stay in memory for some time.
        free_unreachable()


def _train(search: MaskSearch) -> FoundMask:
    """Trains with the scores attached to the model; `learn_mask` detaches them."""
    model, options = search.model, search.options
    attach_masks(model, search.targets, _start_scores(search), search.rules, search.base)
    if options.low_memory:
        keep_no_products(model)
    trainer = _trainer(search)
    if search.weights is None:
        _start_from_the_unmasked_model(trainer, search)
    with stop_on_signal(search.listener) as stop:
        train(
            trainer,
            search.folder,
            stop,
            patience=options.patience,
            resume=search.resume,
            interim=search.interim,
        )
    start_loss, kept = trainer.start_loss, trainer.kept_candidate()
    best_step = trainer.state.best_global_step if options.keep == "best" else trainer.state.global_step
    if start_loss is None or kept is None or best_step is None:
        raise TrainingError("The training ended without a validation.", path=search.folder.folder)
    unmasked_loss = mean_loss(trainer.unmasked_losses) if search.unmasked_loss is None else search.unmasked_loss
    confirming = None
    if search.confirming and kept.loss < unmasked_loss:
        confirming = _confirming_losses(trainer, search, best_step)
    flipped = trainer.flipped_since_start()
    modules = dict(masked_layers(model))
    stored = trainer.start_masks if best_step == 0 else trainer.stored_masks()
    masks = {name: modules[name].rule.mask(one, whole_shape(modules[name].scores)) for name, one in stored.items()}
    return FoundMask(
        {name: codes != 0 for name, codes in masks.items()} if options.harden else masks,
        unmasked_loss,
        start_loss,
        kept.loss,
        best_step,
        trainer.state.global_step,
        int(trainer.state.num_input_tokens_seen),
        trainer.args.learning_rate,
        summarise_flips(search.folder.metrics(), flipped),
        confirming,
        kept.horizon,
        search.unmasked_score,
        kept.score,
        _retained_losses(search, trainer.unmasked_retained_loss, kept.retained_loss),
        kept.rewards,
    )


def _start_from_the_unmasked_model(trainer: ScoreTrainer, search: MaskSearch) -> None:
    """Gives the trainer what is already known of the state before the first step."""
    start = trainer.start_masks = trainer.stored_masks()
    removes_none = all(
        module.rule.keeps_all(start[name], module.scores.numel()) for name, module in masked_layers(search.model)
    )
    trainer.known_start_loss = search.unmasked_loss if removes_none else None
    trainer.known_start_score = search.unmasked_score
    trainer.known_start_rewards = search.unmasked_rewards
    trainer.unmasked_retained_loss = search.unmasked_retained_loss


def _confirming_losses(
    trainer: ScoreTrainer, search: MaskSearch, best_step: int
) -> tuple[Sequence[RecordLoss], Sequence[RecordLoss]]:
    """The losses of the confirmation records without and with the best mask."""
    if best_step == 0:  # the model holds the last state
        for name in trainer.masked():
            trainer.load_scores({name: _start_rows(search)(f"{name}.scores", 0, None)})
    return trainer.losses(search.confirming, masked=False), trainer.losses(search.confirming, masked=True)


def _retained_losses(search: MaskSearch, unmasked: float | None, kept: float | None) -> RetainedLosses | None:
    """The losses on retained data without and with the mask; None without such data."""
    if search.retention is None or unmasked is None or kept is None:
        return None
    return RetainedLosses(records=search.retention.records, start_loss=unmasked, kept_loss=kept)


def _trainer(search: MaskSearch) -> ScoreTrainer:
    """The trainer of the model's scores, with a learning rate for each tensor."""
    options, inputs = search.options, search.inputs
    start = search.start
    rates = {target.name: start.learning_rate(target) for target in search.targets}
    arguments = training_arguments(
        search.folder.checkpoints,
        options,
        steps=start.steps,
        learning_rate=max(rates.values()),
        seed=search.seed,
        bf16=False,
    )
    trainer = ScoreTrainer(search.model, arguments, inputs.train, inputs.validation, inputs.tokenizer, search.listener)
    arguments.load_best_model_at_end = options.keep == "best"
    trainer.step_size = step_size(options)
    trainer.keep_averages(options, start.steps)
    trainer.scores = search.scores
    trainer.retention = search.retention
    trainer.objective = search.objective
    if options.harden:
        trainer.add_callback(Hardening(search.model, start.steps))
    trainer.learning_rates = rates
    trainer.low_memory = options.low_memory
    trainer.rows = None if search.weights is None else _start_rows(search)
    # The gradient of a score is proportional to the weight, or to its change, so the usual epsilon would hold back the
    # scores of the smallest weights, which cost least to remove, and those of almost all changes.
    has_small_gradients = options.start in ("weights", "identity") or search.base is not None
    trainer.epsilon = _SMALL_EPSILON if has_small_gradients else _USUAL_EPSILON
    return trainer


def summarise_flips(metrics: Sequence[MetricsLine], changed: int) -> Flips:
    """Summary of mask flips: entries flipped per round, and expected and measured changes of the loss.

    Args:
        metrics: Metrics of the training.
        changed: Number of entries that differ between start and end.
    """
    rounds = [line.without_epoch() for line in metrics if line.promised is not None]
    turned = sum((line.removed or 0) + (line.restored or 0) for line in rounds)
    return Flips(
        turned=turned,
        undone_share=1 - changed / turned if turned else 0.0,
        promised=sum(line.promised or 0.0 for line in rounds),
        measured=sum(line.measured or 0.0 for line in rounds),
        rounds=rounds,
    )


def _start_scores(search: MaskSearch) -> dict[str, torch.Tensor]:
    options = search.options
    dtype = torch.bfloat16 if options.low_memory else torch.float32
    if search.weights is not None:
        return {target.name: torch.empty_like(target.weight, dtype=dtype) for target in search.targets}
    start = search.start
    return {target.name: start.scores(target, base=search.base_of(target)).to(dtype) for target in search.targets}


def _start_rows(search: MaskSearch) -> Rows:
    """The values of a masked model that was built without them: its weights and the initial scores."""
    weights, options = cast("StoredWeights", search.weights), search.options
    scored = {f"{target.name}.scores": target for target in search.targets}

    def rows(name: str, first: int, last: int | None) -> torch.Tensor:
        if name not in scored:
            return weights.rows(name, first, last)
        target = scored[name]
        values = weights.rows(target.weight_name) if options.start == "weights" else None
        scores = search.start.scores(target, torch.empty(target.weight.shape) if values is None else values)
        return scores[first:last].clone()

    return rows


def find_mask(search: MaskSearch) -> FoundMask:
    """The mask that the options ask for, compared with the unmasked model.

    Raises:
        TrainingError: The loss is no longer finite.
        DeviceMemoryError: The GPU runs out of memory.
        Interrupted: The user stopped the run; its state is saved.
    """
    if search.options.method == "learned":
        return learn_mask(search)
    keep = {target.name: _baseline(target, search) for target in search.targets}
    with masked(search.targets, keep, base=search.base):
        loss = validation_loss(search.model, search.inputs, search.listener)
        retained = None if search.retention is None else search.retention.loss(search.model)
    unmasked_loss = cast("float", search.unmasked_loss)  # None only for a model without values
    return FoundMask(
        {name: bits.cpu() for name, bits in keep.items()},
        unmasked_loss,
        loss,
        loss,
        retained=_retained_losses(search, search.unmasked_retained_loss, retained),
    )


def _baseline(target: MaskTarget, search: MaskSearch) -> torch.Tensor:
    ratio, pattern = search.ratio_of(target) or 0.0, search.options.blocks
    if pattern is not None:
        pattern.require_blocks(target.fan_in, target.name)
    if search.options.method == "random":
        return random_mask(target, ratio, search.seed, pattern)
    if search.options.unit == "row":
        return row_mask(target, ratio)
    return magnitude_mask(target, ratio, search.base_of(target), pattern)


class Hardening(TrainerCallback):
    """Lets the temperature of a soft mask fall, so that its multipliers end as 0 or 1.

    Between steps it is 0, so that what is measured and kept is a hard mask.

    Args:
        model: A model with soft masks.
        steps: Optimizer steps of the training.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self._model = model
        self._steps = steps
        self._set(0.0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the temperature of the step."""
        self._set(temperature(state.global_step, self._steps))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hardens the mask."""
        self._set(0.0)

    def _set(self, value: float) -> None:
        for _, module in masked_layers(self._model):
            if isinstance(module.rule, SoftRule):
                module.rule = replace(module.rule, temperature=value)


def temperature(step: int, steps: int) -> float:
    """The temperature of a step: 1 in the first half, then falling by the same factor in each step to the least one.

    Args:
        step: Number of steps before it.
        steps: Number of all steps.
    """
    soft = _SOFT_SHARE * steps
    progress = max(step + 1 - soft, 0.0) / (steps - soft)
    return float(LEAST_TEMPERATURE**progress)
