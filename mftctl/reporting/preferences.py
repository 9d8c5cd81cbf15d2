"""What training on preferences reached on the validation records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from mftctl.experiments.results import LearnedPreferences
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import place_of
from mftctl.reporting.state_tables import state_label

TRAINING = ("fft", "mask-train")


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """The validation of one state, averaged over seeds.

    Attributes:
        origin: The pre-trained model.
        state: Name of the state, as in the comparison.
        loss: Loss per preference of the kept model or mask; ln 2 before training.
        spread: Its standard deviation over seeds; None with a single seed.
        accuracy: Share of records whose chosen answer has the higher reward.
        accuracy_spread: Its standard deviation over seeds; None with a single seed.
        margin: Mean reward of the chosen answers minus that of the rejected ones.
        chosen: Mean reward of the chosen answers.
        rejected: Mean reward of the rejected answers.
        seeds: The seeds averaged over.
        runs: Names of the training runs.
    """

    origin: str
    state: str
    loss: float
    spread: float | None
    accuracy: float
    accuracy_spread: float | None
    margin: float
    chosen: float
    rejected: float
    seeds: tuple[int, ...]
    runs: tuple[str, ...]


def preference_rows(runs: Sequence[Run]) -> list[PreferenceRow]:
    """One row per state that was trained on preferences, in the order of the papers' tables.

    Uses the latest training of each stage and seed. Masks are validated on half of the records.

    Args:
        runs: The runs of a runs folder, oldest first.
    """
    newest: dict[tuple[str, str, tuple[str, str]], dict[int, tuple[Run, LearnedPreferences]]] = {}
    for run in runs:
        record = run.record
        if record.command not in TRAINING or record.status != RunStatus.FINISHED:
            continue
        result = run.result(LearnedPreferences)
        if result.rewards is not None and result.kept_loss is not None:
            maker = (record.recipe or "", record.stage or ("" if record.recipe else run.name))
            key = (RunInputs.read(record.inputs).origin, result.state, maker)
            newest.setdefault(key, {})[int(record.config.get("seed", 0))] = (run, result)
    rows = []
    for (origin, state, maker), by_seed in newest.items():
        makers = [other for model, name, other in newest if (model, name) == (origin, state)]
        rows.append((place_of(state), _row(origin, state_label(state, maker, makers), by_seed)))
    rows.sort(key=lambda pair: (pair[1].origin, pair[0], pair[1].state))
    return [row for _, row in rows]


def _row(origin: str, state: str, by_seed: dict[int, tuple[Run, LearnedPreferences]]) -> PreferenceRow:
    losses = [result.kept_loss or 0.0 for _, result in by_seed.values()]
    rewards = [result.rewards for _, result in by_seed.values() if result.rewards is not None]
    accuracies = [one.accuracy for one in rewards]
    return PreferenceRow(
        origin=origin,
        state=state,
        loss=fmean(losses),
        spread=stdev(losses) if len(losses) > 1 else None,
        accuracy=fmean(accuracies),
        accuracy_spread=stdev(accuracies) if len(accuracies) > 1 else None,
        margin=fmean(one.margin for one in rewards),
        chosen=fmean(one.chosen for one in rewards),
        rejected=fmean(one.rejected for one in rewards),
        seeds=tuple(by_seed),
        runs=tuple(run.name for run, _ in by_seed.values()),
    )
