"""What a process gives up before it runs foreign code."""

from __future__ import annotations

import ctypes
import os
import resource
import struct

TYPE_CHECKING = False  # as in typing, which takes long to load
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
    """Sets the kernel's limits on this process: processor time, memory, files; no core file."""
    for name, kind in _LIMITS.items():
        _lower(kind, limits[name], limits[name])
    # The signal at the first limit can be caught; the second one cannot.
    _lower(resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1)
    _lower(resource.RLIMIT_CORE, 0, 0)


def _lower(kind: int, soft: int, hard: int) -> None:
    _, ceiling = resource.getrlimit(kind)
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def drop_capabilities() -> None:
    """Gives up what root may do beyond others.

    Raises:
        OSError: The kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    if libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))):
        raise OSError(ctypes.get_errno(), "the capabilities were kept")


def end_with(parent: int) -> None:
    """Has the kernel end this process when its parent ends, however that is; the filter lets nobody take it back.

    Args:
        parent: Process id of the parent at the start; if it has ended by now, so does this process.

    Raises:
        OSError: The kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the process would outlive its parent")
    if os.getppid() != parent:
        os._exit(1)


def close_all_but(kept: Sequence[int]) -> None:
    """Closes every file descriptor above standard error but those named."""
    start = 3
    for fd in sorted(kept):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, max(start, os.sysconf("SC_OPEN_MAX")))


def clear_environment(folder: str) -> None:
    """Leaves only where temporary files go, and that numpy is to start no threads."""
    os.environ.clear()
    os.environ.update(HOME=folder, TMPDIR=folder, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
