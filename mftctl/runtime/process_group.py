"""Work that the processes of a command do together, over the group that joins them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from mftctl.errors import LostProcessError, MftError
from mftctl.runtime.processes import (
    TIMEOUT,
    is_first,
    rank,
    spreads_parameters,
    timeout_seconds,
    under_deepspeed,
    world_size,
)
from mftctl.text import first_line

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor
    from torch._C._distributed_c10d import Store

_COMPILED_ON_CPU = "deepspeed_shm_comm"
"""An operator for inference, for which DeepSpeed would call a compiler for a minute on a machine without a GPU."""


@functools.cache
def import_deepspeed() -> None:
    """Imports DeepSpeed if it is installed; accelerate does so whenever a model is trained.

    Its log goes to the stream that is stdout at that moment. Below errors it tells nothing that a user could act on.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return
    from mftctl.runtime.devices import best_device

    if best_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings(
        "ignore", message="`torch.distributed", category=FutureWarning
    )  # DeepSpeed asks by old names
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if best_device().type == "cpu":
        deepspeed.ops.__compatible_ops__[_COMPILED_ON_CPU] = False


T = TypeVar("T")
SUPERVISED = "MFTCTL_SUPERVISED"
"""Set where the process that started this one ends it when another is lost."""

_LONGEST_NAP_SECONDS = 0.05
_meetings = count()


def shares_weights() -> bool:
    """Whether it also holds a part of the frozen weights only: with ZeRO-3 or FSDP."""
    if not under_deepspeed():
        return spreads_parameters()
    from accelerate.utils import DeepSpeedPlugin

    import_deepspeed()
    return bool(DeepSpeedPlugin().zero_stage == 3)


def from_first(make: Callable[[], str]) -> str:
    """What the first process makes, in every process, however long it takes.

    Args:
        make: Called in the first process only.

    Raises:
        LostProcessError: The first process failed, where it raises its own error, or is gone.
    """
    if world_size() == 1:
        return make()
    made: tuple[str | None, str] = (None, "")
    failure: MftError | None = None
    if is_first():
        try:
            made = (make(), "")
        except MftError as error:
            failure, made = error, (None, str(error))
    text, message = json.loads(_meet(json.dumps(made).encode())[0])
    if failure is not None:
        raise failure
    if text is None:
        raise LostProcessError("The first process failed.", actual=message)
    return str(text)


def share_of(items: Sequence[T]) -> list[T]:
    """This process's share of what all processes do; each has as many items, for which some are taken twice."""
    shares = [items[index :: world_size()] for index in range(world_size())]
    mine = list(shares[rank()])
    return mine if len(mine) == len(shares[0]) else [*mine, items[0]]


def merged(found: dict[int, T]) -> dict[int, T]:
    """What all processes found, in each of them; to be called in all of them at once."""
    if world_size() == 1:
        return found
    parts = [pickle.loads(part) for part in _meet(pickle.dumps(found))]
    return {key: value for part in parts for key, value in part.items()}


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes; to be called in all of them at once."""
    if world_size() == 1:
        return
    import torch.distributed

    _join()
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)


def divides_work() -> bool:
    """Whether each of several processes has the whole model, so that it can work on what is its own alone."""
    return world_size() > 1 and not shares_weights()


def parts() -> int:
    """How many parts the work has that is divided between the processes."""
    return world_size() if divides_work() else 1


def own_part(items: Sequence[T]) -> list[T]:
    """What this process does, of what is done once by one of all; everything where work is not divided."""
    return list(items[rank() :: world_size()] if divides_work() else items)


def put_together(found: dict[int, T]) -> dict[int, T]:
    """What all processes made of their own parts, in each of them; to be called in all of them at once."""
    return merged(found) if divides_work() else found


def wait_for_all() -> None:
    """Returns when every process has come here, however long one of them takes.

    Raises:
        LostProcessError: Another process is gone.
    """
    if world_size() > 1:
        _meet(b"")


@contextmanager
def first_before_others() -> Iterator[None]:
    """Does a block in the first process, then in the others: for what one leaves for all, such as downloads."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def join() -> None:
    """Makes the group of all processes, and gives this one its GPU."""
    if world_size() > 1:
        _join()


def forget_plan() -> None:
    """Lets the next trainer configure DeepSpeed or FSDP anew; accelerate keeps what the first one did."""
    if spreads_parameters():
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        _join()


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

    from mftctl.runtime.devices import best_device

    import_deepspeed()
    # The group is made here, before any TrainingArguments, whose ddp_timeout would come too late.
    return PartialState(cpu=best_device().type == "cpu", timeout=timedelta(seconds=timeout_seconds()))


def _meet(brought: bytes) -> list[bytes]:
    """What every process brings, in their order and in all of them.

    This goes through the store of the group and not over its collective operations: those have a time limit, after
    which NCCL ends the process, and one that writes a checkpoint lets others wait longer than that.

    Raises:
        LostProcessError: Another process is gone, as far as nobody else notices that.
    """
    import torch.distributed
    from torch.distributed.distributed_c10d import _get_default_store

    _join()
    store, number = _get_default_store(), next(_meetings)
    try:
        store.set(_key(number, rank()), b"." + brought)  # type: ignore[arg-type]  # it takes bytes, but not none
        found = [_take(store, _key(number, each)) for each in range(world_size())]
        if number:  # all have come here, so that all have read what was brought before
            store.delete_key(_key(number - 1, rank()))
    except torch.distributed.DistError as error:
        raise LostProcessError("The processes lost each other.", actual=first_line(error)) from error
    return found


def _key(meeting: int, process: int) -> str:
    return f"mftctl/{meeting}/{process}"


def _take(store: Store, key: str) -> bytes:
    """What is under a key of the store, as soon as it is there."""
    end_seconds = None if _is_supervised() else time.monotonic() + timeout_seconds()
    nap_seconds = 0.001
    while not store.check([key]):
        if end_seconds is not None and time.monotonic() > end_seconds:
            raise LostProcessError(
                "Another process did not come in time.",
                expected=f"within {timeout_seconds()} s",
                hint=f"{TIMEOUT}=SECONDS for a longer time",
            )
        time.sleep(nap_seconds)
        nap_seconds = min(2 * nap_seconds, _LONGEST_NAP_SECONDS)
    return store.get(key)[1:]


def _is_supervised() -> bool:
    """Whether whoever started the processes ends all of them when one is lost: mftctl, torchrun or accelerate."""
    return SUPERVISED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
