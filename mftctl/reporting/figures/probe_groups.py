"""The groups that probes ranked, over seeds and group sizes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mftctl.experiments.probe_results import (
    FastProbe,
    Group,
    GroupProbe,
    ProbeResult,
    TrainedGroup,
    TrainedProbe,
    group_text,
)
from mftctl.experiments.results import Score
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Origin, Parents, StartingState, UsedModel

_NO_PART = ("prefix_cache_gb", "benchmark_every", "benchmark_limit", "layers")


@dataclass(frozen=True, slots=True)
class ProbedGroup:
    """One group of projections, over seeds.

    Attributes:
        name: Its layers, such as `4-7`, or its kind of projection.
        changes: Measured or predicted change of the ranking metric, one per seed.
        loss_changes: Change of the loss if a score ranks the groups; empty if the loss does.
        rank: Position of a kind of projection, the best first; None for a group of layers.
    """

    name: str
    changes: tuple[float, ...]
    loss_changes: tuple[float, ...] = ()
    rank: int | None = None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First and last layer of each run of consecutive layers, or twice the rank.

        Raises:
            ValueError: The text is not a list of layers.
        """
        if self.rank is not None:
            return [(self.rank, self.rank)]
        found = []
        for part in self.name.split(","):
            match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
            if match is None:
                raise ValueError(f"{self.name} is not a list of layers")
            found.append((int(match[1]), int(match[2] or match[1])))
        return found

    @property
    def size(self) -> int:
        """Number of layers."""
        return sum(last - first + 1 for first, last in self.ranges)

    @property
    def middle(self) -> float:
        """Mean layer index."""
        return (self.ranges[0][0] + self.ranges[-1][1]) / 2

    @property
    def change(self) -> float:
        """Mean change over seeds."""
        return fmean(self.changes)


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """Probes of one model with the same settings, for several seeds or group sizes.

    Attributes:
        runs: All probe runs.
        sizes: The groups by name of their size, lowest layers first.
        unmasked: The ranking metric without a mask, averaged over seeds; 0 for predicted changes.
        recommended: The group that most runs recommend.
        of_kinds: Whether the groups are kinds of projections, not of layers.
    """

    runs: tuple[Run, ...]
    sizes: Mapping[str, tuple[ProbedGroup, ...]]
    unmasked: float
    recommended: str
    of_kinds: bool

    @property
    def best(self) -> ProbedGroup:
        """The recommended group."""
        return next(group for found in self.sizes.values() for group in found if group.name == self.recommended)

    @property
    def is_fast(self) -> bool:
        """True if this is a fast probe, which trains nothing."""
        return isinstance(probe_result(self.runs[0]), FastProbe)

    @property
    def score(self) -> Score | None:
        """The first run's score without a mask; None if the loss ranks the groups."""
        return unmasked_score(probe_result(self.runs[0]))

    @property
    def ranked_by(self) -> str:
        """The metric that ranks the groups, such as `validation loss` or `gsm8k exact_match,strict-match`."""
        result = probe_result(self.runs[0])
        if not isinstance(result, TrainedProbe) or result.unmasked_score is None:
            return "validation loss"
        by, metric = result.by, result.unmasked_score.metric
        return f"{by} on validation records" if by == metric else f"{by} {metric}"

    @property
    def unmasked_state(self) -> str:
        """State of the model that the masks are applied to."""
        return StartingState.read(self.runs[0].record.inputs).state


