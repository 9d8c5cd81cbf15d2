"""Encoded records chosen from prepared tables: mapped, and made into lists only when they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from sys import maxsize
from typing import Literal, overload

import numpy as np

from mftctl.data.encoding import Encoded, Encoder
from mftctl.data.image_inputs import ImageInputs
from mftctl.data.prepared.encode import encoded_table
from mftctl.data.prepared.encoded_table import EncodedTable, Outcome, Sequences
from mftctl.data.prepared.examples import Examples
from mftctl.data.record_issues import RecordIssues, Remark
from mftctl.progress import Listener

Side = Literal["chosen", "rejected"]
"""Of a preference; a record with one answer has only the first."""


class Records(Sequence[Encoded]):
    """Encoded records in order.

    Args:
        examples: The examples they encode, all of them usable.
        tables: The encoded table of each table of the examples.
        rows: The row of each record in its encoded table, int64.
        reference: The log-probabilities of the answers of preferences under the reference model, fp64
            `(records, 2)`; None if they are not known.
        images: What turns the images of the data into model inputs; None for data without images.
    """

    def __init__(
        self,
        examples: Examples,
        tables: Sequence[EncodedTable],
        rows: np.ndarray,
        reference: np.ndarray | None = None,
        images: ImageInputs | None = None,
    ) -> None:
        self._images = images
        self._examples = examples
        self._tables = tuple(tables)
        self._rows = rows
        self._reference = reference

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Encoded | Records:
        reference = None if self._reference is None else self._reference[index]
        if isinstance(index, slice):
            return Records(self._examples[index], self._tables, self._rows[index], reference, self._images)
        number = int(self._examples.table_numbers[index])
        where = self._examples.tables[number].where(int(self._examples.rows[index]))
        record = self._tables[number].record(int(self._rows[index]), where)
        if self._images is not None:
            shown = self._examples.tables[number].images(int(self._examples.rows[index]))
            record = replace(record, images=shown, image_inputs=self._images)
        return record if reference is None else replace(record, reference=tuple(reference.tolist()))

    def with_reference(self, reference: np.ndarray) -> Records:
        """The same preferences with log-probabilities of the reference model, fp64 `(records, 2)`."""
        return Records(self._examples, self._tables, self._rows, reference, self._images)

    @cached_property
    def lengths_tokens(self) -> list[int]:
        """Number of tokens of each record; of a preference, of its longer sequence."""
        found: list[int] = np.maximum(self.side_lengths("chosen"), self.side_lengths("rejected")).tolist()
        return found

    @cached_property
    def tokens(self) -> list[int]:
        """Number of tokens of each record; of a preference, of both sequences."""
        found: list[int] = (self.side_lengths("chosen") + self.side_lengths("rejected")).tolist()
        return found

    @cached_property
    def answer_tokens(self) -> list[int]:
        """Number of tokens trained on of each record; of a preference, in both answers."""
        both = (self.answer_tokens_between(0, maxsize, side) for side in ("chosen", "rejected"))
        found: list[int] = sum(both, np.zeros(len(self), np.int64)).tolist()
        return found

    def side_lengths(self, side: Side) -> np.ndarray:
        """Number of tokens of the sequence of each record with this answer, int64; 0 if it has none."""
        return self._column([_side(table, side).lengths_tokens for table in self._tables])

    def answer_tokens_between(self, start: int, end: int, side: Side = "chosen") -> np.ndarray:
        """Number of tokens trained on among those from `start` up to, not including, `end` of each record, int64.

        Args:
            start: First token.
            end: Token after the last.
            side: The answer, for preferences.
        """
        return self._column([_side(table, side).answer_tokens_between(start, end) for table in self._tables])

    def _column(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        return _of_rows(self._examples.table_numbers, self._rows, columns, np.int64)


class Sides(Sequence[Encoded]):
    """The sequences of all records, each made only when it is used: of a preference, the chosen, then the rejected.

    Args:
        records: All of them preferences.

    Attributes:
        lengths_tokens: Number of tokens of each sequence.
    """

    def __init__(self, records: Sequence[Encoded]) -> None:
        self._records = records
        if isinstance(records, Records):
            lengths = np.stack([records.side_lengths("chosen"), records.side_lengths("rejected")], axis=1)
            self.lengths_tokens: list[int] = lengths.flatten().tolist()
        else:
            self.lengths_tokens = [len(side.input_ids) for record in records for side in record.sides]

    def __len__(self) -> int:
        return 2 * len(self._records)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._records[index // 2].sides[index % 2]


def _side(table: EncodedTable, side: Side) -> Sequences:
    return table.sequences if side == "chosen" else table.rejected


@dataclass(frozen=True, slots=True)
class PreparedRecords:
    """The usable records.

    Attributes:
        records: The encoded records.
        examples: Their examples, in the same order.
    """

    records: Records
    examples: Examples


def token_lengths(records: Sequence[Encoded]) -> list[int]:
    """Number of tokens of each record; of a preference, of its longer sequence."""
    if isinstance(records, Records | Sides):
        return records.lengths_tokens
    return [record.longest_tokens for record in records]


def token_totals(records: Sequence[Encoded]) -> list[int]:
    """Number of tokens of each record; of a preference, of both sequences."""
    return records.tokens if isinstance(records, Records) else [record.tokens for record in records]


def with_reference(records: Sequence[Encoded], reference: np.ndarray) -> Sequence[Encoded]:
    """Preferences with the log-probabilities of their answers under the reference model.

    Args:
        records: The preferences.
        reference: fp64 `(records, 2)`: of the chosen and of the rejected answers, in nats.
    """
    if isinstance(records, Records):
        return records.with_reference(reference)
    pairs = zip(records, reference.tolist(), strict=True)
    return [replace(record, reference=(chosen, rejected)) for record, (chosen, rejected) in pairs]


def answer_lengths(records: Sequence[Encoded]) -> list[int]:
    """Number of tokens trained on of each record; of a preference, in both answers."""
    return records.answer_tokens if isinstance(records, Records) else [record.answer_tokens for record in records]


def encode_prepared(
    examples: Examples, encoder: Encoder, max_length_tokens: int, issues: RecordIssues, listener: Listener
) -> PreparedRecords:
    """The examples that can be encoded, in order, from the cache or newly encoded.

    All records that the sources select are encoded, so that other splits and fractions find theirs in the cache.

    Args:
        examples: The examples to encode.
        encoder: Encoder for the model's tokenizer.
        max_length_tokens: Longer examples are truncated at the end.
        issues: Collects problems with the records.
        listener: Receives progress updates.
    """
    tables = [
        encoded_table(table, selected, encoder, max_length_tokens, listener)
        for table, selected in zip(examples.tables, examples.selected, strict=True)
    ]
    numbers = examples.table_numbers
    rows = np.empty(len(examples), np.int64)
    for number, table in enumerate(tables):
        here = numbers == number
        rows[here] = table.rows_of(examples.rows[here])
    outcomes = _of_rows(numbers, rows, [table.outcomes for table in tables], np.uint8)
    remarks = _of_rows(numbers, rows, [table.remarks for table in tables], np.uint8)
    is_used = outcomes == Outcome.USED
    issues.tokenised += len(examples)
    overlong = np.flatnonzero(outcomes == Outcome.OVERLONG)
    if len(overlong):
        issues.count_overlong(len(overlong), examples.where(int(overlong[0])))
    for index in np.flatnonzero(outcomes == Outcome.REFUSED):
        issues.refused.append(tables[numbers[index]].refused[int(rows[index])])
    for value, count in zip(*np.unique(remarks[is_used], return_counts=True), strict=True):
        issues.count_remarks(Remark(int(value)), int(count))
    used = examples.take(np.flatnonzero(is_used))
    images = encoder.images if used.has_images else None
    return PreparedRecords(Records(used, tables, rows[is_used], images=images), used)


def _of_rows(
    numbers: np.ndarray, rows: np.ndarray, columns: Sequence[np.ndarray], kind: type[np.generic]
) -> np.ndarray:
    """A value for each record from the columns of the tables."""
    found = np.zeros(len(rows), kind)
    for number, column in enumerate(columns):
        here = numbers == number
        found[here] = column[rows[here]]
    return found
