"""Collects all problems instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mftctl.errors import ConfigError, MftError


class ProblemList:
    """The findings of a check, without duplicates.

    Attributes:
        problems: Problems that would stop the experiment or invalidate it.
        warnings: Points for the user to review.
        not_checked: Items that could not be checked, with the reason.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.not_checked: list[str] = []

    @contextmanager
    def collecting(self, where: str) -> Iterator[None]:
        """Context that turns an `MftError` into a problem and skips the rest of its body.

        Args:
            where: The stage or recipe key concerned, used as a prefix of the message.
        """
        try:
            yield
        except MftError as error:
            for text in error.problems if isinstance(error, ConfigError) and error.problems else [describe(error)]:
                self.problem(f"{where}: {text}")

    def problem(self, text: str) -> None:
        """Adds a problem."""
        _add(self.problems, text)

    def warn(self, text: str) -> None:
        """Adds a warning."""
        _add(self.warnings, text)

    def skip(self, text: str) -> None:
        """Adds an item that could not be checked."""
        _add(self.not_checked, text)


def describe(error: MftError) -> str:
    """Formats an error as one line."""
    head, *details = str(error).split("\n")
    return f"{head.rstrip('.')} ({'; '.join(line.strip() for line in details)})" if details else head


def _add(texts: list[str], text: str) -> None:
    if text not in texts:
        texts.append(text)
