"""Reads records from local files, each with its location.

JSON and CSV are read with the standard library, not with `datasets`: its JSON reader turns texts that look like dates
into dates and texts next to a number into quoted JSON, its CSV reader turns `007` into 7, and neither keeps the line
numbers that errors report.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mftctl.data.formats import is_record
from mftctl.data.hub import read_parquet
from mftctl.errors import DataError

_MOST_CHARACTERS = 2**31 - 1
"""Limit of a CSV cell: what a C long holds on every platform. The csv module's default is 131,072."""


class Record(NamedTuple):
    """One record as stored in its file.

    Attributes:
        where: The file and, if known, the line: `train.jsonl:17`, otherwise `train.parquet, record 17`.
        fields: The values by field name.
    """

    where: str
    fields: dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """All records of a local file in file order, at least one.

    Raises:
        DataError: The file type is unknown, the file cannot be read or parsed, or it contains no records.
    """
    reader = next((read for suffix, read in _READERS.items() if path.name.lower().endswith(suffix)), None)
    if reader is None:
        raise DataError("The data file has an unknown type.", path=path, expected=", ".join(_READERS))
    try:
        records = list(reader(path))
    except OSError as error:
        raise DataError("The data file cannot be read.", path=path, actual=str(error)) from error
    if not records:
        raise DataError("The data file contains no records.", path=path, expected="at least one record", actual="none")
    return records


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder and its subfolders in the order of their names.

    Raises:
        DataError: The folder holds no data file.
    """
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(tuple(_READERS)))
    if not found:
        raise DataError("The folder has no data files.", path=path, expected=f"files that end in {', '.join(_READERS)}")
    return found


def _json_lines(path: Path) -> Iterator[Record]:
    return _parse_lines(_read_text(path), path)


def _json(path: Path) -> Iterator[Record]:
    """The records of a JSON list, a JSON object or JSON lines."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        values = _parse(text, path, first_line=1)
    elif (document := _one_object(text)) is not None:
        values = _records_of(document)
    else:
        yield from _parse_lines(text, path)
        return
    for number, value in enumerate(values, start=1):
        yield _record(value, f"{path}, record {number}")


def _one_object(text: str) -> dict[str, Any] | None:
    """The single JSON object that makes up the text; None for anything else."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # reported later, with its line
        return None
    return value if isinstance(value, dict) and not text[end:].strip() else None


def _records_of(document: dict[str, Any]) -> list[Any]:
    """The records in an object: the object itself, its only list of objects, or its columns."""
    if is_record(document) and not _is_columns(document):
        return [document]
    lists = [value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:
        return lists[0]
    if _is_columns(document):
        return [dict(zip(document, row, strict=True)) for row in zip(*document.values(), strict=True)]
    return [document]


def _is_columns(document: dict[str, Any]) -> bool:
    """True if all fields are lists of equal length whose values are neither turns nor tokens."""
    columns = list(document.values())
    if not columns or not all(isinstance(column, list) for column in columns):
        return False
    if len({len(column) for column in columns}) > 1 or not columns[0]:
        return False
    first = [column[0] for column in columns]
    return is_record(dict(zip(document, first, strict=True))) and not any(
        isinstance(value, dict | int) for value in first
    )


def _parse_lines(text: str, path: Path) -> Iterator[Record]:
    # Not splitlines(): a JSON string may contain U+2028 and other characters that splitlines() takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _record(_parse(line, path, first_line=number), f"{path}:{number}")


def _parse(text: str, path: Path, first_line: int) -> Any:
    """The JSON value of `text`, which starts at `first_line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}"
        raise _malformed(place, f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number with too many digits, or too deeply nested
        raise _malformed(f"{path}:{first_line}", str(error)) from error


def _record(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        raise _malformed(where, f"a JSON {type(value).__name__}")
    return Record(where, value)


def _malformed(where: str, actual: str) -> DataError:
    return DataError(
        "The data file is malformed.",
        path=where,
        expected="a JSON object of named fields",
        actual=actual,
        hint="a .jsonl file has one record per line; a .json file may also be a list of records",
    )


def _csv(path: Path) -> Iterator[Record]:
    """The rows below the header; an empty cell is None."""
    csv.field_size_limit(_MOST_CHARACTERS)
    rows = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = next(rows, [])
        _require_names_once(header, path)
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if row:
                yield Record(where, _csv_fields(header, row, where))
    except csv.Error as error:
        raise DataError("The data file is malformed.", path=f"{path}:{rows.line_num}", actual=str(error)) from error


def _require_names_once(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            "Two columns have the same name.",
            path=f"{path}:1",
            expected="a unique name for each column",
            actual=", ".join(map(repr, twice)),
            hint="rename or remove one of them",
        )


def _csv_fields(header: list[str], row: list[str], where: str) -> dict[str, str | None]:
    if len(row) != len(header):
        raise DataError(
            "A row has a different number of cells than the header.",
            path=where,
            expected=len(header),
            actual=len(row),
            hint="put cells that contain a comma or a line break in double quotes",
        )
    return {name: cell or None for name, cell in zip(header, row, strict=True)}


def _parquet(path: Path) -> Iterator[Record]:
    for number, fields in enumerate(read_parquet(path), start=1):
        yield Record(f"{path}, record {number}", fields)


def _read_text(path: Path) -> str:
    """The file's text, decompressed if its name ends in .gz or .zst."""
    content = path.read_bytes()
    if path.name.lower().endswith(".zst"):
        content = _unpacked_zstd(content, path)
    if path.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError("The data file is not a complete gzip file.", path=path, actual=str(error)) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Counted in error.object: decoding drops a byte order mark before counting positions.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            "The data file is not UTF-8 text.",
            path=f"{path}:{line}",
            actual=f"the byte 0x{error.object[error.start]:02x}",
            hint="convert it to UTF-8",
        ) from error


def _unpacked_zstd(content: bytes, path: Path) -> bytes:
    import pyarrow  # a dependency of datasets

    try:
        with pyarrow.input_stream(pyarrow.BufferReader(content), compression="zstd") as stream:
            return bytes(stream.read())
    except OSError as error:
        raise DataError("The data file is not a complete zstd file.", path=path, actual=str(error)) from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".jsonl.zst": _json_lines,
    ".json": _json,
    ".json.gz": _json,
    ".json.zst": _json,
    ".csv": _csv,
    ".csv.gz": _csv,
    ".csv.zst": _csv,
    ".parquet": _parquet,
}
