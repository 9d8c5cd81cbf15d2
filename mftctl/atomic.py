"""Results that are either the old one or the new one, never half of one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mftctl.storage import remove_leftovers, temporary_prefix

_CURRENT_FOLDER, _RENAME_EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the place of `path` when the block ends well.

    Args:
        path: The file to create or replace. Missing parent folders are made.

    Yields:
        A path in the same folder, so that the final rename stays on one file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    handle, name = tempfile.mkstemp(prefix=temporary_prefix(path.name), dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; it becomes `path` when the block ends well.

    An existing `path` changes places with it in one step and is removed afterwards, the new one being on the disk by
    then. Where the file system cannot do that (NFS) it is set aside first, and a kill in between leaves neither.

    Args:
        path: The folder to create or replace. Missing parent folders are made.

    Yields:
        An empty folder beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(path.name), dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            _write_through(temporary)
            if not _exchange(temporary, path):
                _set_aside_and_replace(temporary, path)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two names now stand for each other's file or folder, after one step of the file system."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    paths = (_CURRENT_FOLDER, os.fsencode(one), _CURRENT_FOLDER, os.fsencode(other))
    if library.renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _set_aside_and_replace(temporary: Path, path: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=temporary_prefix(path.name), dir=path.parent))
    path.replace(old / path.name)
    try:
        temporary.replace(path)
    finally:
        if not path.exists():
            (old / path.name).replace(path)
        shutil.rmtree(old)


def _write_through(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def write_text(path: Path, text: str) -> None:
    """Replaces the text of `path` whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# The umask can only be read by setting it: a second thread in between would read 0 and leave it there.
_UMASK_LOCK = threading.Lock()


def _umask() -> int:
    with _UMASK_LOCK:
        current = os.umask(0)
        os.umask(current)
    return current
