"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h."""


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
