"""Data of another domain that a model should not forget: the records to measure, and those to train on."""

from __future__ import annotations

import numpy as np

from mftctl.data.prepared.examples import Examples
from mftctl.errors import DataError

RETAINED = "retained"
"""Name of the held-out records as a dataset of an evaluation."""


def split_retained(examples: Examples) -> tuple[Examples, Examples]:
    """The records to measure and the records to train on, about half each, in the original order.

    A digest of its prompt decides for each record, so that every command holds out the same records, whatever the seed
    and whatever else the data contains, and no held-out prompt is trained on.

    Args:
        examples: All usable records.

    Raises:
        DataError: No record would be held out.
    """
    held_out = _first_bytes(examples) % 2 == 0
    if not held_out.any():
        raise DataError(
            "The data to retain has too few records.",
            key="retain_data",
            expected="enough records that about half of them can be held out",
            actual=f"records: {len(examples)}, held out: 0",
            hint="add records with other prompts",
        )
    return examples.take(np.flatnonzero(held_out)), examples.take(np.flatnonzero(~held_out))


def without_training_records(examples: Examples, known: np.ndarray) -> Examples:
    """The records that do not also occur in the data trained on.

    Args:
        examples: All usable records.
        known: Digests of the training and validation records, uint64.

    Raises:
        DataError: All records occur there.
    """
    new = np.flatnonzero(~np.isin(examples.digests, known))
    if len(examples) and not len(new):
        raise DataError(
            "The data to retain is the training data.",
            key="retain_data",
            expected="records of another domain",
            actual=f"all {len(examples)} records are also training or validation records",
        )
    return examples.take(new)


def _first_bytes(examples: Examples) -> np.ndarray:
    """The first byte of each prompt's digest, uint8 `(records,)`."""
    keys = examples.prompt_keys
    return keys.view(np.uint8).reshape(len(keys), keys.dtype.itemsize)[:, 0]
