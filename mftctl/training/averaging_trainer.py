"""The part of the trainer that keeps, validates and saves running averages of what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mftctl.errors import DeviceMemoryError
from mftctl.experiments.training_options import TrainingOptions
from mftctl.runtime.memory import available_bytes
from mftctl.runtime.processes import local_world_size, spreads_parameters
from mftctl.text import counted
from mftctl.training.candidates import Candidate, best_candidate, logged_candidates
from mftctl.training.step_trainer import StepTrainer
from mftctl.training.weight_averages import WeightAverages


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

        Raises:
            DeviceMemoryError: Main memory, where averages of a GPU's training are to be held, is too small for them.
        """
        if options.average == "none":
            return
        device = torch.device("cpu") if options.average_device == "cpu" else None
        if device is not None and self.args.device.type != "cpu":
            self._require_main_memory(options)
        self.averages = WeightAverages(options.average_horizons, steps, self.args.seed, device)
        self.add_callback(_Averaging(self))

    def _require_main_memory(self, options: TrainingOptions) -> None:
        model: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        trained = sum(item.numel() * item.element_size() for item in model.parameters() if item.requires_grad)
        horizons = options.average_horizons
        # Each process on this machine holds averages of all parameters, or of its shard.
        copies = 1 if spreads_parameters() else local_world_size()
        needed, free = len(horizons) * trained * copies, available_bytes()
        if needed > free:
            raise DeviceMemoryError(
                "Main memory is too small for the running averages.",
                key="average_device",
                expected=f"{needed / 1e9:.1f} GB free for {counted(len(horizons), 'average')}",
                actual=f"{free / 1e9:.1f} GB",
                hint="fewer average_horizons, --low-memory, or --average none",
            )

    def measure_candidates(self, measured: Callable[[float | None], Candidate]) -> list[Candidate]:
        """The trained values and, after the first step, each average.

        Args:
            measured: Measures the model as it is, for the given horizon.
        """
        candidates = [measured(None)]
        if self.averages is not None and self.state.global_step > 0:
            candidates += [measured(horizon) for horizon in self._averaged(self.averages)]
        return candidates

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

    def kept_candidate(self) -> Candidate | None:
        """The candidate that is kept: the best one of the best step, or of the last; None without a validation."""
        if self.args.load_best_model_at_end:
            return None if self.state.best_global_step is None else self.candidate_at(self.state.best_global_step)
        return self.candidate_at(None)

    def candidate_at(self, step: int | None) -> Candidate | None:
        """The best candidate of the validation after a step, or of the last validation; None if there was none."""
        lines: list[dict[str, Any]] = [line for line in self.state.log_history if "eval_loss" in line]
        lines = [line for line in lines if step is None or line["step"] == step]
        return best_candidate(logged_candidates(lines[-1])) if lines else None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best_step, now = self.state.best_global_step, self.candidate_at(None)
        best = self.candidate_at(best_step) if best_step is not None and self.state.best_metric is not None else None
        if now is not None and best is not None and now.rank == best.rank and now.loss < best.loss:
            self.state.best_metric = math.inf  # of equal scores, that with the lower loss is the best
        return bool(super()._determine_best_metric(metrics, trial))

    def take_kept(self) -> None:
        """Replaces the model's values, those of the step that is kept, with an average if that is kept instead."""
        kept = self.kept_candidate()
        if self.averages is None or kept is None or kept.horizon is None:
            return
        horizon = kept.horizon
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


class _Averaging(TrainerCallback):
    """Updates the averages after each step."""

    def __init__(self, trainer: AveragingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the averages, or reads those of a resumed training."""
        if self._trainer.averages is not None:
            self._trainer.averages.start(self._trainer.trained_values())
        if state.global_step > 0:
            self._trainer.load_averages(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Includes the values after a step."""
        if self._trainer.averages is not None:
            self._trainer.averages.update(self._trainer.trained_values(), state.global_step)
