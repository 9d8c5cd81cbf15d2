"""Compares two runs: differences in what they did and in their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mftctl.errors import EvaluationError, MaskFileError, RunError
from mftctl.experiments.measured_lines import Dataset
from mftctl.experiments.results import LABELS, PLACES, EvalResult
from mftctl.experiments.run_config import NOT_GIVEN
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_record import RunStatus
from mftctl.reporting.paired_change import Change, paired_change, read_samples

_LONG_NUMBER = 20
"""Digits beyond those of a layer or step number."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A value that differs between two runs.

    Attributes:
        key: Dotted key.
        one: Value of the first run; None if it has none.
        other: Value of the second run; None if it has none.
        change: Second value minus first; None unless both are numbers.
    """

    key: str
    one: Any
    other: Any
    change: float | None


@dataclass(frozen=True, slots=True)
class PairedMetric:
    """One metric that two evaluations measured on the same data.

    Attributes:
        dataset: The data file or benchmark.
        metric: The metric's name.
        one: Value in the first run.
        other: Value in the second run.
        samples: Number of records or problems measured.
        change: Change from the first to the second, paired by sample.
    """

    dataset: str
    metric: str
    one: float
    other: float
    samples: int
    change: Change


@dataclass(frozen=True, slots=True)
class MaskOverlap:
    """Overlap of two masks over all tensors that both cover.

    Attributes:
        weights: Number of weights that both cover.
        removed_one: Number of these that the first mask removes.
        removed_other: Number of these that the second mask removes.
        removed_both: Number of these that both remove.
        jaccard: Weights removed by both over weights removed by either.
        expected_jaccard: The value expected by chance.
        only_one: Tensors that only the first mask covers.
        only_other: Tensors that only the second mask covers.
    """

    weights: int
    removed_one: int
    removed_other: int
    removed_both: int
    jaccard: float
    expected_jaccard: float
    only_one: tuple[str, ...]
    only_other: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunComparison:
    """The comparison of two runs.

    Attributes:
        one: Name of the first run, or its folder if both have the same name.
        other: Name or folder of the second run.
        settings: Differences in the resolved configuration and the number of processes.
        inputs: Differences in models, masks, data digests and file contents.
        versions: Differences in code versions.
        results: Differences in measured or counted results.
        metrics: Metrics that both evaluations measured on the same data.
        mask: Overlap of the two masks, if both runs have one.
        problems: One line per part that could not be compared.
    """

    one: str
    other: str
    settings: tuple[Difference, ...]
    inputs: tuple[Difference, ...]
    versions: tuple[Difference, ...]
    results: tuple[Difference, ...]
    metrics: tuple[PairedMetric, ...]
    mask: MaskOverlap | None
    problems: tuple[str, ...]


def compare_two(one: Run, other: Run) -> RunComparison:
    """Compares two runs of the same or different commands, finished or not.

    Args:
        one: The reference run.
        other: The run to compare with it.
    """
    same_name = one.name == other.name and one.folder != other.folder
    names = [str(run.folder) if same_name else run.name for run in (one, other)]
    unfinished = [
        f"{name} is not finished ({run.record.status})"
        for name, run in {names[0]: one, names[1]: other}.items()
        if run.record.status != RunStatus.FINISHED
    ]
    metrics, unpaired = _paired(one, other)
    mask, unread = _overlap(one, other)
    return RunComparison(
        one=names[0],
        other=names[1],
        settings=tuple(_differences(_settings(one), _settings(other))),
        inputs=tuple(_differences(_inputs(one), _inputs(other))),
        versions=tuple(_differences(one.record.versions, other.record.versions)),
        results=tuple(_differences(_results(one), _results(other))),
        metrics=metrics,
        mask=mask,
        problems=(*unfinished, *unpaired, *unread),
    )


def _settings(run: Run) -> dict[str, Any]:
    given = {key: value for key, value in run.record.config.items() if key != NOT_GIVEN}
    return {**given, "processes": run.record.processes}


def _inputs(run: Run) -> dict[str, Any]:
    return {**run.record.inputs, "files": run.record.decides.get("files", {})}


def _results(run: Run) -> dict[str, Any]:
    measured = {key: value for key, value in run.record.result.items() if key not in PLACES}
    return {**measured, "seconds": run.record.seconds}


def _differences(one: object, other: object, key: str = "") -> Iterator[Difference]:
    """The differences between two nested values, by dotted key; list entries are matched by label."""
    one, other = _opened(one), _opened(other)
    if isinstance(one, Mapping | None) and isinstance(other, Mapping | None):
        first, second = one or {}, other or {}
        for name in _in_order(dict.fromkeys([*first, *second])):
            yield from _differences(first.get(name), second.get(name), f"{key}.{name}" if key else name)
    elif one != other:
        yield Difference(key, one, other, _change(one, other))


def _opened(value: object) -> object:
    """Converts a list of mappings to one mapping and an empty container to None; other values are unchanged."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = _by_label(value)
    return None if value == {} else value


