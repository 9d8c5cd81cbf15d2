"""Feeds one tracker from a thread of its own, so that neither its speed nor its failures affect the run."""

from __future__ import annotations

import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.tracking.state import TrackerState
from mftctl.experiments.tracking.values import line_values
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
    """Sends the lines of a run to one tracker, in order and each once, until the tracker fails.

    Attributes:
        name: The name of the tracker.

    Args:
        name: The name of the tracker.
        state: What is remembered of the run in it.
        make: Opens the tracked run; called in the feed's thread.
    """

    def __init__(self, name: str, state: TrackerState, make: Callable[[TrackerState], Tracker]) -> None:
        self.name = name
        self._state, self._make = state, make
        self._repeated: Counter[tuple[object, ...]] = Counter()
        self._work: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[tuple[bool, str]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name=f"mftctl {name}", daemon=True)
        self._thread.start()

    def rewind(self, training: str, kept: Sequence[Mapping[str, Any]], dropped: Sequence[Mapping[str, Any]]) -> None:
        """Sends what the tracker lacks of the lines before a resumption, and remembers what it has of those after.

        Args:
            training: The name of the training.
            kept: The lines up to the step at which the training is resumed.
            dropped: The lines after it, which are logged again.
        """
        sent = self._state.sent.get(training, 0)
        self._work.put(lambda tracker: self._state.sent.update({training: min(sent, len(kept))}))
        for line in kept[sent:]:
            self.log(training, line)
        self._repeated.update(_identity(training, line) for line in dropped[: max(0, sent - len(kept))])

    def log(self, training: str, line: Mapping[str, Any]) -> None:
        """Sends a line, unless it repeats one that the tracker has."""
        step, values, identity = line["step"], line_values(line), _identity(training, line)
        is_repeated = self._repeated[identity] > 0
        if is_repeated:
            self._repeated[identity] -= 1

        def send(tracker: Tracker) -> None:
            if not is_repeated:
                tracker.log(step, values, training)
            self._state.sent[training] = self._state.sent.get(training, 0) + 1
            self._state.save()

        self._work.put(send)

    def end(self, status: RunStatus, figures: Mapping[str, float]) -> None:
        """Ends the tracked run, and the thread, once all lines so far are sent."""
        self._work.put(lambda tracker: tracker.close(status, figures))
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
            tracker = self._make(self._state)
            self._messages.put((False, f"Tracking: {self.name}, {without_secrets(tracker.place)}"))
            while (work := self._work.get()) is not None:
                work(tracker)
        # Trackers raise errors of their own, of HTTP and database libraries, and of the disk. None of them may end a
        # training, which is worth more than its curves, so that here alone every error is caught.
        except Exception as error:
            self._messages.put((True, failed_text(self.name, error)))


def _identity(training: str, line: Mapping[str, Any]) -> tuple[object, ...]:
    return training, line["step"], line.get("dataset"), *sorted(line_values(line))


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
