"""The rule from scores to a mask, and the detection of outdated masks."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from mftctl.masking.mask_file.codecs import Packed, count_kept, pack, unpack
from mftctl.masking.masked_values import masked_values, removable
from mftctl.masking.pattern import Pattern
from mftctl.masking.selection import (
    Cut,
    Ranking,
    check_ratio,
    keep_above,
    keep_highest,
    keep_highest_of_blocks,
    ratio_cut,
)
from mftctl.masking.soft_mask import SoftRule


@dataclass(frozen=True, slots=True)
class MaskRule:
    """The rule that turns scores into a mask: a ratio per tensor, one threshold, or a pattern.

    Attributes:
        ratio: Share removed from each tensor, lowest ranked first; None without a ratio.
        threshold: Entries with a lower (signed) score are removed; None without a threshold.
        ranking: The value ranked with a ratio or pattern: |score| (`absolute`) or the score (`signed`).
        pattern: Entries kept in each block of inputs; None without a pattern.
        inputs_dim: The input dimension of the scores, for a pattern.
    """

    ratio: float | None = 0.1
    threshold: float | None = None
    ranking: Ranking = "absolute"
    pattern: Pattern | None = None
    inputs_dim: int = -1

    def __post_init__(self) -> None:
        if [self.ratio, self.threshold, self.pattern].count(None) != 2:
            raise ValueError("a mask rule needs either a ratio, a threshold or a pattern")
        if self.ratio is not None:
            check_ratio(self.ratio)

    @property
    def uses_magnitude(self) -> bool:
        """True if |score| is ranked, so that the gradient carries the sign of the score."""
        return self.threshold is None and self.ranking == "absolute"

    def cut(self, scores: torch.Tensor) -> Cut | None:
        """The cut of a ratio in these scores, for `keep`; None if none is needed.

        Raises:
            MaskingError: A score is NaN.
        """
        return None if self.ratio is None else ratio_cut(scores, self.ratio, self.ranking)

    def keep(self, scores: torch.Tensor, cut: Cut | None = None) -> torch.Tensor:
        """The bool keep mask for `scores`, of the same shape.

        Args:
            scores: Any shape.
            cut: From `cut` of the same scores, if known.

        Raises:
            MaskingError: A score is NaN, or the pattern does not divide the tensor.
        """
        if self.pattern is not None:
            return keep_highest_of_blocks(scores, self.pattern, self.inputs_dim, ranking=self.ranking)
        if self.ratio is None:
            return keep_above(scores, self.threshold or 0.0)
        return keep_highest(scores, self.ratio, cut, ranking=self.ranking)

    def product(
        self, weight: torch.Tensor, scores: torch.Tensor, base: torch.Tensor | None, cut: Cut | None = None
    ) -> torch.Tensor:
        """The masked weight as a new tensor.

        Args:
            weight: The weight, of any floating-point dtype.
            scores: Scores of its shape, on its device.
            base: The weight before fine-tuning, for a delta mask; None for a weight mask.
            cut: From `cut` of the same scores, if known.
        """
        keep = self.keep(scores) if cut is None else self.keep(scores, cut)
        return masked_values(weight, keep, base)

    def score_gradient(
        self, grad: torch.Tensor, scores: torch.Tensor, weight: torch.Tensor, base: torch.Tensor | None
    ) -> torch.Tensor:
        """The straight-through gradient of the scores.

        dL/dS = dL/dV * W or, with a base, dL/dV * (W - B); times sign(S) where |S| is ranked.

        Args:
            grad: The gradient dL/dV of the masked weight V, in fp32 or fp64; overwritten.
            scores: The scores S.
            weight: The weight W.
            base: The weight before fine-tuning B, for a delta mask.

        Source: MFT, equation 5; the sign is the derivative of |S| in the authors' implementation. Delta masks are ours.
        """
        grad.mul_(removable(weight, base, grad.dtype))
        return grad.mul_(scores.sign()) if self.uses_magnitude else grad

    def stored(self, scores: torch.Tensor) -> Packed:
        """The packed bits of the mask, one bit per weight."""
        return pack(self.keep(scores))

    def mask(self, stored: Packed, shape: torch.Size) -> torch.Tensor:
        """The bool keep mask of the weight's shape in packed bits."""
        return torch.from_numpy(unpack(stored, shape.numel())).view(shape)

    def keeps_all(self, stored: Packed, weights: int) -> bool:
        """True if the mask removes nothing."""
        return count_kept(stored) == weights

    def promised(self, gradient: torch.Tensor, scores: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> float:
        """The reduction of the loss, to first order, from one mask to another.

        Args:
            gradient: Mean gradient of the scores.
            scores: The scores.
            old: The mask before, from `mask`.
            new: The mask after.
        """
        if self.uses_magnitude:
            gradient = gradient * scores.sign()
        return float(gradient[old & ~new].sum() - gradient[new & ~old].sum())


Rule = MaskRule | SoftRule
"""The rule of a hard mask or of a soft one."""


class _StepCounter:
    """Counts the steps of all optimizers in this process."""

    def __init__(self) -> None:
        self.steps = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self.steps += 1


@functools.cache
def _step_counter() -> _StepCounter:
    return _StepCounter()


def scores_state(scores: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """A value that changes whenever an optimizer or anything else has changed the scores."""
    # An in-place update increments a tensor's version counter, except in fused optimizers.
    return (_step_counter().steps, *(values._version for values in scores))
