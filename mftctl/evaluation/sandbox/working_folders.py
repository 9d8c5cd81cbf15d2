"""A folder that foreign code may fill: how full it is, and how it goes away whatever is in it."""

from __future__ import annotations

# By descriptor, so that no path is ever walked.
# ruff: noqa: PTH208
import os
import stat
from pathlib import Path

_ENTRY_BYTES = 4096  # what an empty file costs, so that many of them count too


def used_bytes(folder: Path, enough_bytes: int) -> int:
    """About how many bytes the folder holds, counted no further than to `enough_bytes`.

    What vanishes or cannot be read while it is counted is not counted; links are not followed.
    """
    total = 0
    waiting = [str(folder)]
    while waiting and total < enough_bytes:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += _ENTRY_BYTES + entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if total >= enough_bytes:
                        break
        except OSError:
            continue
    return total


def remove(folder: Path) -> None:
    """Removes a folder and all that is in it; no process may work in it any more.

    Folders within are moved up one by one rather than walked down, so that neither their depth nor the length of
    their paths matters; links are removed, never followed.
    """
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    moved = 0
    try:
        while names := os.listdir(top):
            for name in names:
                if not _remove_entry(name, top):
                    moved += _move_up(name, top, moved)
    finally:
        os.close(top)
    folder.rmdir()


def _remove_entry(name: str, folder: int) -> bool:
    """Removes a file, a link or an empty folder; False for a folder that is not empty."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=folder)
        return True
    os.chmod(name, stat.S_IRWXU, dir_fd=folder)
    try:
        os.rmdir(name, dir_fd=folder)
    except OSError:
        return False
    return True


def _move_up(name: str, top: int, moved: int) -> int:
    """Empties a folder of the top folder; returns how many folders it held, now beside it."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    count = 0
    try:
        for inner in os.listdir(fd):
            if not _remove_entry(inner, fd):
                # Longer than a program can know: the pid of this process is in it.
                os.rename(inner, f".moved-{os.getpid()}-{moved + count}", src_dir_fd=fd, dst_dir_fd=top)
                count += 1
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=top)
    return count
