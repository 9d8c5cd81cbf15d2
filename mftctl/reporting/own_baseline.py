"""Which fine-tuned model each state is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from mftctl.errors import EvaluationError
from mftctl.experiments.state_names import FFT, PRE_TRAINED
from mftctl.reporting.evaluation_runs import Measurement, belong_together
from mftctl.reporting.run_settings import settings_of

Settings = frozenset[tuple[str, str]]
"""Data and settings of a fine-tuning, each value as JSON."""

Pair = tuple[Measurement, Measurement]
"""The evaluation of a baseline, and that of a state."""

_OwnBaselines = Sequence[tuple[Measurement, Sequence[Measurement]]]


def baseline_of(measurements: Sequence[Measurement]) -> str:
    """The state that the others are compared with: FFT, or without it the pre-trained model."""
    return FFT if any(may_be_baseline(item) and item.state == FFT for item in measurements) else PRE_TRAINED


def may_be_baseline(item: Measurement) -> bool:
    """True unless it is a control that `run` added, which for a mask of a given model is its first fine-tuning."""
    return not item.run.record.chose_its_model


def baseline_pairs(group: Sequence[Measurement], others: Iterable[Measurement], baseline: str) -> list[Pair]:
    """The evaluations of a state, each after its own baseline.

    A state that was made from none of several fine-tuned models, such as GMT, is compared with the one whose settings
    are most like its own, then with that of the same recipe.

    Args:
        group: Evaluations of the state, one per seed.
        others: All evaluations on the same data.
        baseline: The state to compare with.

    Raises:
        EvaluationError: Several fine-tuned models fit equally well.
    """
    candidates = [item for item in others if item.state == baseline and may_be_baseline(item)]
    settings = {item.run.name: _settings(item) for item in (*candidates, *group)}
    own = [(item, [base for base in candidates if belong_together(base, item)]) for item in group]
    if any(len({settings[base.run.name] for base in bases}) > 1 for _, bases in own):
        chosen = _most_alike(own, settings)
        own = [(item, [base for base in bases if settings[base.run.name] == chosen]) for item, bases in own]
    return [(base, item) for item, bases in own for base in _of_its_recipe(bases, item)]


def _most_alike(own: _OwnBaselines, settings: Mapping[str, Settings]) -> Settings:
    """The settings of the fine-tuned models to compare with, among those that every seed could be compared with.

    Raises:
        EvaluationError: Several fit equally well, or none.
    """
    item = own[0][0]
    mine = settings[item.run.name]
    recipes: dict[Settings, set[str | None]] = {}
    for _, bases in own:
        for base in bases:
            recipes.setdefault(settings[base.run.name], set()).add(base.run.record.recipe)
    of_each = ({settings[base.run.name] for base in bases} for _, bases in own if bases)
    common = set.intersection(*of_each)
    distances = {
        theirs: (len(theirs - mine) if mine else 0, item.run.record.recipe not in recipes[theirs]) for theirs in common
    }
    nearest = [theirs for theirs, distance in distances.items() if distance == min(distances.values())]
    if len(nearest) != 1:
        names = dict.fromkeys(base.run.name for _, bases in own for base in bases)
        raise EvaluationError(f"no change, since several baselines fit equally well: {', '.join(names)}")
    return nearest[0]


def _of_its_recipe(bases: Sequence[Measurement], item: Measurement) -> Sequence[Measurement]:
    """The baselines of the same recipe, if there are any."""
    return [base for base in bases if base.run.record.recipe == item.run.record.recipe] or bases


def _settings(item: Measurement) -> Settings:
    """Data and settings of the first fine-tuning of a state: its name if its run is missing, nothing without one."""
    tuned = [run for run in item.made_by if run.record.command == "fft"]
    if not tuned:
        return frozenset({("maker", json.dumps(item.maker))} if item.lineage.parents else ())
    found = {"data": tuned[0].record.config.get("data"), **settings_of(tuned[0])}
    return frozenset((key, json.dumps(value)) for key, value in found.items())
