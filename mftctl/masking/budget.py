"""Distribution of a number of removed weights over tensors by the values of single weights."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import torch

from mftctl.errors import MaskingError
from mftctl.masking.selection import removed_count

MOST_OF_A_TENSOR: Final = 0.5
"""Largest share of a tensor that a budget removes."""

_INFINITY: Final = 0x7F800000


def counts_in_budget(gains: Sequence[torch.Tensor], budget: float) -> list[int]:
    """The number of weights to remove from each tensor, so that the highest gains of all are removed.

    Of each tensor at most half is removed, its highest gains first. Among equal gains, earlier tensors come first. The
    counts are exact and depend only on the gains, not on the device.

    Args:
        gains: The gain of removing each weight, fp32, one tensor of any shape for each masked tensor.
        budget: Share of all weights to remove, in [0, 0.5].

    Returns:
        One count for each tensor, `removed_count(weights, budget)` in total.

    Raises:
        MaskingError: A gain is not finite.

    Source: ours; the exploration of ratios by layer and type of mapping that MFT, section 3.2, proposes.
    """
    for values in gains:
        if not torch.isfinite(values).all():
            raise MaskingError(
                "The estimate of what removing a weight gains is not finite.",
                key="ratio",
                expected="finite gradients",
                actual=f"{int((~torch.isfinite(values)).sum())} of {values.numel()} are not",
                hint="--ratio 0.1, or --precision fp32",
            )
    wanted = removed_count(sum(values.numel() for values in gains), budget)
    most = [removed_count(values.numel(), MOST_OF_A_TENSOR) for values in gains]

    def counts(key: int) -> list[int]:
        """The capped number of gains of at least the value with this key."""
        value = _value(key)
        return [min(cap, int((values >= value).sum())) for values, cap in zip(gains, most, strict=True)]

    lowest, highest = -_INFINITY, _INFINITY  # enough are at least the first; none are at least the second
    while highest - lowest > 1:
        middle = (lowest + highest) // 2
        if sum(counts(middle)) >= wanted:
            lowest = middle
        else:
            highest = middle
    found = counts(highest)
    for number, count in enumerate(counts(lowest)):  # those equal to the value of the lowest key
        found[number] += min(count - found[number], wanted - sum(found))
    return found


def _value(key: int) -> float:
    """The fp32 number with a key; keys are in the order of the numbers, and consecutive for neighbours."""
    magnitude: float = struct.unpack("<f", struct.pack("<I", abs(key)))[0]
    return magnitude if key >= 0 else -magnitude
