"""The most memory that a command held, and freed memory given back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch

from mftctl.runtime.devices import best_device, counts_memory
from mftctl.runtime.memory import _MMAP_MAX, _TRIM_THRESHOLD


def give_back_freed_memory() -> None:
    """Returns to the system what an earlier piece of work has freed; without glibc nothing happens."""
    if platform.system() == "Linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def keep_freed_memory() -> bool:
    """Whether this process now keeps freed blocks for the next step, instead of giving them back to the system.

    Each training step allocates the same large blocks. glibc hands them back after each and asks for them anew, page by
    page, which costs time on a CPU; kept, they cost memory between the steps. What the user set in the environment
    (`MALLOC_...`, or `glibc.malloc` in `GLIBC_TUNABLES`) stays, and other C libraries are left alone.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if platform.system() != "Linux" or chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Not by a threshold for mmap: mallopt takes none above 32 MB, and activations are larger.
    return bool(library.mallopt(_MMAP_MAX, 0)) and bool(library.mallopt(_TRIM_THRESHOLD, -1))


def free_unreachable() -> None:
    """Frees what only refers to itself, as a trainer does that has done its work, also the GPU memory of it."""
    gc.collect()
    if best_device().type != "cpu":
        torch.accelerator.empty_cache()


def restart_peak_memory() -> None:
    """Lets `peak_memory_bytes` begin anew, without what was freed before; on other systems than Linux it goes on."""
    if counts_memory(best_device()):
        torch.accelerator.reset_peak_memory_stats(best_device())
    give_back_freed_memory()
    with suppress(OSError):  # where the kernel has no such file, or a container forbids it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """The most memory held since `restart_peak_memory`: of the GPU in use if it has its own, else of the machine."""
    if counts_memory(best_device()):
        return torch.accelerator.max_memory_allocated(best_device())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
