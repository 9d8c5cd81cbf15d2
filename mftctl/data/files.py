"""Reads records from local files as streams, each with its location.

JSON and CSV are read with the standard library, not with `datasets`: its JSON reader turns texts that look like dates
into dates and texts next to a number into quoted JSON, its CSV reader turns `007` into 7, and neither keeps the line
numbers that errors report.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mftctl.data.formats import is_record
from mftctl.data.hub import stream_parquet
from mftctl.data.text_lines import not_utf8, text_lines
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


def stream_records(path: Path) -> Iterator[Record | DataError]:
    """The records of a local file in file order, at least one; a malformed record is yielded as its error.

    The file is read as a stream, in memory bounded by the longest record, except for a `.json` file that does not hold
    JSON lines (a list, an object, columns), which is read whole.

    Malformed on its own, so that reading goes on, is a JSON line that does not parse or is not an object, a line that
    is not UTF-8, and a CSV row with a different number of cells than the header.

    Raises:
        DataError: The file type is unknown, the file cannot be read, is damaged or contains no records.
    """
    read = _READERS[file_kind(path)]
    is_empty = True
    try:
        for record in read(path):
            is_empty = False
            yield record
    except OSError as error:
        raise unreadable(path, error) from error
    if is_empty:
        raise DataError("The data file contains no records.", path=path, expected="at least one record", actual="none")


def read_records(path: Path) -> list[Record]:
    """All records of a local file in file order, at least one.

    Raises:
        DataError: As for `stream_records`, or a record is malformed.
    """
    records = []
    for record in stream_records(path):
        if isinstance(record, DataError):
            raise record
        records.append(record)
    return records


def file_kind(path: Path) -> str:
    """The suffix that tells how a data file is read, such as `.jsonl.gz`.

    Raises:
        DataError: The file type is unknown.
    """
    kind = next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), None)
    if kind is None:
        raise DataError("The data file has an unknown type.", path=path, expected=", ".join(_READERS))
    return kind


def unreadable(path: Path, error: OSError) -> DataError:
    """The error about a data file that the system cannot read."""
    return DataError("The data file cannot be read.", path=path, actual=str(error))


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder and its subfolders in the order of their names.

    Hidden files and folders are left out; links to folders are not followed.

    Raises:
        DataError: The folder holds no data file, or cannot be read.
    """
    if not path.is_dir():
        return [path]
    found = []
    for folder, subfolders, names in os.walk(path, onerror=_raise_unreadable):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        wanted = [name for name in names if name.lower().endswith(tuple(_READERS)) and not _is_hidden(name)]
        found += [Path(folder, name) for name in wanted]
    if not found:
        raise DataError("The folder has no data files.", path=path, expected=f"files that end in {', '.join(_READERS)}")
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _raise_unreadable(error: OSError) -> NoReturn:
    raise DataError("The folder cannot be read.", path=error.filename, actual=str(error)) from error


def _json_lines(path: Path) -> Iterator[Record | DataError]:
    # Only \n ends a line: a JSON string may contain U+2028 and other characters that splitlines() takes for line ends.
    for number, line in enumerate(text_lines(path, newline="\n"), start=1):
        if (error := not_utf8(line, path, number)) is not None:
            yield error
        elif line.strip():
            yield _line_record(line, f"{path}:{number}")


def _line_record(line: str, where: str) -> Record | DataError:
    try:
        return _record(json.loads(line.removesuffix("\n")), where)
    except (ValueError, RecursionError) as error:
        return _malformed(where, _problem(error))


def _json(path: Path) -> Iterator[Record | DataError]:
    """The records of a JSON list, a JSON object or JSON lines."""
    if (values := None if _starts_json_lines(path) else _document(path)) is None:
        yield from _json_lines(path)
        return
    for number, value in enumerate(values, start=1):
        yield _record(value, f"{path}, record {number}")


def _starts_json_lines(path: Path) -> bool:
    """True if the first line with content is an object and another one follows: the file needs not be read whole."""
    lines = list(islice((line for line in text_lines(path, newline="\n") if line.strip()), 2))
    return len(lines) == 2 and _one_object(lines[0]) is not None


def _document(path: Path) -> list[Any] | None:
    """The records of a file that is one JSON value; None if it holds JSON lines."""
    text = "".join(text_lines(path, newline="\n"))
    if (error := _first_foreign_byte(text, path)) is not None:
        raise error
    if text.lstrip().startswith("["):
        return _parsed_list(text, path)
    document = _one_object(text)
    return None if document is None else _records_of(document)


def _first_foreign_byte(text: str, path: Path) -> DataError | None:
    if text.isascii():
        return None
    errors = (not_utf8(line, path, number) for number, line in enumerate(text.split("\n"), start=1))
    return next((error for error in errors if error is not None), None)


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


def _parsed_list(text: str, path: Path) -> list[Any]:
    """The values of a JSON list that makes up the file."""
    try:
        values: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise _malformed(f"{path}:{line}", _problem(error)) from error
    return values


def _problem(error: ValueError | RecursionError) -> str:
    """What is wrong with JSON text: its syntax, a number with too many digits, or too deep nesting."""
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _record(value: object, where: str) -> Record | DataError:
    return Record(where, value) if isinstance(value, dict) else _malformed(where, f"a JSON {type(value).__name__}")


def _malformed(where: str, actual: str) -> DataError:
    return DataError(
        "The data file is malformed.",
        path=where,
        expected="a JSON object of named fields",
        actual=actual,
        hint="a .jsonl file has one record per line; a .json file may also be a list of records",
    )


def _csv(path: Path) -> Iterator[Record | DataError]:
    """The rows below the header; an empty cell is None."""
    csv.field_size_limit(_MOST_CHARACTERS)
    foreign: list[DataError] = []
    with closing(_watched_lines(path, foreign)) as lines:  # an error in `foreign` would keep the file open
        rows = csv.reader(lines, strict=True)
        try:
            header = next(rows, [])
            if foreign:
                raise foreign[0]
            _require_names_once(header, path)
            for row in rows:
                if foreign:
                    yield foreign[0]
                    foreign.clear()
                elif row:
                    yield _csv_record(header, row, f"{path}:{rows.line_num}")
        except csv.Error as error:
            raise DataError("The data file is malformed.", path=f"{path}:{rows.line_num}", actual=str(error)) from error


def _watched_lines(path: Path, foreign: list[DataError]) -> Generator[str]:
    """The lines of a CSV file; appends to `foreign` an error for each that is not UTF-8."""
    for number, line in enumerate(text_lines(path, newline=""), start=1):
        if (error := not_utf8(line, path, number)) is not None:
            foreign.append(error)
        yield line


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


def _csv_record(header: list[str], row: list[str], where: str) -> Record | DataError:
    if len(row) == len(header):
        return Record(where, {name: cell or None for name, cell in zip(header, row, strict=True)})
    return DataError(
        "A row has a different number of cells than the header.",
        path=where,
        expected=len(header),
        actual=len(row),
        hint="put cells that contain a comma or a line break in double quotes",
    )


def _parquet(path: Path) -> Iterator[Record | DataError]:
    for number, fields in enumerate(stream_parquet(path), start=1):
        yield Record(f"{path}, record {number}", fields)


_READERS: dict[str, Callable[[Path], Iterator[Record | DataError]]] = {
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
