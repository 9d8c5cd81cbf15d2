"""Controls of a mask: what else the same data and as many steps give, starting from the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from mftctl.experiments.jobs import Job, spell_out
from mftctl.experiments.presets import LearnFrom
from mftctl.experiments.recipe import Control, Recipe
from mftctl.experiments.recipe_files import with_changes

RATE_FACTORS: Mapping[str, tuple[float, ...]] = {"annealed": (0.3, 0.1, 0.03), "averaged": (1.0, 0.3)}
"""Learning rates that a control tries, relative to that of the fine-tuning; validation chooses among them.

An average tolerates, and needs, a higher rate than weights that have to settle by themselves."""

_SAME_STEPS = (
    "data_fraction",
    "epochs",
    "max_steps",
    "batch_size",
    "grad_accum_steps",
    "global_batch_size",
    "batch_tokens",
    "max_length_tokens",
    "val_steps",
    "objective",
    "beta",
    "length_normalized",
)
"""Options of mask training that determine its records, its steps and what it minimises."""

_OF_A_CONTROL: Mapping[str, Any] = {
    "data": True,
    "val_data": True,
    "val_fraction": True,
    "mask_train": set(_SAME_STEPS),
}
"""Keys of a mask's recipe that determine its controls."""

_OF_PLAIN_TRAINING = ("optimizer", "low_memory", "precision", "weight_decay", "max_grad_norm", "save_dtype")
"""Options of the fine-tuning that a control shares with it, whatever selection of weights it used."""

_SCHEDULES: Mapping[str, dict[str, Any]] = {
    "annealed": {"schedule": "linear", "average": "none"},
    "averaged": {"schedule": "constant", "average": "ema", "average_horizons": (0.3, 1.0)},
}


@dataclass(frozen=True, slots=True)
class _Trained:
    """A control and the jobs that make it, of which the one with the lowest validation loss counts."""

    label: str
    candidates: tuple[Job, ...]


def jobs_with_controls(recipe: Recipe) -> list[Job]:
    """Returns all jobs of a recipe, and for every learned mask that is evaluated the controls that the recipe asks for.

    Masks of the same model that take the same steps share their controls. A control is evaluated on whatever the mask
    is evaluated on.

    Raises:
        ConfigError: As for `spell_out`.
    """
    found: list[Job] = []
    for _, group in groupby(spell_out(recipe), key=lambda job: job.seed):
        jobs = list(group)
        found += [*jobs, *_added(jobs, recipe.controls)]
    return found


def _added(jobs: Sequence[Job], wanted: Sequence[Control]) -> Iterator[Job]:
    """The controls of the masks of one seed, and their evaluations."""
    made: dict[tuple[int, str], list[_Trained]] = {}
    between: dict[int, list[_Trained]] = {}
    measured: set[tuple[str, str]] = set()
    for job in jobs:
        mask = _evaluated_mask(job)
        if mask is None:
            continue
        start = id(mask.after)
        settings = mask.recipe.model_dump_json(include=_OF_A_CONTROL) + _learn_from(mask)
        if (start, settings) not in made:
            several = any(other == start for other, _ in made)
            made[start, settings] = list(_trained(mask, wanted, f" of {mask.name}" if several else ""))
            yield from (candidate for control in made[start, settings] for candidate in control.candidates)
        if start not in between:
            between[start] = list(_interpolated(mask, wanted))
            yield from (candidate for control in between[start] for candidate in control.candidates)
        asked = job.recipe.model_dump_json(include={"eval", "test_data", "retain_data"})
        for control in (*made[start, settings], *between[start]):
            if (control.label, asked) not in measured:
                measured.add((control.label, asked))
                yield _evaluation(job, control)


def _evaluated_mask(job: Job) -> Job | None:
    """The learned mask that a job evaluates, applied or not; None if it does something else."""
    before = job.after if job.command == "eval" else None
    if before is not None and before.command == "apply":
        before = before.after
    if before is None or before.command != "mask-train" or before.recipe.mask_train.method != "learned":
        return None
    return before


def _trained(mask: Job, wanted: Sequence[Control], suffix: str) -> Iterator[_Trained]:
    for control in wanted:
        if control != "interpolated":
            label = f"{_start_name(mask)} {control}{suffix}"
            yield _Trained(label, tuple(_trainings(mask, control, label)))


def _interpolated(mask: Job, wanted: Sequence[Control]) -> Iterator[_Trained]:
    """The interpolation of the model that is masked; none if it was not fine-tuned here on answers."""
    tuning = None if mask.after is None or mask.after.command != "fft" else mask.after
    if "interpolated" in wanted and tuning is not None and tuning.recipe.fft.objective == "sft":
        label = f"{_start_name(mask)} interpolated"
        yield _Trained(label, (Job(label, label, "interpolate", mask.seed, tuning.recipe, tuning),))


def _start_name(mask: Job) -> str:
    return "model" if mask.after is None else mask.after.name


def _trainings(mask: Job, control: Literal["annealed", "averaged"], label: str) -> Iterator[Job]:
    """Plain training from the model that is masked, with the mask's records and steps, once per learning rate."""
    options = mask.recipe.mask_train
    tuning = mask.recipe.fft if mask.after is None else mask.after.recipe.fft
    given = tuning.given()
    settings: dict[str, Any] = {key: getattr(options, key) for key in _SAME_STEPS}
    settings |= {key: given[key] for key in _OF_PLAIN_TRAINING if key in given}
    settings["learn_from"] = _learn_from(mask)
    settings |= {"method": "full", "keep": "best", **_SCHEDULES[control]}
    for factor in RATE_FACTORS[control]:
        rate = factor * tuning.learning_rate
        recipe = with_changes(mask.recipe.model_copy(update={"fft": type(tuning)()}), _under("fft", settings, rate))
        name = f"{label}[learning_rate={rate:.3g}]"
        yield Job(name, name, "fft", mask.seed, recipe, mask.after)


def _learn_from(mask: Job) -> LearnFrom:
    """The records that a mask learns from: all, if it is known that fine-tuning has used every one of them."""
    options, before = mask.recipe.mask_train, mask.after
    if options.learn_from == "auto" and before is not None and before.command == "fft":
        same = [(job.recipe.data, job.recipe.val_data, job.recipe.val_fraction) for job in (mask, before)]
        if same[0] == same[1] and before.recipe.fft.data_fraction == 1 and before.recipe.fft.learn_from == "all":
            return "all"
    return options.learn_from


def _under(section: str, settings: dict[str, Any], rate: float) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in {**settings, "learning_rate": rate}.items()}


def _evaluation(job: Job, control: _Trained) -> Job:
    """The evaluation of a control, as a mask was evaluated."""
    return replace(
        job,
        name=job.name.partition("[")[0],
        label=control.label,
        after=control.candidates[0],
        candidates=control.candidates,
        layers_from=None,
    )
