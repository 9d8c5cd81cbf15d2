"""Configurations of benchmarks as lm-eval takes them: its own tasks, and those that mftctl adds or changes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from mftctl.evaluation.benchmarks.catalog import BENCHMARKS, TASKS_FOLDER, check_prompts, unknown_benchmark
from mftctl.evaluation.benchmarks.olmes import last_numbers, olmes_instruction_scores, olmes_maths_scores
from mftctl.evaluation.benchmarks.scoring import (
    instruction_scores,
    length_scores,
    marked_answers,
    maths_scores,
    passage_scores,
)
from mftctl.experiments.recipe import Prompts

if TYPE_CHECKING:
    pass


def check_task(name: str, prompts: Prompts = "lm-eval") -> None:
    """Checks that a benchmark or lm-eval task exists; reading lm-eval's task names takes seconds.

    Args:
        name: A value of `--tasks`.
        prompts: The value of `--prompts`.

    Raises:
        EvaluationError: There is no such benchmark (the hint names the closest matches), or it does not have that form.
    """
    if name not in BENCHMARKS:
        other_config(name)
    check_prompts(name, prompts)


_LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
_SCORED_BY = {
    "math": maths_scores,
    "math_0shot": maths_scores,
    "ifeval": instruction_scores,
    "alpaca_eval": length_scores,
    "tydiqa": passage_scores,
}
_OLMES_SCORED_BY = {
    "math": olmes_maths_scores,
    "ifeval": olmes_instruction_scores,
    "alpaca_eval": length_scores,
}
_MARKED_FILTER = {"name": "marked-match", "filter": [{"function": "custom", "filter_fn": marked_answers}]}
_NUMBER_FILTER = {"name": "last-number", "filter": [{"function": "custom", "filter_fn": last_numbers}]}
_MATHS_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("strict", "flexible")]


def benchmark_config(name: str) -> dict[str, Any]:
    """The lm-eval configuration of one of our benchmarks.

    Args:
        name: One of `BENCHMARKS`.
    """
    config = _own_config(TASKS_FOLDER / f"{name}.yaml")
    if name in ("gsm8k", "gsm8k_0shot"):
        config["filter_list"] = [*config["filter_list"], _MARKED_FILTER]
    if name in _SCORED_BY:
        config["process_results"] = _SCORED_BY[name]
    if is_maths(name):
        config["metric_list"] = _MATHS_METRICS
    return {**config, "task": name, "test_split": config.get("test_split") or config["validation_split"]}


def is_maths(name: str) -> bool:
    """True if the answers of a benchmark are formulas.

    Args:
        name: A benchmark or lm-eval task.
    """
    return _SCORED_BY.get(name) is maths_scores


def olmes_config(name: str) -> dict[str, Any]:
    """The lm-eval configuration of one of our benchmarks in its OLMES form.

    Args:
        name: A benchmark with an OLMES form.
    """
    config = _own_config(TASKS_FOLDER / "olmes" / f"{name}.yaml")
    if name == "gsm8k":
        config["filter_list"] = [_NUMBER_FILTER]
    if name == "math":
        config["metric_list"] = _MATHS_METRICS
    if name in _OLMES_SCORED_BY:
        config["process_results"] = _OLMES_SCORED_BY[name]
    return {**config, "task": name}


def _own_config(file: Path, *, functions: bool = True) -> dict[str, Any]:
    """The configuration in a file; its `base` names an lm-eval task, with its folder, that the file modifies."""
    own: dict[str, Any] = load_yaml(file)
    base = own.pop("base", None)
    return own if base is None else _task_config(*base.rsplit("/", 1), functions=functions) | own


def _task_config(folder: str, task: str, *, functions: bool) -> dict[str, Any]:
    """The configuration of an lm-eval task; only its folder is indexed, because reading all tasks takes seconds."""
    manager = TaskManager(include_path=_LM_EVAL_TASKS / folder, include_defaults=False)
    config: dict[str, Any] = load_yaml(manager.task_index[task].yaml_path, resolve_func=functions)
    return config


def folder_configs(folder: str) -> list[dict[str, Any]]:
    """The configurations of all single tasks in an lm-eval folder.

    Args:
        folder: Folder below lm-eval's `tasks`.
    """
    manager = TaskManager(include_path=_LM_EVAL_TASKS / folder, include_defaults=False)
    return [copy.deepcopy(manager.task_index[name].cfg) for name in manager.all_subtasks]


def data_config(name: str) -> dict[str, Any]:
    """The configuration that says where a task's data is; its functions are left out as names.

    The modules of some functions download data of their own when they are imported, and print it.

    Args:
        name: A benchmark or lm-eval task.

    Raises:
        EvaluationError: There is no such benchmark; the hint names the closest matches.
    """
    if name not in BENCHMARKS:
        return other_config(name, functions=False)
    config = _own_config(TASKS_FOLDER / f"{name}.yaml", functions=False)
    return {**config, "test_split": config.get("test_split") or config["validation_split"]}


def other_config(name: str, *, functions: bool = True) -> dict[str, Any]:
    """The configuration of a single lm-eval task.

    Args:
        name: Its name in lm-eval.
        functions: Whether to import its functions.

    Raises:
        EvaluationError: There is no such task, or it is a group; the hint names the closest matches.
    """
    manager = _all_of_lm_eval()
    entry = manager.task_index.get(name)
    if name not in manager.all_subtasks or entry is None or entry.yaml_path is None:
        raise unknown_benchmark(name, manager.all_subtasks)
    config = load_yaml(entry.yaml_path, resolve_func=functions)
    return {**config, "task": name, "test_split": config.get("test_split") or config.get("validation_split")}


@cache
def _all_of_lm_eval() -> TaskManager:
    return TaskManager()


def task_config(name: str, prompts: Prompts = "lm-eval") -> dict[str, Any]:
    """The lm-eval configuration of one of our benchmarks or of an lm-eval task.

    Args:
        name: The benchmark or task.
        prompts: The form of the benchmark.

    Raises:
        EvaluationError: There is no such benchmark, or it does not have that form.
    """
    check_prompts(name, prompts)
    if prompts == "olmes":
        return olmes_config(name)
    return benchmark_config(name) if name in BENCHMARKS else other_config(name)
