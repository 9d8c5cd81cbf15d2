"""The path of `interpolate` from a model to the one fine-tuned from it, on validation data and data to retain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from mftctl.data.retained import RETAINED
from mftctl.experiments.combined_results import InterpolateResult
from mftctl.experiments.results import EvalResult
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Origin, RunInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.reporting.frontier import Frontier

_LABEL = "interpolation (validation)"


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the way with both losses, averaged over seeds."""

    share: float
    loss: float
    retained_loss: float


@dataclass(frozen=True, slots=True)
class SharePath:
    """The shares that one stage measured.

    Attributes:
        label: Name in the legend.
        shares: The shares in ascending order.
        runs: The runs averaged over, one per seed.
    """

    label: str
    shares: tuple[Share, ...]
    runs: tuple[str, ...]


def share_paths(
    frontier: Frontier, runs: Sequence[Run], by_name: Mapping[str, Run]
) -> tuple[list[SharePath], list[str]]:
    """The paths of a frontier's model that measured the same data to retain.

    Args:
        frontier: The states.
        runs: The runs of the folder, oldest first.
        by_name: The same runs by name.

    Returns:
        The paths, and one line per run that cannot be read or measured other data.
    """
    digest = _digest(by_name[frontier.points[0].retained.runs[0]])
    stages: dict[tuple[str | None, str | None], dict[int, tuple[str, dict[float, Share]]]] = {}
    problems = []
    for run in runs:
        if run.record.command != "interpolate" or run.record.status != RunStatus.FINISHED:
            continue
        try:
            shares = _shares(run, frontier.origin)
            measured = RunInputs.read(run.record.inputs).digests.retained
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{run.name}: left out of the frontier: {first_fault(error)}")
            continue
        if shares and measured != digest:
            problems.append(
                f"{run.name}: left out of the frontier: its retained data differ from those of the evaluations, "
                "for example because of --limit"
            )
        elif shares:
            seed = int(run.record.config.get("seed", 0))
            stages.setdefault((run.record.recipe, run.record.stage), {})[seed] = (run.name, shares)
    return [_path(stage, list(found.values()), len(stages)) for (_, stage), found in stages.items()], problems


def _digest(evaluation: Run) -> str:
    return next(data.digest for data in evaluation.result(EvalResult).datasets if data.name == RETAINED)


def _shares(run: Run, origin: str) -> dict[float, Share]:
    """The shares with finite losses on both domains; empty if the run is about another model."""
    if Origin.read(run.record.inputs).origin != origin:
        return {}
    found = {}
    for entry in run.result(InterpolateResult).losses:
        kept = entry.retained_loss
        if kept is not None and isfinite(kept) and isfinite(entry.loss):
            found[entry.share] = Share(entry.share, entry.loss, kept)
    return found


def _path(stage: str | None, seeds: Sequence[tuple[str, Mapping[float, Share]]], stages: int) -> SharePath:
    common = set.intersection(*(set(shares) for _, shares in seeds))
    averaged = [
        Share(
            share,
            fmean(shares[share].loss for _, shares in seeds),
            fmean(shares[share].retained_loss for _, shares in seeds),
        )
        for share in sorted(common)
    ]
    label = _LABEL if stages == 1 or stage is None else f"{stage} (validation)"
    return SharePath(label, tuple(averaged), tuple(name for name, _ in seeds))
