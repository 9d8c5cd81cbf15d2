"""Where the outputs that lm-eval scores come from: a model, or a file of outputs written before."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mftctl.errors import EvaluationError
from mftctl.evaluation.inference import length_batches
from mftctl.evaluation.output_cache import OutputCache

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.evaluation.inference import OnProgress

_CPU_BATCH_TOKENS = 16_384
_GPU_BATCH_TOKENS = 131_072
_LIKELIHOOD_BATCH = 8
_HONOURED = {"until", "max_gen_toks", "do_sample", "temperature"}


class ModelAnswers(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model class with our generation: batches by length, stop strings, outputs that survive a crash.

    A prompt that is too long is an error instead of cut at its beginning.
    """

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
    ) -> None:
        # A copy, because lm-eval gives a tokenizer without padding token one.
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size or _LIKELIHOOD_BATCH
        )
        self.generated_tokens = 0
        self._chosen_batch_size = batch_size
        self._most_new_tokens = max_new_tokens
        self._seed = seed
        self._cache = cache
        self._on_progress = on_progress

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The generated texts up to the first stop string, in the order of the requests.

        Raises:
            EvaluationError: A prompt and its answer do not fit the model's context.
        """
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [self._settings(request.args[1]) for request in requests]
        for request, prompt, setting in zip(requests, prompts, settings, strict=True):
            self._check_context(request, len(prompt), setting["max_new_tokens"])
        keys = self._cache.keys(
            [(request.args[0], setting) for request, setting in zip(requests, settings, strict=True)]
        )
        waiting = [index for index, key in enumerate(keys) if key not in self._cache]
        for indices in self._batches(waiting, prompts, settings):
            texts = self._generate([prompts[i] for i in indices], settings[indices[0]], indices[0])
            self._cache.add({keys[index]: text for index, text in zip(indices, texts, strict=True)})
            if self._on_progress is not None:
                self._on_progress(sum(key in self._cache for key in keys), len(requests))
        return [self._cache[key] for key in keys]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it.

        Raises:
            EvaluationError: A prompt and its continuation do not fit the model's context.
        """
        for request in requests:
            prompt, continuation = self._encode_pair(*request.args)
            self._check_context(request, len(prompt), len(continuation))
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Room, stop strings and temperature of a request.

        Raises:
            EvaluationError: The task samples in a way that is not known here.
        """
        known = normalize_gen_kwargs(dict(options), self.max_gen_toks)
        others = sorted(set(known) - _HONOURED)
        if known.get("do_sample") and others:
            raise EvaluationError(
                "The task samples its answers with settings that are not known here.",
                key="tasks",
                expected=", ".join(sorted(_HONOURED)),
                actual=", ".join(others),
            )
        until = known.get("until") or []
        return {
            "max_new_tokens": min(int(known["max_gen_toks"]), self._most_new_tokens or self.max_length),
            "until": [until] if isinstance(until, str) else list(until),
            "temperature": float(known.get("temperature") or 0.0) if known.get("do_sample") else 0.0,
        }

    def _check_context(self, request: Instance, prompt_tokens: int, answer_tokens: int) -> None:
        if prompt_tokens + answer_tokens > self.max_length:
            raise EvaluationError(
                "A prompt and its answer are longer than the model's context.",
                key=f"problem {request.doc_id}",
                expected=f"at most {self.max_length} tokens",
                actual=f"{prompt_tokens} tokens of prompt and up to {answer_tokens} of answer",
                hint="choose a task with fewer examples in its prompt, or lower --max-new-tokens",
            )

    def _batches(
        self, waiting: Sequence[int], prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]
    ) -> Iterator[list[int]]:
        """Requests of like settings, the longest prompts first."""
        budget = _CPU_BATCH_TOKENS if self.device.type == "cpu" else _GPU_BATCH_TOKENS
        alike: dict[str, list[int]] = {}
        for index in waiting:
            alike.setdefault(repr(settings[index]), []).append(index)
        for group in alike.values():
            room = settings[group[0]]["max_new_tokens"]
            lengths = [len(prompts[index]) + room for index in group]
            if self._chosen_batch_size is None:
                batches = length_batches(lengths, budget)
            else:
                order = sorted(range(len(group)), key=lambda place: -lengths[place])
                size = self._chosen_batch_size
                batches = [order[start : start + size] for start in range(0, len(order), size)]
            yield from ([group[place] for place in batch] for batch in batches)

    def _generate(self, prompts: Sequence[list[int]], setting: Mapping[str, Any], first: int) -> list[str]:
        width = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        stop = StopStrings(self.tokenizer, setting["until"], width)
        with (
            _generation_settings(self.model, self.tokenizer, setting),
            torch.random.fork_rng(enabled=bool(setting["temperature"])),
        ):
            if setting["temperature"]:
                torch.manual_seed(1_000_003 * self._seed + first)
            output = self.model.generate(
                input_ids=input_ids.to(self.device),
                attention_mask=mask.to(self.device),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        new = output[:, width:].tolist()
        self.generated_tokens += sum(_written(row, pad) for row in new)
        return [cut_at(self._text(row), setting["until"]) for row in new]

    def _text(self, token_ids: list[int]) -> str:
        ends = _end_tokens(self.model, self.tokenizer)
        end = next((place for place, token in enumerate(token_ids) if token in ends), len(token_ids))
        return str(self.tokenizer.decode(token_ids[:end], skip_special_tokens=True))


class WrittenAnswers(LM):  # type: ignore[misc]  # lm-eval is not typed
    """Outputs that were written before, in the place of a model."""

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
        """Never: probabilities are no outputs.

        Raises:
            EvaluationError: Always.
        """
        raise EvaluationError(
            "This task compares probabilities, which only a model has.",
            key="predictions",
            expected="a task whose answers are written",
        )

    loglikelihood_rolling = loglikelihood


class StopStrings(StoppingCriteria):
    """Says of each row whether a stop string has come up; looks only at the rows and tokens where one can be new."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], width_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        self._width = width_tokens
        self._done: Tensor | None = None
        # A token is at least a byte or joins with the one before, so that this many hold any stop string and what a
        # token may have in front of it.
        self._look_back = max((len(string.encode()) for string in strings), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Of each row, whether it is done, `(rows,)` bool."""
        if self._done is None:
            self._done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        rows = (~self._done).nonzero().flatten().tolist()
        if self._strings and rows:
            recent = input_ids[:, max(self._width, input_ids.shape[1] - self._look_back) :].tolist()
            texts = self._tokenizer.batch_decode([recent[row] for row in rows])
            for row, text in zip(rows, texts, strict=True):
                self._done[row] = any(string in text for string in self._strings)
        return self._done


def cut_at(text: str, strings: Sequence[str]) -> str:
    """The text up to the first of the strings.

    Args:
        text: What was generated.
        strings: Stop strings; empty ones are left out.
    """
    return text[: min((text.find(string) for string in strings if string and string in text), default=len(text))]


def _written(token_ids: list[int], pad: int) -> int:
    """The number of tokens without the padding of a row that ended before others of its batch."""
    return next((place + 1 for place in reversed(range(len(token_ids))) if token_ids[place] != pad), 0)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    return {int(token_id) for token_id in [*named, tokenizer.eos_token_id] if token_id is not None}


@contextmanager
def _generation_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Mapping[str, Any]
) -> Iterator[None]:
    """Generation settings of ours alone: options given to `generate` would be merged with the checkpoint's."""
    own = model.generation_config
    sampling = {"do_sample": True, "temperature": setting["temperature"], "top_k": 0} if setting["temperature"] else {}
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        **({"do_sample": False} | sampling),
        max_new_tokens=setting["max_new_tokens"],
        eos_token_id=sorted(_end_tokens(model, tokenizer)) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own
