"""The token ids of the examples of a table, as an Arrow file with a row for each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pyarrow as pa

from mftctl.data.encoding import Encoded, Encoder, PromptTooLongError
from mftctl.data.examples import IGNORED_LABEL
from mftctl.data.prepared.arrow_files import MappedTable
from mftctl.data.prepared.example_table import ExampleTable
from mftctl.data.record_issues import Remark
from mftctl.errors import DataError

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("answers", pa.list_(pa.int32())),  # start, end, start, end, ...
        ("rejected_ids", pa.list_(pa.int32())),  # empty unless the record is a preference
        ("rejected_answers", pa.list_(pa.int32())),
        ("outcome", pa.uint8()),
        ("remarks", pa.uint8()),
    ]
)


class Outcome(IntEnum):
    """Whether a record can be used."""

    USED = 0
    OVERLONG = 1
    REFUSED = 2


@dataclass(frozen=True, slots=True)
class _Lists:
    """A column of lists of one batch: all values, and where each list begins."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, column: pa.ListArray) -> _Lists:
        return cls(column.values.to_numpy(), column.offsets.to_numpy())

    def of_row(self, row: int) -> list[int]:
        found: list[int] = self.values[self.offsets[row] : self.offsets[row + 1]].tolist()
        return found


class Sequences:
    """The token ids of the rows of a table, and which of them are trained on.

    Args:
        rows: The rows as mapped.
        ids: The column of token ids.
        answers: The column of the spans of answers.

    Attributes:
        lengths_tokens: Number of tokens of each row.
    """

    def __init__(self, rows: MappedTable, ids: str, answers: str) -> None:
        self._ids = [_Lists.of(batch.column(ids)) for batch in rows.batches]
        self._answers = [_Lists.of(batch.column(answers)) for batch in rows.batches]
        lengths = [np.diff(lists.offsets) for lists in self._ids]
        self.lengths_tokens = np.concatenate(lengths) if lengths else np.empty(0, np.int32)

    def answer_tokens_between(self, start: int, end: int) -> np.ndarray:
        """Number of tokens trained on among those from `start` up to, not including, `end` of each row, int64."""
        found = [np.empty(0, np.int64)]
        for lists in self._answers:
            spans = np.clip(lists.values, start, end).reshape(-1, 2)
            sums = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0], dtype=np.int64)])
            found.append(np.diff(sums[lists.offsets // 2]))
        return np.concatenate(found)

    def of_row(self, batch: int, row: int) -> tuple[list[int], list[int]]:
        """The token ids and the labels of a row of a batch."""
        input_ids = self._ids[batch].of_row(row)
        labels = [IGNORED_LABEL] * len(input_ids)
        answers = self._answers[batch].of_row(row)
        for start, end in zip(answers[::2], answers[1::2], strict=True):
            labels[start:end] = input_ids[start:end]
        return input_ids, labels


class EncodedTable:
    """The encoded rows of a table of examples, mapped into memory.

    Args:
        rows: The rows as mapped.
        source_rows: The row of `examples` that each encodes; None for all in order.
        refused: The errors of refused rows by row of this table.

    Attributes:
        outcomes: The `Outcome` of each row, uint8.
        remarks: The `Remark` of each row, uint8.
        sequences: The sequences of the rows, with the chosen answer of a preference; empty if a row cannot be used.
        rejected: The sequences with the rejected answer; empty unless a row is a preference.
        refused: The errors of refused rows by row.
    """

    def __init__(self, rows: MappedTable, source_rows: np.ndarray | None, refused: dict[int, DataError]) -> None:
        self._rows = rows
        self._source_rows = source_rows
        self.outcomes = rows.numbers("outcome")
        self.remarks = rows.numbers("remarks")
        self.sequences = Sequences(rows, "input_ids", "answers")
        self.rejected = Sequences(rows, "rejected_ids", "rejected_answers")
        self.refused = refused

    def rows_of(self, source_rows: np.ndarray) -> np.ndarray:
        """The rows of this table that encode these rows of the examples."""
        return source_rows if self._source_rows is None else np.searchsorted(self._source_rows, source_rows)

    def record(self, row: int, where: str) -> Encoded:
        """A record that can be used.

        Args:
            row: Its row.
            where: Its origin.
        """
        number, within = self._rows.place(row)
        rejected_ids, rejected_labels = self.rejected.of_row(number, within)
        rejected = Encoded(rejected_ids, rejected_labels, where) if rejected_ids else None
        return Encoded(*self.sequences.of_row(number, within), where, Remark(int(self.remarks[row])), rejected)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """What encoding a batch of examples gave.

    Attributes:
        rows: The Arrow record batch in the format for streams, which can be sent between processes.
        refused: The errors of refused examples by their number in the batch.
    """

    rows: bytes
    refused: dict[int, DataError]


def encode_rows(encoder: Encoder, table: ExampleTable, rows: Sequence[int], max_length_tokens: int) -> EncodedBatch:
    """Encodes some examples of a table.

    Args:
        encoder: The encoder.
        table: The examples.
        rows: The rows to encode.
        max_length_tokens: Longer examples are truncated at the end.
    """
    outcomes = encoder.encode_batch([table.example(row) for row in rows], max_length_tokens)
    refused = {
        number: outcome
        for number, outcome in enumerate(outcomes)
        if isinstance(outcome, DataError) and not isinstance(outcome, PromptTooLongError)
    }
    columns = zip(*map(_columns, outcomes), strict=True)
    batch = pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return EncodedBatch(sink.getvalue(), refused)


def _columns(outcome: Encoded | DataError) -> tuple[np.ndarray, list[int], np.ndarray, list[int], Outcome, int]:
    nothing: tuple[np.ndarray, list[int]] = (np.empty(0, np.int32), [])
    if isinstance(outcome, DataError):
        kind = Outcome.OVERLONG if isinstance(outcome, PromptTooLongError) else Outcome.REFUSED
        return *nothing, *nothing, kind, 0
    rejected = nothing if outcome.rejected is None else _sequence(outcome.rejected)
    return *_sequence(outcome), *rejected, Outcome.USED, outcome.remarks


def _sequence(record: Encoded) -> tuple[np.ndarray, list[int]]:
    """The token ids and the spans of answers of a sequence."""
    labels = np.array(record.labels, np.int64)
    learned = np.concatenate([[False], labels != IGNORED_LABEL, [False]])
    answers = np.flatnonzero(learned[1:] != learned[:-1])
    return np.array(record.input_ids, np.int32), answers.tolist()
