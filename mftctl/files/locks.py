"""File locks, which the kernel releases however a process ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class FileLock:
    """A lock on a file, held from `try_lock` until `release`, or until the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def is_on(self, path: Path) -> bool:
        """Checks that the locked file is still the one at a path and was not removed meanwhile."""
        try:
            there = path.lstat()
        except FileNotFoundError:
            return False
        return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), there)

    def release(self) -> None:
        """Releases the lock, if it is still held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def try_lock(path: Path, *, create: bool = False) -> FileLock | None:
    """Locks a file; returns None if another process, or another part of this one, holds the lock.

    On a file system without locks every call succeeds.

    Args:
        path: A regular file.
        create: Whether to create a missing file.

    Raises:
        OSError: The file is missing, is not a regular file, or cannot be opened.
    """
    descriptor = os.open(path, _OPEN | (os.O_CREAT if create else 0), 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            os.close(descriptor)
            raise
    return FileLock(descriptor)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Excludes other processes from blocks with the same folder.

    On a file system that cannot lock folders (NFS), the block runs without a lock.

    Args:
        folder: An existing folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        yield
    finally:
        os.close(descriptor)
