"""The comparison that a report shows: every evaluated state against the fine-tuned model it came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mftctl.errors import EvaluationError, RunError
from mftctl.lineage import FFT, PRE_TRAINED
from mftctl.runs import Run, list_runs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STATE_ORDER = (
    PRE_TRAINED,
    FFT,
    "continued FFT",
    "LoRA",
    "continued LoRA",
    "HFT",
    "random update",
    "random update global",
    "GMT",
    "GMT global",
    "trivial drop",
    "salient drop",
    "random drop",
    "random mask",
    "L1 mask",
    "MFT, paper",
    "MFT",
    "MFT threshold",
    "masked",
)
LOWER_IS_BETTER = ("loss",)

Samples = dict[str, tuple[float, float]]
"""Score and weight of each sample, by its id."""


@dataclass(frozen=True, slots=True)
class Change:
    """A difference against the baseline, paired by sample.

    Attributes:
        value: New minus baseline.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        verdict: `better`, `worse`, or `within noise` where the interval holds 0.
        p_value: Of the exact test by sign flips, which for a single seed is McNemar's, for scores of 0 and 1; None for
            others.
        corrected_p_value: The same, corrected for the number of the state's benchmarks by Holm's method.
    """

    value: float
    low: float
    high: float
    verdict: str
    p_value: float | None = None
    corrected_p_value: float | None = None


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One evaluation run of a state.

    Attributes:
        seed: Its seed.
        value: The metric.
        change: Against the baseline it belongs to; None for the baseline itself, or where there is none.
        run: The evaluation run's name.
    """

    seed: int
    value: float
    change: Change | None
    run: str


