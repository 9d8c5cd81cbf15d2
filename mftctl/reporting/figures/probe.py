"""Probe figures: the measured or predicted effect of masking each group of projections on the loss or a score."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mftctl.errors import RunError
from mftctl.experiments.results import (
    FastProbe,
    Group,
    GroupProbe,
    ProbeResult,
    Score,
    StructureProbe,
    TrainedGroup,
    TrainedProbe,
    group_text,
)
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Origin, Parents, StartingState, UsedModel
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import PRE_TRAINED
from mftctl.reporting.figures.curve_drawing import STAR
from mftctl.reporting.figures.style import (
    INK,
    Figure,
    drawn_text,
    legend_height_inches,
    numbered_style,
    put_legend,
    with_own_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_NO_PART = ("prefix_cache_gb", "benchmark_every", "benchmark_limit", "layers")


@dataclass(frozen=True, slots=True)
class _Group:
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
class _Probe:
    """Probes of one model with the same settings, for several seeds or group sizes.

    Attributes:
        runs: All probe runs.
        sizes: The groups by name of their size, lowest layers first.
        unmasked: The ranking metric without a mask, averaged over seeds; 0 for predicted changes.
        recommended: The group that most runs recommend.
        of_kinds: Whether the groups are kinds of projections, not of layers.
    """

    runs: tuple[Run, ...]
    sizes: Mapping[str, tuple[_Group, ...]]
    unmasked: float
    recommended: str
    of_kinds: bool

    @property
    def best(self) -> _Group:
        """The recommended group."""
        return next(group for found in self.sizes.values() for group in found if group.name == self.recommended)

    @property
    def is_fast(self) -> bool:
        """True if this is a fast probe, which trains nothing."""
        return isinstance(_result(self.runs[0]), FastProbe)

    @property
    def score(self) -> Score | None:
        """The first run's score without a mask; None if the loss ranks the groups."""
        return _unmasked_score(_result(self.runs[0]))

    @property
    def ranked_by(self) -> str:
        """The metric that ranks the groups, such as `validation loss` or `gsm8k exact_match,strict-match`."""
        result = _result(self.runs[0])
        if not isinstance(result, TrainedProbe) or result.unmasked_score is None:
            return "validation loss"
        by, metric = result.by, result.unmasked_score.metric
        return f"{by} on validation records" if by == metric else f"{by} {metric}"

    @property
    def unmasked_state(self) -> str:
        """State of the model that the masks are applied to."""
        return StartingState.read(self.runs[0].record.inputs).state


def probe_figures(runs: Sequence[Run]) -> tuple[list[Figure], list[str]]:
    """Validation loss or score by group for trained probes, and separately the predictions of `probe --fast`.

    Probes of heads and neurons are not drawn. Probes of the same model with the same settings and ranking metric share
    a figure, whatever their seeds and group sizes.

    Args:
        runs: The runs, oldest first.

    Returns:
        The figures, and one line per run that cannot be used.

    Source: MFT, figures 3 and 7.
    """
    together: dict[str, list[list[Run]]] = {}
    problems = []
    for run in runs:
        if run.record.command != "probe" or run.record.status != RunStatus.FINISHED:
            continue
        try:
            if isinstance(run.result(ProbeResult), StructureProbe):
                continue
            _ = _figure(_probe([run])), _model(run)
            clusters = together.setdefault(_settings(run), [])
        except (RunError, KeyError, ValueError, TypeError, AttributeError) as error:
            problems.append(told(error, f"{run.folder / 'run.json'}: the result of this probe cannot be read"))
            continue
        for cluster in clusters:
            if all(_seed(other) != _seed(run) or _model(other) == _model(run) for other in cluster):
                cluster.append(run)
                break
        else:
            clusters.append([run])
    probes = [_probe(cluster) for clusters in together.values() for cluster in clusters]
    drawn = [probe for probe in probes if sum(map(len, probe.sizes.values())) > 1]
    return with_own_names(_figure(probe) for probe in sorted(drawn, key=lambda probe: probe.is_fast)), problems


def _seed(run: Run) -> int:
    return int(run.record.config.get("seed", 0))


def _model(run: Run) -> tuple[str, ...]:
    return (UsedModel.read(run.record.inputs).model, *Parents.read(run.record.inputs).parents)


