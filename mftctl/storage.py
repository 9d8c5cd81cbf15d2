"""Writing where there may be no room."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mftctl.errors import StorageError

_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for more",
    errno.EFBIG: "a larger limit (ulimit -f), or another file system",
    errno.EROFS: "a folder that can be written",
    errno.EACCES: "a folder that you may write to",
    errno.EPERM: "a folder that you may write to",
    errno.EIO: "another disk",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ENXIO: "a file in its place, or nothing",
    errno.ELOOP: "a file or folder in place of links that lead in a circle",
}


@contextmanager
def known_failures(path: Path | None = None) -> Iterator[None]:
    """Turns what the system says where a file cannot be written into a known failure.

    Args:
        path: Where to, if the system does not say.

    Raises:
        StorageError: No room, no permission, a limit, a broken disk, or a name that no file can have.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _HINTS:
            raise
        raise StorageError(
            "A file cannot be read or written.",
            path=error.filename or path,
            actual=error.strerror,
            hint=_HINTS[error.errno],
        ) from error


def is_failure_of_storage(error: BaseException) -> bool:
    """Whether an error, or the one it comes from, is one of storage: what was saved before is sound."""
    cause = error.__cause__
    return isinstance(error, StorageError) or (isinstance(cause, OSError) and cause.errno in _HINTS)


def require_writable(path: Path) -> None:
    """Nothing, if a result can be put at `path`.

    Raises:
        StorageError: Its folder, or the one that would hold the missing ones, cannot be written.
    """
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            "The result cannot be written there.",
            path=folder,
            expected="a folder that can be written",
            actual="a folder that is read-only",
            hint="another --output",
        )


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs, by its id; one that ended and was not waited for does not."""
    import psutil

    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
