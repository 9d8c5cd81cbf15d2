"""A folder that foreign code may fill: how full it is."""

from __future__ import annotations

import os
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
