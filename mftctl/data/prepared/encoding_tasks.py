"""Tasks of the processes that encode examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mftctl.data.encoding import Encoder
from mftctl.data.examples import Learn
from mftctl.data.image_inputs import ImageInputs
from mftctl.data.prepared.arrow_files import MappedTable
from mftctl.data.prepared.encoded_table import EncodedBatch, encode_rows
from mftctl.data.prepared.example_table import ExampleTable, ReadSummary


@dataclass(frozen=True, slots=True)
class EncodingTask:
    """Rows of a table of examples to encode.

    Attributes:
        rows: The rows.
    """

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodingSetup:
    """What every task needs.

    Attributes:
        table: The Arrow file of the examples.
        files: The names of their files.
        has_images: Whether some examples have images.
        tokenizer: The model's tokenizer with its chat template.
        learn: The answers to train on.
        now: The current time as the template sees it.
        max_length_tokens: Longer examples are truncated at the end.
        images: The image side of the model; None for a model that takes only text.
    """

    table: Path
    files: tuple[str, ...]
    has_images: bool
    tokenizer: PreTrainedTokenizerBase
    learn: Learn
    now: datetime
    max_length_tokens: int
    images: ImageInputs | None = None

    def prepared(self) -> Callable[[EncodingTask], EncodedBatch]:
        """The function that does a task."""
        encoder = Encoder(self.tokenizer, learn=self.learn, now=self.now, images=self.images)
        summary = ReadSummary(0, [], {}, has_images=self.has_images)
        examples = ExampleTable(self.table, "", self.files, MappedTable(self.table), summary)
        return lambda task: encode_rows(encoder, examples, task.rows, self.max_length_tokens)
