"""What a GPU cannot do, as known failures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mftctl.errors import DeviceMemoryError, TrainingError

_MPS_OUT_OF_MEMORY = "MPS backend out of memory"
_IN_NO_FIXED_ORDER = re.compile(r"^(\S+) does not have a deterministic implementation")
_ASKED = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_FREE = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")
_HELD = re.compile(r"MPS allocated: ([\d.]+ \w+), .*max allowed: ([\d.]+ \w+)")


@contextmanager
def gpu_failures(doing: str) -> Iterator[None]:
    """Turns what a GPU cannot do into a known failure; the innermost block names what was being done.

    Args:
        doing: Such as `training`.

    Raises:
        DeviceMemoryError: There is no room.
        TrainingError: Something has no deterministic implementation, and one was asked for.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise DeviceMemoryError(
                f"The GPU ran out of memory while {doing}.", actual=_shortage(str(error))
            ) from error
        operation = _IN_NO_FIXED_ORDER.match(str(error))
        if operation is None:
            raise
        raise TrainingError(
            "An operation of this model has no deterministic implementation.",
            key="deterministic",
            expected="operations that give the same bits each time",
            actual=operation[1],
            hint="leave --deterministic out",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that a device has no room; on a Mac it has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith(_MPS_OUT_OF_MEMORY)


def _shortage(message: str) -> str:
    """What was asked for and what was free, from what torch says."""
    asked, free, held = _ASKED.search(message), _FREE.search(message), _HELD.search(message)
    if asked is not None and free is not None:
        return f"{asked[1]} asked for, {free[2]} of {free[1]} free"
    if asked is not None and held is not None:
        return f"{asked[1]} asked for, {held[1]} of {held[2]} held"
    return message.splitlines()[0]


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
