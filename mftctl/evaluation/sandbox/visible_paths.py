"""The paths that a process under Landlock may look up; Landlock itself protects only their contents."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache


class VisiblePaths:
    """Files and folders that a process may look up; all others appear not to exist.

    Args:
        readable: Files and folders with all their contents.
        listable: Folders without their contents.
        working_folder: The folder in which the process may create anything except links.
    """

    def __init__(self, readable: Iterable[str], listable: Iterable[str], working_folder: str) -> None:
        self._trees = frozenset(map(_real, readable))
        self._single = frozenset(map(_real, listable))
        self._working_folder = working_folder

    def shows(self, path: str, *, follows: bool) -> bool:
        """True if a path is visible.

        Args:
            path: Absolute path.
            follows: Whether the call follows symbolic links.
        """
        parts = path.split("/")
        if ".." not in parts and self._is_in_working_folder(path):
            return True
        if ".." in parts:
            real = os.path.realpath(path)
            if not follows and parts[-1] not in ("", ".", ".."):
                real = f"{os.path.realpath(path.rpartition('/')[0] or '/')}/{parts[-1]}"
        else:
            folder, _, name = path.rstrip("/").rpartition("/")
            real = f"{_real(folder or '/').rstrip('/')}/{name}"
            if (follows or path.endswith("/")) and os.path.islink(real):  # noqa: PTH114 - asked for each call
                real = os.path.realpath(real)
        return real in self._single or self._is_in_working_folder(real) or self._is_in_tree(real)

    def _is_in_working_folder(self, path: str) -> bool:
        return path == self._working_folder or path.startswith(f"{self._working_folder}/")

    def _is_in_tree(self, path: str) -> bool:
        while path:
            if path in self._trees:
                return True
            path = path.rpartition("/")[0]
        return False


@lru_cache(4096)
def _real(path: str) -> str:
    """The real path of a folder; cached because folders do not move while programs are judged."""
    return os.path.realpath(path)
