"""The device that a plan is made for, which may be on a different machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from mftctl.errors import ConfigError
from mftctl.runtime.compute_settings import Precision
from mftctl.runtime.devices import best_device, has_bf16

CONTEXT_BYTES = 500_000_000
"""GPU memory used by CUDA and its libraries before the first tensor."""

_MEMORY = re.compile(r"([\d.]+)\s*([kmgt])(i?)b?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """The properties of a device that a plan depends on.

    Attributes:
        kind: Device type, such as `cpu` or `cuda`.
        has_bf16: Whether it supports bf16 natively, so that `auto` means bf16.
        free_bytes: Memory available to a command; None if unknown.
    """

    kind: str
    has_bf16: bool
    free_bytes: int | None = None

    @property
    def is_gpu(self) -> bool:
        """True if it is an accelerator with its own memory and kernels."""
        return self.kind != "cpu"

    def uses_bf16(self, precision: Precision) -> bool:
        """True if training on this device uses bf16."""
        return self.has_bf16 if precision == "auto" else precision == "bf16"


def this_device() -> PlannedDevice:
    """Returns the device that commands on this machine use."""
    device = best_device()
    return PlannedDevice(device.type, has_bf16(), _free_bytes(device))


def asked_device(name: str, memory_bytes: int | None = None) -> PlannedDevice:
    """Returns the requested device.

    Args:
        name: Name in the recipe; `auto` is this machine's device, or a GPU if memory is given.
        memory_bytes: Total memory; None for the free memory of this machine's device.
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
    """Parses a size such as `80GB` (powers of 1000) or `80GiB` (powers of 1024) into bytes.

    Raises:
        ConfigError: The text is not a size.
    """
    found = _MEMORY.fullmatch(text.strip())
    try:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()]) if found else 0
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(
            "Device memory must be a number with a unit.", key="--device-memory", expected="80GB", actual=text
        )
    return size


def _free_bytes(device: torch.device) -> int | None:
    """Free GPU memory, including memory that this process has reserved but does not use."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = device.index or 0
    unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return int(torch.cuda.mem_get_info(index)[0]) + unused
