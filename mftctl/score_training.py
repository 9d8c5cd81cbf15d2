"""Trains the scores of a frozen model, and keeps the best mask that they select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mftctl.config import MaskTrainOptions
from mftctl.errors import ConfigError, TrainingError
from mftctl.masking.layers import Indicator, attach_masks, detach_masks, initial_scores, masked_layers, score_scale
from mftctl.masking.targets import MaskTarget
from mftctl.preparation import TrainingInputs
from mftctl.progress import Listener
from mftctl.runs import TrainingFolder
from mftctl.training import (
    SftTrainer,
    schedule_factors,
    stop_on_signal,
    total_steps,
    train,
    training_arguments,
)

_SCORES_FILE = "scores.safetensors"


@dataclass(frozen=True, slots=True)
class MaskSearch:
    """What a search for a mask works on.

    Attributes:
        model: Unmasked; left unmasked, its weights untouched.
        targets: The projections that carry the mask.
        options: Method, ratio and training options.
        inputs: Encoded data.
        folder: Gets metrics and checkpoints.
        listener: Hears progress.
        unmasked_loss: Validation loss of the unmasked model.
        seed: Decides the random start and the order of the data.
        resume: Go on from the newest checkpoint of the folder.
    """

    model: PreTrainedModel
    targets: list[MaskTarget]
    options: MaskTrainOptions
    inputs: TrainingInputs
    folder: TrainingFolder
    listener: Listener
    unmasked_loss: float
    seed: int
    resume: bool

    @property
    def indicators(self) -> dict[str, Indicator]:
        """The rule from scores to mask of each target."""
        options = self.options
        return {
            target.name: Indicator(options.ratio_of(target.projection), options.threshold, options.ranking)
            for target in self.targets
        }


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

    def figures(self) -> dict[str, Any]:
        """The losses and the training, for a run's result."""
        return {
            "unmasked_loss": self.unmasked_loss,
            "start_loss": self.start_loss,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "steps": self.steps,
            "tokens": self.tokens,
            "learning_rate": self.learning_rate,
            "helps": self.best_loss < self.unmasked_loss,
        }


def learn_mask(search: MaskSearch) -> LearnedMask:
    """The best mask of a training of scores; the starting mask is among the candidates.

    Args:
        search: With options for the method `learned`.

    Raises:
        Interrupted: The user stopped it; the state is saved.
        MftError: Anything known that can go wrong.

    Source: MFT, section 2, equations 2 to 5.
    """
    model, options = search.model, search.options
    attach_masks(model, search.targets, _start_scores(search), search.indicators)
    steps = total_steps(len(search.inputs.train), options)
    rates = {target.name: _learning_rate(target, options, steps) for target in search.targets}
    arguments = training_arguments(
        search.folder.checkpoints,
        options,
        steps=steps,
        learning_rate=max(rates.values()),
        seed=search.seed,
        bf16=False,
    )
    trainer = MaskTrainer(
        model, arguments, search.inputs.train, search.inputs.validation, search.inputs.tokenizer, search.listener
    )
    trainer.learning_rates = rates
    try:
        with stop_on_signal(search.listener) as stop:
            train(trainer, search.folder, stop, patience=options.patience, resume=search.resume)
        start_loss, best_loss = trainer.start_loss, trainer.state.best_metric
        best_step = trainer.state.best_global_step
        if start_loss is None or best_loss is None or best_step is None:
            raise TrainingError("The training ended without a validation.", path=search.folder.folder)
        if start_loss <= best_loss:
            trainer.load_scores(_start_scores(search))
            best_loss, best_step = start_loss, 0
        keep = {name: module.keep().cpu() for name, module in masked_layers(model)}
    finally:
        detach_masks(model)
    return LearnedMask(
        keep,
        search.unmasked_loss,
        start_loss,
        best_loss,
        best_step,
        trainer.state.global_step,
        int(trainer.state.num_input_tokens_seen),
        max(rates.values()),
    )


def auto_learning_rate(travel: float, scale: float, factors: Sequence[float]) -> float:
    """The peak learning rate with which Adam, moving a score by one learning rate a step, goes `travel` scales in all.

    Args:
        travel: Distance in units of `scale`.
        scale: Typical size of the scores at the start.
        factors: The schedule: each step's share of the peak learning rate.

    Source: PAPERS.md, "Measured in miniature": what matters is (sum of lr over steps) / (1 / sqrt(fan_in)).
    """
    return travel * scale / sum(factors)


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


def _start_scores(search: MaskSearch) -> dict[str, torch.Tensor]:
    options = search.options
    return {
        target.name: initial_scores(target, options.start, constant=options.start_value, seed=search.seed)
        for target in search.targets
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
    return auto_learning_rate(options.travel, scale, schedule_factors(steps, options))