def _settings(run: Run) -> str:
    """The settings that all probes in one figure share."""
    record = run.record
    training = {key: value for key, value in record.config["mask_train"].items() if key not in _NO_PART}
    probing = {key: record.config["probe"].get(key) for key in ("data_fraction", "epochs")}
    origin, state = Origin.read(record.inputs).origin, StartingState.read(record.inputs).state
    inputs = [origin, state, record.config.get("data")]
    result = _result(run)
    score = _unmasked_score(result)
    kinds = ["projection"] if _is_of_kinds(result) else []
    by = [] if score is None or not isinstance(result, TrainedProbe) else [result.by, score.metric, score.samples]
    return json.dumps([inputs, probing, training, isinstance(result, FastProbe), *by, *kinds], sort_keys=True)


def _result(run: Run) -> GroupProbe:
    return run.result(GroupProbe)


def _is_of_kinds(result: GroupProbe) -> bool:
    return any(group.projection is not None for group in result.groups)


def _unmasked_score(result: ProbeResult) -> Score | None:
    return result.unmasked_score if isinstance(result, TrainedProbe) else None


def _probe(runs: Sequence[Run]) -> _Probe:
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
        result = _result(run)
        unmasked[_seed(run)] = _without_mask(result)
        for ranked in result.groups:
            change = ranked.change
            if _unmasked_score(result) is not None:
                change = _score_change(ranked)
                loss_changes.setdefault(ranked.name, {})[_seed(run)] = ranked.change
            changes.setdefault(ranked.name, {})[_seed(run)] = change
            names[ranked.name] = "one kind of projection" if ranked.projection else _size_name(run, ranked.size)
    if not all(
        math.isfinite(loss)
        for found in (unmasked, *changes.values(), *loss_changes.values())
        for loss in found.values()
    ):
        raise ValueError("a loss is not a number")
    of_kinds = _is_of_kinds(_result(runs[0]))
    best_first = sorted(changes, key=lambda name: _direction(_result(runs[0])) * fmean(changes[name].values()))
    groups = [
        _Group(
            name,
            tuple(changes[name].values()),
            tuple(loss_changes.get(name, {}).values()),
            rank if of_kinds else None,
        )
        for rank, name in enumerate(best_first)
    ]
    sizes: dict[str, list[_Group]] = {}
    for shown in sorted(groups, key=lambda group: (group.size, group.middle)):
        sizes.setdefault(names[shown.name], []).append(shown)
    recommended = Counter(_result(run).recommended for run in reversed(runs))
    best = recommended.most_common(1)[0][0]
    if best not in changes:
        raise ValueError(f"the recommended {group_text(best)} are not one of the groups")
    placed = {name: tuple(sorted(found, key=lambda group: group.middle)) for name, found in sizes.items()}
    return _Probe(tuple(runs), placed, fmean(unmasked.values()), best, of_kinds)


def _direction(result: GroupProbe) -> int:
    """1 if a lower value of the ranking criterion is better, otherwise -1."""
    score = _unmasked_score(result)
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


