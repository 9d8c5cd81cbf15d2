"""lm-eval as an engine: its tasks and ours, on records already in memory, and nothing on the user's screen.

Of lm-eval 0.4.13 this uses the task files, `ConfigurableTask`, `HFLM` and `evaluate`. `simple_evaluate` would add a
report on the machine by running git and pip, and set the global random seeds.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers.utils import logging as transformers_logging

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks import BENCHMARKS, TASKS_FOLDER, Prompts, check_prompts, unknown_benchmark
from mftctl.evaluation.olmes import last_numbers, olmes_instruction_scores, olmes_maths_scores
from mftctl.evaluation.scoring import instruction_scores, length_scores, marked_answers, maths_scores, passage_scores

if TYPE_CHECKING:
    from mftctl.evaluation.problems import Problems

_OTHER_SPLITS = ("training_split", "validation_split", "fewshot_split")
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
    """lm-eval's configuration of one of our benchmarks.

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
    """Whether the answers of a benchmark are formulas.

    Args:
        name: Of a benchmark, or of a task of lm-eval.
    """
    return _SCORED_BY.get(name) is maths_scores


def olmes_config(name: str) -> dict[str, Any]:
    """lm-eval's configuration of one of our benchmarks in the form that OLMES gives it.

    Args:
        name: A benchmark that has one.
    """
    config = _own_config(TASKS_FOLDER / "olmes" / f"{name}.yaml")
    if name == "gsm8k":
        config["filter_list"] = [_NUMBER_FILTER]
    if name == "math":
        config["metric_list"] = _MATHS_METRICS
    if name in _OLMES_SCORED_BY:
        config["process_results"] = _OLMES_SCORED_BY[name]
    return {**config, "task": name}


def _own_config(file: Path) -> dict[str, Any]:
    """A file's `base` names a task of lm-eval, by its folder, that the rest of the file changes."""
    own: dict[str, Any] = load_yaml(file)
    base = own.pop("base", None)
    return own if base is None else _task_config(*base.rsplit("/", 1)) | own


def _task_config(folder: str, task: str) -> dict[str, Any]:
    """Only that folder is indexed: reading all of lm-eval's task files takes seconds."""
    manager = TaskManager(include_path=_LM_EVAL_TASKS / folder, include_defaults=False)
    config: dict[str, Any] = load_yaml(manager.task_index[task].yaml_path)
    return config


def folder_configs(folder: str) -> list[dict[str, Any]]:
    """The configurations of all single tasks in a folder of lm-eval's.

    Args:
        folder: Below lm-eval's `tasks`.
    """
    manager = TaskManager(include_path=_LM_EVAL_TASKS / folder, include_defaults=False)
    return [copy.deepcopy(manager.task_index[name].cfg) for name in manager.all_subtasks]


class LocalTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval is not typed
    """A task of lm-eval on records already in memory."""

    def __init__(self, config: Mapping[str, Any], problems: Problems) -> None:
        examples = config.get("fewshot_config") or {}
        if config.get("num_fewshot") and not examples.get("samples"):
            raise EvaluationError(
                "The task takes the solved examples of its prompt from the hub's data.",
                key=f"task_data.{config['task']}",
                expected="a task without examples, or with examples of its own",
                actual=f"{config['num_fewshot']} examples of another part of the data",
                hint="leave --task-data out",
            )
        records = Dataset.from_list(list(problems.records))
        # From memory: `dataset_path: json` would leave a copy in the user's cache and read the file a second time.
        own = {"custom_dataset": lambda **_: {"test": records}, "test_split": "test"}
        super().__init__(config={**config, **own, **dict.fromkeys(_OTHER_SPLITS)})

    def build_all_requests(self, **options: Any) -> None:
        """Builds the prompts without lm-eval's progress bar, which has no switch."""
        with contextlib.redirect_stderr(io.StringIO()):
            super().build_all_requests(**options)


def build_task(config: Mapping[str, Any], problems: Problems, *, is_local: bool) -> ConfigurableTask:
    """The task that asks the problems.

    Args:
        config: Of the task.
        problems: What is asked.
        is_local: Whether they come from a file, or are a benchmark's of ours; otherwise lm-eval loads them once more,
            with the other parts of the data that the task may take examples from.

    Raises:
        EvaluationError: A task needs examples that the file does not have.
    """
    return LocalTask(config, problems) if is_local else ConfigurableTask(config=dict(config))


def other_config(name: str) -> dict[str, Any]:
    """The configuration of a single task of lm-eval's own.

    Args:
        name: Its name there.

    Raises:
        EvaluationError: There is none of that name, or it is a group; names the nearest.
    """
    manager = _all_of_lm_eval()
    entry = manager.task_index.get(name)
    if name not in manager.all_subtasks or entry is None or entry.yaml_path is None:
        raise unknown_benchmark(name, manager.all_subtasks)
    config = load_yaml(entry.yaml_path)
    return {**config, "task": name, "test_split": config.get("test_split") or config.get("validation_split")}


@cache
def _all_of_lm_eval() -> TaskManager:
    return TaskManager()


def task_config(name: str, prompts: Prompts = "lm-eval") -> dict[str, Any]:
    """lm-eval's configuration of one of our benchmarks, or of a task of its own.

    Args:
        name: The benchmark or task.
        prompts: The form of the benchmark.

    Raises:
        EvaluationError: There is none of that name, or it has not that form.
    """
    check_prompts(name, prompts)
    if prompts == "olmes":
        return olmes_config(name)
    return benchmark_config(name) if name in BENCHMARKS else other_config(name)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Lets lm-eval and transformers log errors only, then puts their levels back."""
    harness = logging.getLogger("lm_eval")
    harness_level = harness.level
    transformers_level = transformers_logging.get_verbosity()
    harness.setLevel(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        harness.setLevel(harness_level)
        transformers_logging.set_verbosity(transformers_level)
