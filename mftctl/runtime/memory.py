"""How much memory this process may still take of its machine: what the host has free, within the limits of its cgroups.

In a container psutil tells the host's memory, of which the container may use a part only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 of cgroups writes a number above this where there is no limit."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What a version of cgroups calls the files of a group."""

    folder: str
    controller: str
    limit: str
    usage: str
    reclaimable: str


_VERSIONS = (
    _Files("sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file"),
    _Files("sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True)
class _Limit:
    """A cgroup's limit, and what of it is still free."""

    total_bytes: int
    available_bytes: int


def available_bytes(root: Path = Path("/")) -> int:
    """The memory that can be taken without swapping, and without being killed for it.

    Args:
        root: Where the file system begins.
    """
    limits = [limit.available_bytes for limit in _limits(root)]
    return max(0, min([int(psutil.virtual_memory().available), *limits]))


def total_bytes(root: Path = Path("/")) -> int:
    """The memory that this process and those beside it may hold in all.

    Args:
        root: Where the file system begins.
    """
    return min([int(psutil.virtual_memory().total), *(limit.total_bytes for limit in _limits(root))])


def _limits(root: Path) -> Iterator[_Limit]:
    """The limits of the groups that this process is in, of its own and of those above."""
    for files in _VERSIONS:
        top = root / files.folder
        own = top / _group(root, files.controller)
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and (limit := _limit(folder, files)) is not None:
                yield limit


def _group(root: Path, controller: str) -> str:
    """The path of this process's group below the controller's folder.

    Inside a container that may be the path on the host, where there is none here: the folder itself is then the group.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    return ""


def _limit(folder: Path, files: _Files) -> _Limit | None:
    """The limit of one group; None where it has none."""
    limit, usage = (next(iter(_lines(folder / name)), "max") for name in (files.limit, files.usage))
    if not (limit.isdigit() and usage.isdigit()) or int(limit) > _NO_LIMIT_BYTES:
        return None
    # What was read from files counts as used, and goes as soon as there is need.
    stored = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    used = max(0, int(usage) - int(stored.get(files.reclaimable, 0)))
    return _Limit(int(limit), int(limit) - used)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):  # another system, or a group that is not to be seen from here
        return []


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h."""
