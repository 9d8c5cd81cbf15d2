"""Checks that evaluation options given to training commands have an effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mftctl.errors import ConfigError
from mftctl.evaluation.score_choice import LOSS, check_score
from mftctl.experiments.recipe import Recipe
from mftctl.workflows.probe_kind import check_kind


def check_measuring(command: str, recipe: Recipe, options: Mapping[str, Any]) -> None:
    """Checks that benchmarks requested for training also have an interval.

    Args:
        command: `fft`, `probe` or `mask-train`.
        recipe: The resolved recipe.
        options: Values given as options, by recipe key.

    Raises:
        ConfigError: `--tasks` was given without `--benchmark-every`.
    """
    section = recipe.fft if command == "fft" else recipe.mask_train
    if "eval.tasks" in options and section.benchmark_every is None:
        raise ConfigError(
            "Benchmarks during training need an interval.",
            key="--benchmark-every",
            expected="a number of steps",
            actual=f"--tasks {','.join(options['eval.tasks'])} without an interval",
            hint=f"mftctl {command} --benchmark-every 100 --tasks ..., or mftctl eval --tasks ... afterwards",
        )


def check_scoring(command: str, recipe: Recipe, options: Mapping[str, Any]) -> None:
    """Checks that a probe uses the problems given to it by option.

    Args:
        command: `fft`, `probe` or `mask-train`.
        recipe: The resolved recipe.
        options: Values given as options, by recipe key.

    Raises:
        ConfigError: A file or a limit has no effect, or `--by` names no score.
    """
    section = recipe.fft if command == "fft" else recipe.mask_train
    check_score(section.best_by, recipe.eval.task_data, "--best-by")
    if command != "probe":
        return
    check_kind(recipe)
    check_score(recipe.probe.by, recipe.eval.task_data, "--by")
    used = {recipe.probe.by, section.best_by}
    files = options.get("eval.task_data", {})
    unused = [f"--task-data {task}={file}" for task, file in files.items() if task not in used]
    unused += ["--limit"] if "eval.limit" in options and used == {LOSS} else []
    if unused:
        raise ConfigError(
            "A probe uses only the problems of the benchmark that it ranks groups or steps by.",
            key="--by",
            expected="the benchmark of the file; for --limit, exact_match or a benchmark",
            actual=f"{', '.join(sorted(used))}, with {' '.join(unused)}",
            hint=f"mftctl probe --by {next(iter(files), 'exact_match')} ...",
        )
