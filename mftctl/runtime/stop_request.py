"""Requests by the user to stop a training, which ends after its current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mftctl.progress import Listener
from mftctl.runtime.signals import ENDING, is_heeded


class StopRequest:
    """Records that the user asked to stop."""

    def __init__(self) -> None:
        self.requested = False


_late_stop = StopRequest()


def take_late_stop() -> bool:
    """True, once, if the user asked to stop while a training was finishing, so that it was too late to stop it."""
    requested, _late_stop.requested = _late_stop.requested, False
    return requested


def note_late_stop() -> None:
    """Records that the user asked to stop work that then finished."""
    _late_stop.requested = True


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
        if stop.requested:
            note_late_stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
