"""Standard errors, confidence intervals and significance tests.

All intervals are over the samples of the test set: they describe what another test set of the same kind would show for
the same models. Several seeds of a method are averaged per sample first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mftctl.errors import EvaluationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mftctl.evaluation.losses import SampleLoss

# Resamples are drawn in blocks of this many numbers (32 MiB per array), whatever the number of samples.
_BLOCK_NUMBERS = 2**22


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The estimate itself.
        low: Lower end.
        high: Upper end.
        confidence: Share of such intervals that contain the true value, such as 0.95.
    """

    estimate: float
    low: float
    high: float
    confidence: float

    @property
    def excludes_zero(self) -> bool:
        """True if the estimate is more than noise: zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def standard_error_of_loss(losses: Sequence[SampleLoss]) -> float:
    """Standard error of `mean_loss` over samples, by the delta method for a ratio of two sums.

    Tokens of one answer depend on each other, samples do not: the sample is the unit.

    Args:
        losses: At least two samples.

    Raises:
        EvaluationError: Fewer than two samples, or no answer token.
    """
    return standard_error_of_ratio([loss.nll for loss in losses], [loss.answer_tokens for loss in losses])


def standard_error_of_ratio(sums: Sequence[float], weights: Sequence[float]) -> float:
    """Standard error of `sum(sums) / sum(weights)` over samples, by the delta method.

    With weights of 1, it equals the standard error of the mean as lm-eval computes it.

    Args:
        sums: Per sample, at least two.
        weights: Per sample, above 0.

    Raises:
        EvaluationError: Fewer than two samples, or a weight of zero.
    """
    _check_samples(len(sums))
    values, counts = np.array(sums, dtype=np.float64), np.array(weights, dtype=np.float64)
    _check_weights(counts)
    residuals = values - values.sum() / counts.sum() * counts
    variance = len(sums) / (len(sums) - 1) * float(residuals @ residuals)
    return math.sqrt(variance) / float(counts.sum())


def standard_error_of_share(correct: Sequence[bool]) -> float:
    """Standard error of the share of correct answers, `sqrt(p (1 - p) / (n - 1))`.

    The `n - 1` makes the variance unbiased; it is what lm-eval reports.

    Args:
        correct: At least two samples.

    Raises:
        EvaluationError: Fewer than two samples.
    """
    _check_samples(len(correct))
    share = sum(correct) / len(correct)
    return math.sqrt(share * (1 - share) / (len(correct) - 1))


def paired_difference(
    differences: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`sum(differences) / sum(weights)` with its percentile bootstrap interval over samples.

    Args:
        differences: Per sample, `(samples,)`.
        weights: Per sample, not negative, `(samples,)`: answer tokens for a loss, ones for a score.
        confidence: Between 0 and 1.
        resamples: Number of test sets drawn.
        seed: The same seed gives the same interval.

    Raises:
        EvaluationError: Fewer than two samples, arrays of different length, or weights that sum to zero.
    """
    from scipy import stats  # takes as long to import as a short command to run

    if differences.shape != weights.shape or differences.ndim != 1:
        raise EvaluationError(
            "Differences and weights do not cover the same samples.",
            expected=f"weights of shape {differences.shape}",
            actual=weights.shape,
        )
    _check_samples(len(differences))
    _check_weights(weights)
    bootstrap = stats.bootstrap(
        (differences, weights),
        _ratio_of_sums,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, _BLOCK_NUMBERS // len(differences)),
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    low, high = sorted(bootstrap.confidence_interval)  # rounding may swap the ends if all resamples are equal
    return Interval(float(_ratio_of_sums(differences, weights)), float(low), float(high), confidence)


def paired_difference_over_seeds(
    before: NDArray[np.float64], after: NDArray[np.float64], weights: NDArray[np.float64], *, seed: int = 0
) -> Interval:
    """The gain of a method over its baseline, averaged over training seeds per sample, with its 95 % interval.

    Args:
        before: Scores of the baselines, `(training seeds, samples)`; sums of token losses for a loss.
        after: Scores of the method on the same samples, in the same shape.
        weights: Weights of the scores, in the same shape and equal for all training seeds: answer tokens for a loss,
            otherwise 1.
        seed: Seed of the resampling.

    Raises:
        EvaluationError: The weights differ between training seeds, or an error of `paired_difference`.
    """
    unlike = (weights != weights[0]).any(axis=0)
    if unlike.any():
        raise EvaluationError(
            "The runs were not evaluated on the same answers.",
            key=f"sample {int(unlike.argmax())}",
            expected="the same number of answer tokens in every run",
            actual=", ".join(f"{weight:g}" for weight in weights[:, unlike.argmax()]),
            hint="evaluate all runs on the same file, with the same tokenizer and maximum length",
        )
    return paired_difference((after - before).mean(axis=0), weights[0], seed=seed)


def sign_flips(differences: Sequence[int]) -> float:
    """The two-sided p-value of the exact sign-flip test on the sum of the differences.

    If a method changes nothing, each sample's difference is as likely to have the opposite sign. For differences of -1,
    0 and 1 this is McNemar's exact test; differences summed over training seeds may be larger.

    Args:
        differences: One per sample, new minus old.
    """
    sizes = [abs(difference) for difference in differences if difference]
    chances: NDArray[np.float64] = np.ones(1)  # of each sum, from the lowest to the highest, in steps of 1
    for size in sizes:
        longer = np.zeros(len(chances) + 2 * size)
        longer[: len(chances)] = chances / 2
        longer[2 * size :] += chances / 2
        chances = longer
    sums = np.arange(len(chances)) - sum(sizes)
    return min(1.0, float(chances[np.abs(sums) >= abs(sum(differences))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for multiple testing with Holm's step-down method, in the given order.

    Args:
        p_values: One per test, between 0 and 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _ratio_of_sums(
    differences: NDArray[np.float64], weights: NDArray[np.float64], axis: int = -1
) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = differences.sum(axis=axis) / weights.sum(axis=axis)
    return ratio


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise EvaluationError("A standard error needs several samples.", expected="at least 2 samples", actual=samples)


def _check_weights(weights: NDArray[np.float64]) -> None:
    # A resample may consist of any single sample, so none may have a weight of zero.
    if not np.all(weights > 0):
        raise EvaluationError(
            "A sample without answer tokens cannot be weighted.",
            key=f"sample {int(np.argmax(weights <= 0))}",
            expected="a weight above 0",
        )
