"""Reads the lines of UTF-8 text files, decompressed on the way, in memory bounded by the longest line."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

from mftctl.errors import DataError

_BYTE_ORDER_MARK = "\ufeff"
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_BUFFER = 1 << 18


def text_lines(path: Path, *, newline: Literal["", "\n"]) -> Iterator[str]:
    r"""The lines of a file with their line ends, without a byte order mark; decompressed if it ends in .gz or .zst.

    Bytes that are not UTF-8 become lone surrogates, which `not_utf8` finds, so that one bad line does not end the
    reading.

    Args:
        path: The file.
        newline: As for `open`: `"\n"` ends lines at `\n` only, `""` also at `\r`. Line ends are kept.

    Raises:
        DataError: The compressed file is damaged or incomplete.
        OSError: The file cannot be read.
    """
    with _decompressed(path) as stream, _as_text(stream, newline) as lines:
        first = next(lines, None)
        if first is not None:
            first = first.removeprefix(_BYTE_ORDER_MARK)
        if first:
            yield first
        yield from lines


def not_utf8(line: str, path: Path, number: int) -> DataError | None:
    """The error about the first byte of a line of `text_lines` that is not UTF-8; None if there is none.

    Args:
        line: The line.
        path: Its file.
        number: Its number in the file, from 1.
    """
    found = None if line.isascii() else _ESCAPED_BYTE.search(line)
    if found is None:
        return None
    return DataError(
        "The data file is not UTF-8 text.",
        path=f"{path}:{number}",
        actual=f"the byte 0x{ord(found[0]) & 0xFF:02x}",
        hint="convert it to UTF-8",
    )


def _as_text(stream: BinaryIO, newline: str) -> io.TextIOWrapper:
    # Not utf-8-sig: its incremental decoder swallows a file that ends within a byte order mark.
    return io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=newline)


@contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    name = path.name.lower()
    with path.open("rb", buffering=_BUFFER) as raw:
        if name.endswith(".gz"):
            try:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield cast(BinaryIO, stream)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError("The data file is not a complete gzip file.", path=path, actual=str(error)) from error
        elif name.endswith(".zst"):
            with _zstd(raw, path) as stream:
                yield stream
        else:
            yield raw


@contextmanager
def _zstd(raw: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    import pyarrow  # a dependency of datasets

    try:
        with io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), _BUFFER) as stream:
            yield stream
    except OSError as error:
        if error.errno is not None:  # from the system, not from the decompressor
            raise
        raise DataError("The data file is not a complete zstd file.", path=path, actual=str(error)) from error
