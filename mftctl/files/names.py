"""Checks that file names fit the file system and can be recorded."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mftctl.errors import ConfigError, StorageError

_LONGEST_NAME_BYTES, _LONGEST_PATH_BYTES = 255, 4096
"""Limits for names and paths, if the file system does not report any."""

_FIRST_SURROGATE, _LAST_SURROGATE, _BYTE_AS_SURROGATE = "\ud800", "\udfff", 0xDC00
"""Python stores a non-UTF-8 byte of a name as 0xDC00 plus the byte."""

_INSIDE_BYTES = 256
"""Bytes of a path reserved for names in a folder, and for temporary files."""


def shown_name(name: Path | str) -> str:
    """Returns the name as text, with non-UTF-8 bytes escaped."""
    return "".join(map(_shown, str(name)))


def _shown(character: str) -> str:
    if not _FIRST_SURROGATE <= character <= _LAST_SURROGATE:
        return character
    byte = ord(character) - _BYTE_AS_SURROGATE
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{ord(character):04x}"


def is_recordable(text: str) -> bool:
    """Checks whether a text can be encoded as UTF-8, unlike file names that are not UTF-8."""
    return text.isascii() or not any(_FIRST_SURROGATE <= character <= _LAST_SURROGATE for character in text)


def require_recordable(places: Iterable[object], document: object = None) -> None:
    """Checks that all names and texts can be written to a record and read back.

    Args:
        places: Files, folders and hub ids, or None; link targets are checked as well.
        document: Plain data.

    Raises:
        ConfigError: A name, or a text in the document, is not UTF-8.
    """
    for place in places:
        for text in () if place is None else (str(place), os.path.realpath(str(place))):
            _require_recordable(text)
    for text in _texts(document):
        _require_recordable(text)


def _require_recordable(text: str) -> None:
    if not is_recordable(text):
        raise ConfigError(
            "A name is not valid UTF-8, so it cannot be recorded.",
            actual=shown_name(text),
            hint="rename it",
        )


def _texts(document: object) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, Mapping):
        for pair in document.items():
            yield from _texts(pair)
    elif isinstance(document, list | tuple):
        for part in document:
            yield from _texts(part)


def require_short(path: Path) -> None:
    """Checks that the file system accepts the names of a path and of its missing parent folders.

    Args:
        path: The path of a result.

    Raises:
        StorageError: A name or the whole path is too long.
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
            "The name of the result is too long.",
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
