"""Milliseconds and peaks on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

GB = 1e9
DEVICE = torch.device("cuda")


def milliseconds(work: Callable[[], object], repetitions: int = 5) -> float:
    """The median time of some work on the GPU, after one run that warms up.

    Args:
        work: What is timed.
        repetitions: How often.
    """
    work()
    found = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start_seconds = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - start_seconds))
    return median(found)


def peak_gb_above(work: Callable[[], object]) -> float:
    """The most memory that some work holds on top of what is held before, in GB.

    Args:
        work: What is measured.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / GB
