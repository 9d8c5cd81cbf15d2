"""Selection of the entries to remove from a tensor: exact counts, deterministic ties, no sorting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mftctl.errors import MaskingError
from mftctl.masking import device_selection
from mftctl.masking.device_selection import Ranked, keep_beyond, leave_out_lowest
from mftctl.masking.pattern import Pattern

Ranking = Literal["absolute", "signed"]


def removed_count(numel: int, ratio: float) -> int:
    """The number of entries that `ratio` removes from a tensor of `numel` entries: floor(ratio * numel + 0.5).

    Args:
        numel: Number of entries of the tensor, at least 0.
        ratio: Share to remove, in [0, 1).

    Raises:
        MaskingError: The ratio is not in [0, 1).
    """
    check_ratio(ratio)
    return math.floor(ratio * numel + 0.5)


def check_ratio(ratio: float) -> None:
    """Checks that `ratio` leaves something to keep.

    Raises:
        MaskingError: The ratio is not in [0, 1).
    """
    if not 0.0 <= ratio < 1.0:
        raise MaskingError(
            "The ratio, the share of weights to remove, is out of range.",
            key="ratio",
            expected="a number from 0 up to, but not including, 1",
            actual=ratio,
            hint="--ratio 0.1 removes one weight in ten",
        )


def rank(scores: torch.Tensor, ranking: Ranking) -> torch.Tensor:
    """The values to rank entries by: |score| (`absolute`) or the score itself (`signed`).

    Source: MFT, section 2; the authors' implementation ranks by |score| for the ratio indicator.
    """
    return scores.abs() if ranking == "absolute" else scores


@dataclass(frozen=True, slots=True)
class Cut:
    """The cut found for a ratio, from which a keep mask follows in one pass.

    Attributes:
        threshold: The highest value that is removed, entirely or in part; a scalar.
        on_device: The cut with the index of the last removed entry of that value, if an accelerator found it.
    """

    threshold: torch.Tensor
    on_device: device_selection.Cut | None = None


@torch.no_grad()
def ratio_cut(scores: torch.Tensor, ratio: float, ranking: Ranking = "signed") -> Cut | None:
    """The cut for `keep_highest`; None if it removes nothing.

    Args:
        scores: Any shape, floating point.
        ratio: Share to remove, in [0, 1).
        ranking: The value to rank by.

    Raises:
        MaskingError: The ratio is out of range, or a score is NaN.
    """
    count = removed_count(scores.numel(), ratio)
    if scores.device.type != "cpu":
        if not count:
            _refuse_nan(scores)
            return None
        found = _select(scores, count, ranking).cut
        return Cut(found.threshold[0], found)
    values = rank(scores, ranking)
    _refuse_nan(values)
    return Cut(_kth_lowest(values.reshape(-1), count)) if count else None


@torch.no_grad()
def keep_highest(
    scores: torch.Tensor, ratio: float, cut: Cut | None = None, *, ranking: Ranking = "signed"
) -> torch.Tensor:
    """The keep mask that removes exactly `removed_count(numel, ratio)` of the lowest values.

    Among equal values the lowest flat index is removed first, so the mask depends only on the values, not on the
    device, the number of processes or the selection algorithm.

    Args:
        scores: Any shape, floating point, finite.
        ratio: Share to remove, in [0, 1).
        cut: From `ratio_cut` of the same scores, ratio and ranking, if known.
        ranking: The value to rank by.

    Returns:
        Bool tensor of the same shape and device, True where the entry is kept.

    Raises:
        MaskingError: The ratio is out of range, or a score is not a number.

    Source: MFT, section 2, ratio-based indicator.
    """
    count = removed_count(scores.numel(), ratio)
    if cut is None and count and scores.device.type != "cpu":
        return _select(scores, count, ranking).keep[0].view(scores.shape)
    cut = ratio_cut(scores, ratio, ranking) if cut is None else cut
    if cut is None:
        return torch.ones_like(scores, dtype=torch.bool)
    if cut.on_device is not None:
        return keep_beyond(cut.on_device, _ranked(scores, ranking)).view(scores.shape)
    flat = rank(scores, ranking).reshape(-1)
    keep = flat > cut.threshold
    ties = (flat == cut.threshold).nonzero().squeeze(1)
    kept_ties = flat.numel() - count - int(keep.count_nonzero())
    if kept_ties:
        keep[ties[ties.numel() - kept_ties :]] = True
    return keep.reshape(scores.shape)


@torch.no_grad()
def keep_highest_of_blocks(
    scores: torch.Tensor, pattern: Pattern, inputs_dim: int, *, ranking: Ranking = "signed"
) -> torch.Tensor:
    """The keep mask with exactly `pattern.kept` entries in each block, those with the highest values.

    Among equal values the lowest index is removed first, so the mask depends only on the values, not on the device.

    Args:
        scores: Of a weight's shape, floating point.
        pattern: The pattern.
        inputs_dim: The input dimension of the weight, along which blocks are consecutive.
        ranking: The value to rank by.

    Returns:
        Bool tensor of the same shape and device, True where the entry is kept.

    Raises:
        MaskingError: The tensor does not divide into whole blocks, or a score is NaN.

    Source: N:M sparsity (Zhou et al. 2021, arXiv 2102.04010), with learned scores instead of magnitudes.
    """
    values = rank(scores, ranking)
    _refuse_nan(values)
    blocks = pattern.blocks(values, inputs_dim)
    keep = torch.empty(blocks.shape, dtype=torch.bool, device=scores.device)
    for place in range(pattern.block):
        value = blocks[..., place : place + 1]
        # Comparisons take an eighth of the memory of sorting, whose indices are int64.
        lower = (blocks[..., :place] <= value).sum(-1) + (blocks[..., place + 1 :] < value).sum(-1)
        keep[..., place] = lower >= pattern.block - pattern.kept
    return keep.flatten(-2).movedim(-1, inputs_dim).contiguous()


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


def _refuse_nan(values: torch.Tensor) -> None:
    # A sum without NaN inputs is finite or infinite; summing takes a tenth of the time of checking each value.
    if not torch.isfinite(values.sum()) and torch.isnan(values).any():
        raise _nan(values)


def _nan(values: torch.Tensor) -> MaskingError:
    return MaskingError(
        "Scores must not contain NaN, which cannot be ranked.",
        expected="finite scores",
        actual=f"{int(torch.isnan(values).sum())} NaN of {values.numel()}",
        hint="lower the learning rate",
    )


def _ranked(scores: torch.Tensor, ranking: Ranking) -> Ranked:
    flat = scores.reshape(-1)
    return Ranked(flat.numel(), lambda start, stop, step: rank(flat[start:stop:step], ranking))


def _select(scores: torch.Tensor, count: int, ranking: Ranking) -> device_selection.Selection:
    """The selection of all but the `count` lowest, on an accelerator.

    Raises:
        MaskingError: A score is not a number.
    """
    selection = leave_out_lowest([_ranked(scores, ranking)], count)
    if selection.holds_nan[0]:
        raise _nan(scores)
    return selection


def _kth_lowest(flat: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th lowest value (k from 1) on a CPU, where numpy's selection is vectorised."""
    import numpy as np

    # numpy has no bfloat16; every bfloat16 and float16 value is exact in float32.
    wide = flat if flat.dtype == torch.float64 else flat.float()
    return torch.from_numpy(np.partition(wide.numpy(), k - 1)[k - 1 : k]).to(flat.dtype)[0]
