"""Encodes the examples of a table once, on all cores, and keeps the result."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mftctl.data.encoding import Encoder
from mftctl.data.prepared.arrow_files import MappedTable, write_batches
from mftctl.data.prepared.code_digest import code_digest
from mftctl.data.prepared.encoded_table import SCHEMA, EncodedBatch, EncodedTable
from mftctl.data.prepared.encoding_tasks import EncodingSetup, EncodingTask
from mftctl.data.prepared.entries import entry
from mftctl.data.prepared.example_table import ExampleTable, Refusal, error_of, refusal_of
from mftctl.data.prepared.process_count import data_processes
from mftctl.data.prepared.worker_pool import workers
from mftctl.progress import Listener, Progress

_TASK_RECORDS = 512
_FEW_RECORDS = 4_096
"""Fewer records are encoded sooner than processes start."""

_DIRECTIVE = re.compile(r"(?<!\{)%[-_0^#]*[0-9]*[EO]?[A-Za-z+]")
"""A part of the time as strftime writes it, with the flags of the C library; not the start of a tag, `{%if`."""


def encoded_table(
    examples: ExampleTable, rows: np.ndarray | None, encoder: Encoder, max_length_tokens: int, listener: Listener
) -> EncodedTable:
    """The encoded rows of a table, from the cache or newly made.

    Args:
        examples: The examples.
        rows: The rows to encode, ascending; None for all.
        encoder: Encoder for the model's tokenizer.
        max_length_tokens: Longer examples are truncated at the end.
        listener: Receives progress updates.

    Raises:
        DataError: A process that encodes was lost.
        ModelError: The chat template exceeds its limits.
    """
    key = {
        "what": "encoded",
        "code": code_digest(),
        "examples": examples.digest,
        "rows": None if rows is None else hashlib.sha256(rows.tobytes()).hexdigest(),
        "tokenizer": _tokenizer_digest(encoder),
        "learn": encoder.learn,
        "time": _time_used(encoder),
        "max_length_tokens": max_length_tokens,
        "images": _images_used(examples, encoder),
    }
    chosen = range(len(examples)) if rows is None else rows.tolist()
    tasks = [
        EncodingTask(tuple(chosen[start : start + _TASK_RECORDS])) for start in range(0, len(chosen), _TASK_RECORDS)
    ]
    setup = EncodingSetup(
        examples.path,
        examples.files,
        examples.summary.has_images,
        encoder.tokenizer,
        encoder.learn,
        encoder.now,
        max_length_tokens,
        encoder.images,
    )

    def make(path: Path) -> dict[str, Any]:
        refused: dict[str, dict[str, Any]] = {}
        write_batches(path, SCHEMA, _batches(tasks, setup, refused, len(chosen), listener))
        return {"refused": refused}

    made = entry(key, make, listener)
    errors = {int(row): error_of(Refusal(**item), examples.files) for row, item in made.summary["refused"].items()}
    return EncodedTable(MappedTable(made.table), rows, errors)


def _batches(
    tasks: Sequence[EncodingTask],
    setup: EncodingSetup,
    refused: dict[str, dict[str, Any]],
    total: int,
    listener: Listener,
) -> Iterator[pa.RecordBatch]:
    done, begun = 0, time.monotonic()
    for batch in _encoded(tasks, setup, total):
        for number, error in batch.refused.items():
            refused[str(done + number)] = refusal_of(error, setup.files).plain()
        [rows] = pa.ipc.open_stream(batch.rows)
        yield rows
        done += rows.num_rows
        if total >= _FEW_RECORDS:
            speed = done / (time.monotonic() - begun)
            listener.progress(Progress("tokenising", done, total, records_per_second=speed))


def _encoded(tasks: Sequence[EncodingTask], setup: EncodingSetup, total: int) -> Iterator[EncodedBatch]:
    count = min(data_processes(), len(tasks))
    if count <= 1 or total < _FEW_RECORDS:
        yield from map(setup.prepared(), tasks)
        return
    with workers(count, setup) as pool:
        yield from pool.answers(tasks)


def _tokenizer_digest(encoder: Encoder) -> str:
    """The SHA-256 of the tokenizer's files, including its chat template, and of the libraries that read them."""
    digest = hashlib.sha256()
    for library in ("transformers", "tokenizers", "jinja2"):
        digest.update(f"{library} {version(library)}\n".encode())
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder)}:{len(content)}:".encode() + content)
    digest.update(type(encoder.tokenizer).__qualname__.encode())
    return digest.hexdigest()


def _images_used(examples: ExampleTable, encoder: Encoder) -> list[Any] | None:
    """What the tokens depend on in a vision-language model: its ids for images and, for data with some, its processor.

    None for a model that takes only text.
    """
    if encoder.images is None:
        return None
    return [sorted(encoder.images.token_ids), encoder.images.digest if examples.summary.has_images else None]


def _time_used(encoder: Encoder) -> list[str] | None:
    """The parts of the current time that the chat template may write; None if it does not ask for the time."""
    template = str(encoder.tokenizer.chat_template)
    if "strftime_now" not in template:
        return None
    directives = sorted(set(_DIRECTIVE.findall(template))) or ["%c"]
    return [encoder.now.strftime(directive) for directive in directives]
