"""How many records an optimizer step takes, in how many forward passes, and how many steps a training takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mftctl.errors import ConfigError
from mftctl.experiments.training_options import TrainingOptions
from mftctl.progress import Listener
from mftctl.runtime.devices import uses_bf16 as uses_bf16

if TYPE_CHECKING:
    pass


def total_steps(records: int, options: TrainingOptions, world_size: int = 1) -> int:
    """The optimizer steps that a training takes.

    Args:
        records: Training records.
        options: Epochs or steps, and the size of a step.
        world_size: Number of processes.
    """
    if options.max_steps is not None:
        return options.max_steps
    return math.ceil(options.epochs * math.ceil(records / records_per_step(options, world_size)))


def records_per_step(options: TrainingOptions, world_size: int = 1) -> int:
    """The records of an optimizer step over all processes; the last step of an epoch can have fewer.

    Args:
        options: With the global batch size, or with batch size and accumulation.
        world_size: Number of processes.
    """
    if options.global_batch_size is not None:
        return options.global_batch_size
    return options.batch_size * (options.grad_accum_steps or 1) * world_size


def accumulation(options: TrainingOptions, world_size: int = 1) -> int:
    """The forward passes of `batch_size` records that a step takes in each process.

    With `batch_tokens` their number varies, and no batch size has to divide anything.

    Args:
        options: With the global batch size, or with the accumulation itself.
        world_size: Number of processes.

    Raises:
        ConfigError: The global batch cannot be shared out so.
    """
    if options.global_batch_size is None:
        return options.grad_accum_steps or 1
    at_once = options.batch_size * world_size
    if options.global_batch_size % at_once:
        raise ConfigError(
            "The global batch size cannot be shared out.",
            key="global_batch_size",
            expected=f"a multiple of {options.batch_size} records a forward pass in {world_size} processes",
            actual=options.global_batch_size,
            hint="another --batch-size or number of processes, or --batch-tokens, which needs no multiple",
        )
    return options.global_batch_size // at_once


def micro_batch_records(options: TrainingOptions, longest_tokens: int) -> int:
    """The most records that a forward pass takes together with the longest record.

    Args:
        options: With the size of a forward pass in records or in tokens.
        longest_tokens: Length of the longest record, as it is cut.
    """
    if options.batch_tokens is None:
        return options.batch_size
    return min(max(options.batch_tokens // longest_tokens, 1), records_per_step(options))


def smaller_batch_sizes(options: TrainingOptions) -> list[int]:
    """Records a forward pass, each at most half of the one before, that share out a step of as many records as now.

    Args:
        options: With the batch size.
    """
    step, found = records_per_step(options), []
    size = options.batch_size
    while size > 1:
        size = next(size for size in range(size // 2, 0, -1) if step % size == 0)
        found.append(size)
    return found


def accumulates(options: TrainingOptions) -> bool:
    """Whether a step in one process takes more than one forward pass, as far as the options tell."""
    if options.batch_tokens is not None:
        return records_per_step(options) > 1
    return records_per_step(options) > options.batch_size


def announce_step(options: TrainingOptions, world_size: int, listener: Listener) -> None:
    """Says how many records a step has, where that follows from the number of processes and no recipe states it.

    Raises:
        ConfigError: The global batch cannot be shared out.
    """
    if options.batch_tokens is None:
        accumulation(options, world_size)
    if world_size > 1 and options.global_batch_size is None:
        listener.note(
            f"Records an optimizer step: {records_per_step(options, world_size)} ({options.batch_size} a forward pass, "
            f"{options.grad_accum_steps or 1} accumulated, {world_size} processes); "
            "--global-batch-size makes it the same for any number of processes"
        )


def warmup_steps(steps: int, options: TrainingOptions) -> int:
    """The steps in which the learning rate rises; never all of them, since the first of them has a rate of 0."""
    return min(math.ceil(steps * options.warmup_ratio), steps - 1)


def schedule_factors(steps: int, options: TrainingOptions) -> list[float]:
    """The share of the peak learning rate at each step: a linear rise, then a fall to 0 after the last step."""
    rising = warmup_steps(steps, options)
    fallen = [(step - rising) / (steps - rising) for step in range(rising, steps)]
    if options.schedule == "cosine":
        falling = [0.5 * (1 + math.cos(math.pi * share)) for share in fallen]
    else:
        falling = [1 - share for share in fallen]
    return [step / rising for step in range(rising)] + falling
