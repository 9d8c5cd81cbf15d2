"""Answers generated with vLLM: many prompts at once, on a GPU, or on a CPU with vLLM's CPU build."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported, also by its own processes

from lm_eval.models.vllm_causallms import VLLM
from vllm import SamplingParams

from mftctl.errors import EvaluationError
from mftctl.evaluation.answer_stops import turn_stops
from mftctl.evaluation.benchmarks.olmes import begins_texts
from mftctl.evaluation.lm.base import Asked, KeptAnswers
from mftctl.evaluation.lm.stop_strings import cut_at
from mftctl.experiments.recipe import EvalOptions
from mftctl.masking.checkpoints.load_weights import read_configuration
from mftctl.masking.checkpoints.remote_code import trusts_code

_BATCH = 256
"""Requests between saves of the outputs; vLLM schedules requests itself."""

_SPARE = 16
"""Tokens to spare: vLLM generates at least one, and its tokenizer may prepend another to a prompt."""


class VllmAnswers(KeptAnswers, VLLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's vLLM class with crash-safe outputs.

    Args:
        checkpoint: Folder of the model; vLLM does not support masks.
        dtype: Name of the compute dtype; `auto` is the checkpoint's.
        seed: Seed for sampling.
        options: GPUs, their memory, and the maximum sequence length.
        needed_tokens: Longest sequence to expect; reserving more would waste memory.

    Raises:
        EvaluationError: vLLM does not start.
    """

    _context_hint = "choose a task with fewer few-shot examples, or raise --max-model-length"

    def __init__(self, checkpoint: Path, *, dtype: str, seed: int, options: EvalOptions, needed_tokens: int) -> None:
        length = options.max_model_length_tokens or _length(checkpoint, needed_tokens)
        share = {} if options.gpu_memory_share is None else {"gpu_memory_utilization": options.gpu_memory_share}
        try:
            super().__init__(
                pretrained=str(checkpoint),
                dtype=dtype,
                batch_size=_BATCH,
                tensor_parallel_size=options.tensor_parallel,
                max_model_len=length,
                trust_remote_code=trusts_code(),
                add_bos_token=begins_texts(options.prompts),
                **share,
            )
        except (RuntimeError, ValueError) as error:
            raise EvaluationError(
                "vLLM does not start.",
                path=checkpoint,
                actual=str(error).strip(),
                hint="--gpu-memory-share, --max-model-length or --tensor-parallel; VLLM_LOGGING_LEVEL=INFO shows more",
            ) from error
        self._seed = seed

    def _answer(self, asked: Asked) -> Iterator[tuple[list[int], list[str]]]:
        for start in range(0, len(asked.prompts), _BATCH):
            places = list(range(start, min(start + _BATCH, len(asked.prompts))))
            yield places, self._generate(asked, places)

    def _generate(self, asked: Asked, places: Sequence[int]) -> list[str]:
        setting, stops = asked.setting, turn_stops(self.tokenizer)
        until = [*setting["until"], *stops.texts]
        settings = [
            SamplingParams(
                temperature=setting["temperature"],
                max_tokens=setting["max_new_tokens"],
                stop=until,
                stop_token_ids=sorted(stops.token_ids),
                seed=asked.seeds[place] if setting["temperature"] else None,
            )
            for place in places
        ]
        found = [
            answer.outputs[0]
            for answer in self._model_generate([asked.prompts[place] for place in places], True, settings)
        ]
        self.generated_tokens += sum(len(output.token_ids) for output in found)
        return [cut_at(output.text, until) for output in found]


def _length(checkpoint: Path, needed_tokens: int) -> int | None:
    """The maximum sequence length for vLLM; None for the model's own, which must not be exceeded."""
    config = read_configuration(checkpoint).get_text_config(decoder=True)
    own = getattr(config, "max_position_embeddings", None)
    wanted = needed_tokens + _SPARE
    return None if own is not None and wanted >= own else wanted
