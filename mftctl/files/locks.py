"""Locks on files, which the kernel takes back from a process however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class FileLock:
    """A lock on a file, held from `try_lock` until `release`, or until the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def is_on(self, path: Path) -> bool:
        """Whether the file that is locked is still the one at a path, and not one that was removed meanwhile."""
        try:
            there = path.lstat()
        except FileNotFoundError:
            return False
        return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), there)

    def release(self) -> None:
        """Gives the lock up; nothing if that has been done."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def try_lock(path: Path, *, create: bool = False) -> FileLock | None:
    """The lock on a file; None where another process, or another part of this one, holds it.

    On a file system without locks every call succeeds.

    Args:
        path: A regular file.
        create: Whether a missing file is made.

    Raises:
        OSError: The file is missing, is no regular file, or cannot be opened.
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


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on a file; False for a file that is missing or cannot be opened."""
    with suppress(OSError):
        lock = try_lock(path)
        if lock is None:
            return True
        lock.release()
    return False


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """For the time of the block no other process is in a block with the same folder.

    On a file system that does not lock folders (NFS) the block runs all the same.

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
