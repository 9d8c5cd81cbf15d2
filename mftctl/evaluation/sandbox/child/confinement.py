"""Restrictions that a process applies to itself before it runs untrusted code."""

from __future__ import annotations

import ctypes
import os
import resource
import struct

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence

_PR_SET_PDEATHSIG, _SIGKILL = 1, 9
_CAPABILITY_VERSION_3 = 0x20080522
_LIMITS = {
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
}


def limit_resources(limits: dict[str, int]) -> None:
    """Sets the kernel's limits on this process: CPU time, memory, files; no core dumps."""
    for name, kind in _LIMITS.items():
        _lower(kind, limits[name], limits[name])
    # The signal at the soft limit can be caught; the one at the hard limit cannot.
    _lower(resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1)
    _lower(resource.RLIMIT_CORE, 0, 0)


def _lower(kind: int, soft: int, hard: int) -> None:
    _, ceiling = resource.getrlimit(kind)
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def drop_capabilities() -> None:
    """Drops root's capabilities.

    Raises:
        OSError: The kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    if libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))):
        raise OSError(ctypes.get_errno(), "the capabilities could not be dropped")


def end_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends for any reason; the filter prevents undoing this.

    Args:
        parent: Process id of the original parent; if it has already ended, this process exits.

    Raises:
        OSError: The kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the parent-death signal could not be set")
    if os.getppid() != parent:
        os._exit(1)


def close_all_but(kept: Sequence[int]) -> None:
    """Closes all file descriptors above standard error except the given ones."""
    start = 3
    for fd in sorted(kept):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, max(start, os.sysconf("SC_OPEN_MAX")))


def clear_environment(folder: str) -> None:
    """Clears the environment except for the folder of temporary files and settings that keep numpy single-threaded."""
    os.environ.clear()
    os.environ.update(HOME=folder, TMPDIR=folder, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
