"""What ends a command from outside: a closed terminal and a request to terminate count as Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command beside Ctrl-C."""


def end_as_on_interrupt() -> None:
    """From here on SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, once; further ones are passed over.

    A signal that is ignored stays ignored, such as SIGHUP under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    process = os.getpid()
    received = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != process:  # a forked child ends as it would without this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not received:
            received = True
            raise KeyboardInterrupt

    for number in ENDING:
        if is_heeded(number):
            signal.signal(number, interrupt)


def is_heeded(number: int) -> bool:
    """Whether a signal is not ignored by whoever started this process."""
    return signal.getsignal(number) != signal.SIG_IGN
