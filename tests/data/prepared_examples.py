"""Examples as they are read from a data file, made from a list."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mftctl.data.examples import Example
from mftctl.data.prepared.arrow_files import MappedTable
from mftctl.data.prepared.example_table import ExampleTable, ReadSummary, write_table
from mftctl.data.prepared.examples import Examples


def prepared(examples: Sequence[Example]) -> Examples:
    """The examples, mapped from a file that has been removed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.arrow"
        write_table(path, examples, ())
        table = ExampleTable(path, "made", (), MappedTable(path), ReadSummary(len(examples), [], {}))
    return Examples.of_table(table)
