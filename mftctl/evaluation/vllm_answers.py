"""Answers of a model that vLLM runs: many prompts at once, on a GPU, or on a CPU by a build of vLLM for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported, also by its own processes

from lm_eval.models.vllm_causallms import VLLM
from vllm import SamplingParams

from mftctl.evaluation.kept_answers import KeptAnswers, alike
from mftctl.evaluation.stop_strings import cut_at

_BATCH = 256
"""vLLM schedules requests by itself; outputs are kept after so many."""


class VllmAnswers(KeptAnswers, VLLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's vLLM class with outputs that survive a crash.

    Args:
        checkpoint: Folder of the model; vLLM knows nothing of masks.
        dtype: To compute in, by its name; `auto` is the checkpoint's.
        seed: Of sampling.
    """

    def __init__(self, checkpoint: Path, *, dtype: str, seed: int) -> None:
        super().__init__(pretrained=str(checkpoint), dtype=dtype, batch_size=_BATCH)
        self._seed = seed

    def _batches(
        self, waiting: Sequence[int], prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]
    ) -> Iterator[list[int]]:
        for group in alike(waiting, settings):
            yield from (group[start : start + _BATCH] for start in range(0, len(group), _BATCH))

    def _generate(self, prompts: Sequence[list[int]], setting: Mapping[str, Any], first: int) -> list[str]:
        asked = [
            SamplingParams(
                temperature=setting["temperature"],
                max_tokens=setting["max_new_tokens"],
                stop=setting["until"],
                seed=1_000_003 * self._seed + first + place if setting["temperature"] else None,
            )
            for place in range(len(prompts))
        ]
        found = [answer.outputs[0] for answer in self._model_generate(list(prompts), True, asked)]
        self.generated_tokens += sum(len(output.token_ids) for output in found)
        return [cut_at(output.text, setting["until"]) for output in found]
