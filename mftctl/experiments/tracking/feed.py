"""Feeds one tracker from a thread of its own, so that neither its speed nor its failures affect the run."""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from mftctl.experiments.run_record import RunStatus
from mftctl.text import first_line

_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET")
_SHORTEST_SECRET = 4
_LOGIN = re.compile(r"://[^/@\s]+@")


class Tracker(Protocol):
    """A tracked run, open in one library.

    Attributes:
        place: Where the user finds it.
    """

    place: str

    def log(self, step: int, values: Mapping[str, float], training: str) -> None:
        """Sends the numbers of one line.

        Args:
            step: The optimizer step.
            values: The numbers by name.
            training: The name of the training if the run has several; empty otherwise.
        """

    def close(self, status: RunStatus, figures: Mapping[str, float]) -> None:
        """Ends the tracked run.

        Args:
            status: How the run ended.
            figures: The numbers of its result; empty unless it finished.
        """


class Feed:
    """Sends everything to one tracker, in order, until it fails.

    Attributes:
        name: The name of the tracker.
        goes_on: Whether the tracked run existed before, so that it has all lines logged before a resumption.

    Args:
        name: The name of the tracker.
        make: Opens the tracked run; called in the feed's thread.
        goes_on: Whether it exists.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], *, goes_on: bool) -> None:
        self.name, self.goes_on = name, goes_on
        self._make = make
        self._work: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[tuple[bool, str]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name=f"mftctl {name}", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[Tracker], None]) -> None:
        """Queues a call of the tracker."""
        self._work.put(work)

    def end(self) -> None:
        """Ends the thread once all calls so far are done."""
        self._work.put(None)

    def ended(self, timeout_seconds: float) -> bool:
        """Waits for the thread and returns whether it has ended."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def tell(self, note: Callable[[str], None], warn: Callable[[str], None]) -> None:
        """Passes on what the thread has to say; called in the main thread, as consoles expect."""
        while not self._messages.empty():
            is_warning, text = self._messages.get()
            (warn if is_warning else note)(text)

    def _send(self) -> None:
        try:
            tracker = self._make()
            self._messages.put((False, f"Tracking: {self.name}, {without_secrets(tracker.place)}"))
            while (work := self._work.get()) is not None:
                work(tracker)
        # Trackers raise errors of their own, of HTTP and database libraries, and of the disk. None of them may end a
        # training, which is worth more than its curves, so that here alone every error is caught.
        except Exception as error:
            self._messages.put((True, failed_text(self.name, error)))


def failed_text(name: str, error: Exception) -> str:
    """Returns the warning for a tracker that failed.

    Args:
        name: The name of the tracker.
        error: Its error.
    """
    return f"--track {name}: nothing more is sent to it, as it failed: {without_secrets(first_line(error))}"


def without_secrets(text: str) -> str:
    """Returns a text without passwords in URLs and without the values of variables such as `WANDB_API_KEY`."""
    for variable, value in os.environ.items():
        if _SECRET.search(variable) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _LOGIN.sub("://***@", text)
