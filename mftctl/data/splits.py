"""Seeded subsets: validation splits, fractions and counts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mftctl.data.examples import Example
from mftctl.errors import DataError


def split_validation(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
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
    groups: dict[object, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_prompt_key(example), []).append(index)
    if len(groups) < 2:
        raise DataError(
            "The data cannot be split into training and validation data.",
            expected="at least 2 records with different prompts",
            actual=f"records: {len(examples)}, different prompts: {len(groups)}",
            hint="provide separate validation data with --val-data",
        )
    held_out = _choose_groups(list(groups.values()), _share(len(examples), fraction), seed)
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def sample_fraction(examples: Sequence[Example], fraction: float, seed: int) -> list[Example]:
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


def sample_count(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """A random sample of `count` examples in the original order; all examples if there are no more.

    With the same seed, a smaller number is a subset of a larger one.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[index] for index in sorted(order[:count])]


def _share(total: int, fraction: float) -> int:
    """The fraction as a number of records, halves rounded up, at least 1."""
    return max(1, int(total * fraction + 0.5))


def _prompt_key(example: Example) -> object:
    """The key that must not occur in both splits: the prompt, or the whole of a plain text or of token ids."""
    return (example.kind, example.prompt or example.messages or example.token_ids)


def _choose_groups(groups: list[list[int]], count: int, seed: int) -> set[int]:
    """The members of random groups, at most `count`, or of one smallest group if no group is that small."""
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    # A fraction close to 1 would leave nothing to train on.
    if len(chosen) == sum(map(len, groups)):
        chosen.difference_update(groups[0])
    smallest = min(groups, key=len)
    return chosen or set(smallest)
