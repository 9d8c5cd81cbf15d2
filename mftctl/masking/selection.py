"""Which entries of a tensor are removed: exact counts, deterministic ties, no sorting."""

from __future__ import annotations

import math
from typing import Literal

import torch

from mftctl.errors import MaskingError

Ranking = Literal["magnitude", "signed"]


def removed_count(numel: int, ratio: float) -> int:
    """The number of entries that `ratio` removes from a tensor of `numel` entries: floor(ratio * numel + 0.5).

    Args:
        numel: Entries of the tensor, at least 0.
        ratio: Share to remove, in [0, 1).

    Raises:
        MaskingError: The ratio is not in [0, 1).
    """
    check_ratio(ratio)
    return math.floor(ratio * numel + 0.5)


def check_ratio(ratio: float) -> None:
    """Nothing, if `ratio` is a share that leaves something to keep.

    Raises:
        MaskingError: The ratio is not in [0, 1).
    """
    if not 0.0 <= ratio < 1.0:
        raise MaskingError(
            "The ratio is the share of weights that is removed.",
            key="ratio",
            expected="a number from 0 up to, but not including, 1",
            actual=ratio,
            hint="--ratio 0.1 removes one weight in ten",
        )


def rank(scores: torch.Tensor, ranking: Ranking) -> torch.Tensor:
    """The values by which entries are ranked: |score| (`magnitude`) or the score itself (`signed`).

    Source: MFT, section 2; ranking by |score| is what the authors' implementation does for the ratio indicator.
    """
    return scores.abs() if ranking == "magnitude" else scores


@torch.no_grad()
def ratio_threshold(values: torch.Tensor, ratio: float) -> torch.Tensor | None:
    """The highest value that `keep_highest` removes, or some of it; None if it removes nothing.

    Args:
        values: Any shape, floating point.
        ratio: Share to remove, in [0, 1).

    Raises:
        MaskingError: The ratio is out of range, or a value is not a number.
    """
    count = removed_count(values.numel(), ratio)
    # A sum of numbers is one, or infinite; it takes a tenth of the time of looking at each.
    if not torch.isfinite(values.sum()) and torch.isnan(values).any():
        raise MaskingError(
            "Scores must be numbers: NaN cannot be ranked.",
            expected="finite scores",
            actual=f"{int(torch.isnan(values).sum())} NaN of {values.numel()}",
            hint="lower the learning rate",
        )
    return _kth_lowest(values.reshape(-1), count) if count else None


@torch.no_grad()
def keep_highest(values: torch.Tensor, ratio: float, threshold: torch.Tensor | None = None) -> torch.Tensor:
    """The keep mask that removes exactly `removed_count(numel, ratio)` of the lowest values.

    Among equal values the lowest flat index is removed first, so the mask depends on the values alone: not on the
    device, the number of processes or the selection algorithm.

    Args:
        values: Any shape, floating point, finite.
        ratio: Share to remove, in [0, 1).
        threshold: From `ratio_threshold` of the same values and ratio, where it is known.

    Returns:
        Bool tensor of the same shape and device, True where the entry is kept.

    Raises:
        MaskingError: The ratio is out of range, or a value is not a number.

    Source: MFT, section 2, ratio-based indicator.
    """
    threshold = ratio_threshold(values, ratio) if threshold is None else threshold
    if threshold is None:
        return torch.ones_like(values, dtype=torch.bool)
    flat = values.reshape(-1)
    count = removed_count(values.numel(), ratio)
    keep = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    kept_ties = flat.numel() - count - int(keep.count_nonzero())
    if kept_ties:
        keep[ties[ties.numel() - kept_ties :]] = True
    return keep.reshape(values.shape)


@torch.no_grad()
def keep_above(values: torch.Tensor, threshold: float) -> torch.Tensor:
    """The keep mask that removes every entry below `threshold`.

    Args:
        values: Any shape, floating point.
        threshold: Entries equal to it are kept.

    Returns:
        Bool tensor of the same shape and device, True where the entry is kept.

    Source: MFT, section 2, threshold-based indicator (the paper's global masks use -0.035).
    """
    return values >= threshold


def _kth_lowest(flat: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th lowest value (k from 1), by selection: numpy's is vectorised on CPUs, torch's runs on accelerators."""
    if flat.device.type == "cpu":
        import numpy as np

        # bfloat16 has no numpy type; every bfloat16 and float16 value is exact in float32.
        wide = flat if flat.dtype == torch.float64 else flat.float()
        return torch.from_numpy(np.partition(wide.numpy(), k - 1)[k - 1 : k]).to(flat.dtype)[0]
    # torch calls it nondeterministic since any of several equal entries may be named: their value is the same.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return flat.kthvalue(k).values
    finally:
        torch.use_deterministic_algorithms(deterministic)
