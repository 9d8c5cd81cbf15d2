"""The folder that keeps prepared data between commands."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mftctl.files.locks import try_lock

VARIABLE: Final = "MFTCTL_CACHE"
OFF: Final = "off"
"""The value of the variable that turns the cache off, as `--no-cache` does."""

_ENTRIES = "data"
LOCK_SUFFIX: Final = ".lock"


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What the cache holds.

    Attributes:
        folder: Where it lies; None if it is turned off.
        entries: Number of prepared data sets.
        size_bytes: Their total size.
    """

    folder: Path | None
    entries: int
    size_bytes: int


def cache_folder() -> Path | None:
    """The folder of prepared data, which need not exist; None if the cache is turned off.

    The variable `MFTCTL_CACHE` names it; by default it is `mftctl` in the user's cache folder.
    """
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named:
        return Path(named) / _ENTRIES
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user and Path(user).is_absolute() else Path.home() / ".cache") / "mftctl" / _ENTRIES


def cache_use() -> CacheUse:
    """The number and size of the entries in the cache."""
    folder = cache_folder()
    if folder is None or not folder.is_dir():
        return CacheUse(folder, 0, 0)
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return CacheUse(folder, len(entries), sum(file.stat().st_size for file in files))


def clear_cache() -> CacheUse:
    """Removes all entries that no command is preparing; returns what was removed.

    Data that a running command has mapped stays readable for that command.

    Raises:
        OSError: An entry cannot be removed.
    """
    before = cache_use()
    if before.folder is not None and before.folder.is_dir():
        for entry in before.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                _remove(entry)
    after = cache_use()
    return CacheUse(before.folder, before.entries - after.entries, before.size_bytes - after.size_bytes)


def _remove(entry: Path) -> None:
    lock_file = entry.with_name(f"{entry.name}{LOCK_SUFFIX}")
    lock = try_lock(lock_file, create=True)
    if lock is None:
        return
    try:
        shutil.rmtree(entry)
        lock_file.unlink(missing_ok=True)
    finally:
        lock.release()
