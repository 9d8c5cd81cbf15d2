"""Records out of files: JSON lines, JSON, CSV, and folders of them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mftctl.errors import EvaluationError

Located = tuple[str, dict[str, Any]]
"""A record, and where it came from, such as `test.jsonl:17`."""

_SUFFIXES = (".jsonl", ".json", ".csv")


def read_records(path: Path) -> Iterator[Located]:
    """Each record of a file, or of all files of a folder in the order of their names.

    A record from a folder, or from a JSON file with named lists, gets `file`: the file's name without its ending.

    Args:
        path: `.jsonl`, `.json` or `.csv`, also compressed (`.gz`), or a folder.

    Raises:
        EvaluationError: It is missing or in another form; names the line.
    """
    if not path.is_dir():
        yield from _file_records(path)
        return
    files = sorted(file for file in path.rglob("*") if _plain_suffix(file) in _SUFFIXES)
    if not files:
        raise EvaluationError(
            "The folder has no data files.", path=path, expected=f"files that end in {', '.join(_SUFFIXES)}"
        )
    for file in files:
        yield from _file_records(file)


def _plain_suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix


def _file_records(path: Path) -> Iterator[Located]:
    read = {".csv": _csv_records, ".json": _json_records}.get(_plain_suffix(path), _line_records)
    name = Path(path.stem).stem if path.suffix == ".gz" else path.stem
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for where, record in read(file, path):
                yield where, {"file": name, **record}
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(
            "The data file cannot be read.",
            path=path,
            expected="a text file with one JSON record a line",
            actual=str(error),
        ) from error


def _line_records(file: TextIO, path: Path) -> Iterator[Located]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(_parsed(line, where, "one JSON record a line"), where)


def _json_records(file: TextIO, path: Path) -> Iterator[Located]:
    """The records of a list, or of the one list that the document has (`examples` or `data`)."""
    document = _parsed(file.read(), str(path), "a JSON document")
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else None
    if not isinstance(document, list):
        raise EvaluationError("The JSON document has no list of records.", path=path, expected="one list of records")
    for number, record in enumerate(document):
        where = f"{path}#{number}"
        yield where, _object(record, where)


def _csv_records(file: TextIO, path: Path) -> Iterator[Located]:
    reader = csv.DictReader(file)
    for record in reader:
        where = f"{path}:{reader.line_num}"
        if None in record or None in record.values():
            raise EvaluationError(
                "A row has another number of columns than the first.",
                path=where,
                expected=f"{len(reader.fieldnames or ())} columns",
                actual=f"{sum(value is not None for value in record.values())} or more",
            )
        yield where, dict(record)


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise EvaluationError("A line is not JSON.", path=where, expected=expected, actual=str(error)) from error


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise EvaluationError(
            "A line is not a JSON object.",
            path=where,
            expected="an object with the benchmark's fields",
            actual=type(record).__name__,
        )
    return record