def comparable_probes(runs: Sequence[Run], settings: Callable[[Run], str]) -> list[list[Run]]:
    """Groups probes with the same settings, in which each seed has one model.

    Args:
        runs: Probe runs, oldest first.
        settings: Returns what the probes of a group share.
    """
    found: dict[str, list[list[Run]]] = {}
    for run in runs:
        groups = found.setdefault(settings(run), [])
        for group in groups:
            if all(seed_of(other) != seed_of(run) or probed_model(other) == probed_model(run) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    return [group for groups in found.values() for group in groups]


def shared_settings(run: Run, *more: object) -> str:
    """Returns the origin, data and settings that all probes in one figure share, as JSON.

    Args:
        run: A probe run.
        more: Further values that they share.
    """
    config = run.record.config
    training = {key: value for key, value in config["mask_train"].items() if key not in _NO_PART}
    probing = {key: config["probe"].get(key) for key in ("data_fraction", "epochs")}
    origin, state = Origin.read(run.record.inputs).origin, StartingState.read(run.record.inputs).state
    return json.dumps([[origin, state, config.get("data")], probing, training, *more], sort_keys=True)


def probed_model(run: Run) -> tuple[str, ...]:
    """Returns the model that a probe used, and the runs that made it."""
    return (UsedModel.read(run.record.inputs).model, *Parents.read(run.record.inputs).parents)


def seed_of(run: Run) -> int:
    """Returns the seed of a run."""
    return int(run.record.config.get("seed", 0))


def probe_result(run: Run) -> GroupProbe:
    """Returns the result of a probe that ranked groups.

    Raises:
        RunError: The result cannot be read.
    """
    return run.result(GroupProbe)


def is_of_kinds(result: GroupProbe) -> bool:
    """Returns True if the groups are kinds of projections, not of layers."""
    return any(group.projection is not None for group in result.groups)


def unmasked_score(result: ProbeResult) -> Score | None:
    """Returns the score without a mask; None if the loss ranks the groups."""
    return result.unmasked_score if isinstance(result, TrainedProbe) else None


def combined_probe(runs: Sequence[Run]) -> ProbedModel:
    """Combines several runs over the same groups; the latest run per seed counts.

    Raises:
        RunError: A result is incomplete.
        ValueError: A group has no layers, or a loss or score is not a number.
    """
    changes: dict[str, dict[int, float]] = {}
    loss_changes: dict[str, dict[int, float]] = {}
    unmasked: dict[int, float] = {}
    names: dict[str, str] = {}
    for run in runs:
        result = probe_result(run)
        unmasked[seed_of(run)] = _without_mask(result)
        for ranked in result.groups:
            change = ranked.change
            if unmasked_score(result) is not None:
                change = _score_change(ranked)
                loss_changes.setdefault(ranked.name, {})[seed_of(run)] = ranked.change
            changes.setdefault(ranked.name, {})[seed_of(run)] = change
            names[ranked.name] = "one kind of projection" if ranked.projection else _size_name(run, ranked.size)
    if not all(
        math.isfinite(loss)
        for found in (unmasked, *changes.values(), *loss_changes.values())
        for loss in found.values()
    ):
        raise ValueError("a loss is not a number")
    of_kinds = is_of_kinds(probe_result(runs[0]))
    best_first = sorted(changes, key=lambda name: _direction(probe_result(runs[0])) * fmean(changes[name].values()))
    groups = [
        ProbedGroup(
            name,
            tuple(changes[name].values()),
            tuple(loss_changes.get(name, {}).values()),
            rank if of_kinds else None,
        )
        for rank, name in enumerate(best_first)
    ]
    sizes: dict[str, list[ProbedGroup]] = {}
    for shown in sorted(groups, key=lambda group: (group.size, group.middle)):
        sizes.setdefault(names[shown.name], []).append(shown)
    recommended = Counter(probe_result(run).recommended for run in reversed(runs))
    best = recommended.most_common(1)[0][0]
    if best not in changes:
        raise ValueError(f"the recommended {group_text(best)} are not one of the groups")
    placed = {name: tuple(sorted(found, key=lambda group: group.middle)) for name, found in sizes.items()}
    return ProbedModel(tuple(runs), placed, fmean(unmasked.values()), best, of_kinds)


def _direction(result: GroupProbe) -> int:
    """1 if a lower value of the ranking criterion is better, otherwise -1."""
    score = unmasked_score(result)
    return -1 if score is not None and score.higher_is_better else 1


def _without_mask(result: ProbeResult) -> float:
    """Value of the ranking criterion without a mask; 0 for a fast probe, which only predicts changes."""
    if not isinstance(result, TrainedProbe):
        return 0.0
    return result.unmasked_loss if result.unmasked_score is None else result.unmasked_score.value


def _score_change(group: Group) -> float:
    """Change of the score that ranks a group.

    Raises:
        ValueError: The group has no score.
    """
    if not isinstance(group, TrainedGroup) or group.score_change is None:
        raise ValueError(f"the recommended layers {group.layers} have no score change")
    return group.score_change


def _size_name(run: Run, size: int) -> str:
    """The name of the group size that a group belongs to; the last group of a size may be smaller."""
    wanted = run.record.config["probe"].get("groups") or (4,)
    sizes = sorted(int(number) for number in wanted if number != "all")
    common = next((number for number in sizes if size <= number), None)
    if common is None:
        return "all layers together"
    return "single layers" if common == 1 else f"groups of {common}"
