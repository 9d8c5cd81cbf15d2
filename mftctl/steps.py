"""How many optimizer steps a training takes; known before any of them."""

from __future__ import annotations

import math

from mftctl.config import TrainingOptions


def total_steps(records: int, options: TrainingOptions, world_size: int = 1) -> int:
    """The optimizer steps that a training takes.

    Args:
        records: Training records.
        options: Epochs or steps, batch size and accumulation.
        world_size: Number of processes.
    """
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(records / (options.batch_size * world_size))
    return math.ceil(options.epochs * math.ceil(batches / options.grad_accum_steps))
