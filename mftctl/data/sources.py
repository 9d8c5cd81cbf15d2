"""The data of a command: files, hub datasets and the built-in problems, mixed in given amounts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mftctl.data.examples import Example
from mftctl.data.files import Record, read_records
from mftctl.data.formats import to_example, unused_fields
from mftctl.data.hub import read_hub
from mftctl.data.quickstart import built_in
from mftctl.data.record_issues import RecordIssues
from mftctl.data.splits import sample_count
from mftctl.data.trees import conversations, is_message
from mftctl.errors import DataError

_HUB_ID = re.compile(r"(?P<identifier>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<configuration>[\w.-]+))?", re.ASCII)
# `owner/data-v1.5` is a name with a version, `data.jsonl` is a file.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")

_BUILT_IN: dict[str, built_in.Split] = {
    built_in.NAME: "train",
    f"{built_in.NAME}/train": "train",
    f"{built_in.NAME}/validation": "validation",
    f"{built_in.NAME}/test": "test",
}


@dataclass(frozen=True, slots=True)
class DataSource:
    """One part of a mixture.

    Attributes:
        path: A local file, a hub id (`owner/name` or `owner/name:config`), or `quickstart` with or without
            `/train`, `/validation` or `/test`.
        count: Number of records to take; None for all.
        split: The split of a hub dataset; None for `train`.
    """

    path: str
    count: int | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """Parses an option value such as `math.jsonl` or `math.jsonl=10000`.

        Raises:
            DataError: The path is missing.
        """
        if text and Path(text).exists():  # its name may contain =
            return cls(text)
        path, separator, digits = text.rpartition("=")
        counted = bool(separator) and digits.isascii() and digits.isdigit() and int(digits) > 0
        source = cls(path, int(digits)) if counted else cls(text)
        if not source.path:
            raise DataError("The data source has no path.", expected="PATH or PATH=COUNT", actual=repr(text))
        return source


def load_examples(sources: Sequence[DataSource], *, seed: int = 0, issues: RecordIssues | None = None) -> list[Example]:
    """The examples of all sources, one source after another, each in its own order.

    Args:
        sources: The parts of the mixture.
        seed: Determines which records are taken if a source has more than its count.
        issues: Collects problems with single records; without it, they are errors.

    Raises:
        DataError: A source cannot be read, or has fewer records than its count.
    """
    found = RecordIssues() if issues is None else issues
    examples = [example for source in sources for example in _load_source(source, seed, found)]
    if issues is None:
        found.settle("error")
    return examples


def data_digest(examples: Iterable[Example]) -> str:
    """The SHA-256 of kinds, roles and contents in hex: equal for equal data, whatever its source."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.canonical() + b"\n")
    return digest.hexdigest()


def record_digest(example: Example) -> str:
    """The first 16 hex digits of the SHA-256 of one record's kind, roles and contents."""
    return hashlib.sha256(example.canonical()).hexdigest()[:16]


def _load_source(source: DataSource, seed: int, issues: RecordIssues) -> list[Example]:
    records = _read(source)
    if is_message(records[0]):
        records = conversations(records)
        if not records:
            raise DataError("The message trees contain no answer.", path=source.path)
    examples = []
    issues.records += len(records)
    for record in records:
        issues.ignored.update(unused_fields(record.fields))
        try:
            examples.append(to_example(record.fields, record.where))
        except DataError as error:
            issues.refused.append(error)
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
    return sample_count(examples, source.count, seed)


def _read(source: DataSource) -> list[Record]:
    """The records of a built-in split, a local file or a hub dataset, in this order of preference."""
    if source.path in _BUILT_IN:
        _refuse_split(source)
        return read_records(built_in.data_path(_BUILT_IN[source.path]))
    path = Path(source.path)
    if path.is_dir():
        raise DataError("The data path is a folder.", path=path, expected="a file", hint="name one of its files")
    if path.exists():
        _refuse_split(source)
        return read_records(path)
    if source.path.startswith(f"{built_in.NAME}/"):
        raise DataError("The built-in data has no such split.", path=source.path, expected=" | ".join(_BUILT_IN))
    hub_id = _HUB_ID.fullmatch(source.path)
    if hub_id is None or _FILE_SUFFIX.search(hub_id["identifier"]):
        raise DataError("The data file does not exist.", path=path, expected="an existing file or a hub id")
    return _read_hub(hub_id["identifier"], hub_id["configuration"], source.split or "train")


def _read_hub(identifier: str, configuration: str | None, split: str) -> list[Record]:
    rows = read_hub(identifier, configuration, split)
    name = identifier if configuration is None else f"{identifier}:{configuration}"
    if not rows:
        raise DataError("The hub dataset is empty.", path=name, key=split)
    return [Record(f"{name}/{split}, record {number}", row) for number, row in enumerate(rows, start=1)]


def _refuse_split(source: DataSource) -> None:
    if source.split is not None:
        raise DataError(
            "Only hub datasets have splits.",
            path=source.path,
            key=source.split,
            hint=f"name the file of that split, or {built_in.NAME}/{source.split} for the built-in data",
        )
