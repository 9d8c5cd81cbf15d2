"""Loads the examples of data sources: read once, kept in the cache, and chosen by row number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mftctl.data.examples import RecordKind
from mftctl.data.prepared.arrow_files import MappedTable
from mftctl.data.prepared.code_digest import code_digest
from mftctl.data.prepared.entries import Entry, entry
from mftctl.data.prepared.example_table import ExampleTable, ReadSummary, write_examples
from mftctl.data.prepared.examples import Examples
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import DataSource, local_files, source_content_digest, source_places, stream_source
from mftctl.data.splits import sample_count
from mftctl.errors import DataError
from mftctl.progress import Listener, Silence


def load_examples(
    sources: Sequence[DataSource],
    *,
    seed: int = 0,
    issues: RecordIssues | None = None,
    listener: Listener | None = None,
    kind: RecordKind | None = "answers",
) -> Examples:
    """The examples of all sources, one source after another, each in its own order.

    Args:
        sources: The parts of the mixture.
        seed: Determines which records are taken if a source has more than its count.
        issues: Collects problems with single records; without it, they are errors.
        listener: Receives progress updates and notes on the cache.
        kind: The kind of the records; others cannot be used. None for any.

    Raises:
        DataError: A source cannot be read, has only records of another kind, or has fewer records than its count.
    """
    found = RecordIssues() if issues is None else issues
    parts = [_of_source(source, seed, found, listener or Silence(), kind) for source in sources]
    if issues is None:
        found.settle("error")
    return Examples.joined(parts)


def _of_source(
    source: DataSource, seed: int, issues: RecordIssues, listener: Listener, kind: RecordKind | None
) -> Examples:
    table = example_table(source, listener)
    issues.records += table.summary.records
    issues.refused.extend(table.refused())
    issues.ignored.update(table.summary.ignored)
    examples = Examples.of_table(table)
    if kind is not None:
        examples = _of_kind(examples, kind, source, issues)
    if source.count is None:
        return examples
    if source.count > len(examples):
        raise DataError(
            "The data has fewer records than requested.",
            path=source.path,
            expected=source.count,
            actual=len(examples),
            hint="request fewer, or omit the count to take all",
        )
    return sample_count(examples, source.count, seed).as_selection()


def _of_kind(examples: Examples, kind: RecordKind, source: DataSource, issues: RecordIssues) -> Examples:
    """The examples of a kind; others are among the issues.

    Raises:
        DataError: All are of another kind.
    """
    fits = examples.are_preferences == (kind == "preferences")
    if fits.all():
        return examples
    if not fits.any():
        raise other_kind(kind, source.path)
    issues.refused += [other_kind(kind, examples.where(int(index))) for index in np.flatnonzero(~fits)]
    return examples.take(np.flatnonzero(fits)).as_selection()


def other_kind(kind: RecordKind, where: str) -> DataError:
    """The error about records of another kind than this one."""
    if kind == "preferences":
        return DataError(
            "DPO needs preferences.",
            path=where,
            expected="records with chosen and rejected answers",
            actual="one answer for each prompt",
            hint="--objective sft trains on single answers",
        )
    return DataError(
        "Preference data cannot be used as single answers.",
        path=where,
        expected="records of questions and answers",
        actual="records with chosen and rejected answers",
        hint="--objective dpo of fft and mask-train trains on them; to use the preferred answers alone, write records "
        "with prompt and completion",
    )


def example_table(source: DataSource, listener: Listener) -> ExampleTable:
    """The readable records of a source, from the cache or newly read.

    Args:
        source: The source; its count is ignored.
        listener: Receives progress updates and notes on the cache.

    Raises:
        DataError: The source cannot be read, or changes meanwhile.
    """
    places = tuple(source_places(source))
    before = _file_states(source)
    key = {"what": "examples", "code": code_digest(), "source": source_content_digest(source)}

    def make(path: Path) -> dict[str, Any]:
        summary = write_examples(path, stream_source(source), places, listener)
        if _file_states(source) != before:
            raise DataError(
                "The data changed while it was read.",
                path=source.path,
                hint="run the command again once nothing writes to it",
            )
        return summary.plain()

    table = _table(entry(key, make, listener), places)
    images = table.image_files()
    if not images:
        return table
    # The first reading told which images there are; the second is kept for these versions of their files.
    return _table(entry({**key, "images": _image_states(images)}, make, listener), places)


def _table(made: Entry, places: tuple[str, ...]) -> ExampleTable:
    return ExampleTable(made.table, made.name, places, MappedTable(made.table), ReadSummary.parse(made.summary))


def _image_states(images: Sequence[Path]) -> str:
    """SHA-256 of the paths, sizes and modification times of image files."""
    digest = hashlib.sha256()
    for path in images:
        try:
            status = path.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{path.absolute()}\0{state}\n".encode())
    return digest.hexdigest()


def _file_states(source: DataSource) -> list[tuple[Path, int, int]]:
    """Path, size and modification time in ns of each local file; those that cannot be read are told on reading."""
    states = []
    for path in local_files(source):
        with suppress(OSError):
            status = path.stat()
            states.append((path, status.st_size, status.st_mtime_ns))
    return states
