"""Ends a resumed training run that has nothing left to do."""

from __future__ import annotations

from typing import Any

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class EndedBefore(Exception):  # noqa: N818 - not an error
    """A training run was killed after its last checkpoint but before it finished; never leaves `train`."""


class NoStepTooMany(TrainerCallback):
    """Ends a resumed training run that has nothing left to do; the Trainer would take one more step."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises `EndedBefore` if all steps were taken or early stopping had ended the training."""
        out_of_patience = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self._trainer.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if state.global_step >= state.max_steps or out_of_patience:
            raise EndedBefore
