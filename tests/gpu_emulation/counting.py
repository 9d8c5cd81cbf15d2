"""Counts the work that a training step gives an emulated GPU: kernels, and host synchronisations."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from mftctl.progress import Progress
from tests.gpu_emulation import emulated_gpu
from tests.gpu_emulation.emulated_gpu import Mode, is_on_gpu, tensors_in

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
_NO_KERNEL = ("_local_scalar_dense", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")


class Work(Mode):
    """Counts while entered, inside `emulated_gpu`.

    Attributes:
        kernels: Operations that a GPU would run, by name, without views.
        waits: Operations that need a result on the host, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, made = _gpu_tensors((args, kwargs)), _gpu_tensors(result)
        if inputs or made:
            name = func._schema.name.removeprefix("aten::")
            is_view = any(item.alias_info and not item.alias_info.is_write for item in func._schema.arguments)
            if not is_view and name not in _NO_KERNEL:
                self.kernels[name] += 1
            if name in _WAITS or (name.startswith("index") and _has_mask(args)) or _leaves(name, args):
                self.waits[name] += 1
        return result


def _gpu_tensors(values: Any) -> list[torch.Tensor]:
    return [item for item in tensors_in(values) if is_on_gpu(item)]


def _has_mask(args: Any) -> bool:
    return any(item.dtype == torch.bool for item in _gpu_tensors(args[1]) if isinstance(args[1], list | tuple))


def _leaves(name: str, args: Any) -> bool:
    return name == "copy_" and is_on_gpu(args[1]) and not is_on_gpu(args[0])


@contextlib.contextmanager
def counted_work() -> Iterator[Work]:
    """Counts work inside the block, within `emulated_gpu`."""
    work = Work()
    move = emulated_gpu._move

    def counted_move(tensor: torch.Tensor, device: torch.device, *, fresh: bool = False) -> torch.Tensor:
        if device.type == "cpu" and is_on_gpu(tensor):
            work.waits["cpu"] += 1
        return move(tensor, device, fresh=fresh)

    def tolist(_: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if is_on_gpu(args[0]):
            work.waits["tolist"] += 1
        return func(*args, **kwargs)

    with (
        mock.patch.object(emulated_gpu, "_move", counted_move),
        mock.patch.object(emulated_gpu._Devices, "_tolist", tolist, create=True),
        work,
    ):
        yield work


class StepsCounted:
    """A listener that records the work after each training step.

    Attributes:
        after: Kernels and waits from the start of training to the end of each step, by step.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.after: dict[int, tuple[Counter[str], Counter[str]]] = {}

    def progress(self, state: Progress) -> None:
        if state.task == "training":
            self.after[state.done] = Counter(self._work.kernels), Counter(self._work.waits)

    def of_step(self, step: int) -> tuple[Counter[str], Counter[str]]:
        """Kernels and waits of one step, counted from the end of the previous one."""
        (kernels, waits), (earlier_kernels, earlier_waits) = self.after[step], self.after[step - 1]
        return kernels - earlier_kernels, waits - earlier_waits

    def note(self, text: str) -> None:
        """Ignores notes."""

    def warn(self, text: str) -> None:
        """Ignores warnings."""
