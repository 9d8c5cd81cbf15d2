"""Collects everything that is wrong, instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mftctl.errors import ConfigError, MftError


class Findings:
    """What a check has found, each thing once.

    Attributes:
        problems: What would stop the experiment or spoil it.
        warnings: What the user should look at.
        not_checked: What could not be checked, and why.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.not_checked: list[str] = []

    @contextmanager
    def collecting(self, where: str) -> Iterator[None]:
        """Inside it, a known failure becomes a problem, and what follows inside is skipped.

        Args:
            where: The stage or recipe key concerned; stands before the message.
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
        """Adds something that could not be checked."""
        _add(self.not_checked, text)


def describe(error: MftError) -> str:
    """A known failure in one line."""
    head, *details = str(error).split("\n")
    return f"{head.rstrip('.')} ({'; '.join(line.strip() for line in details)})" if details else head


def _add(texts: list[str], text: str) -> None:
    if text not in texts:
        texts.append(text)
