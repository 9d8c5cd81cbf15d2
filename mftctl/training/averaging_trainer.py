"""The part of the trainer that keeps, validates and saves running averages of what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mftctl.experiments.training_options import TrainingOptions
from mftctl.training.step_trainer import StepTrainer
from mftctl.training.weight_averages import WeightAverages

AVERAGE_LOSSES = "average_losses"
"""Key of the log entry with the validation loss of each average, by horizon."""

LOWEST_LOSS = "lowest_loss"
"""Metric that selects the best step: the lowest of the losses of the current values and all averages."""


class AveragingTrainer(StepTrainer):
    """A Trainer that can keep running averages of what it trains, as candidates for the best state.

    A checkpoint holds each average in a folder of its own, written and read as the trained state itself is.

    Attributes:
        averages: The averages; None to keep none.
    """

    averages: WeightAverages | None = None

    def keep_averages(self, options: TrainingOptions, steps: int) -> None:
        """Keeps the averages that the options ask for.

        Args:
            options: Options of the training.
            steps: Optimizer steps of the training.
        """
        if options.average == "none":
            return
        device = torch.device("cpu") if options.average_device == "cpu" else None
        self.averages = WeightAverages(options.average_horizons, steps, self.args.seed, device)
        self.args.metric_for_best_model = f"eval_{LOWEST_LOSS}"
        self.add_callback(_Averaging(self))

    def measure_averages(self, loss: Callable[[], float]) -> dict[str, float]:
        """The validation loss of each average, by horizon; empty before the first step.

        Args:
            loss: Measures the model as it is.
        """
        if self.averages is None or self.state.global_step == 0:
            return {}
        return {str(horizon): loss() for horizon in self._averaged(self.averages)}

    def _averaged(self, averages: WeightAverages) -> Iterator[float]:
        """The horizon of each average, while the model holds that average instead of its current values."""
        for index, horizon in enumerate(averages.horizons):
            with averages.exchanged(index, self.trained_values(), self._refresh):
                yield horizon

    def trained_values(self) -> list[torch.Tensor]:
        """The tensors that the optimizer updates in this process."""
        if self.sharded_model is not None:
            return self.sharded_model.local_values()
        model: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        return [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]

    def _refresh(self) -> None:
        if self.sharded_model is not None:
            self.sharded_model.refresh()

    def kept_horizon(self) -> float | None:
        """The horizon of the average that is kept; None if the trained values themselves are."""
        line = self._kept_line()
        if line is None:
            return None
        losses: dict[float | None, float] = {None: line["eval_loss"]}
        losses |= {float(horizon): loss for horizon, loss in line[AVERAGE_LOSSES].items()}
        return min(losses, key=lambda horizon: nan_last(losses[horizon]))

    def _kept_line(self) -> dict[str, Any] | None:
        """The log entry of the validation at the step that is kept; None if no average was measured there."""
        lines: list[dict[str, Any]] = [line for line in self.state.log_history if "eval_loss" in line]
        if self.args.load_best_model_at_end:
            lines = [line for line in lines if line["step"] == self.state.best_global_step]
        return lines[-1] if lines and AVERAGE_LOSSES in lines[-1] else None

    def take_kept(self) -> None:
        """Replaces the model's values, those of the step that is kept, with an average if that is kept instead."""
        horizon = self.kept_horizon()
        if self.averages is None or horizon is None:
            return
        if self.args.load_best_model_at_end:
            self._load_from_checkpoint(str(_average_folder(Path(str(self.state.best_model_checkpoint)), horizon)))
        else:
            self.averages.exchange(self.averages.horizons.index(horizon), self.trained_values(), self._refresh)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained state and its averages."""
        super().save_model(output_dir, _internal_call)
        if self.averages is not None and output_dir is not None:
            for horizon in self._averaged(self.averages):
                super().save_model(str(_average_folder(Path(output_dir), horizon)), _internal_call)

    def load_averages(self, checkpoint: Path) -> None:
        """Reads the averages of a checkpoint."""
        if self.averages is not None:
            for horizon in self._averaged(self.averages):
                self._load_from_checkpoint(str(_average_folder(checkpoint, horizon)))


def _average_folder(checkpoint: Path, horizon: float) -> Path:
    # One level further down: peft takes folders in a checkpoint for adapters of the model.
    return checkpoint / "averages" / str(horizon)


def lowest_loss(line: Mapping[str, Any]) -> float:
    """The lowest validation loss in a log entry, of the trained values and their averages."""
    losses: list[float] = [line["eval_loss"], *line.get(AVERAGE_LOSSES, {}).values()]
    return min(losses, key=nan_last)


def nan_last(loss: float) -> float:
    """A loss as a sorting key under which NaN is the worst."""
    return math.inf if math.isnan(loss) else loss


class _Averaging(TrainerCallback):
    """Updates the averages after each step."""

    def __init__(self, trainer: AveragingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the averages of a resumed training."""
        if state.global_step > 0:
            self._trainer.load_averages(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Includes the values after a step."""
        if self._trainer.averages is not None:
            self._trainer.averages.update(self._trainer.trained_values(), state.global_step)
