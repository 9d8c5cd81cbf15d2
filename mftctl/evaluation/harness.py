"""lm-eval as an engine: its tasks on our records, its model class with our checks, and nothing on the user's screen.

Of lm-eval 0.4.13 this uses the task files, `ConfigurableTask`, `HFLM` and `evaluate`. `simple_evaluate` would add a
report on the machine by running git and pip, and set the global random seeds; nothing here draws at random.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from transformers.utils import logging as transformers_logging

from mftctl.errors import EvaluationError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.evaluation.inference import OnProgress
    from mftctl.evaluation.problems import Problems


def task_config(folder: str, task: str) -> dict[str, Any]:
    """The configuration of one of lm-eval's own tasks.

    Only its folder is indexed: reading all of lm-eval's task files takes seconds.

    Args:
        folder: Below lm-eval's `tasks`.
        task: The task's name there.
    """
    manager = TaskManager(include_path=Path(lm_eval.tasks.__file__).parent / folder, include_defaults=False)
    return copy.deepcopy(manager.task_index[task].cfg)


class LocalTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval is not typed
    """A task of lm-eval on records already in memory."""

    def __init__(self, config: Mapping[str, Any], problems: Problems) -> None:
        records = Dataset.from_list(list(problems.records))
        # From memory: `dataset_path: json` would leave a copy in the user's cache and read the file a second time.
        super().__init__(config={**config, "custom_dataset": lambda **_: {config["test_split"]: records}})

    def build_all_requests(self, **options: Any) -> None:
        """Builds the prompts without lm-eval's progress bar, which has no switch."""
        with contextlib.redirect_stderr(io.StringIO()):
            super().build_all_requests(**options)


class CheckedModel(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model class, but a prompt that is too long is an error instead of cut at its beginning."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        on_progress: OnProgress | None,
    ) -> None:
        # A copy, because lm-eval gives a tokenizer without padding token one.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._on_progress = on_progress
        self._done = 0
        self._total = 0

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The generated texts, in the order of the requests.

        Raises:
            EvaluationError: A prompt and its answer do not fit the model's context.
        """
        for request in requests:
            context, options = request.args
            answer_tokens = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            prompt_tokens = len(self.tok_encode(context))
            if prompt_tokens + answer_tokens > self.max_length:
                raise EvaluationError(
                    "A prompt and its answer are longer than the model's context.",
                    key=f"problem {request.doc_id}",
                    expected=f"at most {self.max_length} tokens",
                    actual=f"{prompt_tokens} tokens of prompt and up to {answer_tokens} of answer",
                    hint="choose a task with fewer examples in its prompt",
                )
        self._done, self._total = 0, len(requests)
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return texts

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
        generated: Tensor = super()._model_generate(context, *args, **options)
        self._done += len(context)
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
        return generated


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
