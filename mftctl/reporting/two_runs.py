"""Two runs side by side: what was done differently, and what came out differently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mftctl.errors import EvaluationError, MaskFileError, RunError
from mftctl.experiments.measured_lines import Dataset
from mftctl.experiments.results import LABELS, PLACES, EvalResult
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run
from mftctl.reporting.paired_change import Change, paired_change, read_samples

_LONG_NUMBER = 20
"""Digits of what is no number of a layer or a step."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A value that two runs do not share.

    Attributes:
        key: Dotted.
        one: Of the first run; None where it has none.
        other: Of the second run; None where it has none.
        change: The second minus the first, of numbers; None for others.
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
        one: Its value in the first run.
        other: Its value in the second run.
        samples: Records or problems measured.
        change: The second against the first, paired by sample.
    """

    dataset: str
    metric: str
    one: float
    other: float
    samples: int
    change: Change


@dataclass(frozen=True, slots=True)
class MaskOverlap:
    """How much two masks agree, over all tensors that both cover.

    Attributes:
        weights: That both cover.
        removed_one: Of these, removed by the first.
        removed_other: Removed by the second.
        removed_both: Removed by both.
        jaccard: Removed by both over removed by either.
        expected_jaccard: What chance would give.
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
        one: Name of the first run; its folder where the names are the same.
        other: The same of the second run.
        settings: What the resolved configurations do not share, and the number of processes.
        inputs: What they worked on: models, masks, digests of the data, contents of the files.
        versions: Of the code.
        results: Everything measured or counted that is not the same.
        metrics: For two evaluations, what both measured on the same data.
        mask: For two masks.
        problems: A line for each part that could not be compared.
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
    """The comparison of two runs, of the same command or of two, finished or not.

    Args:
        one: The run that differences are against.
        other: The run compared with it.
    """
    same_name = one.name == other.name and one.folder != other.folder
    names = [str(run.folder) if same_name else run.name for run in (one, other)]
    problems = [
        f"{name} is not finished ({run.record.status})"
        for name, run in {names[0]: one, names[1]: other}.items()
        if run.record.status != "finished"
    ]
    return RunComparison(
        one=names[0],
        other=names[1],
        settings=tuple(_differences(_settings(one), _settings(other))),
        inputs=tuple(_differences(_inputs(one), _inputs(other))),
        versions=tuple(_differences(one.record.versions, other.record.versions)),
        results=tuple(_differences(_results(one), _results(other))),
        metrics=_paired(one, other, problems),
        mask=_overlap(one, other, problems),
        problems=tuple(problems),
    )


def _settings(run: Run) -> dict[str, Any]:
    return {**run.record.config, "processes": run.record.processes}


def _inputs(run: Run) -> dict[str, Any]:
    return {**run.record.inputs, "files": run.record.decides.get("files", {})}


def _results(run: Run) -> dict[str, Any]:
    measured = {key: value for key, value in run.record.result.items() if key not in PLACES}
    return {**measured, "seconds": run.record.seconds}


def _differences(one: object, other: object, key: str = "") -> Iterator[Difference]:
    """The values that nested data does not share, by dotted key; an entry of a list by what names it."""
    one, other = _opened(one), _opened(other)
    if isinstance(one, Mapping | None) and isinstance(other, Mapping | None):
        first, second = one or {}, other or {}
        for name in _in_order(dict.fromkeys([*first, *second])):
            yield from _differences(first.get(name), second.get(name), f"{key}.{name}" if key else name)
    elif one != other:
        yield Difference(key, one, other, _change(one, other))


def _opened(value: object) -> object:
    """A list of mappings as one mapping; nothing in place of an empty list or mapping; anything else as it is."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = _by_label(value)
    return None if value == {} else value


def _in_order(names: Iterable[str]) -> list[str]:
    """As they come, but numbers, such as those of layers, by their size."""
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


def _paired(one: Run, other: Run, problems: list[str]) -> tuple[PairedMetric, ...]:
    """What two evaluations measured on the same data, its p-values corrected for their number."""
    if {one.record.command, other.record.command} != {"eval"}:
        return ()
    if not (one.record.result and other.record.result):
        return ()
    try:
        ours, theirs = (EvalResult.read(run.record.result).datasets for run in (one, other))
    except ValueError as error:
        problems.append(f"the record of an evaluation is not complete: {first_fault(error)}")
        return ()
    found: list[PairedMetric] = []
    by_name = {data.name: data for data in theirs}
    for mine in ours:
        data = by_name.get(mine.name)
        if data is not None and data.digest != mine.digest:
            problems.append(f"{mine.name}: the data measured on is not the same")
        elif data is not None:
            found += _paired_metrics((one, mine), (other, data), problems)
    return _with_corrected_p_values(found)


def _paired_metrics(
    one: tuple[Run, Dataset], other: tuple[Run, Dataset], problems: list[str]
) -> Iterator[PairedMetric]:
    """The metrics that both runs have of a data set."""
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
            yield PairedMetric(dataset, name, metric.value, values[name], len(before), change)


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


def _overlap(one: Run, other: Run, problems: list[str]) -> MaskOverlap | None:
    """How much the masks of two runs agree; None where one of them has none."""
    if any(run.record.command != "mask-train" or run.record.status != "finished" for run in (one, other)):
        return None
    from mftctl.masking.mask import open_mask
    from mftctl.masking.overlap import diff

    try:
        with open_mask(one.folder / "mask.bits") as first, open_mask(other.folder / "mask.bits") as second:
            found = diff(first, second)
    except MaskFileError as error:
        problems.append(f"masks: {error.path}: {error.message}" if error.path else f"masks: {error.message}")
        return None
    total = found.total
    return MaskOverlap(
        weights=total.weights,
        removed_one=total.removed_a,
        removed_other=total.removed_b,
        removed_both=total.removed_both,
        jaccard=total.jaccard,
        expected_jaccard=total.expected_jaccard,
        only_one=found.only_a,
        only_other=found.only_b,
    )
