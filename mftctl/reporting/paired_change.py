"""The paired change between two evaluations of the same samples, and whether it is beyond noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.errors import EvaluationError, RunError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOWER_IS_BETTER = ("loss",)

Samples = dict[str, tuple[float, float]]
"""Score and weight of each sample, by ID."""


@dataclass(frozen=True, slots=True)
class Change:
    """A difference against the baseline, paired by sample.

    Attributes:
        value: New minus baseline.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        verdict: `better`, `worse`, or `within noise` if the interval includes 0.
        p_value: p-value of the exact sign-flip test (McNemar's for a single seed) for scores of 0 and 1; None for
            other scores.
        corrected_p_value: The p-value corrected by Holm's method for the number of the state's benchmarks.
    """

    value: float
    low: float
    high: float
    verdict: str
    p_value: float | None = None
    corrected_p_value: float | None = None


def read_samples(path: Path, metric: str) -> Samples:
    """Reads the score and weight of each sample of an evaluation, by ID.

    Args:
        path: The evaluation's samples file.
        metric: The metric's name; samples without it are left out.

    Raises:
        RunError: The file cannot be read, a score is not a number, or no sample has any weight.
    """
    from mftctl.experiments.run_contents import sample_lines

    found = {
        row.id: (row.scores[metric], row.weights.get(metric, 1.0)) for row in sample_lines(path) if metric in row.scores
    }
    place = f"{path.parent.name}/{path.name}"
    if found and not any(weight for _, weight in found.values()):
        raise RunError(f"The samples in {place} have no weight.", path=path, key=metric)
    endless = next((name for name, (score, _) in found.items() if not math.isfinite(score)), None)
    if endless is not None:
        raise RunError(f"The {metric} of a sample in {place} is not a number.", path=path, key=endless)
    return found


def paired_change(pairs: Sequence[tuple[Samples, Samples]], metric: str) -> Change:
    """The change between two evaluations of the same samples, averaged over seeds, with interval and verdict.

    Args:
        pairs: The samples before and after, one pair per seed.
        metric: The metric's name, which determines whether lower or higher is better.

    Raises:
        EvaluationError: The samples differ or are too few.
    """
    import numpy as np

    from mftctl.evaluation.statistics import paired_difference_over_seeds

    ids = list(pairs[0][0])
    if any(set(before) != set(after) for before, after in pairs):
        raise EvaluationError("not measured on the same samples as its baseline")
    if any(set(before) != set(ids) for before, _ in pairs):
        raise EvaluationError("its seeds were not measured on the same samples")
    if not ids:
        raise EvaluationError("no samples were measured")
    before, after = (np.array([[pair[side][key] for key in ids] for pair in pairs]) for side in (0, 1))
    interval = paired_difference_over_seeds(before[..., 0], after[..., 0], after[..., 1])
    verdict = "within noise"
    if interval.excludes_zero:
        verdict = "better" if (interval.estimate < 0) == (metric in LOWER_IS_BETTER) else "worse"
    return Change(interval.estimate, interval.low, interval.high, verdict, _p_value(before[..., 0], after[..., 0]))


def _p_value(before: NDArray[np.float64], after: NDArray[np.float64]) -> float | None:
    """p-value of the exact sign-flip test; None unless all scores are 0 or 1, so that sums over seeds are whole."""
    from mftctl.evaluation.statistics import sign_flips

    if not set(before.flat) | set(after.flat) <= {0.0, 1.0}:
        return None
    return sign_flips([int(difference) for difference in (after - before).sum(axis=0)])
