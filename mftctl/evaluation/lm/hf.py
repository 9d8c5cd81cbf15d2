"""Sources of the outputs that lm-eval scores: a model, or a file of existing predictions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from mftctl.data.decoding import decode_behind
from mftctl.errors import EvaluationError
from mftctl.evaluation.answer_room import OnShortage, answer_room
from mftctl.evaluation.answer_stops import answer_stops
from mftctl.evaluation.generation import continue_prompts, generation_settings
from mftctl.evaluation.lm.base import Asked, KeptAnswers
from mftctl.evaluation.lm.output_cache import OutputCache
from mftctl.evaluation.lm.sampling import SeededSampling
from mftctl.evaluation.lm.stop_strings import cut_at

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.evaluation.inference import OnProgress

_LIKELIHOOD_BATCH = 8


class ModelAnswers(KeptAnswers, HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model class with our generation: batches by length, stop strings, crash-safe outputs."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None,
        max_new_tokens: int | None,
        seed: int,
        cache: OutputCache,
        on_progress: OnProgress | None,
        on_shortage: OnShortage | None = None,
        has_turns: bool = False,
        add_bos_token: bool | None = None,
    ) -> None:
        # A copy, because lm-eval adds a padding token to a tokenizer without one.
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size or _LIKELIHOOD_BATCH,
            add_bos_token=add_bos_token,
        )
        self._chosen_batch_size = batch_size
        self._seed = seed
        self._room = answer_room(model, on_shortage)
        # Plain text that ends a turn may occur within any other answer.
        stops = answer_stops(model, tokenizer)
        self._stops = stops if has_turns else replace(stops, texts=())
        self.keep_outputs(cache, max_new_tokens=max_new_tokens, on_progress=on_progress)

    def _answer(self, asked: Asked) -> Iterator[tuple[list[int], list[str]]]:
        """Generates the answers batch by batch, longest prompts first."""
        lengths = [len(prompt) for prompt in asked.prompts]
        if self._chosen_batch_size is None:
            yield from self._room.answered(
                lengths, asked.setting["max_new_tokens"], lambda places: self._generate(asked, places)
            )
            return
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        size = self._chosen_batch_size
        for places in (order[start : start + size] for start in range(0, len(order), size)):
            yield places, self._generate(asked, places)

    def _generate(self, asked: Asked, places: Sequence[int]) -> list[str]:
        prompts, setting = [asked.prompts[place] for place in places], asked.setting
        pad_id = self.tokenizer.pad_token_id
        drawing = []
        if setting["temperature"]:
            seeds, new = [asked.seeds[place] for place in places], setting["max_new_tokens"]
            width = max(len(prompt) for prompt in prompts)
            sampling = SeededSampling(seeds, temperature=setting["temperature"], width_tokens=width, new_tokens=new)
            drawing.append(sampling)
        until = [*setting["until"], *self._stops.texts]
        with generation_settings(self.model, self._stops, pad_id, setting["max_new_tokens"]):
            new_ids = continue_prompts(
                self.model, self.tokenizer, prompts, pad_id=pad_id, stop_texts=until, logits_processors=drawing
            )
        self.generated_tokens += sum(_written(row, pad_id) for row in new_ids)
        return [cut_at(self._text(prompt, row), until) for prompt, row in zip(prompts, new_ids, strict=True)]

    def _text(self, prompt: Sequence[int], token_ids: Sequence[int]) -> str:
        return decode_behind(self.tokenizer, prompt, self._stops.before(token_ids), skip_special_tokens=True)


class WrittenAnswers(LM):  # type: ignore[misc]  # lm-eval is not typed
    """Existing predictions in place of a model."""

    def __init__(self, outputs: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self._outputs = outputs

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The outputs of each problem, in the order of the requests."""
        taken: dict[int, int] = {}
        texts = []
        for request in requests:
            place = taken.get(request.doc_id, 0)
            taken[request.doc_id] = place + 1
            until = request.args[1].get("until") or []
            texts.append(cut_at(self._outputs[request.doc_id][place], [until] if isinstance(until, str) else until))
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Not supported: predictions carry no probabilities.

        Raises:
            EvaluationError: Always.
        """
        raise EvaluationError(
            "This task compares probabilities, so it cannot score predictions.",
            key="predictions",
            expected="a task with generated answers",
        )

    loglikelihood_rolling = loglikelihood


def _numbered_generators(device: torch.device) -> list[torch.device]:
    """The device if it has a random generator per device; the CPU's generator is preserved in any case."""
    return [device] if device.type in ("cuda", "xpu") else []


def _written(token_ids: list[int], pad: int) -> int:
    """Number of tokens, without the padding of a row that ended before others in its batch."""
    return next((place + 1 for place in reversed(range(len(token_ids))) if token_ids[place] != pad), 0)
