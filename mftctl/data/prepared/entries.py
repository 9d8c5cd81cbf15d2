"""Entries of the cache: a folder with one Arrow file and a summary, made once and whole or not at all."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from mftctl.data.prepared.cache_folder import LOCK_SUFFIX, cache_folder
from mftctl.errors import StorageError
from mftctl.files.atomic import atomic_folder, known_failures
from mftctl.files.json_files import read_json_object
from mftctl.files.locks import FileLock, try_lock
from mftctl.progress import Listener
from mftctl.runtime.processes import is_first

FORMAT: Final = 1
"""The version of the layout of entries, part of their names."""

TABLE: Final = "table.arrow"
_SUMMARY = "summary.json"
_POLL_SECONDS = 0.1
_TOLD_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A prepared data set.

    Attributes:
        name: The digest of what it was made from.
        table: Its Arrow file.
        summary: What making it found, as plain data.
    """

    name: str
    table: Path
    summary: dict[str, Any]


Make = Callable[[Path], dict[str, Any]]
"""Writes the Arrow file at a path and returns its summary as plain data."""


def entry(key: object, make: Make, listener: Listener) -> Entry:
    """The Arrow file for a key and its summary, from the cache or newly made.

    Without a cache, or if its folder cannot be written, the file is made for this process only and removed at its end.

    Args:
        key: What the content depends on, as plain data.
        make: Makes the content.
        listener: Told if the cache cannot be used, if an entry is damaged, and while another process makes it.

    Raises:
        StorageError: The content can be written neither to the cache nor to the folder for temporary files.
    """
    name = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]
    root = cache_folder()
    if root is not None:
        try:
            _require_folder(root)
            with known_failures(root):
                return _kept(root / name, make, listener)
        except StorageError as error:
            if not _is_within(error, root):
                raise
            listener.note(f"The data is prepared for this command only: {root} cannot be written ({error.actual}).")
    with known_failures():
        return _kept(_temporary_root() / name, make, listener)


def _require_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError("The cache folder cannot be created.", path=root, actual=error.strerror) from error


def _kept(folder: Path, make: Make, listener: Listener) -> Entry:
    found = _opened(folder)
    if found is not None:
        return found
    lock = _locked(folder.with_name(f"{folder.name}{LOCK_SUFFIX}"), listener)
    try:
        found = _opened(folder)
        if found is not None:
            return found
        if folder.exists():
            listener.note(f"The prepared data in {folder} is damaged; preparing it again.")
            shutil.rmtree(folder)
        with atomic_folder(folder, permit=lambda path: None) as temporary:
            summary = make(temporary / TABLE)
            digest, size_bytes = _digest(temporary / TABLE), (temporary / TABLE).stat().st_size
            content = {"table": {"sha256": digest, "bytes": size_bytes}, "summary": summary}
            (temporary / _SUMMARY).write_text(json.dumps(content), encoding="utf-8")
        return Entry(folder.name, folder / TABLE, summary)
    finally:
        lock.release()


def _opened(folder: Path) -> Entry | None:
    """The content of an entry; None if it is missing or differs from what was written."""
    table = folder / TABLE
    try:
        content = read_json_object(folder / _SUMMARY)
        facts, summary = content["table"], content["summary"]
        is_whole = table.stat().st_size == facts["bytes"] and _digest(table) == facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Entry(folder.name, table, summary) if is_whole and isinstance(summary, dict) else None


def _locked(path: Path, listener: Listener) -> FileLock:
    """The lock of an entry; waits while another process holds it."""
    if not is_first():
        time.sleep(_POLL_SECONDS)  # the first process, which shows the progress, should be the one that prepares
    begun, told = time.monotonic(), False
    while True:
        lock = try_lock(path, create=True)
        if lock is not None and lock.is_on(path):
            return lock
        if not told and time.monotonic() - begun > _TOLD_SECONDS:
            listener.note("Waiting for another process that prepares the same data.")
            told = True
        time.sleep(_POLL_SECONDS)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_within(error: StorageError, root: Path) -> bool:
    return error.path is not None and Path(error.path).is_relative_to(root)


@cache
def _temporary_root() -> Path:
    """A folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="mftctl-data-"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork
        shutil.rmtree(folder, ignore_errors=True)
