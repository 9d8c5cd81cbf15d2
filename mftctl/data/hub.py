"""Reads rows from Parquet files and from datasets of the Hugging Face hub, a batch at a time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftctl.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

_BATCH_RECORDS = 64
"""Enough to make the overhead of a batch small, few enough for records of a megabyte."""
_PAGE_BUFFER_BYTES = 1 << 20


def stream_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, read page by page, so that a large row group is never in memory as a whole.

    Raises:
        DataError: It is not a valid Parquet file.
        OSError: The file cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        # Without a buffer of its own, Arrow reads the column chunks of a row group whole.
        with (
            pyarrow.OSFile(str(path)) as raw,
            parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_PAGE_BUFFER_BYTES) as file,
        ):
            features = _json_features(file.schema_arrow)
            for batch in file.iter_batches(batch_size=_BATCH_RECORDS, use_threads=False):
                yield from _rows(batch, features)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the system, not about the content
            raise
        raise DataError("The data file is not a valid Parquet file.", path=path, actual=str(error)) from error


def open_hub(identifier: str, configuration: str | None, split: str) -> datasets.Dataset:
    """One split of a hub dataset, memory-mapped from the cache of `datasets`, with at least one row.

    Args:
        identifier: `name` or `owner/name`.
        configuration: The dataset's configuration, such as `main`; None for its only one.
        split: The split, such as `train`.

    Raises:
        DataError: The dataset, configuration or split does not exist or is empty, or the network is down.
    """
    from datasets import load_dataset

    name = identifier if configuration is None else f"{identifier}:{configuration}"
    with quiet_hub():
        try:
            dataset = load_dataset(identifier, configuration, split=split)
        except hub_failures() as error:
            raise DataError(
                "The data is neither an existing file nor a reachable hub dataset.",
                path=name,
                expected=f"a local file, or a dataset with the split {split}",
                actual=str(error),
                hint="check the path; for a hub dataset, also its configuration (owner/name:config) and the network",
            ) from error
    if not len(dataset):
        raise DataError("The hub dataset is empty.", path=name, key=split)
    return dataset


def stream_rows(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, read a batch at a time."""
    features = _with_json(dataset.features)
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_RECORDS):
        yield from _rows(table, features)


def rows_digest(dataset: datasets.Dataset) -> str:
    """The SHA-256 of a dataset's features and rows in hex, read a batch at a time.

    Not of the files behind it: slices of a split (`train[:10%]`) lie in the same files, and a dataset that `datasets`
    keeps in memory has none.
    """
    digest = hashlib.sha256(json.dumps(dataset.features.to_dict(), sort_keys=True).encode())
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_RECORDS):
        for batch in table.to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _rows(batch: pyarrow.RecordBatch | pyarrow.Table, features: datasets.Features | None) -> list[dict[str, Any]]:
    """The rows of a batch with the given features decoded.

    Pictures stay compressed until a batch needs them; sounds, which are refused anyway, need further packages.
    """
    rows: list[dict[str, Any]] = batch.to_pylist()
    if features is None:
        return rows
    for name in features:
        decoded = features.decode_column([row[name] for row in rows], name)
        for row, value in zip(rows, decoded, strict=True):
            row[name] = value
    return rows


def _json_features(schema: pyarrow.Schema) -> datasets.Features | None:
    """The columns of a Parquet file that contain JSON, which Arrow leaves as text; None if there are none."""
    metadata = (schema.metadata or {}).get(b"huggingface", b"")
    if "arrow.json" not in str(schema.types) and b'"Json"' not in metadata:
        return None  # spares the import of datasets
    from datasets import Features

    return _with_json(Features.from_arrow_schema(schema))


def _with_json(features: datasets.Features) -> datasets.Features:
    from datasets import Features

    # The name of the type, however deep it is nested.
    return Features({name: feature for name, feature in features.items() if "Json(" in repr(feature)})


def hub_failures() -> tuple[type[Exception], ...]:
    """What `datasets` and `huggingface_hub` raise for data that does not exist or cannot be downloaded."""
    import httpx2
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError

    return (DatasetsError, EntryNotFoundError, httpx2.HTTPError, OSError, RuntimeError, ValueError)


def is_network_down(error: BaseException | None) -> bool:
    """Checks whether a failure says that the hub cannot be reached, rather than that it lacks the data.

    Args:
        error: One of `hub_failures`.
    """
    import httpx2
    from huggingface_hub.errors import LocalEntryNotFoundError

    return isinstance(error, ConnectionError | LocalEntryNotFoundError | httpx2.TransportError)


@contextmanager
def offline() -> Iterator[None]:
    """Limits `datasets` and `huggingface_hub` to their caches while the context is open."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silences the progress bars and logs of `datasets` and `huggingface_hub` while the context is open."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity = datasets.logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    progress_shown = datasets.is_progress_bar_enabled()
    hub_progress_shown = not are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if progress_shown:
            datasets.enable_progress_bars()
        if hub_progress_shown:
            enable_progress_bars()
