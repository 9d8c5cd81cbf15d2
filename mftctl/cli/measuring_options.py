"""Options of a training that measure: refused where they would have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.workflows.probe_by import check_by


def check_measuring(command: str, recipe: Recipe, options: Mapping[str, Any]) -> None:
    """Checks that benchmarks asked for by option are measured at some step.

    Args:
        command: `fft`, `probe` or `mask-train`.
        recipe: As settled.
        options: Values given as options, by recipe key.

    Raises:
        ConfigError: They are not.
    """
    section = recipe.fft if command == "fft" else recipe.mask_train
    if "eval.tasks" in options and section.benchmark_every is None:
        raise ConfigError(
            "Benchmarks during training need an interval.",
            key="--benchmark-every",
            expected="a number of steps",
            actual=f"none given, and --tasks {','.join(options['eval.tasks'])}",
            hint=f"mftctl {command} --benchmark-every 100 --tasks ..., or mftctl eval --tasks ... afterwards",
        )


def check_scoring(command: str, recipe: Recipe, options: Mapping[str, Any]) -> None:
    """Checks that problems given to a probe by option are those that it scores.

    Args:
        command: `fft`, `probe` or `mask-train`.
        recipe: As settled.
        options: Values given as options, by recipe key.

    Raises:
        ConfigError: A file or a limit has no effect, or `--by` names no score.
    """
    if command != "probe":
        return
    check_by(recipe)
    files, by = options.get("eval.task_data", {}), recipe.probe.by
    unused = [f"--task-data {task}={file}" for task, file in files.items() if task != by]
    unused += ["--limit"] if "eval.limit" in options and by == "loss" else []
    if unused:
        raise ConfigError(
            "A probe scores only the problems that it ranks groups by.",
            key="--by",
            expected="the benchmark of the file, or for --limit exact_match or a benchmark",
            actual=f"{by}, and {' '.join(unused)}",
            hint=f"mftctl probe --by {next(iter(files), 'exact_match')} ...",
        )
