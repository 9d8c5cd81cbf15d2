"""Compares a state with the strongest plain fine-tuning of the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mftctl.errors import EvaluationError, RunError
from mftctl.experiments.state_names import known_state
from mftctl.reporting.evaluation_runs import Measurement
from mftctl.reporting.own_baseline import Pair
from mftctl.reporting.paired_change import LOWER_IS_BETTER, Change, paired_change


@dataclass(frozen=True, slots=True)
class AgainstControl:
    """The change of a state against its strongest control.

    Attributes:
        control: Name of the control's row.
        change: New minus control.
        is_baseline: Whether the control is what the state is compared with anyway, because no other is stronger.
    """

    control: str
    change: Change
    is_baseline: bool


def is_control(state: str) -> bool:
    """True for plain fine-tuning, once or continued, and for averages and interpolations of its weights."""
    known = known_state(state)
    return known is not None and known.is_plain_training


def against_strongest(
    group: Sequence[Measurement],
    groups: Mapping[str, Sequence[Measurement]],
    metric: str,
    baseline: Sequence[Pair],
    baseline_change: Change | None,
) -> AgainstControl | None:
    """The paired change of a state against the control with the best value on the same samples.

    The control is chosen by the very values that are compared, which favours it: a mask that is better than this
    control is better than each of them. None if no control saw the same data with every seed of the state.

    Args:
        group: The evaluations of the state, one per seed.
        groups: All evaluations by the name of their row.
        metric: The metric's name, which determines whether lower or higher is better.
        baseline: The state's evaluations after those of its baseline.
        baseline_change: The change against its baseline, if known.
    """
    paired = {}
    for name, others in groups.items():
        if is_control(others[0].state) and same_objective(others[0].state, group[0].state):
            pairs = [(other, item) for item in group for other in others if _saw_the_same(other, item)]
            if {item.seed for _, item in pairs} == {item.seed for item in group} and len(pairs) == len(group):
                paired[name] = pairs
    sign = 1 if metric in LOWER_IS_BETTER else -1
    by_value = sorted(paired, key=lambda name: sign * fmean(other.metric.value for other, _ in paired[name]))
    for name in by_value:
        is_baseline = _runs(paired[name]) == _runs(baseline)
        if is_baseline and baseline_change is not None:
            return AgainstControl(name, baseline_change, is_baseline)
        try:
            change = paired_change([(other.samples(), item.samples()) for other, item in paired[name]], metric)
        except (EvaluationError, RunError):  # reported where all states are compared with the baseline
            continue
        return AgainstControl(name, change, is_baseline)
    return None


def same_objective(control: str, state: str) -> bool:
    """True if both states were trained on answers, or both on preferences.

    Args:
        control: Label of one state.
        state: Label of the other.
    """
    known = [known_state(label) for label in (control, state)]
    objectives = {one is not None and one.is_preference for one in known}
    return len(objectives) == 1


def _runs(pairs: Sequence[Pair]) -> set[tuple[str, str]]:
    return {(other.run.name, item.run.name) for other, item in pairs}


def _saw_the_same(control: Measurement, item: Measurement) -> bool:
    """True if both come from the same model, training data and seed."""
    same_model = control.lineage.origin == item.lineage.origin
    return same_model and (control.seed, control.trained_on) == (item.seed, item.trained_on)
