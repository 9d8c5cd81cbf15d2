"""Masks without training: random entries, the smallest weights, and the rows with the smallest weights."""

from __future__ import annotations

import hashlib

import torch

from mftctl.masking.masked_values import removable
from mftctl.masking.pattern import Pattern
from mftctl.masking.selection import keep_highest, keep_highest_of_blocks
from mftctl.masking.targets import MaskTarget


def random_mask(target: MaskTarget, ratio: float, seed: int, pattern: Pattern | None = None) -> torch.Tensor:
    """The keep mask that removes exactly the ratio's share of a target's weights, uniformly at random.

    It is independent of the initial scores of training with the same seed, which come from a different random stream.

    Args:
        target: The projection to mask.
        ratio: Share to remove, in [0, 1).
        seed: Together with the target's name, decides the entries.
        pattern: Remove the rest of each block instead.

    Returns:
        Bool tensor of the weight's shape.

    Source: MFT, section 3.1, baseline 5.
    """
    digest = hashlib.sha256(f"random mask:{seed}:{target.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    scores = torch.rand(target.weight.shape, generator=generator).to(target.weight.device)
    return _keep(scores, target, ratio, pattern)


def magnitude_mask(
    target: MaskTarget, ratio: float, base: torch.Tensor | None = None, pattern: Pattern | None = None
) -> torch.Tensor:
    """The keep mask that removes the ratio's share of a target's weights, smallest absolute values first.

    Args:
        target: The projection to mask.
        ratio: Share to remove, in [0, 1).
        base: For a delta mask, the weight before fine-tuning: the smallest changes are removed first.
        pattern: Remove the smallest of each block instead.

    Returns:
        Bool tensor of the weight's shape.

    Source: MFT, section 3.1, baseline 6 (L1 mask), as in the authors' implementation since its commit 43d5384.
    """
    return _keep(removable(target.weight.detach(), base, torch.float32).abs(), target, ratio, pattern)


def row_mask(target: MaskTarget, ratio: float) -> torch.Tensor:
    """The keep mask that removes the ratio's share of a target's outputs, smallest mean absolute weight first.

    A removed output has no weights left; its bias, if any, stays. Exactly `removed_count(outputs, ratio)` outputs are
    removed, in order of index among equal ones. Means are computed in fp64 and compared in fp32, which hides
    differences from the order of summation, so every machine selects the same rows.

    Args:
        target: The projection to mask. An output is a row of the weight: a column of a `Conv1D`; for fused experts, a
            row of the stored tensor, or a column if they are stored transposed.
        ratio: Share to remove, in [0, 1).

    Returns:
        Bool tensor of the weight's shape.

    Source: MFT, section 3.1, baseline 6 (L1 mask), as in the authors' implementation when the paper was published
        (commit d1d7a72).
    """
    weight = target.weight.detach()
    means = weight.cpu().abs().mean(dim=target.inputs_dim, keepdim=True, dtype=torch.float64)
    return keep_highest(means.float(), ratio).expand(weight.shape).contiguous().to(weight.device)


def _keep(values: torch.Tensor, target: MaskTarget, ratio: float, pattern: Pattern | None) -> torch.Tensor:
    if pattern is None:
        return keep_highest(values, ratio)
    return keep_highest_of_blocks(values, pattern, target.inputs_dim)
