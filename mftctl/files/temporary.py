"""Temporary folders for what is not finished yet, and what becomes of those that a killed process left behind.

Each holds `journal.json`, which names the process, its host and its start, and is locked while that process lives.
A leftover is recognised by this journal and by nothing but the expected names beside it: whatever else is in a folder,
it is the user's and stays.
"""

from __future__ import annotations

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
CONTENT = "content"
"""What is being made: a file or a folder."""
REPLACED = "replaced"
"""What is set aside while another takes its place; it is put back if its place is empty."""
_JOURNAL = "journal.json"
_PREFIXES = (PREFIX, SANDBOX_PREFIX)
_PURPOSE = "temporary folder of mftctl"
_MOST_JOURNAL_BYTES = 65536


@dataclass(frozen=True, slots=True)
class _Journal:
    """Who made a temporary folder, and for what.

    Attributes:
        purpose: Always `_PURPOSE`.
        host: Name of the machine.
        process: Process id there.
        started: UTC time at which that process began, ISO 8601.
        target: The name that the content gets beside the temporary folder; empty where it gets none.
    """

    purpose: str
    host: str
    process: int
    started: str
    target: str


@contextmanager
def temporary_folder(parent: Path, *, target: str = "", prefix: str = PREFIX) -> Iterator[Path]:
    """A folder with a journal, in which `CONTENT` can be made; it is removed with all that is in it.

    Args:
        parent: Where; must exist.
        target: The name that the content gets in `parent`.
        prefix: How its name begins: `PREFIX` or `SANDBOX_PREFIX`.
    """
    folder, lock = _make(parent, prefix)
    try:
        journal = _Journal(_PURPOSE, platform.node(), os.getpid(), _start_time(), target)
        (folder / _JOURNAL).write_bytes(json.dumps(asdict(journal)).encode())
        yield folder
    finally:
        _remove(folder)
        lock.release()


def remove_leftovers(parent: Path) -> None:
    """Removes the temporary folders whose process of this machine has ended, and puts back what they had set aside."""
    with os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(_PREFIXES) and _is_folder(entry)]
    for folder in found:
        with suppress(OSError, ValueError):  # of another user, removed by another process, or no name of a file
            _remove_if_left(folder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _make(parent: Path, prefix: str) -> tuple[Path, FileLock]:
    """A folder of a new name, and the lock on its journal, which is still empty."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Until it is locked, another process may take the folder for a leftover and remove it.
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
    """The journal; None for anything else."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_JOURNAL_BYTES:
        return None
    try:
        journal = _Journal(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return None
    # A path would put something elsewhere.
    is_name = isinstance(journal.target, str) and journal.target in ("", Path(journal.target).name)
    return journal if journal.purpose == _PURPOSE and is_name else None


def _is_cut_short(path: Path, names: set[str]) -> bool:
    """Whether a folder has nothing but a journal that is empty, or of this host and cut short, as after a kill."""
    if names != {_JOURNAL} or path.is_symlink() or not path.is_file():
        return False
    start = json.dumps({"purpose": _PURPOSE, "host": platform.node()})[:-1].encode()
    content = path.read_bytes()
    return not content or content.startswith(start)


def _remove(folder: Path) -> None:
    """Removes a temporary folder; its journal last, so that a kill leaves something that can be recognised."""
    for name in (CONTENT, REPLACED):
        path = folder / name
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)
    if {path.name for path in folder.iterdir()} <= {_JOURNAL}:
        (folder / _JOURNAL).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # another process took the empty folder for a leftover
            folder.rmdir()


def remove_folder(folder: Path) -> None:
    """Removes a folder and all that is in it; no process may work in it any more.

    It goes down and up again one folder at a time, so that neither depth nor the length of paths matters; links are
    removed, never followed.
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
    """Removes all but the folders in a folder; returns their names, each now open to its owner."""
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
