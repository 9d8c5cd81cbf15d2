"""Process group of a command: joining and leaving it, dividing work, and exchanging results."""

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

from mftctl.errors import ConfigError, LostProcessError, MftError
from mftctl.runtime.processes import (
    INSTALL_DEEPSPEED,
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
"""An inference operator that DeepSpeed would compile for a minute on a machine without a GPU."""


@functools.cache
def import_deepspeed() -> None:
    """Imports DeepSpeed if it is installed; accelerate does so whenever a model is trained.

    Its log goes to the stream that is stdout at that moment. Only its errors are useful to a user.

    Raises:
        ConfigError: It is not installed, but this process was started to train with it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        if under_deepspeed():
            raise ConfigError(
                "The processes were started to train with DeepSpeed, which is not installed.",
                key="ACCELERATE_USE_DEEPSPEED",
                hint=INSTALL_DEEPSPEED,
            )
        return
    from mftctl.runtime.devices import best_device

    if best_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # DeepSpeed uses old names
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if best_device().type == "cpu":
        deepspeed.ops.__compatible_ops__[_COMPILED_ON_CPU] = False


T = TypeVar("T")
SUPERVISED = "MFTCTL_SUPERVISED"
"""Set if the parent process ends this one when another is lost."""

_LONGEST_NAP_SECONDS = 0.05
_meetings = count()


def shares_weights() -> bool:
    """Checks whether the frozen weights are sharded as well, with ZeRO-3 or FSDP."""
    if not under_deepspeed():
        return spreads_parameters()
    from accelerate.utils import DeepSpeedPlugin

    import_deepspeed()
    return bool(DeepSpeedPlugin().zero_stage == 3)


def from_first(make: Callable[[], str]) -> str:
    """Returns in every process what the first process makes, however long that takes.

    Args:
        make: Called in the first process only.

    Raises:
        LostProcessError: The first process failed (and raised its own error there), or was lost.
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
    """Returns this process's share of items; all shares have equal length, so some items may appear twice."""
    shares = [items[index :: world_size()] for index in range(world_size())]
    mine = list(shares[rank()])
    return mine if len(mine) == len(shares[0]) else [*mine, items[0]]


def merged(found: dict[int, T]) -> dict[int, T]:
    """Merges the results of all processes in each of them; a collective call."""
    if world_size() == 1:
        return found
    parts = [pickle.loads(part) for part in _meet(pickle.dumps(found))]
    return {key: value for part in parts for key, value in part.items()}


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes; a collective call."""
    if world_size() == 1:
        return
    import torch.distributed

    _join()
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)


def divides_work() -> bool:
    """Checks whether each of several processes has the whole model and can work independently."""
    return world_size() > 1 and not shares_weights()


def parts() -> int:
    """Returns the number of parts that work is divided into."""
    return world_size() if divides_work() else 1


def own_part(items: Sequence[T]) -> list[T]:
    """Returns the items this process works on; all items if work is not divided."""
    return list(items[rank() :: world_size()] if divides_work() else items)


def put_together(found: dict[int, T]) -> dict[int, T]:
    """Merges the results of all parts in each process; a collective call."""
    return merged(found) if divides_work() else found


def wait_for_all() -> None:
    """Waits until every process has called this, however long one of them takes.

    Raises:
        LostProcessError: Another process was lost.
    """
    if world_size() > 1:
        _meet(b"")


@contextmanager
def first_before_others() -> Iterator[None]:
    """Runs a block in the first process, then in the others, for work that one does for all, such as downloads."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def join() -> None:
    """Creates the group of all processes and assigns this one its GPU."""
    if world_size() > 1:
        _join()


def forget_plan() -> None:
    """Lets the next trainer reconfigure DeepSpeed or FSDP; accelerate would keep the first configuration."""
    if spreads_parameters():
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        _join()


def leave() -> None:
    """Removes this process from its group, if any, as the group's threads would abort it on exit."""
    if "torch" in sys.modules and world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def any_process(flag: bool) -> bool:
    """Checks whether the flag is set in any process; a collective call."""
    return bool(largest(flag))


def largest(number: int) -> int:
    """Returns the largest number over all processes; a collective call."""
    if world_size() == 1:
        return number
    import torch

    numbers = torch.tensor([float(number)], device=_join().device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers.item())


def _join() -> PartialState:
    """Returns the group of all processes, created on first use."""
    from accelerate import PartialState

    from mftctl.runtime.devices import best_device

    import_deepspeed()
    # The group is created here, before any TrainingArguments, whose ddp_timeout would come too late.
    return PartialState(cpu=best_device().type == "cpu", timeout=timedelta(seconds=timeout_seconds()))


def _meet(brought: bytes) -> list[bytes]:
    """Returns the contributions of all processes by rank, in all of them.

    This uses the store of the group instead of its collective operations: those have a timeout, after which NCCL ends
    the process, and writing a checkpoint can keep the others waiting longer than that.

    Raises:
        LostProcessError: Another process was lost, unless the parent detects that.
    """
    import torch.distributed
    from torch.distributed.distributed_c10d import _get_default_store

    _join()
    store, number = _get_default_store(), next(_meetings)
    try:
        store.set(_key(number, rank()), b"." + brought)  # type: ignore[arg-type]  # it takes non-empty bytes
        found = [_take(store, _key(number, each)) for each in range(world_size())]
        if number:  # all have arrived here, so all have read the previous contributions
            store.delete_key(_key(number - 1, rank()))
    except torch.distributed.DistError as error:
        raise LostProcessError("The processes lost their connection.", actual=first_line(error)) from error
    return found


def _key(meeting: int, process: int) -> str:
    return f"mftctl/{meeting}/{process}"


def _take(store: Store, key: str) -> bytes:
    """Returns the value of a key in the store, as soon as it exists."""
    end_seconds = None if _is_supervised() else time.monotonic() + timeout_seconds()
    nap_seconds = 0.001
    while not store.check([key]):
        if end_seconds is not None and time.monotonic() > end_seconds:
            raise LostProcessError(
                "Another process did not respond in time.",
                expected=f"within {timeout_seconds()} s",
                hint=f"{TIMEOUT}=SECONDS to wait longer",
            )
        time.sleep(nap_seconds)
        nap_seconds = min(2 * nap_seconds, _LONGEST_NAP_SECONDS)
    return store.get(key)[1:]


def _is_supervised() -> bool:
    """Checks whether the parent (mftctl, torchrun or accelerate) ends all processes when one is lost."""
    return SUPERVISED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
