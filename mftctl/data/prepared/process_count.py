"""The number of processes that prepare data."""

from __future__ import annotations

import os
from typing import Final

from mftctl.errors import ConfigError

VARIABLE: Final = "MFTCTL_DATA_PROCESSES"
_MOST = 32
"""More would wait for the one that writes their results."""


def data_processes() -> int:
    """The number of processes that prepare data: one per core, at most 32, or what `MFTCTL_DATA_PROCESSES` says.

    Raises:
        ConfigError: The variable is not a positive number.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, _MOST)
    if not (named.isascii() and named.isdigit() and int(named) > 0):
        raise ConfigError("The number of processes is invalid.", key=VARIABLE, expected="1 or more", actual=named)
    return int(named)
