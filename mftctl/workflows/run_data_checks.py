"""Checks of the data of all jobs and seeds of an experiment before its first job starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mftctl.data.examples import RecordKind
from mftctl.errors import MftError
from mftctl.evaluation.suite import encode_test_data, prepare_suite
from mftctl.experiments.jobs import Job
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import load_model_encoder
from mftctl.progress import Listener, Progress, Silence
from mftctl.training.inputs import prepare_training
from mftctl.workflows.planning.problem_list import describe
from mftctl.workflows.planning.stage_estimates import TRAINING_COMMANDS, training_options

_DATA_KEYS = {
    "model",
    "revision",
    "seed",
    "data",
    "val_data",
    "val_fraction",
    "test_data",
    "retain_data",
    "learn",
    "chat_template",
    "template_args",
    "merge_system",
    "bad_records",
    "bad_records_max",
}


@dataclass(frozen=True, slots=True)
class _Use:
    """How a job uses its data; jobs with equal values are checked once.

    Attributes:
        data: The keys of the recipe that determine the records, as JSON.
        max_length_tokens: Length at which records are truncated.
        kind: Kind of the training records; None for an evaluation.
        retain_weight: Weight of the data to retain; None if the job does not use it.
        limit: Number of records that an evaluation measures; None for all.
    """

    data: str
    max_length_tokens: int
    kind: RecordKind | None = None
    retain_weight: float | None = None
    limit: int | None = None


def data_problems(jobs: Sequence[Job], listener: Listener) -> Iterator[str]:
    """The problems with the data of jobs, which a later seed or stage would otherwise meet after hours of training.

    Training data is read and tokenised as the jobs do it, and stays in the cache for them.

    Args:
        jobs: The jobs that will run.
        listener: Receives progress updates.
    """
    known: set[_Use] = set()
    for job in jobs:
        use = _use(job)
        if use is None or use in known:
            continue
        known.add(use)
        try:
            _check(job.recipe, use, _OnlyProgress(listener))
        except MftError as error:
            yield f"seed {job.seed}, {job.name}: {describe(error)}"


def _use(job: Job) -> _Use | None:
    """How a job uses its data; None if it uses none."""
    recipe = job.recipe
    data = recipe.model_dump_json(include=_DATA_KEYS)
    drops = job.command == "mask-train" and recipe.mask_train.method == "drop"
    if job.command in TRAINING_COMMANDS and not drops and recipe.data:
        options = training_options(job)
        weight = None if job.command == "probe" else options.retain_weight
        return _Use(data, options.max_length_tokens, options.record_kind, weight)
    if job.command == "delta" and recipe.delta.needs_data:
        return _Use(data, recipe.mask_train.max_length_tokens, recipe.mask_train.record_kind)
    if job.command == "interpolate" and recipe.data:
        return _Use(data, recipe.fft.max_length_tokens, "answers", 0.0)
    measures = job.command == "eval" and recipe.eval.predictions is None
    if measures and (recipe.test_data or recipe.retain_data):
        return _Use(data, recipe.eval.max_length_tokens, limit=recipe.eval.limit)
    return None


def _check(recipe: Recipe, use: _Use, listener: Listener) -> None:
    """Reads and tokenises data as a job will do it.

    Raises:
        MftError: The job could not use the data.
    """
    if use.kind is not None:
        prepare_training(
            recipe,
            recipe.model or "",
            max_length_tokens=use.max_length_tokens,
            adapters=True,
            retain_weight=use.retain_weight,
            kind=use.kind,
            listener=listener,
        )
        return
    without_tasks = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"tasks": ()})})
    suite = prepare_suite(without_tasks, listener)
    encode_test_data(suite, without_tasks, load_model_encoder(recipe.model or "", recipe), listener)


class _OnlyProgress(Silence):
    """Passes on progress, not the notes and warnings, which each job repeats."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def progress(self, state: Progress) -> None:
        """Shows the progress of a task."""
        self._listener.progress(state)
