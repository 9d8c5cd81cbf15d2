"""A folder that foreign code may fill: how full it is, and how it goes away whatever is in it."""

from __future__ import annotations

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

    It goes down and up again one folder at a time, so that neither depth nor the length of paths matters; links are
    removed, never followed.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    current = os.open(folder, flags)
    path: list[str] = []
    waiting = [_remove_files(current)]
    while True:
        if waiting[-1]:
            path.append(waiting[-1].pop())
            below = os.open(path[-1], flags, dir_fd=current)
            os.close(current)
            current = below
            waiting.append(_remove_files(current))
        elif path:
            above = os.open("..", flags, dir_fd=current)
            os.close(current)
            current = above
            os.rmdir(path.pop(), dir_fd=current)
            waiting.pop()
        else:
            break
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
