"""Measures time and peak memory on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

GB = 1e9
DEVICE = torch.device("cuda")


def milliseconds(work: Callable[[], object], repetitions: int = 5) -> float:
    """The median time of work on the GPU, after one warm-up run.

    Args:
        work: The work to time.
        repetitions: Number of timed runs.
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
    """Peak additional memory used by work, in GB.

    Args:
        work: The work to measure.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / GB
