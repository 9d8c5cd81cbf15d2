"""Arrow files: written batch by batch, and mapped into memory for reading."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes an Arrow file; no more than one batch is held in memory."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


class MappedTable:
    """The rows of an Arrow file, mapped into memory: what is not used takes none.

    Args:
        path: The file; its columns hold no nulls.

    Attributes:
        batches: The mapped batches in order.
        starts: The number of the first row of each batch.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.starts: list[int] = []
        self._rows = 0
        for batch in self.batches:
            self.starts.append(self._rows)
            self._rows += batch.num_rows

    def __len__(self) -> int:
        return self._rows

    def place(self, row: int) -> tuple[int, int]:
        """The batch of a row, and its number within."""
        number = bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    def value(self, column: str, row: int) -> Any:
        """The value of one row."""
        number, within = self.place(row)
        return self.batches[number].column(column)[within].as_py()

    def binary(self, column: str) -> Callable[[int], memoryview]:
        """The function that gives the bytes of a row of a binary column, without a copy."""
        views = []
        for batch in self.batches:
            _, offsets, content = batch.column(column).buffers()
            views.append((memoryview(offsets).cast("i"), memoryview(content) if content else memoryview(b"")))

        def of_row(row: int) -> memoryview:
            number, within = self.place(row)
            offsets, content = views[number]
            return content[offsets[within] : offsets[within + 1]]

        return of_row

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers as one array."""
        return self._joined([batch.column(column).to_numpy() for batch in self.batches])

    def flags(self, column: str) -> np.ndarray:
        """A column of truth values as one array."""
        return self._joined([batch.column(column).to_numpy(zero_copy_only=False) for batch in self.batches])

    def fixed_bytes(self, column: str, width_bytes: int) -> np.ndarray:
        """A column of bytes of one width as one array of void values."""
        kind = np.dtype(f"V{width_bytes}")
        arrays = []
        for batch in self.batches:
            values = batch.column(column)
            whole = np.frombuffer(values.buffers()[1], kind)
            arrays.append(whole[values.offset : values.offset + len(values)])
        return self._joined(arrays)

    @staticmethod
    def _joined(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays) if arrays else np.empty(0)
