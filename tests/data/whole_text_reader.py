"""Reads text files whole, as mftctl did before it read them as streams: the reference for the stream reader."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mftctl.data.files import _records_of

Found = tuple[str, Any]
"""The place and the fields of a record, or the place and the details of an error."""


class Stop(Exception):  # noqa: N818
    """An error, as its place and details."""

    def __init__(self, where: str, actual: object) -> None:
        super().__init__(where, actual)


def read_whole(path: Path, content: bytes) -> Iterator[Found]:
    """The records of an uncompressed file.

    Raises:
        Stop: At the first error.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise Stop(f"{path}:{line}", f"the byte 0x{error.object[error.start]:02x}") from error
    yield from {".jsonl": _lines, ".json": _json, ".csv": _csv}[path.suffix](text, path)


def _json(text: str, path: Path) -> Iterator[Found]:
    if text.lstrip().startswith("["):
        values = _parse(text, path, 1)
    else:
        start = len(text) - len(text.lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            value, end = None, 0
        if not isinstance(value, dict) or text[end:].strip():
            yield from _lines(text, path)
            return
        values = _records_of(value)
    for number, value in enumerate(values, start=1):
        yield _record(value, f"{path}, record {number}")


def _lines(text: str, path: Path) -> Iterator[Found]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _record(_parse(line, path, number), f"{path}:{number}")


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Stop(f"{path}:{first_line + error.lineno - 1}", f"{error.msg} at column {error.colno}") from error


def _record(value: object, where: str) -> Found:
    if not isinstance(value, dict):
        raise Stop(where, f"a JSON {type(value).__name__}")
    return where, value


def _csv(text: str, path: Path) -> Iterator[Found]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(rows, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise Stop(f"{path}:1", ", ".join(map(repr, twice)))
        for row in rows:
            if row and len(row) != len(header):
                raise Stop(f"{path}:{rows.line_num}", len(row))
            if row:
                yield f"{path}:{rows.line_num}", {name: cell or None for name, cell in zip(header, row, strict=True)}
    except csv.Error as error:
        raise Stop(f"{path}:{rows.line_num}", str(error)) from error
