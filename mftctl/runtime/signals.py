"""Signals that end a command: hang-up and termination are handled like Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals other than Ctrl-C that end a command."""


def end_as_on_interrupt() -> None:
    """Makes SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, once; further signals are ignored.

    An ignored signal stays ignored, such as SIGHUP under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    process = os.getpid()
    received = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != process:  # a forked child ends as it would without this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not received:
            received = True
            raise KeyboardInterrupt

    for number in ENDING:
        if is_heeded(number):
            signal.signal(number, interrupt)


def is_heeded(number: int) -> bool:
    """Checks that the parent process did not set a signal to be ignored."""
    return signal.getsignal(number) != signal.SIG_IGN
