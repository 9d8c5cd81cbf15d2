"""The device that a plan is made for, which need not be one of this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from mftctl.errors import ConfigError
from mftctl.runtime.compute_settings import Precision
from mftctl.runtime.devices import best_device, has_bf16

CONTEXT_BYTES = 500_000_000
"""What CUDA and the libraries on it take of a GPU before the first tensor."""

_MEMORY = re.compile(r"([\d.]+)\s*([kmgt])(i?)b?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """What a plan has to know of a device.

    Attributes:
        kind: Such as `cpu` or `cuda`.
        has_bf16: Whether it computes in bf16 itself, so that `auto` means bf16.
        free_bytes: There for a command; None where that is not known.
    """

    kind: str
    has_bf16: bool
    free_bytes: int | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether it has memory of its own, and the kernels of an accelerator."""
        return self.kind != "cpu"

    def uses_bf16(self, precision: Precision) -> bool:
        """Whether a training computes in bf16 there."""
        return self.has_bf16 if precision == "auto" else precision == "bf16"


def this_device() -> PlannedDevice:
    """The device that commands on this machine use."""
    device = best_device()
    return PlannedDevice(device.type, has_bf16(), _free_bytes(device))


def asked_device(name: str, memory_bytes: int | None = None) -> PlannedDevice:
    """The device that is asked about.

    Args:
        name: As in the recipe: `auto` is this machine's, or a GPU where memory is given.
        memory_bytes: All that it has; None for what is free of this machine's own.
    """
    kind = name.partition(":")[0]
    if kind == "auto":
        if memory_bytes is None:
            return this_device()
        kind = "cuda"
    if memory_bytes is not None:
        free: int | None = max(memory_bytes - (0 if kind == "cpu" else CONTEXT_BYTES), 0)
    else:
        free = _free_bytes(torch.device(kind if name == "auto" else name))
    return PlannedDevice(kind, kind == "cuda", free)


def parse_memory(text: str) -> int:
    """The bytes in `80GB`, or in `80GiB`, where a unit is 1024 of the one below.

    Raises:
        ConfigError: It is no size.
    """
    found = _MEMORY.fullmatch(text.strip())
    try:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()]) if found else 0
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(
            "The memory of a device is a number with its unit.", key="--device-memory", expected="80GB", actual=text
        )
    return size


def _free_bytes(device: torch.device) -> int | None:
    """What is free of a GPU, with what this process holds there without using it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = device.index or 0
    unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return int(torch.cuda.mem_get_info(index)[0]) + unused
