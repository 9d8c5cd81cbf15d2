"""Atomic replacement of files and folders, with errors for files that cannot be written, and a check of process ids."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mftctl.errors import StorageError
from mftctl.files.temporary import CONTENT, REPLACED, remove_leftovers, temporary_folder

Permit = Callable[[Path], None]
"""Raises if the content at a path may not be replaced; called at the moment of replacement."""

_CURRENT_FOLDER, _NO_REPLACE, _EXCHANGE = -100, 1, 2
"""AT_FDCWD, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux."""

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def atomic_file(path: Path, permit: Permit | None = None) -> Iterator[Path]:
    """Yields a temporary file that replaces `path` when the block succeeds.

    Args:
        path: The file to create or replace. Missing parent folders are created.
        permit: Called before an existing `path` is replaced; None replaces any file.

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
    """Yields a temporary folder that becomes `path` when the block succeeds.

    An existing `path` is exchanged with it in one step and removed afterwards, once the new one is on disk. On file
    systems without this operation (NFS) it is moved aside first; if the process is killed in between, the next command
    that writes there restores it.

    Args:
        path: The folder to create or replace. Missing parent folders are created.
        permit: Called before an existing `path` is replaced.

    Yields:
        An empty folder on the same file system.

    Raises:
        StorageError: The old folder changed during its replacement; it is left unchanged.
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
    """Moves the new content into place, even if something appears there meanwhile."""
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
    """Moves the content if its place is free; returns whether it was."""
    try:
        if _rename(temporary, path, _NO_REPLACE):
            return True
    except FileExistsError:
        return False
    if os.path.lexists(path):  # a file system without an atomic operation for this
        return False
    temporary.replace(path)
    return True


def _replace_folder(folder: Path, path: Path) -> None:
    """Replaces `path` by the content of a temporary folder, with which the old content is removed.

    Raises:
        StorageError: The old content changed meanwhile; it is restored.
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
        "The old result changed during its replacement.",
        path=path,
        hint="another --output; this one was left unchanged",
    )


def _listing(path: Path) -> dict[str, tuple[int, int, int]]:
    """Returns inode, size and modification time of a file, or of everything in a folder; empty if there is nothing."""
    found = {}
    for item in (path, *sorted(path.rglob("*"))):
        with suppress(FileNotFoundError):
            status = item.lstat()
            size_bytes = 0 if item.is_dir() else status.st_size
            # Renaming a folder changes the folder itself.
            change_ns = 0 if item == path else status.st_mtime_ns
            found[str(item.relative_to(path))] = (status.st_ino, size_bytes, change_ns)
    return found


def _rename(one: Path, other: Path, flag: int) -> bool:
    """Renames in one step, exchanging both paths or replacing nothing; returns False if not supported.

    Raises:
        FileExistsError: Something exists at `other`, and nothing may be replaced.
        OSError: Renaming failed for another reason.
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
    """Replaces the text of `path` completely or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_file(source: Path, path: Path, permit: Permit | None = None) -> None:
    """Copies a file to `path`, completely or not at all.

    Args:
        source: The file to copy.
        path: The file to create or replace. Missing parent folders are created.
        permit: Called before an existing `path` is replaced; None replaces any file.
    """
    with atomic_file(path, permit) as temporary:
        shutil.copyfile(source, temporary)


# The umask can only be read by setting it; a second thread in between would read 0 and restore that.
_UMASK_LOCK = threading.Lock()


def _umask() -> int:
    with _UMASK_LOCK:
        current = os.umask(0)
        os.umask(current)
    return current


_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or request a larger quota",
    errno.EFBIG: "a higher limit (ulimit -f), or another file system",
    errno.EROFS: "a writable folder",
    errno.EACCES: "a folder that you can write to",
    errno.EPERM: "a folder that you can write to",
    errno.EIO: "another disk",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ENXIO: "replace it with a regular file, or remove it",
    errno.ELOOP: "remove the circular symbolic links",
}


@contextmanager
def known_failures(path: Path | None = None) -> Iterator[None]:
    """Turns system errors about unwritable files into known failures.

    Args:
        path: The path to report if the system error has none.

    Raises:
        StorageError: Disk full, no permission, a limit, a broken disk, or an invalid file name.
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
    """Checks whether an error or its cause is a storage failure, after which earlier saved state is valid."""
    cause = error.__cause__
    return isinstance(error, StorageError) or (isinstance(cause, OSError) and cause.errno in _HINTS)


def require_writable(path: Path) -> None:
    """Checks that a result can be written at `path`.

    Raises:
        StorageError: Its folder, or the closest existing parent, is not writable.
    """
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            "The result cannot be written there.",
            path=folder,
            expected="a writable folder",
            actual="a read-only folder",
            hint="another --output",
        )


def is_alive(process: int) -> bool:
    """Checks whether a process of this machine is running, by its id; zombies do not count."""
    import psutil

    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
