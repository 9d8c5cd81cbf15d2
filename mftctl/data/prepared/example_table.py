"""The readable records of a data source, as an Arrow file: their content, where each comes from, and digests of it.

The content is the canonical JSON of an `Example`, so that digests, splits and prompts need no second reading.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mftctl.data.examples import Example
from mftctl.data.files import Record
from mftctl.data.formats import to_example, unused_fields
from mftctl.data.image_reference import ImageReference
from mftctl.data.images import located, read_images
from mftctl.data.prepared.arrow_files import MappedTable, write_batches
from mftctl.errors import DataError
from mftctl.progress import Listener, Progress

BATCH_RECORDS = 1024
_PROGRESS_RECORDS = 10_000
_BATCH_BYTES = 1 << 26
_KEY_BYTES = 16
_IN_FILE = re.compile(r":\d+|, record \d+", re.ASCII)

_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),  # number of the file; -1 if the place is complete
        ("place", pa.string()),  # such as `:17`
        ("content", pa.binary()),
        ("has_turns", pa.bool_()),
        ("begins_without_system", pa.bool_()),
        ("is_preference", pa.bool_()),
        ("digest", pa.uint64()),
        ("prompt_key", pa.binary(_KEY_BYTES)),
        ("image_digests", pa.list_(pa.string())),
        ("image_paths", pa.list_(pa.string())),  # as in the record; empty for an image whose bytes the record holds
        ("image_contents", pa.list_(pa.binary())),
    ]
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a record cannot be used: the fields of its error, with the place apart from the file.

    Attributes:
        file: Number of the file; -1 if the place is complete.
        place: The place in the file, such as `:17`.
        message: What is wrong.
        key: The field concerned.
        expected: What would have been valid.
        actual: What was found.
        hint: What to do.
        number: Number of the record among all records read, from 1; 0 if it is not kept.
    """

    file: int
    place: str
    message: str
    key: str | None
    expected: str | None
    actual: str | None
    hint: str | None
    number: int = 0

    def plain(self) -> dict[str, Any]:
        """The refusal as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ReadSummary:
    """What reading a source found, beside the records that can be used.

    Attributes:
        records: Records read.
        refused: Why some of them cannot be used.
        ignored: Number of records that have each ignored field.
        missing_images: Numbers of files and paths of the images of refused records.
        has_images: Whether some record that can be used has images.
    """

    records: int
    refused: list[Refusal]
    ignored: dict[str, int]
    missing_images: list[tuple[int, str]] = field(default_factory=list)
    has_images: bool = False

    def plain(self) -> dict[str, Any]:
        """The summary as plain data."""
        return asdict(self)

    @classmethod
    def parse(cls, document: dict[str, Any]) -> ReadSummary:
        """The summary from plain data."""
        refused = [Refusal(**item) for item in document["refused"]]
        missing = [(number, path) for number, path in document["missing_images"]]
        return cls(document["records"], refused, document["ignored"], missing, document["has_images"])


@dataclass(frozen=True, slots=True)
class ExampleTable:
    """The readable records of a source.

    Attributes:
        path: The Arrow file.
        digest: Digest of its content and of the code that made it.
        files: The names of the files as the user gave them.
        rows: The mapped rows.
        summary: What else reading found.
    """

    path: Path
    digest: str
    files: tuple[str, ...]
    rows: MappedTable
    summary: ReadSummary

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digests(self) -> np.ndarray:
        """The first 8 bytes of the SHA-256 of each record's content, as uint64."""
        return self.rows.numbers("digest")

    @property
    def prompt_keys(self) -> np.ndarray:
        """A 16-byte digest of what must not occur in both training and validation data, as void16."""
        return self.rows.fixed_bytes("prompt_key", _KEY_BYTES)

    @property
    def begins_without_system(self) -> np.ndarray:
        """Whether a template may add a system prompt to each record, as bool."""
        return self.rows.flags("begins_without_system")

    @property
    def are_preferences(self) -> np.ndarray:
        """Whether each record has a chosen and a rejected answer, as bool."""
        return self.rows.flags("is_preference")

    @property
    def numbers(self) -> np.ndarray:
        """The number of each record among all records read, from 1; those refused have the others, int64."""
        refused = [item.number for item in self.summary.refused]
        return np.setdiff1d(np.arange(1, self.summary.records + 1), refused)

    def content(self, row: int) -> bytes:
        """The canonical JSON of a record."""
        content: bytes = self.rows.value("content", row)
        return content

    def where(self, row: int) -> str:
        """The origin of a record, such as `train.jsonl:17`."""
        return _whole_place(self.files, self.rows.value("file", row), self.rows.value("place", row))

    def example(self, row: int) -> Example:
        """A record."""
        return Example.from_canonical(
            self.content(row),
            self.where(row),
            has_turns=self.rows.value("has_turns", row),
            images=self.images(row) if self.summary.has_images else (),
        )

    def images(self, row: int) -> tuple[ImageReference, ...]:
        """The images of a record."""
        names = ("image_digests", "image_paths", "image_contents")
        folder = data_folder(self.files, self.rows.value("file", row))
        return tuple(
            ImageReference(digest, str(located(path, folder)) if path else "", content)
            for digest, path, content in zip(*(self.rows.value(name, row) for name in names), strict=True)
        )

    def image_files(self) -> list[Path]:
        """The image files of all records, also of those that cannot be used because one is missing."""
        found = dict.fromkeys(self.summary.missing_images)
        for batch in self.rows.batches if self.summary.has_images else ():
            columns = (batch.column(name).to_pylist() for name in ("file", "image_paths"))
            for number, paths in zip(*columns, strict=True):
                found |= dict.fromkeys((number, path) for path in paths if path)
        return [located(path, data_folder(self.files, number)) for number, path in found]

    def refused(self) -> list[DataError]:
        """The errors of the records that cannot be used."""
        return [error_of(item, self.files) for item in self.summary.refused]