def _figure(probe: _Probe) -> Figure:
    first = probe.runs[0].record
    seeds = len({_seed(run) for run in probe.runs})
    share = first.config["probe"].get("data_fraction", 1.0)
    ranked_by = probe.ranked_by[0].upper() + probe.ranked_by[1:] if probe.score is None else probe.ranked_by
    groups_text = "kind of projection" if probe.of_kinds else "group of layers"
    what = f"Predicted loss change by {groups_text}" if probe.is_fast else f"{ranked_by} by {groups_text}"
    origin = Origin.read(first.inputs).origin
    captions = [f"{origin}, {probe.unmasked_state}: masks based on {share:.0%} of the training data."]
    if probe.is_fast:
        captions.append(
            "Nothing was trained: first-order predictions from one pass of gradients. They rank groups of one size; "
            f"the predicted change is far too optimistic and always grows with the number of "
            f"{'weights' if probe.of_kinds else 'layers'}."
        )
        captions += _agreement(probe.runs)
    elif probe.score is not None:
        error = probe.score.standard_error
        within = "" if error is None else f", standard error of one score {error:.4f}"
        captions.append(
            f"Each group's mask with the lowest validation loss, scored on {probe.score.samples} samples{within}."
        )
    else:
        captions.append("Each group's mask was chosen on these validation records, so the best result is partly luck.")
    votes = sum(_result(run).recommended == probe.recommended for run in probe.runs)
    captions.append(
        f"Star: {group_text(probe.recommended)} ({probe.best.change:+.4f}), recommended by {votes} of "
        f"{len(probe.runs)} probes."
    )
    captions.append(
        f"Mean over {seeds} seeds; bars span the lowest to the highest change." if seeds > 1 else "One seed."
    )
    return Figure(
        name=f"probe{'-promised' if probe.is_fast else ''}{'-projections' if probe.of_kinds else ''}",
        title=what,
        caption=" ".join(captions),
        data=tuple(
            {
                "projection" if probe.of_kinds else "layers": group.name,
                "groups": name,
                "change": group.change,
                "lowest": min(group.changes),
                "highest": max(group.changes),
                "seeds": len(group.changes),
                **_values_without_mask(probe),
                **({"loss_change": fmean(group.loss_changes)} if group.loss_changes else {}),
                "recommended": group.name == probe.recommended,
            }
            for name, groups in probe.sizes.items()
            for group in groups
        ),
        runs=tuple(run.name for run in probe.runs),
        draw=partial(_draw, probe),
        height_inches=3.2 + legend_height_inches(["FFT, no mask", *probe.sizes, "recommended"]),
    )


def _values_without_mask(probe: _Probe) -> dict[str, Any]:
    """The unmasked model's values for the figure's data."""
    if probe.score is None:
        return {"unmasked_loss": None if probe.is_fast else probe.unmasked}
    results = [_result(run) for run in probe.runs]
    losses = [result.unmasked_loss for result in results if isinstance(result, TrainedProbe)]
    return {"score": probe.ranked_by, "unmasked_score": probe.unmasked, "unmasked_loss": fmean(losses)}


def _agreement(runs: Sequence[Run]) -> list[str]:
    results = [_result(run) for run in runs]
    found = [result.agreement for result in results if isinstance(result, FastProbe) and result.agreement]
    if not found:
        return []
    values = ", ".join(f"{item.rank_correlation:.2f} ({item.run})" for item in found)
    return [f"Rank correlation with trained probes: {values}."]


def _draw(probe: _Probe, canvas: Canvas) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = canvas.subplots()
    base = probe.unmasked
    without = "without a mask" if probe.unmasked_state == PRE_TRAINED else f"{probe.unmasked_state}, no mask"
    axes.axhline(base, color=INK, linestyle=(0, (5, 2)), linewidth=1.2, label=drawn_text(without))
    for number, (name, groups) in enumerate(probe.sizes.items()):
        _draw_size(axes, name, groups, number, base)
    axes.plot(probe.best.middle, base + probe.best.change, label="recommended", **STAR)
    axes.set_ylabel("predicted change in loss" if probe.is_fast else probe.ranked_by)
    if probe.of_kinds:
        kinds = [group.name for groups in probe.sizes.values() for group in groups]
        axes.set_xlabel("masked projection")
        axes.set_xticks(range(len(kinds)), list(map(drawn_text, kinds)))
    else:
        axes.set_xlabel("decoder layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    put_legend(canvas, dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))


def _draw_size(axes: Axes, name: str, groups: Sequence[_Group], number: int, base: float) -> None:
    """Draws each group as a bar spanning its layers, with a marker in the middle."""
    style = numbered_style(number)
    heights = [base + group.change for group in groups]
    line = {"linestyle": "none"} if groups[0].rank is not None else {}
    axes.plot([group.middle for group in groups], heights, label=name, **{**style.keywords(), **line})
    for group, height in zip(groups, heights, strict=True):
        for first, last in group.ranges:
            axes.plot([first - 0.4, last + 0.4], [height, height], color=style.color, linewidth=3.0, alpha=0.5)
        if len(group.changes) > 1:
            ends = [base + min(group.changes), base + max(group.changes)]
            axes.plot([group.middle] * 2, ends, color=style.color, linewidth=0.9, marker="_", markersize=4.0)
