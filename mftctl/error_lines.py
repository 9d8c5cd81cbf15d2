"""What an exception of a library says, in one line of a message."""

from __future__ import annotations

_MOST_CHARACTERS = 300


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, not too long; the name of its class where it has no text."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"
