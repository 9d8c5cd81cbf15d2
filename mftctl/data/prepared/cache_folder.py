"""The folder that keeps prepared data between commands."""

from __future__ import annotations

import os
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mftctl.files.locks import try_lock
from mftctl.files.temporary import remove_leftovers

VARIABLE: Final = "MFTCTL_CACHE"
OFF: Final = "off"
"""The value of the variable that turns the cache off, as `--no-cache` does."""

_ENTRIES = "data"
TABLE: Final = "table.arrow"
SUMMARY: Final = "summary.json"
LOCK_SUFFIX: Final = ".lock"
_NAME = re.compile(r"[0-9a-f]{32}")
"""The name of an entry, a digest."""


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What the cache holds.

    Attributes:
        folder: Where it lies; None if it is turned off.
        entries: Number of prepared data sets.
        size_bytes: Their total size.
        problem: Why the folder cannot be read; None if it can.
    """

    folder: Path | None
    entries: int
    size_bytes: int
    problem: str | None = None


def cache_folder() -> Path | None:
    """The folder of prepared data, which need not exist; None if the cache is turned off or the user has no home.

    The variable `MFTCTL_CACHE` names it; by default it is `mftctl` in the user's cache folder.
    """
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named:
        return Path(named) / _ENTRIES
    user = os.environ.get("XDG_CACHE_HOME")
    if user and Path(user).is_absolute():
        return Path(user) / "mftctl" / _ENTRIES
    try:
        return Path.home() / ".cache" / "mftctl" / _ENTRIES
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None


def is_entry(folder: Path) -> bool:
    """Whether a path is the folder of an entry, whole or damaged, with nothing in it that mftctl does not write."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return names <= {TABLE, SUMMARY} and (bool(names) or _lock_file(folder).exists())


def cache_use() -> CacheUse:
    """The number and size of the entries in the cache, and of what is left of others."""
    folder = cache_folder()
    try:
        if folder is None or not folder.is_dir():
            return CacheUse(folder, 0, 0)
        return CacheUse(folder, sum(map(is_entry, _entries(folder))), _size_bytes(folder))
    except OSError as error:
        return CacheUse(folder, 0, 0, error.strerror)


def clear_cache() -> CacheUse:
    """Removes all entries that no command is preparing; returns what was removed.

    Data that a running command has mapped stays readable for that command.

    Raises:
        OSError: An entry cannot be removed.
    """
    folder = cache_folder()
    if folder is None or not folder.is_dir():
        return CacheUse(folder, 0, 0)
    before_bytes = _size_bytes(folder)
    remove_leftovers(folder)  # of commands that were killed
    left_bytes = _size_bytes(folder)
    removed = [size for entry in _entries(folder) if (size := _remove(entry)) is not None]
    return CacheUse(folder, len(removed), sum(removed) + max(before_bytes - left_bytes, 0))


def _entries(folder: Path) -> list[Path]:
    """The folders of the entries, and the places of those that only have a lock; nothing that belongs to the user."""
    names = {path.name.removesuffix(LOCK_SUFFIX) for path in folder.iterdir()}
    places = [folder / name for name in sorted(names) if _NAME.fullmatch(name)]
    return [place for place in places if _is_lock_or_free(place) and (is_entry(place) or not os.path.lexists(place))]


def _is_lock_or_free(entry: Path) -> bool:
    """Whether the place of the entry's lock has an empty file or nothing."""
    try:
        status = _lock_file(entry).lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and not status.st_size


def _lock_file(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}{LOCK_SUFFIX}")


def _size_bytes(folder: Path) -> int:
    found = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # removed meanwhile by another command
            status = file.lstat()
            found += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return found


def _remove(entry: Path) -> int | None:
    """The size of the entry that was removed; None if there is none or a command is preparing it."""
    lock_file = _lock_file(entry)
    lock = try_lock(lock_file, create=True)
    if lock is None:
        return None
    try:
        if not lock.is_on(lock_file):
            return None
        size_bytes = _size_bytes(entry) if is_entry(entry) else None
        if size_bytes is not None:
            shutil.rmtree(entry)
        lock_file.unlink(missing_ok=True)
        return size_bytes
    finally:
        lock.release()
