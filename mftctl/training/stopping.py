"""Ends a training run before its last step, on request or because nothing is left to do."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mftctl.progress import Listener
from mftctl.runtime.signals import ENDING, is_heeded


class StopRequest:
    """Records that the user asked to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_on_signal(listener: Listener) -> Iterator[StopRequest]:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a stop request; a second Ctrl-C ends the program at once.

    Args:
        listener: Receives a note that the current step is finished and saved first.

    Yields:
        The stop request.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def remember(number: int, frame: object) -> None:
        if stop.requested:
            if number in ENDING:  # torchrun forwards interrupts as SIGTERM; a terminal closes once
                return
            raise KeyboardInterrupt
        stop.requested = True
        listener.note("Stopping after this step; the state will be saved. Press Ctrl-C again to stop at once.")

    heeded = [signal.SIGINT, *filter(is_heeded, ENDING)]
    before = {number: signal.signal(number, remember) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
