"""The `validate` workflow: all checks of a recipe that are possible before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mftctl.data.batching import any_images
from mftctl.data.encoding import Encoded
from mftctl.data.prepared.records import token_lengths
from mftctl.data.rendering import Segment
from mftctl.evaluation.benchmarks.problems import read_problems
from mftctl.evaluation.score_choice import check_score
from mftctl.evaluation.suite import suite_problems
from mftctl.experiments.controls import jobs_with_controls
from mftctl.experiments.jobs import Job
from mftctl.experiments.recipe import Command, Recipe
from mftctl.masking.checkpoints.check import check_lengths
from mftctl.masking.checkpoints.load_weights import whole_checkpoint
from mftctl.masking.checkpoints.locate import local_folder
from mftctl.masking.checkpoints.mask_support import check_support
from mftctl.masking.checkpoints.remote_code import trusting_code
from mftctl.masking.hub_masks import local_mask
from mftctl.workflows.planning.data_uses import data_uses
from mftctl.workflows.planning.mask_sizes import MaskEstimate
from mftctl.workflows.planning.memory import resident_bytes
from mftctl.workflows.planning.model_check import CheckedModel, ModelSummary, check_model
from mftctl.workflows.planning.planned_device import PlannedDevice, asked_device, parse_memory
from mftctl.workflows.planning.planned_stages import PlannedStage, StageMemory
from mftctl.workflows.planning.problem_list import ProblemList, describe
from mftctl.workflows.planning.stage_estimates import TRAINING_COMMANDS, StageEstimates, training_options
from mftctl.workflows.planning.training_data import DataCheck, TokenCounts, Tokens, token_counts, trained_segments
from mftctl.workflows.probe_kind import check_kind

SAMPLES = 2
_WITHOUT_STAGES: tuple[Command, ...] = ("fft", "mask-train")


@dataclass(frozen=True, slots=True)
class PartCounts:
    """Counts of a part of the data.

    Attributes:
        records: Number of records.
        tokens: Counts of their tokens; None if they were not tokenised.
    """

    records: int
    tokens: TokenCounts | None = None

    def document(self) -> dict[str, int]:
        """Returns the counts as plain data."""
        return {"records": self.records, **({} if self.tokens is None else asdict(self.tokens))}


@dataclass(frozen=True, slots=True)
class Sample:
    """A training record in the form used for training.

    Attributes:
        where: File and line of the record.
        tokens: Its tokens.
        answer_tokens: Those of them that are learned.
        segments: Its text, split where labels begin and end.
    """

    where: str
    tokens: int
    answer_tokens: int
    segments: list[Segment]


@dataclass(frozen=True, slots=True)
class Validation:
    """Everything `validate` finds out about a recipe.

    Attributes:
        recipe: Name or path of the recipe.
        problems: Problems that would stop the experiment or invalidate it.
        warnings: Points for the user to review.
        not_checked: Items that could not be checked, with the reason.
        model: The model; None if its shapes cannot be determined.
        data: Counts by part of the data.
        samples: The first training records.
        seeds: Number of seeds; they repeat the same stages, so the rest describes one.
        stages: The stages with their steps and tokens.
        masks: Masks by stage.
        device: The device to check for.
        memory: Memory estimates of the stages.
    """

    recipe: str | None
    problems: list[str]
    warnings: list[str]
    not_checked: list[str]
    model: ModelSummary | None
    data: dict[str, PartCounts]
    samples: list[Sample]
    seeds: int
    stages: list[PlannedStage]
    masks: dict[str, MaskEstimate]
    device: PlannedDevice
    memory: list[StageMemory]

    def document(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        return {
            "recipe": self.recipe,
            "problems": self.problems,
            "warnings": self.warnings,
            "not_checked": self.not_checked,
            "model": {} if self.model is None else asdict(self.model),
            "data": {name: counts.document() for name, counts in self.data.items()},
            "samples": [asdict(sample) for sample in self.samples],
            "seeds": self.seeds,
            "stages": [stage.document() for stage in self.stages],
            "masks": {name: mask.document() for name, mask in self.masks.items()},
            "device": {"kind": self.device.kind, "free_bytes": self.device.free_bytes},
            "memory": [memory.document() for memory in self.memory],
        }


def validate(recipe: Recipe, name: str | None, *, device_memory: str | None = None) -> Validation:
    """Checks a recipe without training or reading weights.

    Args:
        recipe: The complete recipe.
        name: Its name or path, for the record.
        device_memory: Total memory of the device, such as `80GB`; by default the free memory of this machine's GPU.

    Raises:
        ConfigError: `device_memory` is not a size.
    """
    device = asked_device(recipe.device, None if device_memory is None else parse_memory(device_memory))
    with trusting_code(recipe.trust_remote_code):
        return _checked(recipe, name, device)


def _checked(recipe: Recipe, name: str | None, device: PlannedDevice) -> Validation:
    """Checks a recipe for a device."""
    problems = ProblemList()
    model = check_model(recipe, problems)
    data = DataCheck(None if model is None else model.tokenizer, problems, None if model is None else model.images)
    all_jobs = _jobs(recipe, problems)
    jobs = [job for job in all_jobs if job.seed == all_jobs[0].seed]
    if jobs:
        recipe = recipe.model_copy(update={"seed": jobs[0].seed})
    parts = data.parts(recipe)
    length = _first_length(recipe, jobs)
    tokens = data.tokens(recipe, length)
    if tokens is not None and any_images(tokens.train):
        problems.warn("memory: the estimates do not cover the vision tower's work on images")
    estimates = StageEstimates(model, data, problems, resident_bytes(), device, staged=bool(recipe.stages))
    stages = [_stage(job, estimates, problems) for job in jobs]
    _check_seeds(all_jobs, data, model, problems)
    if recipe.eval.tasks or recipe.eval.task_data:
        _check_suite(recipe, problems, "eval")
    counts = {
        "train": PartCounts(len(parts.train), None if tokens is None else token_counts(tokens.train)),
        "validation": PartCounts(len(parts.validation), None if tokens is None else token_counts(tokens.validation)),
        "test": PartCounts(len(parts.test)),
    }
    if recipe.retain_data:
        counts["retained_held_out"] = PartCounts(len(parts.retained))
        counts["retained_to_train"] = PartCounts(len(parts.retained_train))
    return Validation(
        recipe=name,
        problems=problems.problems,
        warnings=problems.warnings,
        not_checked=problems.not_checked,
        model=None if model is None else model.summary(),
        data=counts,
        samples=_samples(data.train(recipe, length), model),
        seeds=len(recipe.seeds) or 1,
        stages=stages,
        masks=estimates.masks,
        device=device,
        memory=estimates.memory,
    )


def _check_positions(tokens: Tokens | None, model: CheckedModel | None, problems: ProblemList) -> None:
    """Checks that every record fits the learned positions of the model, if it has any."""
    if tokens is None or model is None:
        return
    with problems.collecting("data"):
        records = (*tokens.train, *tokens.validation)
        check_lengths(model.check, token_lengths(records), Path(model.name))


def _jobs(recipe: Recipe, problems: ProblemList) -> list[Job]:
    """Returns the jobs for all seeds; without stages, `fft` and `mask-train` as configured."""
    if not recipe.stages:
        return [Job(command, command, command, recipe.seed, recipe) for command in _WITHOUT_STAGES]
    jobs: list[Job] = []
    with problems.collecting("stages"):
        jobs = jobs_with_controls(recipe)
    return jobs


def _check_seeds(jobs: Sequence[Job], first: DataCheck, model: CheckedModel | None, problems: ProblemList) -> None:
    """Reports problems with the data of all seeds, which split and sample their training data differently.

    Args:
        jobs: The jobs of all seeds.
        first: The data of the first seed.
        model: The model, if its shapes can be determined.
        problems: Receives the problems.
    """
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    for seed in seeds:
        found, data = (problems, first)
        if seed != seeds[0]:
            found = ProblemList()
            data = DataCheck(None if model is None else model.tokenizer, found, None if model is None else model.images)
        for job in jobs:
            if job.seed == seed:
                _check_data(job, data, model, found)
        if found is not problems:
            for text in found.problems:
                if text not in problems.problems:
                    problems.problem(f"seed {seed}, {text}")


def _check_data(job: Job, data: DataCheck, model: CheckedModel | None, problems: ProblemList) -> None:
    """Reports problems with the data that a job uses."""
    for use in data_uses(job):
        with problems.collecting(job.name):
            if use.kind is None:
                recipe = use.recipe.model_copy(update={"eval": use.recipe.eval.model_copy(update={"limit": use.limit})})
                data.longest_question(recipe)
                data.retained(recipe)
                continue
            _check_positions(data.tokens(use.recipe, use.max_length_tokens), model, problems)
            if use.retain_weight is not None and use.recipe.retain_data:
                data.check_retained(use.recipe, use.max_length_tokens, trains=use.retain_weight > 0)


def _first_length(recipe: Recipe, jobs: Sequence[Job]) -> int:
    """Returns the length at which the first training truncates records."""
    lengths = [training_options(job).max_length_tokens for job in jobs if job.command in TRAINING_COMMANDS]
    return lengths[0] if lengths else recipe.fft.max_length_tokens


def _stage(job: Job, estimates: StageEstimates, problems: ProblemList) -> PlannedStage:
    of = job.after.name if job.command in ("apply", "interpolate", "delta", "eval") and job.after is not None else None
    stage = PlannedStage(job.name, job.command, of)
    with problems.collecting(job.name):
        if job.command in TRAINING_COMMANDS:
            _check_support(job)
            stage = estimates.training(job)
            if job.command == "probe":
                check_kind(job.recipe)
                check_score(job.recipe.probe.by, job.recipe.eval.task_data, "probe.by")
        elif job.command == "interpolate":
            estimates.interpolation(job)
        elif job.command == "eval":
            _check_suite(job.recipe, problems, job.name)
            estimates.evaluation(job)
    return stage


def _check_support(job: Job) -> None:
    """Checks the mask whose kept weights an adapter is to train against a model on this machine."""
    if job.command == "fft" and job.recipe.fft.support is not None:
        folder = local_folder(job.recipe.model or "")
        if folder is not None:
            check_support(local_mask(job.recipe.fft.support), whole_checkpoint(folder))


def _check_suite(recipe: Recipe, problems: ProblemList, where: str) -> None:
    """Reports problems of a recipe's evaluation settings, and reads each local file of a benchmark."""
    for problem in suite_problems(recipe):
        problems.problem(f"{where}: {describe(problem)}")
    for task, file in recipe.eval.task_data.items():
        if Path(file).exists():
            with problems.collecting(f"eval.task_data.{task}"):
                read_problems(Path(file), task)


def _samples(train: Sequence[Encoded], model: CheckedModel | None) -> list[Sample]:
    """Returns the first training records in the form used for training."""
    if model is None or model.tokenizer is None:
        return []
    return [
        Sample(record.where, len(record.input_ids), record.answer_tokens, trained_segments(record, model.tokenizer))
        for record in train[:SAMPLES]
    ]
