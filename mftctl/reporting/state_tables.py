"""Compares every evaluated state with the fine-tuned model it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from statistics import fmean, stdev

from mftctl.data.retained import RETAINED
from mftctl.errors import EvaluationError, RunError
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import PRE_TRAINED, State, known_state, place_of
from mftctl.progress import Listener, Progress
from mftctl.reporting.evaluation_runs import Maker, Measurement, measurements_of
from mftctl.reporting.own_baseline import Pair, baseline_of, baseline_pairs, may_be_baseline
from mftctl.reporting.paired_change import Change, paired_change
from mftctl.reporting.strongest_control import AgainstControl, against_strongest, is_control


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One evaluation run of a state.

    Attributes:
        seed: The seed.
        value: The metric's value.
        change: Change against its baseline; None for the baseline itself or if there is none.
        run: Name of the evaluation run.
    """

    seed: int
    value: float
    change: Change | None
    run: str


@dataclass(frozen=True, slots=True)
class Row:
    """One state's result for one metric.

    Attributes:
        state: Name of the state, as in the papers.
        value: The metric, averaged over seeds.
        spread: Standard deviation over seeds; None with a single seed.
        standard_error: Standard error of a single seed's value, averaged over seeds; None if no run reports one.
        samples: Number of records or problems measured.
        seeds: The seeds averaged over.
        is_baseline: Whether this is a baseline for other states.
        change: Change against its baseline; None for a baseline itself, without one, or if the samples differ.
        against: Names of the baseline's rows; more than one if seeds were made from models of different rows.
        runs: Names of the evaluation runs.
        by_seed: The result of each run.
        flags: Differences from the baseline that affect comparability, other than those that define the method.
        made: The state; None if its label is not known to this version.
        against_control: Change against the strongest control; None for a control itself or if there is none.
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
    against: tuple[str, ...] = ()
    by_seed: tuple[SeedResult, ...] = ()
    flags: tuple[str, ...] = ()
    made: State | None = None
    against_control: AgainstControl | None = None


@dataclass(frozen=True, slots=True)
class MetricTable:
    """All states of one model for one metric on one dataset.

    Attributes:
        origin: The pre-trained model.
        dataset: The evaluation data.
        metric: The metric's name.
        baseline: The state that changes are measured against.
        rows: The states, in the order of the papers' tables.
        is_benchmark: Whether the data is a benchmark rather than a file of records.
    """

    origin: str
    dataset: str
    metric: str
    baseline: str
    rows: tuple[Row, ...]
    is_benchmark: bool = False

    @property
    def has_several_baselines(self) -> bool:
        """True if the states are compared with several fine-tuned models, each with its own."""
        return sum(row.is_baseline for row in self.rows) > 1

    @property
    def is_retained(self) -> bool:
        """True for the data to retain, which shows what a model forgets rather than what it learned."""
        return is_retained(self.dataset, is_benchmark=self.is_benchmark)


def metric_tables(runs: Sequence[Run], listener: Listener) -> tuple[list[MetricTable], list[str]]:
    """One table per model, dataset and metric; empty without a finished evaluation.

    Args:
        runs: The runs of a runs folder, oldest first.
        listener: Receives progress updates.

    Returns:
        The tables, and one line per run that cannot be used.
    """
    groups, problems = measured(runs)
    makers = makers_of(groups)
    total = sum(map(len, groups.values()))
    done = 0

    def advance(measurements: int) -> None:
        nonlocal done
        done += measurements
        listener.progress(Progress("comparing", done, total))

    tables = []
    for (origin, _, metric), group in sorted(groups.items(), key=lambda item: _is_retained(item[1][0])):
        table, unpaired = _table(origin, metric, newest(group), makers[origin], advance)
        tables.append(table)
        problems += unpaired
    advance(total - done)
    return _with_corrected_p_values(tables), problems


def makers_of(groups: Mapping[tuple[str, str, str], Sequence[Measurement]]) -> dict[str, dict[str, list[Maker]]]:
    """What made each state, by origin and state, for `state_label`.

    Args:
        groups: The measurements by model, dataset and metric.
    """
    makers: dict[str, dict[str, list[Maker]]] = {}
    for (origin, _, _), group in groups.items():
        for item in group:
            found = makers.setdefault(origin, {}).setdefault(item.state, [])
            found += [item.maker] * (item.maker not in found)
    return makers


def measured(runs: Sequence[Run]) -> tuple[dict[tuple[str, str, str], list[Measurement]], list[str]]:
    """Measurements by model, dataset and metric, and one line per run or value that cannot be used.

    Args:
        runs: The runs of a runs folder, oldest first.
    """
    by_name = {run.name: run for run in runs}
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    problems = []
    for run in runs:
        if run.record.command != "eval" or run.record.status != RunStatus.FINISHED:
            continue
        try:
            for item in measurements_of(run, by_name):
                if item.is_number:
                    groups.setdefault(item.key, []).append(item)
                else:
                    name = item.dataset.name
                    problems.append(f"{run.name}: left out, since the {item.metric.name} on {name} is not a number")
        except RunError as error:
            problems.append(told(error, run.name))
    return groups, problems


def _with_corrected_p_values(tables: Sequence[MetricTable]) -> list[MetricTable]:
    """The tables with p-values corrected for the number of tests per state (one for each benchmark)."""
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


def newest(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The latest measurement of each state and seed."""
    return list({(item.state, item.maker, item.seed): item for item in measurements}.values())


