"""What the environment of a command may be: numbers of processes, a width, names that can be recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mftctl.errors import ConfigError
from mftctl.files.names import is_recordable, shown_name
from mftctl.runtime.processes import world_size

_SIZES = {"COLUMNS": (20, 9_999), "LINES": (5, 9_999)}
"""Within these a width or height is believed: outside, a table is empty, or as large as the memory."""

_PROCESS_NUMBERS = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
"""What torchrun and `accelerate launch` tell a process, with the smallest number each can be."""

_RUNS = "MFTCTL_RUNS"


def settle_environment() -> None:
    """Takes away what only says how to show things, and says it wrong."""
    for name, (least, most) in _SIZES.items():
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdecimal() and least <= int(text[:9]) <= most):
            del os.environ[name]
    # Figures are drawn into files alone; a backend that is not there would end the report.
    os.environ["MPLBACKEND"] = "agg"


def check_environment(arguments: Sequence[str]) -> None:
    """Nothing, if a command can work here.

    Args:
        arguments: Of the command line, without the program.

    Raises:
        ConfigError: A variable of several processes is no such number, or a name cannot be recorded.
    """
    for name, least in _PROCESS_NUMBERS.items():
        _check_number(name, least)
    if int(os.environ.get("RANK", "0")) >= world_size():
        actual = os.environ.pop("RANK")  # else the error would be kept for another process to tell
        raise ConfigError(
            "The number of this process is not one of those there are.",
            key="RANK",
            expected=f"less than WORLD_SIZE, {world_size()}",
            actual=actual,
            hint="unset RANK, or start mftctl with torchrun or accelerate launch",
        )
    _check_names(arguments)


def _check_number(name: str, least: int) -> None:
    text = os.environ.get(name)
    if text is None or (text.isascii() and text.isdecimal() and int(text) >= least):
        return
    del os.environ[name]  # telling the error asks for these numbers
    raise ConfigError(
        "The environment does not say which of how many processes this is.",
        key=name,
        expected=f"a whole number, at least {least}",
        actual=repr(text),
        hint=f"unset {name}, or start mftctl with torchrun or accelerate launch",
    )


def _check_names(arguments: Sequence[str]) -> None:
    """Nothing, if what names files here is UTF-8: a record of anything else could not be read again."""
    try:
        folder = os.getcwd()  # noqa: PTH109 - Path.cwd() is the same call, and a name is all that is wanted
    except FileNotFoundError as error:
        raise ConfigError("The current folder was deleted.", hint="cd to another folder") from error
    places = {"the current folder": folder, _RUNS: os.environ.get(_RUNS, "")}
    places |= {f"argument {number}": text for number, text in enumerate(arguments, start=1)}
    for place, text in places.items():
        if not is_recordable(text):
            raise ConfigError(
                "A name is not UTF-8, so that no record of it could be read again.",
                key=place,
                actual=shown_name(text),
                hint="rename it",
            )
