"""The rule from scores to a mask, and the detection of outdated masks."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

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
