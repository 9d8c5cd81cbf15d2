"""What torch says of a file that it could not write, in words of the system."""

from __future__ import annotations

from collections.abc import Iterator

_OF_TORCH = ("inline_container", "iostream error", "PytorchStreamWriter")
"""In the messages of torch's writer, which tell a place in its source and no reason."""


def failure_of_writing(error: BaseException) -> OSError | None:
    """The system's error that one of torch comes from; None where torch has not kept it."""
    return next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)


def reason_of(error: BaseException) -> str:
    """Why a file could not be written, in a line."""
    found = failure_of_writing(error)
    if found is not None:
        return found.strerror or str(found)
    if any(words in str(error) for words in _OF_TORCH):
        return "no room, a limit, or a broken disk: torch could not write a file to its end"
    return str(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from or after."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
