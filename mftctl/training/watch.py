"""Progress and metrics of a running training."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mftctl.errors import TrainingError
from mftctl.experiments.training_folder import TrainingFolder
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import any_process
from mftctl.runtime.stop_request import StopRequest


class TrainingWatch(TrainerCallback):
    """Shows progress, logs the metrics, and stops on request or when the loss is no longer finite."""

    def __init__(self, listener: Listener, folder: TrainingFolder, stop: StopRequest) -> None:
        self._listener = listener
        self._folder = folder
        self._stop = stop
        self._loss: float | None = None
        self._start_tokens = 0
        self._step_start_seconds = 0.0
        self._step_seconds = 0.0
        self._training_seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remembers the step at which a resumed training run starts."""
        self._start_tokens = int(state.num_input_tokens_seen)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of a step."""
        self._step_start_seconds = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Logs a line of metrics.

        Raises:
            TrainingError: The loss is no longer finite.
        """
        if "train_loss" in (logs or {}):  # the Trainer's summary covers only the steps since it was resumed
            return
        loss = (logs or {}).get("loss")
        timing = {} if loss is None else {"step_seconds": round(self._step_seconds, 6)}
        self._folder.log({"step": state.global_step, **(logs or {}), **timing})
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(
                f"The training loss is no longer finite at step {state.global_step}.",
                path=self._folder.folder,
                expected="a finite loss",
                actual=loss,
                hint="use a lower --lr",
            )
        self._loss = loss

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reports progress and stops the training on request."""
        self._step_seconds = time.monotonic() - self._step_start_seconds  # without the validations between steps
        self._training_seconds += self._step_seconds
        speed = (int(state.num_input_tokens_seen) - self._start_tokens) / max(self._training_seconds, 1e-9)
        self._listener.progress(Progress("training", state.global_step, state.max_steps, self._loss, speed))
        # One answer for all processes, even if a signal reaches one of them in the meantime.
        stop = any_process(self._stop.requested)
        self._stop.requested |= stop
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last state is a candidate too, regardless of the interval
        elif stop:
            control.should_save = True
            control.should_training_stop = True
