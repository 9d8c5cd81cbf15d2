"""The candidates for the state to keep at each validation: the trained values and their running averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mftctl.experiments.results import Rewards, Score

RANK = "rank"
"""Metric that selects the best step; lower is better."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was measured of the trained values, or of an average of them, at one validation.

    Attributes:
        horizon: Horizon of the average; None for the trained values themselves.
        loss: Validation loss per answer token, or per preference.
        score: The score that decides; None if the loss does.
        retained_loss: Loss on data of another domain; None without such data.
        rewards: Rewards of the validation records; None if they are no preferences.
    """

    horizon: float | None
    loss: float
    score: Score | None = None
    retained_loss: float | None = None
    rewards: Rewards | None = None

    @property
    def rank(self) -> float:
        """The value to compare; lower is better, and NaN counts as infinite."""
        value = self.loss if self.score is None else self.score.rank
        return math.inf if math.isnan(value) else value


def best_candidate(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the best score, or without scores the lowest loss; of equal scores, that with the lower loss.

    Args:
        candidates: At least one; the trained values come first.
    """
    return min(candidates, key=lambda one: (one.rank, math.inf if math.isnan(one.loss) else one.loss))


def log_entry(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The candidates of a validation as an entry of the Trainer's log and a line of metrics.

    Args:
        candidates: The trained values, then their averages.
    """
    current, *averages = candidates
    entry: dict[str, Any] = {"eval_loss": current.loss}
    if averages:
        entry["average_losses"] = {str(one.horizon): one.loss for one in averages}
    if current.retained_loss is not None:
        entry["retained_loss"] = current.retained_loss
        retained = {str(one.horizon): one.retained_loss for one in averages}
        entry |= {"average_retained_losses": retained} if retained else {}
    if current.rewards is not None:
        entry["rewards"] = current.rewards.document()
        rewards = {str(one.horizon): one.rewards.document() for one in averages if one.rewards is not None}
        entry |= {"average_rewards": rewards} if rewards else {}
    if current.score is not None:
        entry["score"] = current.score.document()
        scores = {str(one.horizon): one.score.document() for one in averages if one.score is not None}
        entry |= {"average_scores": scores} if scores else {}
    return entry


def logged_candidates(entry: dict[str, Any]) -> list[Candidate]:
    """The candidates in an entry made by `log_entry`."""
    scores = {None: entry.get("score"), **entry.get("average_scores", {})}
    losses = {None: entry["eval_loss"], **entry.get("average_losses", {})}
    retained = {None: entry.get("retained_loss"), **entry.get("average_retained_losses", {})}
    rewards = {None: entry.get("rewards"), **entry.get("average_rewards", {})}
    return [
        Candidate(
            None if key is None else float(key),
            loss,
            None if (score := scores.get(key)) is None else Score.read(score),
            retained.get(key),
            None if (found := rewards.get(key)) is None else Rewards.read(found),
        )
        for key, loss in losses.items()
    ]
