"""lm-eval as the benchmark engine: its tasks and ours, on records in memory, without console output.

Uses the task files, `ConfigurableTask`, `HFLM` and `evaluate` of lm-eval 0.4.13. `simple_evaluate` would also report on
the machine by running git and pip, and set the global random seeds.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from transformers.utils import logging as transformers_logging

from mftctl.errors import EvaluationError

if TYPE_CHECKING:
    from mftctl.evaluation.benchmarks.problems import Problems

_OTHER_SPLITS = ("training_split", "validation_split", "fewshot_split")


class LocalTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval is not typed
    """An lm-eval task on records in memory."""

    def __init__(self, config: Mapping[str, Any], problems: Problems) -> None:
        examples = config.get("fewshot_config") or {}
        if config.get("num_fewshot") and not examples.get("samples"):
            raise EvaluationError(
                "The task takes its few-shot examples from the hub dataset.",
                key=f"task_data.{config['task']}",
                expected="a task without few-shot examples, or with built-in ones",
                actual=f"few-shot examples from another split: {config['num_fewshot']}",
                hint="omit --task-data",
            )
        records = Dataset.from_list(list(problems.records))
        # From memory: `dataset_path: json` would leave a copy in the user's cache and read the file again.
        own = {"custom_dataset": lambda **_: {"test": records}, "test_split": "test"}
        super().__init__(config={**config, **own, **dict.fromkeys(_OTHER_SPLITS)})

    def build_all_requests(self, **options: Any) -> None:
        """Builds the prompts without lm-eval's progress bar, which cannot be switched off."""
        with contextlib.redirect_stderr(io.StringIO()):
            super().build_all_requests(**options)


def build_task(config: Mapping[str, Any], problems: Problems, *, is_local: bool) -> ConfigurableTask:
    """Builds the lm-eval task for the problems.

    Args:
        config: Configuration of the task.
        problems: The problems.
        is_local: Whether the problems come from a file or belong to one of our benchmarks; otherwise lm-eval loads them
            again, with the other splits from which the task may take few-shot examples.

    Raises:
        EvaluationError: The task needs few-shot examples that the file lacks.
    """
    return LocalTask(config, problems) if is_local else ConfigurableTask(config=dict(config))


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Limits lm-eval and transformers to logging errors; restores their log levels on exit."""
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
