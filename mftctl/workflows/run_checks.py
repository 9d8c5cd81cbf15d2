"""Checks of an experiment before its first job starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mftctl.errors import ConfigError, MftError, ModelError
from mftctl.evaluation.score_choice import check_score
from mftctl.evaluation.suite import check_suite
from mftctl.experiments.jobs import Job
from mftctl.files.json_files import read_json_object
from mftctl.masking.checkpoints.load_weights import whole_checkpoint
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.mask_support import check_support
from mftctl.masking.hub_masks import local_mask
from mftctl.masking.targets import layer_groups, parse_layers
from mftctl.progress import Listener
from mftctl.runtime.devices import best_device, find_device
from mftctl.training.updates.optimizers import check_memory_options
from mftctl.workflows.probe_kind import check_kind
from mftctl.workflows.run_data_checks import data_problems

_LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def check_jobs(jobs: Sequence[Job], listener: Listener) -> None:
    """Checks that every job has its inputs and fits the model.

    Args:
        jobs: The jobs that will run.
        listener: Receives progress updates while data is tokenised.

    Raises:
        ConfigError: Jobs have problems, with one line each, or the device is not available.
        ModelError: The model is missing.
    """
    problems: dict[str, None] = {}
    for job in jobs:
        find_device(job.recipe.device)
        for problem in _problems(job):
            problems[f"{job.name}: {problem}"] = None
    if not problems:
        problems = dict.fromkeys(data_problems(jobs, listener))
    if problems:
        raise ConfigError("The experiment cannot be completed.", problems=list(problems))


def _problems(job: Job) -> Iterator[str]:
    recipe = job.recipe
    config = _model_config(recipe.model or "", recipe.revision)
    if recipe.model_type is not None and config.get("model_type") != recipe.model_type:
        yield f"the recipe is for models of type {recipe.model_type}, but {recipe.model} is {config.get('model_type')}"
    drops = job.command == "mask-train" and recipe.mask_train.method == "drop"
    if job.command in ("fft", "probe", "mask-train", "interpolate") and not drops and not recipe.data:
        yield "there is no training data (key data)"
    resets = job.command in ("probe", "mask-train") and recipe.mask_train.kind == "delta"
    if resets and recipe.mask_train.base is None and job.after is None:
        what = "drop" if recipe.mask_train.method == "drop" else "kind delta"
        yield f"{what} needs the model before fine-tuning: put it after an fft stage, or set mask_train.base"
    if job.command == "interpolate":
        yield from _interpolation_problems(job)
    if job.command == "delta":
        yield from _delta_problems(job)
    if job.command in ("probe", "mask-train", "apply") and _is_adapter(job.after):
        yield f"a mask needs a full model, but {job.after.name if job.after else ''} writes an adapter (fft.merge)"
    checks = {"fft": _fft_problem, "eval": _eval_problem, "probe": _probe_problem, "mask-train": _mask_problem}
    if job.command in checks:
        problem = checks[job.command](job, _layer_count(config))
        if problem is not None:
            yield problem


def _interpolation_problems(job: Job) -> Iterator[str]:
    if job.recipe.interpolate.base is None and job.after is None:
        yield "interpolate needs the model before fine-tuning: put it after an fft stage, or set interpolate.base"
    if _is_adapter(job.after):
        yield f"interpolate needs a full model, but {job.after.name if job.after else ''} writes an adapter (fft.merge)"
    if job.after is not None and job.after.command == "mask-train":
        yield f"interpolate needs a checkpoint, but {job.after.name} makes a mask (put an apply stage between them)"


def _delta_problems(job: Job) -> Iterator[str]:
    if job.recipe.delta.base is None and job.after is None:
        yield "delta needs the model before fine-tuning: put it after an fft stage, or set delta.base"
    if job.recipe.delta.needs_data and not job.recipe.data:
        yield f"delta.select {job.recipe.delta.select} needs training data (key data)"
    if _is_adapter(job.after):
        yield f"delta needs a full model, but {job.after.name if job.after else ''} writes an adapter (fft.merge)"


def _is_adapter(job: Job | None) -> bool:
    """Checks whether a job writes an adapter."""
    if job is None or job.command != "fft":
        return False
    return job.recipe.fft.trains_adapter and not job.recipe.fft.merge


def _fft_problem(job: Job, layer_count: int | None) -> str | None:
    options, task_data = job.recipe.fft, job.recipe.eval.task_data
    return (
        _message(lambda: check_memory_options(options, best_device()))
        or _message(lambda: check_score(options.best_by, task_data, "fft.best_by"))
        or _message(lambda: _check_adapter(job))
    )


def _check_adapter(job: Job) -> None:
    """Checks what an adapter is to continue, and the mask whose kept weights it is to train.

    Raises:
        MftError: One of them does not fit.
    """
    options, before = job.recipe.fft, job.after
    if before is not None and _is_adapter(before) and options.trains_adapter:
        method = before.recipe.fft.method
        if method != options.method:
            raise ConfigError(
                f"{before.name} writes an adapter of another method.", expected=method, actual=options.method
            )
    if options.support is not None:
        checkpoint = resolve_checkpoint(job.recipe.model or "", job.recipe.revision, adapters=True)
        check_support(local_mask(options.support), whole_checkpoint(checkpoint))


def _eval_problem(job: Job, layer_count: int | None) -> str | None:
    if job.recipe.eval.engine == "openai":
        return "a server cannot serve a model that the experiment has yet to make; measure it later with mftctl eval"
    return _message(lambda: check_suite(job.recipe))


def _probe_problem(job: Job, layer_count: int | None) -> str | None:
    recipe = job.recipe
    problem = _message(lambda: check_kind(recipe)) or _message(
        lambda: check_score(recipe.probe.by, recipe.eval.task_data, "probe.by")
    )
    if problem is not None or layer_count is None:
        return problem
    if recipe.probe.unit != "layer":
        return _message(lambda: parse_layers(recipe.probe.layers or "all", layer_count))
    return _message(
        lambda: layer_groups(layer_count, recipe.probe.groups, parse_layers(recipe.probe.layers or "all", layer_count))
    )


def _mask_problem(job: Job, layer_count: int | None) -> str | None:
    options, task_data = job.recipe.mask_train, job.recipe.eval.task_data
    probe = job.layers_from
    if probe is not None and probe.recipe.probe.unit in ("head", "neuron"):
        return f"The stage {probe.name} probes {probe.recipe.probe.unit}s and recommends no layers."
    problem = _message(lambda: check_score(options.best_by, task_data, "mask_train.best_by"))
    if problem is not None:
        return problem
    if layer_count is None or job.layers_from is not None or options.layers is None:
        return None
    layers = options.layers
    return _message(lambda: parse_layers(layers, layer_count))


def _message(check: Any) -> str | None:
    """Runs a check and returns its error message on one line, or None."""
    try:
        check()
    except MftError as error:
        got = "" if error.actual is None else f" Expected {error.expected}, got {error.actual}."
        return f"{error.message}{got}"
    return None


def _model_config(model: str, revision: str | None) -> dict[str, Any]:
    path = Path(resolve_checkpoint(model, revision, adapters=True)) / "config.json"
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ModelError("The model's configuration cannot be read.", path=path, actual=error) from error


def _layer_count(config: dict[str, Any]) -> int | None:
    """Returns the number of decoder layers in a configuration; None if it has none under a known name."""
    texts = [text for text in (config, config.get("text_config")) if isinstance(text, dict)]
    stated = (text[key] for text in texts for key in _LAYER_COUNT_KEYS if key in text)
    return next((count for count in stated if isinstance(count, int)), None)
