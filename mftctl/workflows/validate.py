"""The `validate` workflow: all checks of a recipe that are possible before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mftctl.data.encoding import Encoded
from mftctl.data.prepared.records import token_lengths
from mftctl.evaluation.benchmarks.problems import read_problems
from mftctl.evaluation.suite import suite_problems
from mftctl.experiments.jobs import Job, spell_out
from mftctl.experiments.recipe import Command, Recipe
from mftctl.masking.checkpoints.check import check_lengths
from mftctl.masking.checkpoints.remote_code import trusting_code
from mftctl.workflows.planning.memory import resident_bytes
from mftctl.workflows.planning.model_check import CheckedModel, check_model
from mftctl.workflows.planning.planned_device import PlannedDevice, asked_device, parse_memory
from mftctl.workflows.planning.problem_list import ProblemList, describe
from mftctl.workflows.planning.stage_estimates import TRAINING_COMMANDS, StageEstimates, training_options
from mftctl.workflows.planning.training_data import DataCheck, Tokens, token_counts, trained_segments
from mftctl.workflows.probe_by import check_by

SAMPLES = 2
_WITHOUT_STAGES: tuple[Command, ...] = ("fft", "mask-train")


def validate(recipe: Recipe, name: str | None, *, device_memory: str | None = None) -> dict[str, Any]:
    """Checks a recipe and returns the result as plain data, without training or reading weights.

    Keys: `recipe`; `problems`, `warnings` and `not_checked`, one text each; `model`; `data` (records and tokens of
    each part); `samples` (records with their `segments`); `masks` (tensors and counts by stage); `stages` (steps and
    tokens); `device` and `memory` (bytes on it by stage, and options with which a stage that does not fit would fit).
    Seeds repeat the same stages, so only one is shown.

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


def _checked(recipe: Recipe, name: str | None, device: PlannedDevice) -> dict[str, Any]:
    """Checks a recipe for a device."""
    findings = ProblemList()
    model = check_model(recipe, findings)
    data = DataCheck(None if model is None else model.tokenizer, findings)
    jobs = _jobs(recipe, findings)
    parts = data.parts(recipe)
    length = _first_length(recipe, jobs)
    tokens = data.tokens(recipe, length)
    _check_positions(tokens, model, findings)
    estimates = StageEstimates(model, data, findings, resident_bytes(), device, staged=bool(recipe.stages))
    stages = [_stage(job, estimates, findings) for job in jobs]
    if recipe.eval.tasks or recipe.eval.task_data:
        _check_suite(recipe, findings, "eval")
    counts: dict[str, dict[str, Any]] = {
        "train": {"records": len(parts.train)},
        "validation": {"records": len(parts.validation)},
        "test": {"records": len(parts.test)},
    }
    if tokens is not None:
        counts["train"] |= token_counts(tokens.train)
        counts["validation"] |= token_counts(tokens.validation)
    return {
        "recipe": name,
        "problems": findings.problems,
        "warnings": findings.warnings,
        "not_checked": findings.not_checked,
        "model": {} if model is None else model.summary(),
        "data": counts,
        "samples": _samples(data.train(recipe, length), model),
        "seeds": len(recipe.seeds) or 1,
        "stages": stages,
        "masks": estimates.masks,
        "device": {"kind": device.kind, "free_bytes": device.free_bytes},
        "memory": estimates.memory,
    }


def _check_positions(tokens: Tokens | None, model: CheckedModel | None, findings: ProblemList) -> None:
    """Checks that every record fits the learned positions of the model, if it has any."""
    if tokens is None or model is None:
        return
    with findings.collecting("data"):
        records = (*tokens.train, *tokens.validation)
        check_lengths(model.check, token_lengths(records), Path(model.name))


def _jobs(recipe: Recipe, findings: ProblemList) -> list[Job]:
    """Returns the jobs for the first seed; without stages, `fft` and `mask-train` as configured."""
    if not recipe.stages:
        return [Job(command, command, command, recipe.seed, recipe) for command in _WITHOUT_STAGES]
    jobs: list[Job] = []
    with findings.collecting("stages"):
        jobs = spell_out(recipe)
    return [job for job in jobs if job.seed == jobs[0].seed]


def _first_length(recipe: Recipe, jobs: Sequence[Job]) -> int:
    """Returns the length at which the first training truncates records."""
    lengths = [training_options(job).max_length_tokens for job in jobs if job.command in TRAINING_COMMANDS]
    return lengths[0] if lengths else recipe.fft.max_length_tokens


def _stage(job: Job, estimates: StageEstimates, findings: ProblemList) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": job.name, "command": job.command}
    if job.command in ("apply", "eval") and job.after is not None:
        row["of"] = job.after.name
    with findings.collecting(job.name):
        if job.command in TRAINING_COMMANDS:
            row |= estimates.row(job)
            if job.command == "probe":
                check_by(job.recipe)
        elif job.command == "eval":
            _check_suite(job.recipe, findings, job.name)
            estimates.evaluation(job)
    return row


def _check_suite(recipe: Recipe, findings: ProblemList, where: str) -> None:
    """Reports problems of a recipe's evaluation settings, and reads each local file of a benchmark."""
    for problem in suite_problems(recipe):
        findings.problem(f"{where}: {describe(problem)}")
    for task, file in recipe.eval.task_data.items():
        if Path(file).exists():
            with findings.collecting(f"eval.task_data.{task}"):
                read_problems(Path(file), task)


def _samples(train: Sequence[Encoded], model: CheckedModel | None) -> list[dict[str, Any]]:
    """Returns the first training records in the form used for training."""
    if model is None or model.tokenizer is None:
        return []
    return [
        {
            "where": record.where,
            "tokens": len(record.input_ids),
            "answer_tokens": record.answer_tokens,
            "segments": [asdict(segment) for segment in trained_segments(record, model.tokenizer)],
        }
        for record in train[:SAMPLES]
    ]
