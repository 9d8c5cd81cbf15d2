"""How workflows tell what they are doing, without knowing who listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a piece of work.

    Attributes:
        task: What is going on, such as `training` or `validating`.
        done: Steps done.
        total: Steps in all.
        loss: The latest training loss per answer token, where there is one.
        tokens_per_second: Speed since the work began, where tokens are counted.
    """

    task: str
    done: int
    total: int
    loss: float | None = None
    tokens_per_second: float | None = None


class Listener(Protocol):
    """Whoever shows progress and messages: the console of a command, or nobody in a test."""

    def progress(self, state: Progress) -> None:
        """Shows how far a piece of work has come."""

    def note(self, text: str) -> None:
        """Says something worth knowing, such as which run is used."""

    def warn(self, text: str) -> None:
        """Says something the user should look at."""


class Silence:
    """A listener that hears nothing."""

    def progress(self, state: Progress) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def warn(self, text: str) -> None:
        """Says nothing."""
