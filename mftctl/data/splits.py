"""Seeded subsets: validation splits, fractions and counts."""

from __future__ import annotations

import random

import numpy as np

from mftctl.data.prepared.examples import Examples
from mftctl.errors import DataError


def split_validation(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """The training and validation splits, both in the original order.

    Examples with the same prompt stay together, so that no validation prompt is trained on; the validation split may
    therefore be a few records short of its fraction.

    Args:
        examples: The examples to split.
        fraction: The fraction for validation, above 0 and below 1; at least one record.
        seed: Determines which prompts are held out.

    Raises:
        DataError: The fraction is out of range, or all examples share one prompt, so that one split would be empty.
    """
    if not 0 < fraction < 1:
        raise DataError("The validation fraction is out of range.", expected="above 0 and below 1", actual=fraction)
    groups = _groups(examples.prompt_keys)
    if len(groups) < 2:
        raise DataError(
            "The data cannot be split into training and validation data.",
            expected="at least 2 records with different prompts",
            actual=f"records: {len(examples)}, different prompts: {len(groups)}",
            hint="provide separate validation data with --val-data",
        )
    held_out = np.zeros(len(examples), np.bool_)
    held_out[_choose_groups(groups, _share(len(examples), fraction), seed)] = True
    return examples.take(np.flatnonzero(~held_out)), examples.take(np.flatnonzero(held_out))


def sample_fraction(examples: Examples, fraction: float, seed: int) -> Examples:
    """A random fraction of the examples in the original order, at least one.

    With the same seed, a smaller fraction is a subset of a larger one.

    Args:
        examples: The examples to sample from.
        fraction: The fraction, above 0 and at most 1.
        seed: Determines which examples are sampled.

    Raises:
        DataError: The fraction is out of range, or there are no examples.
    """
    if not 0 < fraction <= 1:
        raise DataError("The data fraction is out of range.", expected="above 0 and at most 1", actual=fraction)
    if not examples:
        raise DataError("There is no data to sample from.", expected="at least one record", actual="none")
    return sample_count(examples, _share(len(examples), fraction), seed)


def sample_count(examples: Examples, count: int, seed: int) -> Examples:
    """A random sample of `count` examples in the original order; all examples if there are no more.

    With the same seed, a smaller number is a subset of a larger one.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return examples.take(sorted(order[:count]))


def _share(total: int, fraction: float) -> int:
    """The fraction as a number of records, halves rounded up, at least 1."""
    return max(1, int(total * fraction + 0.5))


def _groups(keys: np.ndarray) -> list[np.ndarray]:
    """The indices of each key, the keys in the order of their first index."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group))[:-1])
    return [members[number] for number in np.argsort(first)]


def _choose_groups(groups: list[np.ndarray], count: int, seed: int) -> np.ndarray:
    """The members of random groups, at most `count`, or of one smallest group if no group is that small."""
    random.Random(seed).shuffle(groups)
    chosen: list[np.ndarray] = []
    records = 0
    for group in groups:
        if records + len(group) <= count:
            chosen.append(group)
            records += len(group)
    # A fraction close to 1 would leave nothing to train on.
    if len(chosen) == len(groups):
        chosen = chosen[1:]
    return np.concatenate(chosen or [min(groups, key=len)])
