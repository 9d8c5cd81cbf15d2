"""Seeded subsets: validation parts, shares and counts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mftctl.data.examples import Example
from mftctl.errors import DataError


def split_validation(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The training and the validation part, both in the original order.

    Examples with the same prompt stay together, so that no validation question was trained on; the validation part
    therefore may fall a few records short of its share.

    Args:
        examples: What to split.
        fraction: The share for validation, above 0 and below 1; at least one record.
        seed: Decides which prompts are held out.

    Raises:
        DataError: the fraction is out of range, or all examples share one prompt, so that one part would be empty.
    """
    if not 0 < fraction < 1:
        raise DataError("The share for validation is out of range.", expected="above 0 and below 1", actual=fraction)
    groups: dict[object, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_prompt_key(example), []).append(index)
    if len(groups) < 2:
        raise DataError(
            "The data cannot be split into a training and a validation part.",
            expected="at least 2 records with different prompts",
            actual=f"{len(examples)} records, {len(groups)} different prompts",
            hint="give validation data of its own with --val-data",
        )
    held_out = _choose_groups(list(groups.values()), _share(len(examples), fraction), seed)
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def sample_fraction(examples: Sequence[Example], fraction: float, seed: int) -> list[Example]:
    """A share of the examples in the original order, at least one.

    With the same seed, a smaller share is a subset of a larger one.

    Args:
        examples: What to choose from.
        fraction: The share, above 0 and at most 1.
        seed: Decides which examples are chosen.

    Raises:
        DataError: the fraction is out of range, or there are no examples.
    """
    if not 0 < fraction <= 1:
        raise DataError("The share of the data is out of range.", expected="above 0 and at most 1", actual=fraction)
    if not examples:
        raise DataError("There is no data to choose from.", expected="at least one record", actual="none")
    return sample_count(examples, _share(len(examples), fraction), seed)


def sample_count(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The given number of examples in the original order; all of them where there are no more.

    With the same seed, a smaller number is a subset of a larger one.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[index] for index in sorted(order[:count])]


def _share(total: int, fraction: float) -> int:
    """The share as a number of records, halves rounded up, at least 1."""
    return max(1, int(total * fraction + 0.5))


def _prompt_key(example: Example) -> object:
    """What two examples must not share across parts: the prompt, or all of a plain text or of token ids."""
    return (example.kind, example.prompt or example.messages or example.token_ids)


def _choose_groups(groups: list[list[int]], count: int, seed: int) -> set[int]:
    """The members of random groups, at most `count` of them, or of one smallest group where none is that small."""
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    # A share close to 1 would leave nothing to train on.
    if len(chosen) == sum(map(len, groups)):
        chosen.difference_update(groups[0])
    smallest = min(groups, key=len)
    return chosen or set(smallest)
