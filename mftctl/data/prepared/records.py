"""Encoded records chosen from prepared tables: mapped, and made into lists only when they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from mftctl.data.encoding import Encoded, Encoder
from mftctl.data.prepared.encode import encoded_table
from mftctl.data.prepared.encoded_table import EncodedTable, Outcome
from mftctl.data.prepared.examples import Examples
from mftctl.data.record_issues import RecordIssues, Remark
from mftctl.progress import Listener


class Records(Sequence[Encoded]):
    """Encoded records in order.

    Args:
        examples: The examples they encode, all of them usable.
        tables: The encoded table of each table of the examples.
        rows: The row of each record in its encoded table, int64.
    """

    def __init__(self, examples: Examples, tables: Sequence[EncodedTable], rows: np.ndarray) -> None:
        self._examples = examples
        self._tables = tuple(tables)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Encoded | Records:
        if isinstance(index, slice):
            return Records(self._examples[index], self._tables, self._rows[index])
        number = int(self._examples.table_numbers[index])
        where = self._examples.tables[number].where(int(self._examples.rows[index]))
        return self._tables[number].record(int(self._rows[index]), where)

    @cached_property
    def lengths_tokens(self) -> list[int]:
        """Number of tokens of each record."""
        return self._column([table.lengths_tokens for table in self._tables])

    @cached_property
    def answer_tokens(self) -> list[int]:
        """Number of tokens trained on of each record."""
        return self._column([table.answer_tokens for table in self._tables])

    def answer_tokens_between(self, start: int, end: int) -> np.ndarray:
        """Number of tokens trained on among those from `start` up to, not including, `end` of each record, int64."""
        columns = [table.answer_tokens_between(start, end) for table in self._tables]
        return _of_rows(self._examples.table_numbers, self._rows, columns, np.int64)

    def _column(self, columns: Sequence[np.ndarray]) -> list[int]:
        found: list[int] = _of_rows(self._examples.table_numbers, self._rows, columns, np.int64).tolist()
        return found


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
    """Number of tokens of each record."""
    if isinstance(records, Records):
        return records.lengths_tokens
    return [len(record.input_ids) for record in records]


def answer_lengths(records: Sequence[Encoded]) -> list[int]:
    """Number of tokens trained on of each record."""
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
    issues.overlong += int((outcomes == Outcome.OVERLONG).sum())
    for index in np.flatnonzero(outcomes == Outcome.REFUSED):
        issues.refused.append(tables[numbers[index]].refused[int(rows[index])])
    for value, count in zip(*np.unique(remarks[is_used], return_counts=True), strict=True):
        issues.count_remarks(Remark(int(value)), int(count))
    used = examples.take(np.flatnonzero(is_used))
    return PreparedRecords(Records(used, tables, rows[is_used]), used)


def _of_rows(
    numbers: np.ndarray, rows: np.ndarray, columns: Sequence[np.ndarray], kind: type[np.generic]
) -> np.ndarray:
    """A value for each record from the columns of the tables."""
    found = np.zeros(len(rows), kind)
    for number, column in enumerate(columns):
        here = numbers == number
        found[here] = column[rows[here]]
    return found
