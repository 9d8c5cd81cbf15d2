"""lm-eval as an engine: its tasks and ours, on records already in memory, and nothing on the user's screen.

Of lm-eval 0.4.13 this uses the task files, `ConfigurableTask`, `HFLM` and `evaluate`. `simple_evaluate` would add a
report on the machine by running git and pip, and set the global random seeds.
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
