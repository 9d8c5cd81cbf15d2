"""The data that the jobs of an experiment read, and how they use it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from mftctl.data.examples import RecordKind
from mftctl.experiments.deciding_keys import IN_THE_MODEL, measuring_training
from mftctl.experiments.jobs import Job
from mftctl.experiments.recipe import Recipe
from mftctl.workflows.planning.stage_estimates import TRAINING_COMMANDS, training_options

_OF_EVALUATION = {
    *("model", "revision", "trust_remote_code", "test_data", "retain_data"),
    *("chat_template", "template_args", "merge_system", "learn", "bad_records", "bad_records_max"),
}
_OF_TRAINING = {*_OF_EVALUATION, "seed", "data", "val_data", "val_fraction"} - {"test_data"}


@dataclass(frozen=True, slots=True)
class DataUse:
    """How a job uses its data.

    Attributes:
        recipe: Names the data and the seed, with the chat template that the job's model has.
        max_length_tokens: Length at which records are truncated.
        kind: Kind of the training and validation records; None for an evaluation.
        data_fraction: Share of the training records that is used.
        retain_weight: Weight of the data to retain; None if a training does not use it.
        limit: Number of records that an evaluation measures; None for all.
    """

    recipe: Recipe
    max_length_tokens: int
    kind: RecordKind | None = None
    data_fraction: float = 1.0
    retain_weight: float | None = None
    limit: int | None = None

    @property
    def key(self) -> Hashable:
        """Equal for uses of the same records in the same way."""
        keys = _OF_EVALUATION if self.kind is None else _OF_TRAINING
        data = self.recipe.model_dump_json(include=keys)
        return data, self.max_length_tokens, self.kind, self.data_fraction, self.retain_weight, self.limit


def data_uses(job: Job) -> Iterator[DataUse]:
    """The uses of data by a job, without regard to `learn_from`: records that a mask leaves out are included."""
    recipe, options = _with_saved_template(job), training_options(job)
    drops = job.command == "mask-train" and recipe.mask_train.method == "drop"
    trains = (job.command in TRAINING_COMMANDS and not drops) or (job.command == "delta" and recipe.delta.needs_data)
    if trains and recipe.data:
        share = recipe.probe.data_fraction if job.command == "probe" else options.data_fraction
        measures = measuring_training(recipe, job.command) is not None
        weight = options.retain_weight if measures else None
        yield DataUse(recipe, options.max_length_tokens, options.record_kind, share, weight)
        if measures and options.benchmark_every is not None:
            limit = min(options.benchmark_limit, recipe.eval.limit or options.benchmark_limit)
            yield from _evaluation(recipe, limit)
    if job.command == "interpolate" and recipe.data:
        yield DataUse(recipe, recipe.fft.max_length_tokens, "answers", retain_weight=0.0)
    if job.command == "eval" and recipe.eval.predictions is None:
        yield from _evaluation(recipe, recipe.eval.limit)


def _evaluation(recipe: Recipe, limit: int | None) -> Iterator[DataUse]:
    if recipe.test_data or recipe.retain_data:
        yield DataUse(recipe, recipe.eval.max_length_tokens, limit=limit)


def _with_saved_template(job: Job) -> Recipe:
    """The job's recipe with the chat template of an earlier fine-tuning, which is in its model, unless it sets one."""
    default = Recipe()
    before: Job | None = job
    while before is not None:
        kept = {key: getattr(before.recipe, key) for key in IN_THE_MODEL}
        if before is job or before.command == "fft":
            if any(value != getattr(default, key) for key, value in kept.items()):
                return job.recipe.model_copy(update=kept)
        before = before.candidates[0] if before.candidates else before.after
    return job.recipe
