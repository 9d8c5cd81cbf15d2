"""Expands the stages of a recipe over sweeps and seeds into ordered jobs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Command, Recipe, Stage
from mftctl.experiments.recipe_files import MAX_JOBS, too_many_jobs, with_changes
from mftctl.experiments.recipe_problems import nearest

Variant = dict[str, Any]
"""The swept keys and their values."""


@dataclass(frozen=True)
class Job:
    """One job of an experiment: one stage with one seed and one choice of swept values.

    Attributes:
        name: The name of the stage, with swept values if there are any: `mft[ratio=0.02]`.
        label: The name of the run in a report: the job name, or that of the job it evaluates.
        command: The command.
        seed: The seed.
        recipe: Resolved for this job, except for the model and layers determined by other jobs.
        after: The job whose model is the input; None for the recipe's model.
        layers_from: The probe job that selects the layers.
        variant: The swept keys and values.
        candidates: Jobs of which the one with the lowest validation loss gives the model; empty if `after` does.
    """

    name: str
    label: str
    command: Command
    seed: int
    recipe: Recipe
    after: Job | None = None
    layers_from: Job | None = None
    variant: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Job, ...] = ()


def spell_out(recipe: Recipe) -> list[Job]:
    """Returns all jobs of a recipe, each after those it needs, seed by seed.

    Raises:
        ConfigError: A stage needs a missing one, stages need each other in a cycle, or there are too many jobs.
    """
    order = stage_order(recipe.stages)
    _require_few(recipe, order)
    jobs: list[Job] = []
    for seed in recipe.seeds or (recipe.seed,):
        made: dict[str, list[Job]] = {}
        for name in order:
            made[name] = list(_jobs_of(recipe, name, seed, made))
            jobs += made[name]
    return jobs


def _require_few(recipe: Recipe, order: Sequence[str]) -> None:
    """Checks that swept values inherited between stages do not multiply to too many jobs."""
    jobs, seeds = 0, max(1, len(recipe.seeds))
    made: dict[str, list[Variant]] = {}
    for name in order:
        stage = recipe.stages[name]
        inputs = [variant for other in stage.of or filter(None, [stage.after]) for variant in made[other]] or [{}]
        probes = made[stage.layers_from] if stage.layers_from else [{}]
        pairs = (
            {**inherited, **probed}
            for inherited, probed in itertools.product(inputs, probes)
            if _agree(inherited, probed)
        )
        few = list(itertools.islice(pairs, MAX_JOBS + 1))
        jobs += seeds * len(few) * math.prod(map(len, stage.sweep.values()))
        if jobs > MAX_JOBS:
            raise too_many_jobs(jobs)
        made[name] = [{**pair, **choice} for pair in few for choice in _choices(stage)]


def _agree(inherited: Variant, probed: Variant) -> bool:
    return all(inherited.get(key, value) == value for key, value in probed.items())


def _choices(stage: Stage) -> list[Variant]:
    return [dict(zip(stage.sweep, values, strict=True)) for values in itertools.product(*stage.sweep.values())]


def stage_order(stages: Mapping[str, Stage]) -> list[str]:
    """Returns the names of the stages, each after those it needs, otherwise in the order of the recipe.

    Raises:
        ConfigError: A stage needs a missing one, or stages need each other in a cycle.
    """
    for name, stage in stages.items():
        for other in stage.needs():
            if other not in stages:
                raise ConfigError(
                    f"The stage {name} needs a stage that is not in the recipe.",
                    key=f"stages.{name}",
                    expected=f"one of {', '.join(stages)}",
                    actual=other,
                    hint=nearest(other, list(stages)),
                )
    sorter = TopologicalSorter({name: stage.needs() for name, stage in stages.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ConfigError("Stages depend on each other in a cycle.", key="stages", actual=circle) from error
    order, position = [], {name: number for number, name in enumerate(stages)}
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=position.__getitem__)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


def _jobs_of(recipe: Recipe, name: str, seed: int, made: Mapping[str, Sequence[Job]]) -> Iterator[Job]:
    """Yields the jobs of one stage, for each input, each probe of the same variant and each choice of swept values."""
    stage, bare = recipe.stages[name], recipe.model_copy(update={"stages": {}})
    inputs: list[Job | None] = [job for other in stage.of for job in made[other]]
    if not stage.of:
        inputs = list(made[stage.after]) if stage.after else [None]
    probes: list[Job | None] = list(made[stage.layers_from]) if stage.layers_from else [None]
    for source, probe, choice in itertools.product(inputs, probes, _choices(stage)):
        inherited = {} if source is None else dict(source.variant)
        probed = {} if probe is None else dict(probe.variant)
        if not _agree(inherited, probed):
            continue
        variant = {**inherited, **probed, **choice}
        full_name = name + _variant_text(variant)
        changes = {"stages": {}, "seeds": [], **stage.set, **choice, "seed": seed}
        label = source.name if stage.of and source is not None else full_name
        yield Job(full_name, label, stage.command, seed, with_changes(bare, changes), source, probe, variant)


def _variant_text(variant: Mapping[str, Any]) -> str:
    if not variant:
        return ""
    parts = (f"{key.rpartition('.')[2]}={_value_text(value)}" for key, value in variant.items())
    return f"[{','.join(parts)}]"


def _value_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