def _in_order(names: Iterable[str]) -> list[str]:
    """The names in their original order, but numbers (such as layers) in ascending order."""
    found = list(names)
    return sorted(found, key=int) if all(name.isdecimal() and len(name) < _LONG_NUMBER for name in found) else found


def _by_label(items: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    labels = [" ".join(str(item[key]) for key in LABELS if key in item) for item in items]
    if len(set(labels)) < len(items) or not all(labels):
        return {str(number): item for number, item in enumerate(items)}
    rest = [{key: value for key, value in item.items() if key not in LABELS} for item in items]
    return dict(zip(labels, rest, strict=True))


def _change(one: object, other: object) -> float | None:
    if isinstance(one, bool) or isinstance(other, bool):
        return None
    if isinstance(one, int | float) and isinstance(other, int | float):
        try:
            return other - one
        except OverflowError:
            return None
    return None


def _paired(one: Run, other: Run) -> tuple[tuple[PairedMetric, ...], list[str]]:
    """Metrics that two evaluations measured on the same data, with p-values corrected for their number.

    Returns:
        The metrics, and one line per dataset or metric that cannot be paired.
    """
    if {one.record.command, other.record.command} != {"eval"}:
        return (), []
    if not (one.record.result and other.record.result):
        return (), []
    try:
        ours, theirs = (EvalResult.read(run.record.result).datasets for run in (one, other))
    except ValueError as error:
        return (), [f"the record of an evaluation is incomplete: {first_fault(error)}"]
    found, problems = [], []
    by_name = {data.name: data for data in theirs}
    for mine in ours:
        data = by_name.get(mine.name)
        if data is not None and data.digest != mine.digest:
            problems.append(f"{mine.name}: not evaluated on the same data")
        elif data is not None:
            metrics, unpaired = _paired_metrics((one, mine), (other, data))
            found += metrics
            problems += unpaired
    return _with_corrected_p_values(found), problems


def _paired_metrics(one: tuple[Run, Dataset], other: tuple[Run, Dataset]) -> tuple[list[PairedMetric], list[str]]:
    """The metrics of a dataset that both runs have, and one line per metric that cannot be paired."""
    found, problems = [], []
    dataset = one[1].name
    values = {metric.name: metric.value for metric in other[1].metrics}
    for metric in one[1].metrics:
        name = metric.name
        if name not in values:
            continue
        try:
            before, after = (read_samples(run.folder / data.samples, name) for run, data in (one, other))
            change = paired_change([(before, after)], name)
        except (RunError, EvaluationError) as error:
            problems.append(f"{dataset}, {name}: {error.message}")
        else:
            found.append(PairedMetric(dataset, name, metric.value, values[name], len(before), change))
    return found, problems


def _with_corrected_p_values(metrics: Sequence[PairedMetric]) -> tuple[PairedMetric, ...]:
    from mftctl.evaluation.statistics import holm

    p_values = [item.change.p_value for item in metrics if item.change.p_value is not None]
    corrected = iter(holm(p_values))
    return tuple(
        item
        if item.change.p_value is None
        else replace(item, change=replace(item.change, corrected_p_value=next(corrected)))
        for item in metrics
    )


def _overlap(one: Run, other: Run) -> tuple[MaskOverlap | None, list[str]]:
    """Overlap of the masks of two runs, None if either has no mask; and the reason if they cannot be compared."""
    if any(run.record.command != "mask-train" or run.record.status != RunStatus.FINISHED for run in (one, other)):
        return None, []
    from mftctl.masking.mask import open_mask
    from mftctl.masking.overlap import diff

    try:
        with open_mask(one.folder / "mask.bits") as first, open_mask(other.folder / "mask.bits") as second:
            found = diff(first, second)
    except MaskFileError as error:
        return None, [f"masks: {error.path}: {error.message}" if error.path else f"masks: {error.message}"]
    total = found.total
    overlap = MaskOverlap(
        weights=total.weights,
        removed_one=total.removed_a,
        removed_other=total.removed_b,
        removed_both=total.removed_both,
        jaccard=total.jaccard,
        expected_jaccard=total.expected_jaccard,
        only_one=found.only_a,
        only_other=found.only_b,
    )
    return overlap, []
