"""Several processes that train one model together, as `accelerate launch` and `torchrun` start them.

All of them do the same; the first one alone asks, writes and shows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from mftctl.errors import MftError, RunError
from mftctl.quiet_deepspeed import import_deepspeed

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


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


def shares_weights() -> bool:
    """Whether it also holds a part of the frozen weights only: with ZeRO-3 or FSDP."""
    if not under_deepspeed():
        return spreads_parameters()
    from accelerate.utils import DeepSpeedPlugin

    import_deepspeed()
    return bool(DeepSpeedPlugin().zero_stage == 3)


def from_first(make: Callable[[], str]) -> str:
    """What the first process makes, in every process.

    Args:
        make: Called in the first process only.

    Raises:
        RunError: The first process failed; there, its own error.
    """
    if world_size() == 1:
        return make()
    import torch.distributed

    _join()
    made: list[tuple[str | None, str]] = [(None, "")]
    failure: MftError | None = None
    if is_first():
        try:
            made = [(make(), "")]
        except MftError as error:
            failure, made = error, [(None, str(error))]
    torch.distributed.broadcast_object_list(made)
    if failure is not None:
        raise failure
    text, message = made[0]
    if text is None:
        raise RunError("The first process failed.", actual=message)
    return text


def share_of(items: Sequence[T]) -> list[T]:
    """This process's share of what all processes do; each has as many items, for which some are taken twice."""
    shares = [items[index :: world_size()] for index in range(world_size())]
    mine = list(shares[rank()])
    return mine if len(mine) == len(shares[0]) else [*mine, items[0]]


def merged(found: dict[int, T]) -> dict[int, T]:
    """What all processes found, in each of them; to be called in all of them at once."""
    if world_size() == 1:
        return found
    import torch.distributed

    _join()
    parts: list[dict[int, T]] = [{} for _ in range(world_size())]
    torch.distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if world_size() > 1:
        _join().wait_for_everyone()


def leave() -> None:
    """Takes this process out of the group, if it is in one: at its end, the group's threads would abort it."""
    if "torch" in sys.modules and world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in some process; to be asked in all of them at the same step."""
    return bool(largest(flag))


def largest(number: int) -> int:
    """The largest number that a process has; to be asked in all of them at the same step."""
    if world_size() == 1:
        return number
    import torch

    numbers = torch.tensor([float(number)], device=_join().device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers.item())


def _join() -> PartialState:
    """The group of all processes; made when it is first needed."""
    from accelerate import PartialState

    from mftctl.devices import best_device

    import_deepspeed()
    return PartialState(cpu=best_device().type == "cpu")
