"""Checks of a command's environment: process numbers, terminal size, names that can be recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mftctl.data.prepared.cache_folder import VARIABLE as CACHE
from mftctl.data.prepared.process_count import data_processes
from mftctl.errors import ConfigError
from mftctl.files.names import is_recordable, shown_name
from mftctl.runtime.processes import world_size

_SIZES = {"COLUMNS": (20, 9_999), "LINES": (5, 9_999)}
"""Plausible widths and heights; anything else would give empty tables or fill the memory."""

_PROCESS_NUMBERS = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
"""Variables set by torchrun and `accelerate launch`, with the smallest valid value of each."""

_FOLDERS = ("MFTCTL_RUNS", CACHE)
"""Variables that name folders of mftctl."""


def settle_environment() -> None:
    """Removes invalid display settings from the environment, and what makes libraries print on stdout."""
    for name, (least, most) in _SIZES.items():
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdecimal() and least <= int(text[:9]) <= most):
            del os.environ[name]
    if os.environ.get("WANDB_MODE") == "offline":  # about which transformers prints a line, among the results
        os.environ["WANDB_MODE"] = "dryrun"  # an older name of the same
    # Figures are only drawn into files; a missing interactive backend would end the report.
    os.environ["MPLBACKEND"] = "agg"


def check_environment(arguments: Sequence[str]) -> None:
    """Checks that a command can run in this environment.

    Args:
        arguments: The command-line arguments, without the program name.

    Raises:
        ConfigError: A variable for processes is not a valid number, or a name cannot be recorded.
    """
    for name, least in _PROCESS_NUMBERS.items():
        _check_number(name, least)
    if int(os.environ.get("RANK", "0")) >= world_size():
        actual = os.environ.pop("RANK")  # otherwise the error would be left for another process to report
        raise ConfigError(
            "The rank of this process is out of range.",
            key="RANK",
            expected=f"less than WORLD_SIZE, {world_size()}",
            actual=actual,
            hint="unset RANK, or start mftctl with torchrun or accelerate launch",
        )
    data_processes()
    _check_names(arguments)


def _check_number(name: str, least: int) -> None:
    text = os.environ.get(name)
    if text is None or (text.isascii() and text.isdecimal() and int(text) >= least):
        return
    del os.environ[name]  # reporting the error reads these variables
    raise ConfigError(
        "An environment variable for multi-process training is not valid.",
        key=name,
        expected=f"a whole number, at least {least}",
        actual=repr(text),
        hint=f"unset {name}, or start mftctl with torchrun or accelerate launch",
    )


def _check_names(arguments: Sequence[str]) -> None:
    """Checks that all names of files here are UTF-8; other names cannot be recorded."""
    try:
        folder = os.getcwd()  # noqa: PTH109 - Path.cwd() is the same call, and a name is all that is needed
    except FileNotFoundError as error:
        raise ConfigError("The current folder was deleted.", hint="cd to another folder") from error
    places = {"the current folder": folder, **{name: os.environ.get(name, "") for name in _FOLDERS}}
    places |= {f"argument {number}": text for number, text in enumerate(arguments, start=1)}
    for place, text in places.items():
        if not is_recordable(text):
            raise ConfigError(
                "A name is not valid UTF-8, so it cannot be recorded.",
                key=place,
                actual=shown_name(text),
                hint="rename it",
            )