def _table(
    origin: str,
    metric: str,
    measurements: Sequence[Measurement],
    makers: Mapping[str, Sequence[Maker]],
    advance: Callable[[int], None],
) -> tuple[MetricTable, list[str]]:
    """The table of one metric, and one line per state that cannot be paired with its baseline."""
    states: dict[tuple[str, tuple[str, str]], list[Measurement]] = {}
    for item in measurements:
        states.setdefault((item.state, item.maker), []).append(item)
    baseline = baseline_of(measurements)
    domains = list(dict.fromkeys(item.trained_on for item in measurements))

    def order(group: Sequence[Measurement]) -> tuple[int, int, tuple[str, str]]:
        """Sort key as in the papers: the pre-trained model, then by training data and method."""
        first = group[0]
        domain = 0 if first.state == PRE_TRAINED else 1 + domains.index(first.trained_on)
        return domain, place_of(first.state), first.maker

    rows, problems = [], []
    ordered = sorted(states.values(), key=order)
    labels = [state_label(group[0].state, group[0].maker, makers[group[0].state]) for group in ordered]
    by_label = dict(zip(labels, ordered, strict=True))
    names = {item.run.name: label for label, group in by_label.items() for item in group}
    for label, group in by_label.items():
        state = group[0].state
        pairs: list[Pair] = []
        changes: list[Change | None] = [None] * (1 + len(group))
        is_baseline = state == baseline and may_be_baseline(group[0])
        if not is_baseline:
            parts = [group] if len(group) == 1 else [group, *([item] for item in group)]
            try:
                pairs = baseline_pairs(group, measurements, baseline)
                changes = [_change([pair for pair in pairs if pair[1] in part], metric) for part in parts]
            except (RunError, EvaluationError) as error:
                problems.append(told(error, label))
        row = _row(label, group, changes, is_baseline=is_baseline)
        against = dict.fromkeys(names[base.run.name] for base, _ in pairs)
        row = replace(row, against=tuple(against))
        # The strongest control is the one that learned most; on data to retain it would be one that forgot least.
        if not (is_control(state) or state == PRE_TRAINED or _is_retained(group[0])):
            control = against_strongest(group, by_label, metric, pairs, row.change)
            row = replace(row, against_control=control)
        rows.append(row)
        advance(len(group))
    dataset = measurements[0].dataset
    table = MetricTable(origin, dataset.name, metric, baseline, tuple(rows), is_benchmark=dataset.task is not None)
    return table, problems


def is_retained(dataset: str, *, is_benchmark: bool) -> bool:
    """True for the data to retain among the datasets of an evaluation.

    Args:
        dataset: Name of the dataset.
        is_benchmark: Whether it is a benchmark.
    """
    return dataset == RETAINED and not is_benchmark


def _is_retained(item: Measurement) -> bool:
    return is_retained(item.dataset.name, is_benchmark=item.dataset.task is not None)


def state_label(state: str, maker: Maker, makers: Sequence[Maker]) -> str:
    """The state, with its recipe and stage if needed to distinguish it from others of the same state."""
    recipe, stage = maker
    if len(makers) == 1:
        return state
    if [other for _, other in makers].count(stage) == 1:
        return f"{state} ({stage})"
    return f"{state} ({recipe}: {stage})"


def _row(label: str, group: Sequence[Measurement], changes: Sequence[Change | None], *, is_baseline: bool) -> Row:
    """One row of a table.

    Args:
        label: Name of the state.
        group: Its evaluations, one per seed.
        changes: The overall change, then that of each seed if there are several.
        is_baseline: Whether this is the baseline.
    """
    values = [item.metric.value for item in group]
    errors = [item.metric.standard_error for item in group if item.metric.standard_error is not None]
    runs = tuple(item.run.name for item in group)
    own = changes[-len(group) :]
    return Row(
        state=label,
        value=fmean(values),
        spread=stdev(values) if len(values) > 1 else None,
        standard_error=fmean(errors) if errors else None,
        samples=group[0].metric.samples,
        seeds=tuple(item.seed for item in group),
        is_baseline=is_baseline,
        change=changes[0],
        runs=runs,
        made=known_state(group[0].state),
        by_seed=tuple(starmap(SeedResult, zip((item.seed for item in group), values, own, runs, strict=True))),
    )


def _change(pairs: Sequence[Pair], metric: str) -> Change | None:
    """The change of a state: each run is paired by sample with its own baseline, then averaged over seeds."""
    return paired_change([(base.samples(), item.samples()) for base, item in pairs], metric) if pairs else None
