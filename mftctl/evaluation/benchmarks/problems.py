"""Problems of a benchmark: those of a local file or folder, those that are published, and checks of their text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mftctl.data.files import Record
from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.problem_fields import check_problem, decided_by
from mftctl.evaluation.benchmarks.problem_layouts import from_published_layout
from mftctl.evaluation.benchmarks.published_data import PublishedData, read_problem_records


def is_whole(text: str) -> bool:
    """Checks whether a text can be encoded as UTF-8.

    Args:
        text: Any text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def emptied(outputs: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[int]]:
    """Replaces outputs that cannot be encoded by empty texts; returns the outputs and the indices of those problems.

    Args:
        outputs: Outputs of each problem.
    """
    whole = [[text if is_whole(text) else "" for text in texts] for texts in outputs]
    return whole, [place for place, texts in enumerate(outputs) if whole[place] != list(texts)]


@dataclass(frozen=True, slots=True)
class Problems:
    """The problems of a benchmark.

    Attributes:
        records: The problems, with the fields that the benchmark uses.
        source: The file, package or hub dataset they came from.
        digest: SHA-256 of the records (not of the file), so that the hub dataset and a local copy have the same digest.
    """

    records: tuple[dict[str, Any], ...]
    source: str
    digest: str


def read_problems(path: Path, task: str) -> Problems:
    """The problems in a local file or a folder of files.

    Args:
        path: JSON lines, JSON or CSV, optionally compressed (`.gz`), or a folder of such files.
        task: The benchmark, or an lm-eval task, whose fields are not checked.

    Raises:
        EvaluationError: The file is missing, empty or malformed, or a record lacks a field; the error names the line.
    """
    return _problems(read_problem_records(path), task, source=str(path))


def fetch_problems(config: Mapping[str, Any], task: str) -> Problems:
    """The published problems: those that come with a package, or those of a hub dataset or of its local cache.

    Args:
        config: Configuration of the lm-eval task, with the dataset's name and split.
        task: The benchmark.

    Raises:
        MissingDataError: The problems are not on this machine and cannot be downloaded.
        EvaluationError: A record lacks a field.
    """
    data = PublishedData.of(config)
    return _problems(data.records(task), task, data.source)


def _problems(found: Iterable[Record], task: str, source: str) -> Problems:
    kept = tuple(_checked(from_published_layout(found, task), task))
    if not kept:
        raise EvaluationError("The data file has no problems.", path=source, expected="one JSON record per line")
    digest = hashlib.sha256()
    for record in kept:
        deciding = [record.get(field) for field in decided_by(task) or sorted(record)]
        digest.update(json.dumps(deciding, ensure_ascii=True).encode() + b"\n")
    return Problems(kept, source, digest.hexdigest())


def _checked(found: Iterable[Record], task: str) -> Iterator[dict[str, Any]]:
    for where, record in found:
        if not is_whole(json.dumps(record, ensure_ascii=False, default=str)):
            raise EvaluationError(
                "A problem contains a lone surrogate, which is not valid text.",
                path=where,
                expected="text that can be encoded as UTF-8",
            )
        yield check_problem(record, task, where)
