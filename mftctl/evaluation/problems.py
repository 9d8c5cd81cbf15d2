"""GSM8K's problems, from a local file or the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mftctl.errors import EvaluationError
from mftctl.evaluation.answers import MARKER

FIELDS = ("question", "answer")


@dataclass(frozen=True, slots=True)
class Problems:
    """The records a benchmark is scored on.

    Attributes:
        records: Each with a `question` and an `answer` that ends in `#### <number>`.
        source: The file, or the hub's data set, they came from.
        digest: SHA-256 of the records (not of the file), so that the hub's and a local copy's are the same.
    """

    records: tuple[dict[str, str], ...]
    source: str
    digest: str


def read_problems(path: Path) -> Problems:
    """The problems of a local file.

    Args:
        path: JSON lines, also compressed (`.gz`). Further fields are left out.

    Raises:
        EvaluationError: The file is missing, empty or not JSON lines, or a record lacks a field; names the line.
    """
    return _problems(_records(path), source=str(path))


def fetch_problems(dataset_path: str, dataset_name: str | None, split: str) -> Problems:
    """The problems of a data set on the hub, or of its local cache.

    Args:
        dataset_path: The data set's id, such as `openai/gsm8k`.
        dataset_name: Its configuration.
        split: Its split.

    Raises:
        EvaluationError: It is not in the cache and the hub cannot be reached.
    """
    import datasets

    source = f"{dataset_path}/{dataset_name}:{split}" if dataset_name else f"{dataset_path}:{split}"
    try:
        rows = datasets.load_dataset(dataset_path, dataset_name, split=split)
    except OSError as error:
        raise EvaluationError(
            "The benchmark's data cannot be fetched.",
            path=source,
            actual=str(error).partition("\n")[0],
            hint="give a local file: --task-data NAME=FILE",
        ) from error
    return _problems(({field: row[field] for field in FIELDS} for row in rows), source=source)


def _problems(records: Iterable[dict[str, str]], *, source: str) -> Problems:
    kept = tuple(records)
    if not kept:
        raise EvaluationError("The data file has no problems.", path=source, expected="one JSON record a line")
    digest = hashlib.sha256()
    for record in kept:
        digest.update(json.dumps([record[field] for field in FIELDS], ensure_ascii=True).encode() + b"\n")
    return Problems(kept, source, digest.hexdigest())


def _records(path: Path) -> Iterator[dict[str, str]]:
    """Each line's record, checked."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _record(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EvaluationError(
            "The data file cannot be read.",
            path=path,
            expected="a text file with one JSON record a line",
            actual=str(error),
        ) from error


def _record(line: str, where: str) -> dict[str, str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise EvaluationError(
            "A line is not JSON.", path=where, expected="one JSON record a line", actual=str(error)
        ) from error
    if not isinstance(record, dict):
        raise EvaluationError(
            "A line is not a JSON object.",
            path=where,
            expected=f"an object with {' and '.join(FIELDS)}",
            actual=type(record).__name__,
        )
    for field in FIELDS:
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise EvaluationError(
                "A record lacks a field that the benchmark needs.",
                path=where,
                key=field,
                expected="a text that is not empty",
                actual=repr(record[field]) if field in record else f"only the fields {sorted(record)}",
            )
    if MARKER not in record["answer"]:
        raise EvaluationError(
            "An answer does not say which number is the final one.",
            path=where,
            key="answer",
            expected=f"a last line like '{MARKER} 18'",
            actual=repr(record["answer"][-40:]),
        )
    return {field: record[field] for field in FIELDS}
