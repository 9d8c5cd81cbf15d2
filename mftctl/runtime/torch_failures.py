"""Errors of torch as known failures: missing GPU memory, nondeterministic operations and files not written."""

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
    """Turns GPU errors into known failures; the innermost block names the activity.

    Args:
        doing: The activity, such as `training`.

    Raises:
        DeviceMemoryError: The GPU ran out of memory.
        TrainingError: An operation has no deterministic implementation, but one was requested.
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
            expected="deterministic operations",
            actual=operation[1],
            hint="omit --deterministic",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Checks whether a torch error means that a device ran out of memory; on a Mac it has no separate class."""
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith(_MPS_OUT_OF_MEMORY)


def _shortage(message: str) -> str:
    """Returns the requested and the free memory from torch's message."""
    asked, free, held = _ASKED.search(message), _FREE.search(message), _HELD.search(message)
    if asked is not None and free is not None:
        return f"{asked[1]} requested, {free[2]} of {free[1]} free"
    if asked is not None and held is not None:
        return f"{asked[1]} requested, {held[1]} of {held[2]} in use"
    return message.splitlines()[0]


_OF_TORCH = ("inline_container", "iostream error", "PytorchStreamWriter")
"""Found in messages of torch's file writer, which name a source location instead of a reason."""


def failure_of_writing(error: BaseException) -> OSError | None:
    """Returns the system error that caused a torch error; None if torch did not keep it."""
    return next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)


def reason_of(error: BaseException) -> str:
    """Returns the reason why a file could not be written, in one line."""
    found = failure_of_writing(error)
    if found is not None:
        return found.strerror or str(found)
    if any(words in str(error) for words in _OF_TORCH):
        return "disk full, file size limit or broken disk: torch could not finish writing a file"
    return str(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
