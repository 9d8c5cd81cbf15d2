"""Reading files that may have been replaced by something that blocks or never ends, such as a FIFO."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def is_file(path: Path) -> bool:
    """Checks whether a path is a regular file, or a link to one."""
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading bytes, without blocking.

    Raises:
        OSError: It cannot be opened, or is a FIFO, a socket, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.ENXIO, f"{kind} instead of a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Reads all bytes of a regular file.

    Raises:
        OSError: As for `open_regular`.
    """
    with open_regular(path) as stream:
        return stream.read()
