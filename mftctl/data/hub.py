"""Records through the `datasets` library: Parquet files and data sets of the Hugging Face hub."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mftctl.errors import DataError


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file, streamed so that nothing of it is copied into a cache.

    Raises:
        DataError: it is no sound Parquet file.
    """
    from datasets import load_dataset

    with _quiet():
        try:
            # data_files is a glob pattern, and a file name may hold brackets.
            pattern = glob.escape(str(path.resolve()))
            return list(load_dataset("parquet", data_files=pattern, split="train", streaming=True))
        except ValueError as error:  # pyarrow's errors are ValueErrors
            raise DataError("The data file is no sound Parquet file.", path=path, actual=str(error)) from error


def read_hub(identifier: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a hub data set, kept in the cache of `datasets`.

    Args:
        identifier: `name` or `owner/name`.
        configuration: The data set's configuration, such as `main`; None for its only one.
        split: The split, such as `train`.

    Raises:
        DataError: the data set cannot be had: not found, no network, no such configuration or split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError

    with _quiet():
        try:
            return list(load_dataset(identifier, configuration, split=split))
        except (DatasetsError, EntryNotFoundError, OSError, RuntimeError, ValueError) as error:
            raise DataError(
                "The data is neither an existing file nor a hub data set that can be reached.",
                path=identifier if configuration is None else f"{identifier}:{configuration}",
                expected=f"a local file, or a data set with the split {split}",
                actual=str(error),
                hint="check the path; for a hub data set also its configuration (owner/name:config) and the network",
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside it, `datasets` and `huggingface_hub` show no progress bars and log nothing below critical."""
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
