"""Processes that train one model together, as started by `accelerate launch` and `torchrun`.

All of them do the same work; only the first one asks, writes and shows.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

TIMEOUT = "MFTCTL_DDP_TIMEOUT"
"""Environment variable with the timeout of collective operations in seconds."""

_DEFAULT_TIMEOUT_SECONDS = 1800


def world_size() -> int:
    """Returns the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Returns the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def rank() -> int:
    """Returns the rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Checks whether this is the process that writes."""
    return rank() == 0


INSTALL_DEEPSPEED = "pip install 'mftctl[deepspeed]'"
"""The command that installs DeepSpeed."""


def under_deepspeed() -> bool:
    """Checks whether accelerate launched this process to train with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1")


def spreads_parameters() -> bool:
    """Checks whether accelerate launched this process to train part of the parameters, with DeepSpeed or FSDP."""
    return under_deepspeed() or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def timeout_seconds() -> int:
    """Returns the timeout of collective operations, called `ddp_timeout` in transformers.

    Work done by one process alone, such as writing a checkpoint, may take longer.
    """
    return int(os.environ.get(TIMEOUT, str(_DEFAULT_TIMEOUT_SECONDS)))
