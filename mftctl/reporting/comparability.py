"""Flags states whose code, data or settings are not comparable with their baseline.

Settings that methods are compared by (learning rate, method, ratio, layers, epochs, ...) are not flagged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mftctl.experiments.results import MeasuredData
from mftctl.experiments.run_folder import SOURCE, Run
from mftctl.experiments.run_inputs import RunInputs
from mftctl.reporting.run_settings import SECTIONS, settings_of

_DATA = ("data", "val_data", "val_fraction")
_EQUAL_IN_TRAINING = ("max_length_tokens", "precision")
_NOT_MEASURING = ("tasks", "task_data", "predictions", "save_samples", "unsafe_code")
"""Keys of the `eval` section that do not affect results, or that the evaluation data already covers."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """An evaluation and the runs that made what it measures, oldest first; missing runs by name."""

    run: Run
    makers: tuple[Run, ...]
    gone: tuple[str, ...]

    @property
    def parents(self) -> list[str]:
        return RunInputs.read(self.run.record.inputs).parents

    @property
    def trainings(self) -> tuple[Run, ...]:
        return tuple(run for run in self.makers if run.record.command in ("fft", "mask-train"))

    @property
    def seed(self) -> int:
        """The seed of the evaluated model, which may differ from that of the evaluation."""
        return int((self.trainings or (self.run,))[-1].record.config.get("seed", 0))

    def fine_tuning(self, before: Run | None = None) -> Run | None:
        """The last run that trained weights, if any."""
        found = None
        for run in self.makers:
            if run is before:
                break
            found = run if run.record.command == "fft" else found
        return found


def flags(item_runs: Sequence[Run], baseline_runs: Sequence[Run], by_name: Mapping[str, Run]) -> tuple[str, ...]:
    """One line per difference between a state and its baseline, or between the seeds of a state.

    Args:
        item_runs: Evaluations of the state, one per seed.
        baseline_runs: Evaluations of its baseline; the same runs for the baseline's own row.
        by_name: All runs of the runs folder.
    """
    item, baseline = ([_measured(run, by_name) for run in runs] for runs in (item_runs, baseline_runs))
    pairs = list(_pairs(item, baseline))
    found = [
        *_unlike_seeds(item),
        *_unlike_pairs(pairs, baseline),
        *(line for one, other in pairs for line in _other_code(one, other)),
        *_code_not_recorded(pairs),
        *(line for one, other in pairs for line in _other_data(one, other)),
        *(line for one, other in pairs for line in _other_settings(one, other)),
        *_gone(pairs),
    ]
    return tuple(dict.fromkeys(found))


def _measured(run: Run, by_name: Mapping[str, Run]) -> _Measured:
    names = RunInputs.read(run.record.inputs).parents
    makers = tuple(by_name[name] for name in names if name in by_name)
    return _Measured(run, makers, tuple(name for name in names if name not in by_name))


def _pairs(item: Sequence[_Measured], baseline: Sequence[_Measured]) -> Iterator[tuple[_Measured, _Measured]]:
    """Pairs each evaluation with its baseline evaluations.

    The baseline is the model that a state was made from, or otherwise the baseline model with the same seed and, if
    there is one, the same data.
    """
    for one in item:
        own = [other for other in baseline if other.parents and other.parents == one.parents[: len(other.parents)]]
        of_seed = [other for other in baseline if other.seed == one.seed]
        of_data = [other for other in of_seed if _sources(other.run, "data") == _sources(one.run, "data")]
        yield from ((one, other) for other in own or of_data or of_seed or baseline[:1])


def _unlike_seeds(item: Sequence[_Measured]) -> Iterator[str]:
    """Differences between the seeds averaged in one row."""
    chains = {" → ".join(name.partition("-")[2] for name in one.parents) for one in item}
    if len(chains) > 1:
        yield f"Seeds were produced by different commands: {_listed(chains)}"
        return
    aspects = [_aspects(one) for one in item]
    for name in dict.fromkeys(name for found in aspects for name in found):
        values = [(one.seed, found[name]) for one, found in zip(item, aspects, strict=True) if name in found]
        if len({value for _, value in values}) > 1:
            yield f"Seeds differ in {name}: {', '.join(f'{value} (seed {seed})' for seed, value in values)}"


def _aspects(measured: _Measured) -> dict[str, str]:
    """Everything that must be the same for all seeds of a row, by name: settings, data, versions."""
    found: dict[str, str] = {}
    commands: list[str] = []
    for run in (*measured.trainings, measured.run):
        commands.append(run.record.command)
        times = commands.count(run.record.command)
        of = run.record.command if times == 1 else f"{run.record.command} {times}"
        for key, value in settings_of(run).items():
            if commands[-1] != "eval" or key not in _NOT_MEASURING:
                found[f"{key} of {of}"] = _text(value)
        if commands[-1] != "eval":
            found |= {f"{key} of {of}": _sources(run, key) for key in _DATA}
        found[f"processes of {of}"] = _text(run.record.processes)
        for path, digest in (run.record.decides.get("files") or {}).items():
            found[f"the contents of {path}"] = _text(digest)[:12]
        versions = {SOURCE: "not recorded", **run.record.versions}
        found |= {f"{name} of {of}": version for name, version in versions.items() if name != "mftctl"}
        if measured.run.record.chose_its_model and run in measured.trainings[-1:]:
            found.pop(f"learning_rate of {of}", None)  # chosen for each seed
    return found


def _unlike_pairs(pairs: Sequence[tuple[_Measured, _Measured]], baseline: Sequence[_Measured]) -> Iterator[str]:
    """Seeds compared with a different seed, and baselines averaged over additional seeds, if both were trained."""
    trained = [(one, other) for one, other in pairs if one.parents and other.parents]
    for one, other in trained:
        if one.seed != other.seed:
            yield f"Seed {one.seed} is compared with seed {other.seed} of the baseline"
    more = {other.seed for other in baseline} - {other.seed for _, other in trained}
    if trained and more:
        yield f"The baseline is averaged over additional seeds: {', '.join(map(str, sorted(more)))}"


def _other_code(one: _Measured, other: _Measured) -> Iterator[str]:
    """Different versions; for mftctl itself, the digest of its source decides."""
    roles: list[tuple[str, Sequence[Run], Sequence[Run]]] = [
        ("Measured", (one.run,), (other.run,)),
        ("Made", _own(one, other), other.makers),
    ]
    for role, runs, others in roles:
        mine, theirs = _versions(runs), _versions(others)
        for package in sorted(mine.keys() & theirs.keys() - {"mftctl"}):
            different = mine[package] - theirs[package]
            if different:
                yield f"{role} with {package} {_listed(different)}, the baseline with {_listed(theirs[package])}"


def _versions(runs: Iterable[Run]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for run in runs:
        for package, version in run.record.versions.items():
            found.setdefault(package, set()).add(version)
    return found


def _code_not_recorded(pairs: Sequence[tuple[_Measured, _Measured]]) -> Iterator[str]:
    """Runs without a record of their code that are compared with runs that have one."""
    found: dict[str, None] = {}
    for one, other in pairs:
        for mine, theirs in (((one.run,), (other.run,)), (_own(one, other), other.makers)):
            silent = [run.name for run in (*mine, *theirs) if SOURCE not in run.record.versions]
            if mine and theirs and len(silent) < len(mine) + len(theirs):
                found |= dict.fromkeys(silent)
    if found:
        yield f"Code version not recorded: {', '.join(found)}"


def _other_data(one: _Measured, other: _Measured) -> Iterator[str]:
    digests = _digests_by_name(other.run)
    for name, digest in _digests_by_name(one.run).items():
        if digests.get(name, digest) != digest:
            yield f"Measured on a {name} that differs from the baseline's"
    for run in _own_trainings(one, other):
        is_mask = run.record.command == "mask-train"
        reference = one.fine_tuning(before=run) if is_mask else other.fine_tuning()
        if reference is None:
            continue
        what, whose = ("Mask learned from", "its fine-tuning's") if is_mask else ("Trained on", "the baseline's")
        difference = _difference_of_data(run, reference, "train", "data")
        if difference:
            yield f"{what} records that differ from {whose}: {difference}"
        difference = _difference_of_data(run, reference, "validation", "val_data")
        if difference:
            yield f"Validated on records that differ from {whose}: {difference}"


def _difference_of_data(run: Run, reference: Run, part: Literal["train", "validation"], key: str) -> str:
    """The sources and record counts of both runs; empty if the data is the same.

    Data is compared by digest, or by configured source if a run has no digest.
    """
    known = [RunInputs.read(item.record.inputs).of_part(part) for item in (run, reference)]
    digests = [digest for digest, _ in known]
    texts = [_sources(item, key) for item in (run, reference)]
    if digests[0] == digests[1] if all(digests) else texts[0] == texts[1]:
        return ""
    counts = ["some" if records is None else str(records) for _, records in known]
    if texts[0] == texts[1]:
        return f"{counts[0]} and {counts[1]} of {texts[0]}"
    return f"{counts[0]} of {texts[0]} instead of {counts[1]} of {texts[1]}"


def _other_settings(one: _Measured, other: _Measured) -> Iterator[str]:
    theirs = settings_of(other.run)
    for key, value in settings_of(one.run).items():
        if key not in _NOT_MEASURING and theirs.get(key) != value:
            yield f"Measured with eval.{key} {_text(value)}, the baseline with {_text(theirs.get(key))}"
    reference = other.fine_tuning()
    if reference is None:
        return
    for run in _own_trainings(one, other):
        for name, (value, expected) in _to_be_equal(run, reference).items():
            if value != expected:
                yield f"Trained with {name} {_text(value)}, the baseline with {_text(expected)}"


def _to_be_equal(run: Run, reference: Run) -> dict[str, tuple[object, object]]:
    """Settings of two training runs that must be equal because they are not part of a method."""
    mine, theirs = settings_of(run), settings_of(reference)
    keys = {f"{SECTIONS[run.record.command][0]}.{key}": key for key in _EQUAL_IN_TRAINING}
    found: dict[str, tuple[object, object]] = {name: (mine[key], theirs[key]) for name, key in keys.items()}
    return {**found, "a batch of": (_records_a_step(run), _records_a_step(reference))}


def _records_a_step(run: Run) -> int:
    settings = settings_of(run)
    stated = settings.get("global_batch_size")
    if stated is not None:
        return int(stated)
    return int(settings["batch_size"]) * int(settings["grad_accum_steps"] or 1) * run.record.processes


def _gone(pairs: Sequence[tuple[_Measured, _Measured]]) -> Iterator[str]:
    gone = dict.fromkeys(name for one, other in pairs for name in one.gone if name not in other.parents)
    if gone:
        yield f"Not checked because the run folder is missing: {', '.join(gone)}"


def _own(one: _Measured, other: _Measured) -> list[Run]:
    """Runs that made the first model but not the second."""
    return [run for run in one.makers if run.name not in other.parents]


def _own_trainings(one: _Measured, other: _Measured) -> list[Run]:
    """The runs of `_own` that learned from data."""
    own = [run for run in _own(one, other) if run in one.trainings]
    return [run for run in own if run.record.command == "fft" or settings_of(run)["method"] == "learned"]


def _digests_by_name(run: Run) -> dict[str, str]:
    return {data.name: data.digest for data in run.result(MeasuredData).datasets}


def _sources(run: Run, key: str) -> str:
    """The configured data in command-line form."""
    value = run.record.config.get(key)
    if not isinstance(value, list):
        return _text(value)
    parts = [part if isinstance(part, dict) else {"path": part} for part in value]
    return " + ".join(str(part["path"]) + (f"={part['count']}" if part.get("count") else "") for part in parts)


def _listed(values: Iterable[str]) -> str:
    return " and ".join(sorted(values))


def _text(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
