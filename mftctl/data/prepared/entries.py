"""Entries of the cache: a folder with one Arrow file and a summary, made once and whole or not at all."""

from __future__ import annotations

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

from mftctl.data.prepared.cache_folder import LOCK_SUFFIX, OFF, SUMMARY, TABLE, VARIABLE, cache_folder, is_entry
from mftctl.errors import StorageError
from mftctl.files.atomic import atomic_folder, known_failures
from mftctl.files.json_files import read_json_object
from mftctl.files.locks import FileLock, try_lock
from mftctl.files.temporary import CONTENT, DATA_PREFIX, folder_until_exit, remove_leftovers
from mftctl.progress import Listener
from mftctl.runtime.processes import is_first

FORMAT: Final = 2
"""The version of the layout of entries, part of their names."""

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
    name = _name(key)
    root = cache_folder()
    if root is not None:
        try:
            _require_folder(root)
            with known_failures(root):
                return _kept(root / name, make, listener)
        except (StorageError, OSError) as error:
            reason = _reason_within(error, root)
            if reason is None:
                raise
            listener.note(f"The data is prepared for this command only: {root} cannot be written ({reason}).")
    elif os.environ.get(VARIABLE) != OFF:
        listener.note(f"The data is prepared for this command only: there is no home folder; {VARIABLE} may name one.")
    with known_failures():
        return _kept(_temporary_root() / name, make, listener)


def kept_entry(key: object) -> Entry | None:
    """The entry for a key if the cache has it whole, without making it; None otherwise.

    Args:
        key: What the content depends on, as plain data.
    """
    root = cache_folder()
    return None if root is None else _opened(root / _name(key))


def _name(key: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]


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
        if os.path.lexists(folder):
            if not is_entry(folder):
                raise StorageError(
                    "Something else lies in the place of prepared data.",
                    path=folder,
                    actual=f"{folder.name} is not prepared data",
                    hint="move it elsewhere",
                )
            listener.note(f"The prepared data in {folder} is damaged; preparing it again.")
            shutil.rmtree(folder)
        with atomic_folder(folder, permit=lambda path: None) as temporary:
            summary = make(temporary / TABLE)
            digest, size_bytes = _digest(temporary / TABLE), (temporary / TABLE).stat().st_size
            content = {
                "table": {"sha256": digest, "bytes": size_bytes},
                "summary": summary,
                "summary_sha256": _summary_digest(summary),
            }
            (temporary / SUMMARY).write_text(json.dumps(content), encoding="utf-8")
        return Entry(folder.name, folder / TABLE, summary)
    finally:
        lock.release()


def _opened(folder: Path) -> Entry | None:
    """The content of an entry; None if it is missing or differs from what was written."""
    table = folder / TABLE
    try:
        content = read_json_object(folder / SUMMARY)
        facts, summary = content["table"], content["summary"]
        is_whole = (
            _summary_digest(summary) == content["summary_sha256"]
            and table.stat().st_size == facts["bytes"]
            and _digest(table) == facts["sha256"]
        )
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


def _summary_digest(summary: object) -> str:
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()


def _reason_within(error: StorageError | OSError, root: Path) -> str | None:
    """Why the cache cannot be used; None if the error is about something outside it."""
    path, reason = (error.path, error.actual) if isinstance(error, StorageError) else (error.filename, error.strerror)
    return str(reason) if path is not None and Path(path).is_relative_to(root) else None


@cache
def _temporary_root() -> Path:
    """A folder that is removed when this process ends, or by a later command if it is killed."""
    parent = Path(tempfile.gettempdir())
    remove_leftovers(parent)
    root = folder_until_exit(parent, prefix=DATA_PREFIX) / CONTENT
    root.mkdir()
    return root
