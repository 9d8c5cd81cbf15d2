"""Progress reports from workflows to any listener."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a task.

    Attributes:
        task: The activity, such as `training` or `validating`.
        done: Steps done.
        total: Total number of steps; None if it is not known yet.
        loss: The latest training loss per answer token, if any.
        tokens_per_second: Speed since the task started, if tokens are counted.
        records_per_second: Speed since the task started, if records are counted.
    """

    task: str
    done: int
    total: int | None
    loss: float | None = None
    tokens_per_second: float | None = None
    records_per_second: float | None = None


class Listener(Protocol):
    """Receives progress and messages: the console of a command, or nothing in a test."""

    def progress(self, state: Progress) -> None:
        """Shows the progress of a task."""

    def note(self, text: str) -> None:
        """Shows an informational message, such as the run that is used."""

    def warn(self, text: str) -> None:
        """Shows a warning."""


class Silence:
    """A listener that discards everything."""

    def progress(self, state: Progress) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def warn(self, text: str) -> None:
        """Does nothing."""
