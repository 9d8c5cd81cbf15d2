"""Names of files and folders that a file system can hold and a record can repeat."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from mftctl.errors import ConfigError, StorageError

_LONGEST_NAME_BYTES, _LONGEST_PATH_BYTES = 255, 4096
"""Of a file or folder, where the file system does not say."""

_INSIDE_BYTES = 256
"""Of a path, left for names within a folder, and beside a file while it is written."""


def shown_name(name: Path | str) -> str:
    """The name as text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if _has_surrogates(str(name)) else str(name)


def require_recordable(names: Iterable[Path | str | None]) -> None:
    """Nothing, if all names, and what they stand for where they are links, can be written into a record as text.

    Args:
        names: Of files, folders or hub data; None for none.

    Raises:
        ConfigError: One has bytes that are not UTF-8: the record could not be read again.
    """
    for name in names:
        for text in () if name is None else (str(name), os.path.realpath(name)):
            if _has_surrogates(text):
                raise ConfigError(
                    "A name is not UTF-8, so that no record of it could be read again.",
                    path=shown_name(text),
                    hint="rename it",
                )


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def require_short(path: Path) -> None:
    """Nothing, if the file system can hold a file or folder of this name, and the folders above it that are missing.

    Args:
        path: Of a result.

    Raises:
        StorageError: A name is too long, or all of them together are.
    """
    folder, missing = path.absolute(), []
    while not _exists(folder):
        missing.append(folder.name)
        folder = folder.parent
    for name in missing:
        _require_length(name, _limit(folder, "PC_NAME_MAX", _LONGEST_NAME_BYTES))
    if missing:
        _require_length(str(path.absolute()), _limit(folder, "PC_PATH_MAX", _LONGEST_PATH_BYTES) - _INSIDE_BYTES)


def _require_length(text: str, most_bytes: int) -> None:
    length = len(os.fsencode(text))
    if length > most_bytes:
        raise StorageError(
            "The result cannot have such a long name.",
            path=text,
            expected=f"at most {most_bytes} bytes",
            actual=f"{length}",
            hint="a shorter --output",
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def _limit(folder: Path, name: str, otherwise: int) -> int:
    try:
        return os.pathconf(folder, name)
    except OSError:
        return otherwise
