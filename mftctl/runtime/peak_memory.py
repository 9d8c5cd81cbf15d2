"""Peak memory of a command, and control over when freed memory returns to the system."""

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
    """Returns freed memory to the system; does nothing without glibc."""
    if platform.system() == "Linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def keep_freed_memory() -> bool:
    """Keeps freed blocks for the next step instead of returning them to the system; returns whether that worked.

    Each training step allocates the same large blocks. glibc returns them after each step and requests them again page
    by page, which costs time on a CPU; kept, they cost memory between steps. Settings in the environment (`MALLOC_...`,
    or `glibc.malloc` in `GLIBC_TUNABLES`) take precedence, and other C libraries are left alone.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if platform.system() != "Linux" or chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Not through the mmap threshold: mallopt accepts none above 32 MB, and activations are larger.
    return bool(library.mallopt(_MMAP_MAX, 0)) and bool(library.mallopt(_TRIM_THRESHOLD, -1))


def free_unreachable() -> None:
    """Frees unreachable reference cycles, such as a finished trainer, including their GPU memory."""
    gc.collect()
    if best_device().type != "cpu":
        torch.accelerator.empty_cache()


def restart_peak_memory() -> None:
    """Resets `peak_memory_bytes` to what is held now; has no effect on CPU memory outside Linux."""
    if counts_memory(best_device()):
        torch.accelerator.reset_peak_memory_stats(best_device())
    give_back_freed_memory()
    with suppress(OSError):  # the kernel may lack the file, or a container may forbid it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """Peak memory since `restart_peak_memory`: of the GPU in use if it has its own memory, otherwise of the process."""
    if counts_memory(best_device()):
        return torch.accelerator.max_memory_allocated(best_device())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
