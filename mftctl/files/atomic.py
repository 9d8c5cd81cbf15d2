"""Results that are either the old one or the new one, never half of one."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mftctl.errors import StorageError
from mftctl.files.temporary import CONTENT, REPLACED, remove_leftovers, temporary_folder

Permit = Callable[[Path], None]
"""Raises where what stands at a path may not be replaced; called at the moment of replacing."""

_CURRENT_FOLDER, _NO_REPLACE, _EXCHANGE = -100, 1, 2
"""AT_FDCWD, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux."""

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def atomic_file(path: Path, permit: Permit | None = None) -> Iterator[Path]:
    """A temporary file to write to; it takes the place of `path` when the block ends well.

    Args:
        path: The file to create or replace. Missing parent folders are made.
        permit: Asked before something at `path` is replaced; None replaces any file.

    Yields:
        A path on the same file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with temporary_folder(path.parent, target=path.name) as folder:
        temporary = folder / CONTENT
        temporary.touch()
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        _place(temporary, path, permit, temporary.replace)


@contextmanager
def atomic_folder(path: Path, permit: Permit) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends well.

    An existing `path` changes places with it in one step and is removed afterwards, the new one being on the disk by
    then. Where the file system cannot do that (NFS) it is set aside first; after a kill in between, the next command
    that writes there puts it back.

    Args:
        path: The folder to create or replace. Missing parent folders are made.
        permit: Asked before something at `path` is replaced.

    Yields:
        An empty folder on the same file system.

    Raises:
        StorageError: The old folder changed while it was being replaced; it is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with temporary_folder(path.parent, target=path.name) as folder:
        temporary = folder / CONTENT
        temporary.mkdir()
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _place(temporary, path, permit, lambda path: _replace_folder(folder, path))


def _place(temporary: Path, path: Path, permit: Permit | None, replace: Callable[[Path], object]) -> None:
    """Moves what was made to its place; something may appear there at any moment."""
    if permit is None:
        temporary.replace(path)
        return
    while not _move_if_free(temporary, path):
        before = _listing(path)
        permit(path)
        if before and _listing(path) == before:
            replace(path)
            return


def _move_if_free(temporary: Path, path: Path) -> bool:
    """Whether it could be moved to where nothing was."""
    try:
        if _rename(temporary, path, _NO_REPLACE):
            return True
    except FileExistsError:
        return False
    if os.path.lexists(path):  # a file system that cannot do it in one step
        return False
    temporary.replace(path)
    return True


def _replace_folder(folder: Path, path: Path) -> None:
    """Puts the content of a temporary folder in the place of `path`, which then goes with that folder.

    Raises:
        StorageError: The old one changed meanwhile; it is put back.
    """
    content, replaced = folder / CONTENT, folder / REPLACED
    before = _listing(path)
    _write_through(content)
    in_one_step = _rename(content, path, _EXCHANGE)
    if not in_one_step:
        path.replace(replaced)
        try:
            content.replace(path)
        finally:
            if not path.exists():
                replaced.replace(path)
    if _listing(content if in_one_step else replaced) == before:
        return
    if in_one_step:
        _rename(content, path, _EXCHANGE)
    else:
        path.replace(content)
        replaced.replace(path)
    raise StorageError(
        "The old result changed while it was being replaced.",
        path=path,
        hint="another --output; this one was left as it is",
    )


def _listing(path: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of a file, or of all that is in a folder; empty where there is nothing."""
    found = {}
    for item in (path, *sorted(path.rglob("*"))):
        with suppress(FileNotFoundError):
            status = item.lstat()
            size_bytes = 0 if item.is_dir() else status.st_size
            # Renaming a folder is a change of the folder itself.
            change_ns = 0 if item == path else status.st_mtime_ns
            found[str(item.relative_to(path))] = (status.st_ino, size_bytes, change_ns)
    return found


def _rename(one: Path, other: Path, flag: int) -> bool:
    """Whether the file system renamed in one step, so that both are exchanged or nothing is replaced.

    Raises:
        FileExistsError: There is something at `other`, and nothing is to be replaced.
        OSError: It failed for another reason.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_CURRENT_FOLDER, os.fsencode(one), _CURRENT_FOLDER, os.fsencode(other), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


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
