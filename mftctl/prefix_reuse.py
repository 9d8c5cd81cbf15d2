"""How much room the hidden states get that mask training computes once for each batch."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from mftctl.config import MaskTrainOptions
from mftctl.host_memory import available_bytes
from mftctl.masking.hidden_states import HiddenStates
from mftctl.processes import local_world_size, world_size
from mftctl.steps import accumulation, records_per_step, total_steps

_SHARE = 4
"""A quarter of what is free on a machine, for all its processes: the training itself needs the rest."""


def hidden_states(options: MaskTrainOptions, folder: Path) -> HiddenStates:
    """An empty cache with the room that the options and the machine give this process.

    Args:
        options: With the limit, of a machine.
        folder: Of the run; gets the file.
    """
    processes = local_world_size()
    memory_bytes = available_bytes() // _SHARE // processes
    if options.prefix_cache_gb is None:
        disk_bytes = shutil.disk_usage(folder).free // _SHARE // processes
        return HiddenStates(folder, memory_bytes, disk_bytes)
    limit_bytes = int(options.prefix_cache_gb * 1e9) // processes
    memory_bytes = min(memory_bytes, limit_bytes)
    return HiddenStates(folder, memory_bytes, limit_bytes - memory_bytes)


def batches_come_again(records: int, options: MaskTrainOptions) -> bool:
    """Whether a training takes a micro-batch a second time."""
    steps = total_steps(records, options, world_size())
    if options.batch_tokens is not None:
        # The steps of each epoch have other records, and these go together by length; all of them in one do again.
        return steps > 1 and records <= records_per_step(options, world_size())
    batches = math.ceil(records / options.batch_size)
    return steps * accumulation(options, world_size()) * world_size() > batches


def token_batches_change(records: int, options: MaskTrainOptions) -> bool:
    """Whether only a token budget keeps a training from taking a micro-batch a second time, and it would pay."""
    if options.batch_tokens is None or options.prefix_cache_gb == 0 or options.method != "learned":
        return False
    processes = world_size()
    return total_steps(records, options, processes) * records_per_step(options, processes) >= 2 * records


def figures(states: HiddenStates) -> dict[str, Any]:
    """What was kept and how often it was used, for a run's result."""
    return {"batches": len(states), "size_bytes": states.size_bytes, "reused": states.reused}
