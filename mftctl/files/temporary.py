"""Temporary folders for unfinished work, and removal of those left behind by killed processes.

Each contains `journal.json`, which names the process, its host and its start, and is locked while that process lives.
A leftover is recognised by this journal, with only the expected names next to it: a folder with anything else belongs
to the user and stays.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from mftctl.files.locks import FileLock, try_lock

PREFIX = ".mftctl-tmp-"
SANDBOX_PREFIX = "mftctl-sandbox-"
DATA_PREFIX = "mftctl-data-"
CONTENT = "content"
"""The new file or folder."""
REPLACED = "replaced"
"""The old content while it is being replaced; restored if its place is empty."""
_JOURNAL = "journal.json"
_PREFIXES = (PREFIX, SANDBOX_PREFIX, DATA_PREFIX)
_PURPOSE = "temporary folder of mftctl"
_MOST_JOURNAL_BYTES = 65536


@dataclass(frozen=True, slots=True)
class _Journal:
    """Owner and purpose of a temporary folder.

    Attributes:
        purpose: Always `_PURPOSE`.
        host: The name of the machine.
        process: The process id on that machine.
        started: The UTC start time of that process, ISO 8601.
        target: The final name of the content next to the temporary folder; may be empty.
    """

    purpose: str
    host: str
    process: int
    started: str
    target: str


@contextmanager
def temporary_folder(parent: Path, *, target: str = "", prefix: str = PREFIX) -> Iterator[Path]:
    """Yields a folder with a journal, in which `CONTENT` can be created; removed with everything in it afterwards.

    Args:
        parent: An existing folder to create it in.
        target: The final name of the content in `parent`.
        prefix: The prefix of its name: `PREFIX`, `SANDBOX_PREFIX` or `DATA_PREFIX`.
    """
    folder, lock = _make(parent, prefix)
    try:
        _write_journal(folder, target)
        yield folder
    finally:
        _remove(folder)
        lock.release()


def folder_until_exit(parent: Path, *, prefix: str) -> Path:
    """Returns a folder with a journal, in which `CONTENT` can be created; removed when this process ends.

    Args:
        parent: An existing folder to create it in.
        prefix: The prefix of its name.
    """
    folder, lock = _make(parent, prefix)
    atexit.register(_remove_at_exit, folder, lock, os.getpid())
    _write_journal(folder, "")
    return folder


def _remove_at_exit(folder: Path, lock: FileLock, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork
        with suppress(OSError):
            _remove(folder)
        lock.release()


def _write_journal(folder: Path, target: str) -> None:
    journal = _Journal(_PURPOSE, platform.node(), os.getpid(), _start_time(), target)
    (folder / _JOURNAL).write_bytes(json.dumps(asdict(journal)).encode())


def remove_leftovers(parent: Path) -> None:
    """Removes temporary folders of ended processes on this machine, and restores content they had moved aside."""
    with os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(_PREFIXES) and _is_folder(entry)]
    for folder in found:
        with suppress(OSError, ValueError):  # of another user, removed by another process, or an invalid name
            _remove_if_left(folder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _make(parent: Path, prefix: str) -> tuple[Path, FileLock]:
    """Creates a folder with a new name; returns it with the lock on its still empty journal."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Until it is locked, another process may mistake the folder for a leftover and remove it.
        with suppress(FileNotFoundError):
            lock = try_lock(folder / _JOURNAL, create=True)
            if lock is not None and lock.is_on(folder / _JOURNAL):
                return folder, lock


def _remove_if_left(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    if not names:
        folder.rmdir()
        return
    journal = _read_journal(folder / _JOURNAL) if names <= {_JOURNAL, CONTENT, REPLACED} else None
    is_ours = journal.host == platform.node() if journal is not None else _is_cut_short(folder / _JOURNAL, names)
    if not is_ours:
        return
    lock = try_lock(folder / _JOURNAL)
    if lock is None:
        return
    try:
        if journal is not None and journal.target and REPLACED in names:
            place = folder.parent / journal.target
            if not os.path.lexists(place):
                (folder / REPLACED).rename(place)
        _remove(folder)
    finally:
        lock.release()


def _read_journal(path: Path) -> _Journal | None:
    """Returns the journal; None for anything else."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_JOURNAL_BYTES:
        return None
    try:
        journal = _Journal(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return None
    # A path would place the content elsewhere.
    is_name = isinstance(journal.target, str) and journal.target in ("", Path(journal.target).name)
    return journal if journal.purpose == _PURPOSE and is_name else None


def _is_cut_short(path: Path, names: set[str]) -> bool:
    """Checks whether a folder has only a journal that is empty, or of this host and truncated, as after a kill."""
    if names != {_JOURNAL} or path.is_symlink() or not path.is_file():
        return False
    start = json.dumps({"purpose": _PURPOSE, "host": platform.node()})[:-1].encode()
    content = path.read_bytes()
    return not content or content.startswith(start)


def _remove(folder: Path) -> None:
    """Removes a temporary folder, its journal last, so that a killed removal leaves a recognisable folder."""
    for name in (CONTENT, REPLACED):
        path = folder / name
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)
    if {path.name for path in folder.iterdir()} <= {_JOURNAL}:
        (folder / _JOURNAL).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # another process mistook the empty folder for a leftover
            folder.rmdir()


def remove_folder(folder: Path) -> None:
    """Removes a folder and everything in it; no process may still be using it.

    Descends and ascends one folder at a time, so that neither depth nor path length matters; links are removed, never
    followed.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    current = os.open(folder, flags)
    path: list[str] = []
    try:
        waiting = [_remove_files(current)]
        while path or waiting[-1]:
            down = bool(waiting[-1])
            if down:
                path.append(waiting[-1].pop())
            following = os.open(path[-1] if down else "..", flags, dir_fd=current)
            os.close(current)
            current = following
            if down:
                waiting.append(_remove_files(current))
            else:
                os.rmdir(path.pop(), dir_fd=current)
                waiting.pop()
    finally:
        os.close(current)
    folder.rmdir()


def _remove_files(folder: int) -> list[str]:
    """Removes all files in a folder; returns the names of its subfolders, made accessible to their owner."""
    folders = []
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.chmod(name, stat.S_IRWXU, dir_fd=folder)
            folders.append(name)
        else:
            os.unlink(name, dir_fd=folder)
    return folders


@cache
def _start_time() -> str:
    import psutil

    return datetime.fromtimestamp(psutil.Process().create_time(), UTC).isoformat(timespec="seconds")
