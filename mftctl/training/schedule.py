"""Steps of a training run: their number, records and forward passes per step, and learning rate at each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mftctl.errors import ConfigError
from mftctl.experiments.training_options import TrainingOptions
from mftctl.progress import Listener

if TYPE_CHECKING:
    pass


def total_steps(records: int, options: TrainingOptions, world_size: int = 1) -> int:
    """The number of optimizer steps of a training run.

    Args:
        records: Training records.
        options: Epochs or steps, and the size of a step.
        world_size: Number of processes.
    """
    if options.max_steps is not None:
        return options.max_steps
    return math.ceil(options.epochs * math.ceil(records / records_per_step(options, world_size)))


def records_per_step(options: TrainingOptions, world_size: int = 1) -> int:
    """The number of records per optimizer step over all processes; the last step of an epoch may have fewer.

    Args:
        options: Specify the global batch size, or batch size and accumulation.
        world_size: Number of processes.
    """
    if options.global_batch_size is not None:
        return options.global_batch_size
    return options.batch_size * (options.grad_accum_steps or 1) * world_size


def accumulation(options: TrainingOptions, world_size: int = 1) -> int:
    """The number of forward passes of `batch_size` records per step and process.

    With `batch_tokens` the number varies, and the batch size need not divide anything.

    Args:
        options: Specify the global batch size, or the accumulation itself.
        world_size: Number of processes.

    Raises:
        ConfigError: The global batch cannot be divided evenly.
    """
    if options.global_batch_size is None:
        return options.grad_accum_steps or 1
    at_once = options.batch_size * world_size
    if options.global_batch_size % at_once:
        raise ConfigError(
            "The global batch size cannot be divided evenly.",
            key="global_batch_size",
            expected=f"a multiple of {options.batch_size} records per forward pass in {world_size} processes",
            actual=options.global_batch_size,
            hint="change --batch-size or the number of processes, or use --batch-tokens, which needs no multiple",
        )
    return options.global_batch_size // at_once


def micro_batch_records(options: TrainingOptions, longest_tokens: int) -> int:
    """The maximum number of records in a forward pass that contains the longest record.

    Args:
        options: Specify the size of a forward pass in records or in tokens.
        longest_tokens: Length of the longest record after truncation.
    """
    if options.batch_tokens is None:
        return options.batch_size
    at_once = options.batch_tokens // (longest_tokens * sequences_of_a_record(options))
    return min(max(at_once, 1), records_per_step(options))


def sequences_of_a_record(options: TrainingOptions) -> int:
    """The number of sequences that a record gives: two for a preference, one with each answer."""
    return 2 if options.objective == "dpo" else 1


def smaller_batch_sizes(options: TrainingOptions) -> list[int]:
    """Smaller batch sizes, each at most half of the previous one, that keep the number of records per step.

    Args:
        options: Specify the current batch size.
    """
    step, found = records_per_step(options), []
    size = options.batch_size
    while size > 1:
        size = next(size for size in range(size // 2, 0, -1) if step % size == 0)
        found.append(size)
    return found


def accumulates(options: TrainingOptions) -> bool:
    """True if, according to the options, a step in one process takes more than one forward pass."""
    if options.batch_tokens is not None:
        return records_per_step(options) > 1
    return records_per_step(options) > options.batch_size


def announce_step(options: TrainingOptions, world_size: int, listener: Listener) -> None:
    """Reports the records per step if the number depends on the number of processes and no recipe states it.

    Raises:
        ConfigError: The global batch cannot be divided evenly.
    """
    if options.batch_tokens is None:
        accumulation(options, world_size)
    if world_size > 1 and options.global_batch_size is None:
        listener.note(
            f"Records per optimizer step: {records_per_step(options, world_size)} "
            f"({options.batch_size} per forward pass, {options.grad_accum_steps or 1} accumulated, "
            f"{world_size} processes); set --global-batch-size to keep it the same for any number of processes"
        )


def warmup_steps(steps: int, options: TrainingOptions) -> int:
    """The number of warm-up steps; fewer than all steps, since the first has a learning rate of 0."""
    return min(math.ceil(steps * options.warmup_ratio), steps - 1)


def decay_steps(steps: int, options: TrainingOptions) -> int:
    """The number of steps over which the schedule `wsd` decays, at the end; at most those after the warmup."""
    return min(max(1, round(steps * options.decay_ratio)), steps - warmup_steps(steps, options))


def schedule_factors(steps: int, options: TrainingOptions) -> list[float]:
    """The share of the peak learning rate at each step: a linear rise, then what the schedule says."""
    rising = warmup_steps(steps, options)
    later = steps - rising
    match options.schedule:
        case "constant":
            after = [1.0] * later
        case "wsd":
            decay = decay_steps(steps, options)
            after = [1.0] * (later - decay) + [1 - step / decay for step in range(decay)]
        case "cosine":
            after = [0.5 * (1 + math.cos(math.pi * step / later)) for step in range(later)]
        case "linear":
            after = [1 - step / later for step in range(later)]
    return [step / rising for step in range(rising)] + after
