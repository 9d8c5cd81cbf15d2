"""The number of processes that prepare data."""

from __future__ import annotations

import os
from typing import Final

from mftctl.errors import ConfigError

VARIABLE: Final = "MFTCTL_DATA_PROCESSES"


def data_processes() -> int:
    """The number of processes that prepare data: one per core, or what `MFTCTL_DATA_PROCESSES` says.

    Raises:
        ConfigError: The variable is not a positive number.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not (named.isascii() and named.isdigit() and int(named) > 0):
        raise ConfigError("The number of processes is invalid.", key=VARIABLE, expected="1 or more", actual=named)
    return int(named)