@dataclass(frozen=True, slots=True)
class Row:
    """One state under one metric.

    Attributes:
        state: In the words of the papers.
        value: The metric, averaged over seeds.
        spread: Standard deviation over seeds; None with a single one.
        standard_error: Of a single seed's value, averaged; None where a run has none.
        samples: Records or problems measured.
        seeds: The seeds averaged over.
        is_baseline: Whether the changes of the other states are against this one.
        change: Against the baseline; None for the baseline itself, or where it was not measured on the same samples.
        runs: Names of the evaluation runs.
        by_seed: Each of these runs by itself.
        flags: How it was made in another way than its comparison; what the methods compared differ in is none.
    """

    state: str
    value: float
    spread: float | None
    standard_error: float | None
    samples: int
    seeds: tuple[int, ...]
    is_baseline: bool
    change: Change | None
    runs: tuple[str, ...]
    by_seed: tuple[SeedResult, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetricTable:
    """All states of one model under one metric of one data set.

    Attributes:
        origin: The pre-trained model.
        dataset: The data measured on.
        metric: The metric's name.
        baseline: The state that changes are against.
        rows: In the order of the papers' tables.
        is_benchmark: Whether the data is a benchmark's, and not a file of records.
    """

    origin: str
    dataset: str
    metric: str
    baseline: str
    rows: tuple[Row, ...]
    is_benchmark: bool = False


@dataclass(frozen=True, slots=True)
class _Measurement:
    """One metric of one evaluation run, with the runs that made the state, from first to last, as far as known."""

    run: Run
    dataset: dict[str, Any]
    metric: dict[str, Any]
    made_by: tuple[Run, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """What two measurements in one table have in common: model, data and metric."""
        return (self.inputs["origin"], f"{self.dataset['name']}:{self.dataset['digest']}", self.metric["name"])

    @property
    def inputs(self) -> dict[str, Any]:
        return self.run.record.inputs

    @property
    def state(self) -> str:
        return str(self.run.record.result["state"])

    @property
    def seed(self) -> int:
        return int(self.run.record.config.get("seed", 0))

    @property
    def trained_on(self) -> str:
        """The training data."""
        return json.dumps(self.run.record.config.get("data", []))

    @property
    def maker(self) -> tuple[str, str]:
        """What tells two states of the same name apart: recipe and stage, else the run that made the state."""
        makers = [name for name in self.inputs["parents"] if not name.endswith("-apply")]
        record = next((run.record for run in self.made_by if makers and run.name == makers[-1]), self.run.record)
        if self.state == PRE_TRAINED:
            return "", ""
        return record.recipe or "", record.stage or self.run.record.stage or (makers[-1] if makers else "")

    @property
    def first_state(self) -> str | None:
        """The state that the first run on the way here made of the pre-trained model; None where it is not known."""
        first = [run for run in self.made_by if run.name == self.inputs["parents"][0]]
        return str(first[0].record.result.get("state")) if first else None

    def samples(self) -> Samples:
        """Score and weight of each sample, by its id."""
        return read_samples(self.run.folder / self.dataset["samples"], self.metric["name"])


def read_samples(path: Path, metric: str) -> Samples:
    """Score and weight of each sample of an evaluation, by its id.

    Args:
        path: The evaluation's file of samples.
        metric: The metric's name; samples without it are left out.

    Raises:
        RunError: The file cannot be read.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {
            row["id"]: (row["scores"][metric], row.get("weights", {}).get(metric, 1.0))
            for row in rows
            if metric in row["scores"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError("The samples of an evaluation cannot be read.", path=path, actual=repr(error)) from error


def compare_runs(root: Path) -> tuple[list[MetricTable], list[str]]:
    """One table for each model, data set and metric, and a line for each run that could not be used.

    Args:
        root: The runs folder.

    Raises:
        RunError: There is no finished evaluation.
    """
    runs, errors = list_runs(root)
    problems = [f"{error.path}: {error.message}" for error in errors]
    tables = metric_tables(runs, problems)
    if not tables:
        raise RunError(
            "There is nothing to report: no finished evaluation.",
            path=root,
            actual="; ".join(problems) or f"{len(runs)} other runs",
            hint="mftctl eval",
        )
    return tables, problems


def metric_tables(runs: Sequence[Run], problems: list[str]) -> list[MetricTable]:
    """One table for each model, data set and metric; none without a finished evaluation.

    Args:
        runs: Of a runs folder, oldest first.
        problems: Gets a line for each run that cannot be used.
    """
    by_name = {run.name: run for run in runs}
    groups: dict[tuple[str, str, str], list[_Measurement]] = {}
    for run in runs:
        if run.record.command != "eval" or run.record.status != "finished":
            continue
        try:
            for item in _measurements(run, by_name):
                groups.setdefault(item.key, []).append(item)
        except RunError as error:
            problems.append(f"{error.path}: {error.message}")
    makers: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (origin, _, _), group in groups.items():
        for item in group:
            found = makers.setdefault((origin, item.state), [])
            found += [item.maker] * (item.maker not in found)
    tables = [
        _table(
            origin,
            metric,
            group,
            {state: found for (model, state), found in makers.items() if model == origin},
            problems,
        )
        for (origin, _, metric), group in groups.items()
    ]
    return _with_corrected_p_values(tables)


def _with_corrected_p_values(tables: Sequence[MetricTable]) -> list[MetricTable]:
    """Every p-value corrected for all that its state has, as a state is tried on every benchmark."""
    from mftctl.evaluation.statistics import holm

    found: dict[tuple[str, str], list[float]] = {}
    for table in tables:
        for row in table.rows:
            if row.change is not None and row.change.p_value is not None:
                found.setdefault((table.origin, row.state), []).append(row.change.p_value)
    corrected = {key: iter(holm(values)) for key, values in found.items()}

    def correct(row: Row, origin: str) -> Row:
        if row.change is None or row.change.p_value is None:
            return row
        return replace(row, change=replace(row.change, corrected_p_value=next(corrected[origin, row.state])))

    return [replace(table, rows=tuple(correct(row, table.origin) for row in table.rows)) for table in tables]


def _measurements(run: Run, by_name: Mapping[str, Run]) -> list[_Measurement]:
    """All metrics of a finished evaluation.

    Raises:
        RunError: Its record lacks something that a comparison needs.
    """
    record = run.record
    try:
        made_by = tuple(by_name[name] for name in record.inputs["parents"] if name in by_name)
        found = [
            _Measurement(run, data, metric, made_by) for data in record.result["datasets"] for metric in data["metrics"]
        ]
        for item in found:
            _ = item.key, item.state, item.seed, item.maker, item.dataset["samples"]
            _ = item.metric["value"], item.metric["standard_error"], item.metric["samples"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = run.folder / "run.json"
        raise RunError("The record of this evaluation is not complete.", path=path, actual=repr(error)) from error
    return found


def _table(
    origin: str,
    metric: str,
    measurements: Sequence[_Measurement],
    makers: Mapping[str, Sequence[tuple[str, str]]],
    problems: list[str],
) -> MetricTable:
    newest = {(item.state, item.maker, item.seed): item for item in measurements}
    states: dict[tuple[str, tuple[str, str]], list[_Measurement]] = {}
    for item in newest.values():
        states.setdefault((item.state, item.maker), []).append(item)
    baseline = FFT if any(state == FFT for state, _ in states) else PRE_TRAINED
    domains = list(dict.fromkeys(item.trained_on for item in measurements))

    def order(group: Sequence[_Measurement]) -> tuple[int, int, tuple[str, str]]:
        """As in the papers: the pre-trained model, then by what was trained on, and by method."""
        first = group[0]
        place = STATE_ORDER.index(first.state) if first.state in STATE_ORDER else len(STATE_ORDER)
        return (0 if first.state == PRE_TRAINED else 1 + domains.index(first.trained_on), place, first.maker)

    rows = []
    for group in sorted(states.values(), key=order):
        state = group[0].state
        label = state_label(state, group[0].maker, makers[state])
        changes: list[Change | None] = [None] * (1 + len(group))
        if state != baseline:
            parts = [group] if len(group) == 1 else [group, *([item] for item in group)]
            try:
                changes = [_change(part, newest.values(), metric, baseline) for part in parts]
            except (RunError, EvaluationError) as error:
                problems.append(f"{label}: {error.message}")
        rows.append(_row(label, group, changes, is_baseline=state == baseline))
    dataset = measurements[0].dataset
    return MetricTable(origin, dataset["name"], metric, baseline, tuple(rows), is_benchmark="task" in dataset)


def state_label(state: str, maker: tuple[str, str], makers: Sequence[tuple[str, str]]) -> str:
    """The state, with as much of its maker as tells it from others of the same state."""
    recipe, stage = maker
    if len(makers) == 1:
        return state
    if [other for _, other in makers].count(stage) == 1:
        return f"{state} ({stage})"
    return f"{state} ({recipe}: {stage})"


def _row(label: str, group: Sequence[_Measurement], changes: Sequence[Change | None], *, is_baseline: bool) -> Row:
    """One line of a table.

    Args:
        label: Name of the state.
        group: Its evaluations, seed by seed.
        changes: Of all together, then of each if there are several.
        is_baseline: Whether the others are compared with it.
    """
    values = [item.metric["value"] for item in group]
    errors = [item.metric["standard_error"] for item in group if item.metric["standard_error"] is not None]
    runs = tuple(item.run.name for item in group)
    own = changes[-len(group) :]
    return Row(
        state=label,
        value=fmean(values),
        spread=stdev(values) if len(values) > 1 else None,
        standard_error=fmean(errors) if errors else None,
        samples=group[0].metric["samples"],
        seeds=tuple(item.seed for item in group),
        is_baseline=is_baseline,
        change=changes[0],
        runs=runs,
        by_seed=tuple(starmap(SeedResult, zip((item.seed for item in group), values, own, runs, strict=True))),
    )


def _change(group: Sequence[_Measurement], others: Iterable[_Measurement], metric: str, baseline: str) -> Change | None:
    """The change of a state, each run paired by sample with its own baseline, then averaged over seeds."""
    candidates = [item for item in others if item.state == baseline]
    pairs = [(base, item) for item in group for base in candidates if _belong_together(base, item)]
    if not pairs:
        return None
    return paired_change([(base.samples(), item.samples()) for base, item in pairs], metric)


def paired_change(pairs: Sequence[tuple[Samples, Samples]], metric: str) -> Change:
    """What changed between two measurements of the same samples, averaged over seeds, with interval and verdict.

    Args:
        pairs: The samples before and after, a pair a seed.
        metric: The metric's name, which says which way is better.

    Raises:
        EvaluationError: They were not measured on the same samples, or on too few.
    """
    import numpy as np

    from mftctl.evaluation.statistics import paired_difference_over_seeds

    ids = list(pairs[0][0])
    if any(set(samples) != set(ids) for pair in pairs for samples in pair):
        raise EvaluationError("not measured on the same samples as its baseline")
    before, after = (np.array([[pair[side][key] for key in ids] for pair in pairs]) for side in (0, 1))
    interval = paired_difference_over_seeds(before[..., 0], after[..., 0], after[..., 1])
    verdict = "within noise"
    if interval.excludes_zero:
        verdict = "better" if (interval.estimate < 0) == (metric in LOWER_IS_BETTER) else "worse"
    return Change(interval.estimate, interval.low, interval.high, verdict, _p_value(before[..., 0], after[..., 0]))


def _p_value(before: NDArray[np.float64], after: NDArray[np.float64]) -> float | None:
    """Of the exact test by sign flips, where all scores are 0 or 1: summed over seeds, differences stay whole."""
    from mftctl.evaluation.statistics import sign_flips

    if not set(before.flat) | set(after.flat) <= {0.0, 1.0}:
        return None
    return sign_flips([int(difference) for difference in (after - before).sum(axis=0)])


def _belong_together(base: _Measurement, item: _Measurement) -> bool:
    """Whether a state is to be compared with this baseline.

    What was made of a fine-tuned model belongs to that very model; a pre-trained model to all made of it; and what was
    tuned in another way, such as GMT, to the baseline of the same pre-trained model, training data and seed.
    """
    same_origin = bool(base.inputs["origin"] == item.inputs["origin"])
    if PRE_TRAINED in (base.state, item.state):
        return same_origin
    if item.first_state in (None, FFT):
        return bool(base.inputs["parents"] == item.inputs["parents"][:1])
    return same_origin and (base.seed, base.trained_on) == (item.seed, item.trained_on)
