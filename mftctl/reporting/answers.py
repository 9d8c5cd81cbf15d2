"""The answers that a state changed: problems that it solves and its baseline does not, and the reverse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mftctl.errors import EvaluationError, RunError
from mftctl.experiments.measured_lines import Sample
from mftctl.experiments.run_contents import sample_lines, told
from mftctl.experiments.run_folder import Run
from mftctl.files.json_files import json_lines
from mftctl.reporting.evaluation_runs import Maker, Measurement
from mftctl.reporting.own_baseline import Pair, baseline_of, baseline_pairs
from mftctl.reporting.paired_change import LOWER_IS_BETTER
from mftctl.reporting.state_tables import makers_of, measured, newest, state_label

SHOWN_ANSWERS = 50
"""Problems won, and problems lost, that the page shows for a pair of evaluations; the file has all."""


@dataclass(frozen=True, slots=True)
class ChangedAnswer:
    """A problem that only one of two states solves.

    Attributes:
        id: The sample's identifier.
        prompt: The question; None if it was not saved.
        reference: The reference answer; None if there is none.
        before: The baseline's answer.
        after: The state's answer.
    """

    id: str
    prompt: str | None
    reference: str | None
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class AnswerChanges:
    """All problems that one of two evaluations of the same data solves and the other does not.

    Attributes:
        dataset: Name of the data.
        metric: The score of 0 or 1 that decides.
        baseline: The state compared with, as it is called in the tables.
        state: The state, as it is called in the tables.
        seed: Seed of the evaluation of the state.
        samples: Number of problems.
        won: Problems that only the state solves.
        lost: Problems that only the baseline solves.
        runs: Names of both evaluation runs, the baseline's first.
    """

    dataset: str
    metric: str
    baseline: str
    state: str
    seed: int
    samples: int
    won: tuple[ChangedAnswer, ...]
    lost: tuple[ChangedAnswer, ...]
    runs: tuple[str, str]

    @property
    def title(self) -> str:
        """One line with the counts."""
        return (
            f"{self.dataset}: {self.state} against {self.baseline}, seed {self.seed}: "
            f"{len(self.won)} won, {len(self.lost)} lost of {self.samples} ({self.metric})"
        )

    def lines(self) -> str:
        """All changed answers as JSON lines."""
        rows: list[dict[str, Any]] = []
        for change, answers in (("won", self.won), ("lost", self.lost)):
            rows += [{"change": change, **asdict(answer)} for answer in answers]
        return json_lines(rows)


def answer_changes(runs: Sequence[Run]) -> tuple[list[AnswerChanges], list[str]]:
    """The changed answers of each state and seed, for each dataset with a score of 0 or 1 per generated answer.

    Of several such scores of a benchmark, the first one counts.

    Args:
        runs: The runs of a runs folder, oldest first.

    Returns:
        The changes in the order of the runs, and one line per evaluation that cannot be read.
    """
    groups, _ = measured(runs)
    makers = makers_of(groups)
    found: list[AnswerChanges] = []
    problems: list[str] = []
    done: set[tuple[str, str]] = set()
    for (origin, data, metric), group in groups.items():
        if metric in LOWER_IS_BETTER or (origin, data) in done:
            continue
        try:
            changes = list(_of_group(newest(group), makers[origin]))
        except RunError as error:
            problems.append(told(error, group[0].dataset.name))
            continue
        if changes:
            done.add((origin, data))
            found += changes
    return found, problems


def _of_group(group: Sequence[Measurement], makers: Mapping[str, Sequence[Maker]]) -> Iterator[AnswerChanges]:
    """The changes of all states, for one model, dataset and metric; none unless answers are right or wrong."""
    read: dict[Path, dict[str, Sample]] = {}  # the baseline's samples are compared with those of every state
    for before, after in _of_one_seed(_pairs(group)):
        rows = [_samples(item, read) for item in (before, after)]
        metric = after.metric.name
        if rows[0].keys() != rows[1].keys():
            continue
        if not _are_right_or_wrong([*rows[0].values(), *rows[1].values()], metric):
            return
        won: list[ChangedAnswer] = []
        lost: list[ChangedAnswer] = []
        for key, old in rows[0].items():
            new = rows[1][key]
            if old.output is None or new.output is None or old.scores.get(metric) == new.scores.get(metric):
                continue
            changed = ChangedAnswer(key, new.prompt, new.reference, old.output, new.output)
            (won if new.scores[metric] > old.scores[metric] else lost).append(changed)
        yield AnswerChanges(
            dataset=after.dataset.name,
            metric=metric,
            baseline=state_label(before.state, before.maker, makers[before.state]),
            state=state_label(after.state, after.maker, makers[after.state]),
            seed=after.seed,
            samples=len(rows[0]),
            won=tuple(won),
            lost=tuple(lost),
            runs=(before.run.name, after.run.name),
        )


def _pairs(group: Sequence[Measurement]) -> list[Pair]:
    """The evaluations of all states, each after its own baseline."""
    baseline = baseline_of(group)
    states: dict[tuple[str, Maker], list[Measurement]] = {}
    for item in group:
        if item.state != baseline:
            states.setdefault((item.state, item.maker), []).append(item)
    pairs: list[Pair] = []
    for state in states.values():
        with suppress(EvaluationError):  # reported where all states are compared with the baseline
            pairs += baseline_pairs(state, group, baseline)
    return pairs


def _of_one_seed(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs without those of a pre-trained model with baselines of other seeds, if there is one of its own."""
    paired = {after.run.name for before, after in pairs if before.seed == after.seed}
    return [pair for pair in pairs if pair[0].seed == pair[1].seed or pair[1].run.name not in paired]


def _samples(item: Measurement, read: dict[Path, dict[str, Sample]]) -> dict[str, Sample]:
    """The samples of an evaluation by their identifier, kept for the next comparison with it."""
    path = item.run.folder / item.dataset.samples
    if path not in read:
        read[path] = {row.id: row for row in sample_lines(path)}
    return read[path]


def _are_right_or_wrong(rows: Sequence[Sample], metric: str) -> bool:
    """True if all generated answers that have the score have 0 or 1, and there are some."""
    scored = [row for row in rows if metric in row.scores]
    return bool(scored) and all(row.output is not None and row.scores[metric] in (0.0, 1.0) for row in scored)
