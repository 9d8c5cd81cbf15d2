"""Times several ways of doing the same work in turn in one process: ratios are less noisy than times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def seconds_in_turn(
    ways: Mapping[str, Callable[[], object]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per way and repetition on a clock; each repetition starts with a different way."""
    names = list(ways)
    found: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            start_seconds = clock()
            ways[name]()
            found[name].append(clock() - start_seconds)
    return found


def spread(values: list[float]) -> str:
    """Minimum, median and maximum."""
    return f"{min(values):.3f}, {median(values):.3f}, {max(values):.3f}"


def ratios(new: list[float], old: list[float]) -> list[float]:
    """The ratio at each repetition."""
    return [mine / its for mine, its in zip(new, old, strict=True)]
