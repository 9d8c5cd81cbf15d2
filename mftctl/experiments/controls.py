"""Controls of a mask: what else the same data and as many steps give, starting from the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from mftctl.experiments.jobs import Job, spell_out
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
)
"""Options of mask training that determine its records and steps."""

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
    measured: set[tuple[str, str]] = set()
    for job in jobs:
        mask = _evaluated_mask(job)
        if mask is None:
            continue
        key = (id(mask.after), mask.recipe.model_dump_json(include=_OF_A_CONTROL))
        if key not in made:
            several = any(start == key[0] for start, _ in made)
            made[key] = list(_controls(mask, wanted, f" of {mask.name}" if several else ""))
            yield from (candidate for control in made[key] for candidate in control.candidates)
        for control in made[key]:
            if (control.label, job.name) not in measured:
                measured.add((control.label, job.name))
                yield _evaluation(job, control)


def _evaluated_mask(job: Job) -> Job | None:
    """The learned mask that a job evaluates, applied or not; None if it does something else."""
    before = job.after if job.command == "eval" else None
    if before is not None and before.command == "apply":
        before = before.after
    if before is None or before.command != "mask-train" or before.recipe.mask_train.method != "learned":
        return None
    return before


def _controls(mask: Job, wanted: Sequence[Control], suffix: str) -> Iterator[_Trained]:
    start = "model" if mask.after is None else mask.after.name
    for control in wanted:
        label = f"{start} {control}{suffix}"
        if control != "interpolated":
            yield _Trained(label, tuple(_trainings(mask, control, label)))
        elif mask.after is not None and mask.after.command == "fft":
            yield _Trained(label, (Job(label, label, "interpolate", mask.seed, mask.after.recipe, mask.after),))


def _trainings(mask: Job, control: Literal["annealed", "averaged"], label: str) -> Iterator[Job]:
    """Plain training from the model that is masked, with the mask's records and steps, once per learning rate."""
    options = mask.recipe.mask_train
    tuning = mask.recipe.fft if mask.after is None else mask.after.recipe.fft
    given = tuning.given()
    settings: dict[str, Any] = {key: getattr(options, key) for key in _SAME_STEPS}
    settings |= {key: given[key] for key in _OF_PLAIN_TRAINING if key in given}
    settings |= {"method": "full", "keep": "best", **_SCHEDULES[control]}
    for factor in RATE_FACTORS[control]:
        rate = factor * tuning.learning_rate
        recipe = with_changes(mask.recipe.model_copy(update={"fft": type(tuning)()}), _under("fft", settings, rate))
        name = f"{label}[learning_rate={rate:.3g}]"
        yield Job(name, name, "fft", mask.seed, recipe, mask.after)


def _under(section: str, settings: dict[str, Any], rate: float) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in {**settings, "learning_rate": rate}.items()}


def _evaluation(job: Job, control: _Trained) -> Job:
    """The evaluation of a control, as a mask was evaluated."""
    return replace(
        job, label=control.label, after=control.candidates[0], candidates=control.candidates, layers_from=None
    )
