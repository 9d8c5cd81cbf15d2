"""Total and available memory of this process: that of the host, within the limits of its cgroups.

In a container, psutil reports the memory of the host, of which the container may use only a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_NO_LIMIT_BYTES = 1 << 60
"""Cgroups v1 writes a number above this if there is no limit."""


@dataclass(frozen=True, slots=True)
class _Files:
    """File names of a group in one version of cgroups."""

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
    """A cgroup's limit and the memory still available within it."""

    total_bytes: int
    available_bytes: int


def available_bytes(root: Path = Path("/")) -> int:
    """Returns the memory that can be allocated without swapping or being killed.

    Args:
        root: The root of the file system.
    """
    limits = [limit.available_bytes for limit in _limits(root)]
    return max(0, min([int(psutil.virtual_memory().available), *limits]))


def total_bytes(root: Path = Path("/")) -> int:
    """Returns the total memory that all processes here may hold.

    Args:
        root: The root of the file system.
    """
    return min([int(psutil.virtual_memory().total), *(limit.total_bytes for limit in _limits(root))])


def _limits(root: Path) -> Iterator[_Limit]:
    """Yields the limits of this process's group and its parent groups."""
    for files in _VERSIONS:
        top = root / files.folder
        own = top / _group(root, files.controller)
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and (limit := _limit(folder, files)) is not None:
                yield limit


def _group(root: Path, controller: str) -> str:
    """Returns the path of this process's group below the controller's folder.

    In a container this may be a path on the host that does not exist here; the folder itself is then the group.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    return ""


def _limit(folder: Path, files: _Files) -> _Limit | None:
    """Returns the limit of one group, or None."""
    limit, usage = (next(iter(_lines(folder / name)), "max") for name in (files.limit, files.usage))
    if not (limit.isdigit() and usage.isdigit()) or int(limit) > _NO_LIMIT_BYTES:
        return None
    # File cache counts as used, but is freed on demand.
    stored = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    used = max(0, int(usage) - int(stored.get(files.reclaimable, 0)))
    return _Limit(int(limit), int(limit) - used)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):  # another system, or a group not visible from here
        return []


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h."""
