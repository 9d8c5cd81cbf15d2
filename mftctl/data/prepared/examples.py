"""Examples chosen from prepared sources: row numbers, not texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from mftctl.data.examples import Example
from mftctl.data.prepared.example_table import ExampleTable


class Examples(Sequence[Example]):
    """Examples in order, read from their tables when they are used.

    Args:
        tables: The tables they come from.
        table_numbers: The number of the table of each example, int16.
        rows: The row of each example in its table, int64.
        selected: The rows of each table that the count of its source selects, ascending, int64; None for all.

    Attributes:
        tables: The tables they come from.
        selected: The rows of each table that the count of its source selects; None for all.
        table_numbers: The number of the table of each example.
        rows: The row of each example in its table.
    """

    def __init__(
        self,
        tables: Sequence[ExampleTable],
        table_numbers: np.ndarray,
        rows: np.ndarray,
        selected: Sequence[np.ndarray | None],
    ) -> None:
        self.tables = tuple(tables)
        self.selected = tuple(selected)
        self.table_numbers = table_numbers
        self.rows = rows

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """The examples of all parts, one part after another."""
        tables = [table for part in parts for table in part.tables]
        starts = np.cumsum([0, *(len(part.tables) for part in parts)])
        numbers = [part.table_numbers + np.int16(start) for part, start in zip(parts, starts, strict=False)]
        return cls(
            tables,
            _concatenated(numbers, np.int16),
            _concatenated([part.rows for part in parts], np.int64),
            [rows for part in parts for rows in part.selected],
        )

    @classmethod
    def of_table(cls, table: ExampleTable) -> Examples:
        """All examples of a table."""
        return cls([table], np.zeros(len(table), np.int16), np.arange(len(table), dtype=np.int64), [None])

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """The examples with these numbers, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Examples(self.tables, self.table_numbers[chosen], self.rows[chosen], self.selected)

    def as_selection(self) -> Examples:
        """The same examples, all of one table, as those that the count of their source selects."""
        return Examples(self.tables, self.table_numbers, self.rows, [self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self.tables, self.table_numbers[index], self.rows[index], self.selected)
        table: ExampleTable = self.tables[self.table_numbers[index]]
        return table.example(int(self.rows[index]))

    @property
    def has_images(self) -> bool:
        """Whether the data has records with images; true for all parts of it."""
        return any(table.summary.has_images for table in self.tables)

    def where(self, index: int) -> str:
        """The origin of an example, such as `train.jsonl:17`."""
        table: ExampleTable = self.tables[self.table_numbers[index]]
        return table.where(int(self.rows[index]))

    def contents(self) -> Iterator[memoryview]:
        """The canonical JSON of each example."""
        contents = [table.rows.binary("content") for table in self.tables]
        for number, row in zip(self.table_numbers.tolist(), self.rows.tolist(), strict=True):
            yield contents[number](row)

    @cached_property
    def digests(self) -> np.ndarray:
        """The first 8 bytes of the SHA-256 of each example's content, as uint64."""
        return self._column([table.digests for table in self.tables], np.dtype(np.uint64))

    @property
    def prompt_keys(self) -> np.ndarray:
        """A 16-byte digest of what must not occur in both training and validation data, as void16."""
        return self._column([table.prompt_keys for table in self.tables], np.dtype("V16"))

    @property
    def are_preferences(self) -> np.ndarray:
        """Whether each example has a chosen and a rejected answer, as bool."""
        return self._column([table.are_preferences for table in self.tables], np.dtype(np.bool_))

    @property
    def begin_without_system(self) -> np.ndarray:
        """Whether a template may add a system prompt to each example, as bool."""
        return self._column([table.begins_without_system for table in self.tables], np.dtype(np.bool_))

    def _column(self, columns: list[np.ndarray], kind: np.dtype) -> np.ndarray:
        found = np.empty(len(self), kind)
        for number, column in enumerate(columns):
            here = self.table_numbers == number
            found[here] = column[self.rows[here]]
        return found


def any_begins_without_system(examples: Iterable[Example]) -> bool:
    """True if a template may add a system prompt to some example."""
    if isinstance(examples, Examples):
        return bool(examples.begin_without_system.any())
    return any(example.begins_without_system for example in examples)


def data_digest(examples: Sequence[Example]) -> str:
    """The SHA-256 of kinds, roles and contents in hex: equal for equal data, whatever its source."""
    digest = hashlib.sha256()
    contents = examples.contents() if isinstance(examples, Examples) else map(Example.canonical, examples)
    for content in contents:
        digest.update(content)
        digest.update(b"\n")
    return digest.hexdigest()


def _concatenated(arrays: list[np.ndarray], kind: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, kind)
