"""Masks that need no training: random entries, the smallest weights, and the rows with the smallest weights."""

from __future__ import annotations

import hashlib

import torch

from mftctl.masking.selection import keep_highest
from mftctl.masking.targets import MaskTarget


def random_mask(target: MaskTarget, ratio: float, seed: int) -> torch.Tensor:
    """The keep mask that removes exactly the ratio's share of a target's weights, uniformly at random.

    With the same seed it is independent of the scores that a training starts from, which are drawn otherwise.

    Args:
        target: The projection to be masked.
        ratio: Share to remove, in [0, 1).
        seed: With the target's name it decides the entries.

    Returns:
        Bool tensor of the weight's shape.

    Source: MFT, section 3.1, baseline 5.
    """
    digest = hashlib.sha256(f"random mask:{seed}:{target.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    scores = torch.rand(target.weight.shape, generator=generator)
    return keep_highest(scores.to(target.weight.device), ratio)


def magnitude_mask(target: MaskTarget, ratio: float) -> torch.Tensor:
    """The keep mask that removes the ratio's share of the smallest absolute weights of a target.

    Args:
        target: The projection to be masked.
        ratio: Share to remove, in [0, 1).

    Returns:
        Bool tensor of the weight's shape.

    Source: MFT, section 3.1, baseline 6 (L1 mask), as the authors' implementation has it since its commit 43d5384.
    """
    return keep_highest(target.weight.detach().abs(), ratio)


def row_mask(target: MaskTarget, ratio: float) -> torch.Tensor:
    """The keep mask that removes the ratio's share of a target's outputs: those whose weights are smallest on average.

    A removed output has no weight left; its bias, where it has one, stays. Exactly `removed_count(outputs, ratio)`
    outputs go, of equal ones the first. Means are taken in fp64 and compared in fp32, where the order of a sum does not
    show, so that every machine finds the same rows.

    Args:
        target: The projection to be masked; of a `Conv1D` an output is a column, of fused experts a row of the stored
            tensor, or a column where they are stored transposed.
        ratio: Share to remove, in [0, 1).

    Returns:
        Bool tensor of the weight's shape.

    Source: MFT, section 3.1, baseline 6 (L1 mask), as the authors' implementation had it when the paper came out
        (commit d1d7a72).
    """
    weight = target.weight.detach()
    means = weight.cpu().abs().mean(dim=target.inputs_dim, keepdim=True, dtype=torch.float64)
    return keep_highest(means.float(), ratio).expand(weight.shape).contiguous().to(weight.device)
