"""Several processes that train one model together, as `accelerate launch` and `torchrun` start them.

All of them do the same; the first one alone asks, writes and shows.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

TIMEOUT = "MFTCTL_DDP_TIMEOUT"
"""Names the seconds after which a process that waits for the others in a collective operation gives up."""

_DEFAULT_TIMEOUT_SECONDS = 1800


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def under_deepspeed() -> bool:
    """Whether accelerate launched this process to train with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1")


def spreads_parameters() -> bool:
    """Whether accelerate launched this process to train a part of the parameters: with DeepSpeed or FSDP."""
    return under_deepspeed() or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def timeout_seconds() -> int:
    """How long a process waits for the others in a collective operation: `ddp_timeout` in the words of transformers.

    What one of them does alone, such as to write a checkpoint, may take longer.
    """
    return int(os.environ.get(TIMEOUT, str(_DEFAULT_TIMEOUT_SECONDS)))
