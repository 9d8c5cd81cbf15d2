"""Reads records with the `datasets` library: Parquet files and datasets from the Hugging Face hub."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mftctl.errors import DataError


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file, streamed so that nothing is copied into a cache.

    Raises:
        DataError: It is not a valid Parquet file.
    """
    from datasets import load_dataset

    with _quiet():
        try:
            # data_files is a glob pattern, and a file name may contain brackets.
            pattern = glob.escape(str(path.resolve()))
            return list(load_dataset("parquet", data_files=pattern, split="train", streaming=True))
        except ValueError as error:  # pyarrow's errors are ValueErrors
            raise DataError("The data file is not a valid Parquet file.", path=path, actual=str(error)) from error


def read_hub(identifier: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a hub dataset, kept in the cache of `datasets`.

    Args:
        identifier: `name` or `owner/name`.
        configuration: The dataset's configuration, such as `main`; None for its only one.
        split: The split, such as `train`.

    Raises:
        DataError: The dataset, configuration or split does not exist, or the network is down.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError

    with _quiet():
        try:
            return list(load_dataset(identifier, configuration, split=split))
        except (DatasetsError, EntryNotFoundError, OSError, RuntimeError, ValueError) as error:
            raise DataError(
                "The data is neither an existing file nor a reachable hub dataset.",
                path=identifier if configuration is None else f"{identifier}:{configuration}",
                expected=f"a local file, or a dataset with the split {split}",
                actual=str(error),
                hint="check the path; for a hub dataset, also its configuration (owner/name:config) and the network",
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
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