def write_table(path: Path, examples: Iterable[Example], files: Sequence[str]) -> None:
    """Writes examples to an Arrow file.

    Args:
        path: The file to write.
        examples: The examples in order.
        files: The names of the files with which their places begin.
    """
    write_batches(path, _SCHEMA, _batches(examples, files))


def write_examples(
    path: Path, records: Iterable[Record | DataError], files: Sequence[str], listener: Listener
) -> ReadSummary:
    """Writes the readable records of a source, and returns what else was found.

    Args:
        path: The Arrow file to write.
        records: The records of the source in order, or why one is malformed.
        files: The names of its files, with which their places begin.
        listener: Receives progress updates.
    """
    found = _Found(files, listener)
    write_table(path, found.usable(records), files)
    missing = list(dict.fromkeys(found.missing_images))
    return ReadSummary(found.records, found.refused, dict(found.ignored), missing, found.has_images)


@dataclass(slots=True)
class _Found:
    """Collects what is found while reading beside the records that can be used."""

    files: Sequence[str]
    listener: Listener
    records: int = 0
    refused: list[Refusal] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    missing_images: list[tuple[int, str]] = field(default_factory=list)
    has_images: bool = False

    def usable(self, records: Iterable[Record | DataError]) -> Iterator[Example]:
        """The records that can be used."""
        begun = time.monotonic()
        for record in records:
            self.records += 1
            if self.records % _PROGRESS_RECORDS == 0:
                speed = self.records / (time.monotonic() - begun)
                self.listener.progress(Progress("reading", self.records, None, records_per_second=speed))
            try:
                if isinstance(record, DataError):
                    raise record
                self.ignored.update(unused_fields(record.fields))
                example = self._with_images(to_example(record.fields, record.where))
            except DataError as error:
                self.refused.append(refusal_of(error, self.files, self.records))
            else:
                yield example
        if self.records >= _PROGRESS_RECORDS:
            self.listener.progress(Progress("reading", self.records, self.records))

    def _with_images(self, example: Example) -> Example:
        """The example with the digests of its images."""
        if not example.images:
            return example
        number, _ = _place(example.where, self.files)
        try:
            found = read_images(example, data_folder(self.files, number))
        except DataError:
            self.missing_images += [(number, image.path) for image in example.images if image.path]
            raise
        self.has_images = True
        return found


def data_folder(files: Sequence[str], number: int) -> Path | None:
    """The folder of a data file; None for a record that is in none.

    Args:
        files: The names of the files.
        number: Number of the file; -1 for none.
    """
    if number < 0 or not Path(files[number]).is_file():
        return None
    return Path(files[number]).parent


def _batches(examples: Iterable[Example], files: Sequence[str]) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[Any, ...]] = []
    size_bytes, file = 0, 0
    for example in examples:
        row = _row(example, *_place(example.where, files, likely=file))
        file = max(row[0], 0)
        rows.append(row)
        size_bytes += len(row[2]) + sum(len(image.content) for image in example.images)
        if len(rows) == BATCH_RECORDS or size_bytes > _BATCH_BYTES:
            yield _batch(rows)
            rows, size_bytes = [], 0
    if rows:
        yield _batch(rows)


def _row(example: Example, file: int, place: str) -> tuple[Any, ...]:
    content = example.canonical()
    return (
        file,
        place,
        content,
        example.has_turns,
        example.begins_without_system,
        bool(example.rejected),
        int.from_bytes(hashlib.sha256(content).digest()[:8], "big"),
        hashlib.sha256(example.prompt_content()).digest()[:_KEY_BYTES],
        [image.sha256 for image in example.images],
        [image.path for image in example.images],
        [image.content for image in example.images],
    )


def refusal_of(error: DataError, files: Sequence[str], number: int = 0) -> Refusal:
    """What is kept of the error of a record, with the record's number among all records read."""
    expected, actual = (None if value is None else str(value) for value in (error.expected, error.actual))
    return Refusal(*_place(error.path or "", files), error.message, error.key, expected, actual, error.hint, number)


def error_of(refusal: Refusal, files: Sequence[str]) -> DataError:
    """The error of a record that was kept."""
    return DataError(
        refusal.message,
        path=_whole_place(files, refusal.file, refusal.place),
        key=refusal.key,
        expected=refusal.expected,
        actual=refusal.actual,
        hint=refusal.hint,
    )


def _place(where: str, files: Sequence[str], likely: int = 0) -> tuple[int, str]:
    """The number of the file of a place and the rest; -1 and the whole if it lies in none.

    Args:
        where: The place, such as `train.jsonl:17`.
        files: The names of the files.
        likely: The file to try first.
    """
    for number in (likely, *range(len(files))) if files else ():
        file = files[number]
        if where.startswith(file) and _IN_FILE.fullmatch(where, len(file)):
            return number, where[len(file) :]
    return -1, where


def _whole_place(files: Sequence[str], file: int, place: str) -> str:
    return place if file < 0 else files[file] + place


def _batch(rows: Sequence[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _SCHEMA, strict=True)]
    return pa.record_batch(columns, schema=_SCHEMA)
