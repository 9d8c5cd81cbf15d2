"""Common base of the model classes: checks context lengths first and stores outputs as they are generated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from mftctl.errors import EvaluationError
from mftctl.evaluation.lm.sampling import sample_seeds
from mftctl.runtime.process_group import divides_work, own_part, parts, put_together

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from mftctl.data.encoding import Encoder
    from mftctl.evaluation.data_file import RecordMeasure
    from mftctl.evaluation.inference import OnProgress
    from mftctl.evaluation.lm.output_cache import OutputCache


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests with the same settings.

    Attributes:
        prompts: Token ids of each prompt.
        texts: The text of each prompt.
        setting: `max_new_tokens`, `until` and `temperature`.
        seeds: Seed of each sample.
    """

    prompts: Sequence[list[int]]
    texts: Sequence[str]
    setting: Mapping[str, Any]
    seeds: Sequence[int]


_HONOURED = {"until", "max_gen_toks", "do_sample", "temperature"}


class KeptAnswers(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """Mixin for an lm-eval model class, which tokenises, computes likelihoods and provides the context length.

    A prompt that is too long is an error; it is not truncated from the left.

    Attributes:
        generated_tokens: Tokens generated since `keep_outputs`, without padding.
        tokenizer: The model's tokenizer.
    """

    generated_tokens: int
    _context_hint = "choose a task with fewer few-shot examples, or a model with a longer context"
    tokenizer: PreTrainedTokenizerBase
    _seed: int
    _cache: OutputCache
    _most_new_tokens: int | None
    _on_progress: OnProgress | None

    def keep_outputs(self, cache: OutputCache, *, max_new_tokens: int | None, on_progress: OnProgress | None) -> None:
        """Stores all further outputs in a cache.

        Args:
            cache: The cache; outputs it contains are not generated again.
            max_new_tokens: Maximum tokens per answer; None for the task's limit.
            on_progress: Called with the number of answers done and the total.
        """
        self.generated_tokens = 0
        self._cache = cache
        self._most_new_tokens = max_new_tokens
        self._on_progress = on_progress

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generates texts up to the first stop string, in the order of the requests.

        Several processes share out the requests; what is drawn for each stays the same.

        Raises:
            EvaluationError: A prompt and its answer do not fit the model's context.
        """
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [self._settings(request.args[1]) for request in requests]
        self._fill_context([len(prompt) for prompt in prompts], settings)
        for request, prompt, setting in zip(requests, prompts, settings, strict=True):
            self._check_context(request, len(prompt), setting["max_new_tokens"])
        texts_and_settings = [(request.args[0], setting) for request, setting in zip(requests, settings, strict=True)]
        keys, seeds = self._cache.keys(texts_and_settings), sample_seeds(self._seed, texts_and_settings)
        waiting = [index for index, key in enumerate(keys) if key not in self._cache]
        written: dict[int, str] = {}
        for group in alike(own_part(waiting), settings):
            asked = Asked(
                prompts=[prompts[index] for index in group],
                texts=[requests[index].args[0] for index in group],
                setting=settings[group[0]],
                seeds=[seeds[index] for index in group],
            )
            for places, texts in self._answer(asked):
                written |= {group[place]: text for place, text in zip(places, texts, strict=True)}
                self._cache.add({keys[group[place]]: text for place, text in zip(places, texts, strict=True)})
                if self._on_progress is not None:
                    done = len(requests) - len(waiting) + min(len(written) * parts(), len(waiting))
                    self._on_progress(done, len(requests))
        self._cache.take({keys[index]: text for index, text in put_together(written).items()})
        return [self._cache[key] for key in keys]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would generate it.

        Raises:
            EvaluationError: A prompt and its continuation do not fit the model's context.
        """
        for request in requests:
            prompt, continuation = self._encode_pair(*request.args)
            self._check_context(request, len(prompt), len(continuation))
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *arguments: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """lm-eval's hook for all likelihoods; in multi-process runs, the processes share its batches."""
        if not divides_work():
            alone: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *arguments, **options)
            return alone
        batches = likelihood_batches([request[1:] for request in requests], int(self.batch_size))
        indices = sorted(index for batch in own_part(batches) for index in batch)
        found = super()._loglikelihood_tokens([requests[index] for index in indices], *arguments, **options)
        shared: dict[int, tuple[float, bool]] = put_together(dict(zip(indices, found, strict=True)))
        return [shared[index] for index in range(len(requests))]

    def for_records(self, encoder: Encoder) -> RecordMeasure:
        """What measures the records of a data file with this engine.

        Args:
            encoder: Encoder for the model's tokenizer.

        Raises:
            EvaluationError: The engine runs benchmarks only.
        """
        raise EvaluationError("This engine runs benchmarks only.", expected="no data file", actual=type(self).__name__)

    @abstractmethod
    def _answer(self, asked: Asked) -> Iterator[tuple[list[int], list[str]]]:
        """Texts up to the first stop string, batch by batch, each with the indices of its prompts in `asked`."""

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Maximum tokens, stop strings and temperature of a request.

        Raises:
            EvaluationError: The task uses unsupported sampling settings.
        """
        known = normalize_gen_kwargs(dict(options), self.max_gen_toks)
        others = sorted(set(known) - _HONOURED)
        if known.get("do_sample") and others:
            raise EvaluationError(
                "The task uses unsupported sampling settings.",
                key="tasks",
                expected=", ".join(sorted(_HONOURED)),
                actual=", ".join(others),
            )
        until = known.get("until") or []
        return {
            "max_new_tokens": min(int(known["max_gen_toks"]), self._most_new_tokens or self.max_length),
            "until": [until] if isinstance(until, str) else list(until),
            "temperature": float(known.get("temperature") or 0.0) if known.get("do_sample") else 0.0,
            **({"fills_context": True} if known.get("fills_context") else {}),
        }

    def _fill_context(self, prompt_tokens: Sequence[int], settings: Sequence[dict[str, Any]]) -> None:
        """Limits answers that may fill the context to what the longest prompt leaves of it."""
        filling = [place for place, setting in enumerate(settings) if setting.pop("fills_context", False)]
        room = self.max_length - max((prompt_tokens[place] for place in filling), default=0)
        for place in filling:
            settings[place]["max_new_tokens"] = min(settings[place]["max_new_tokens"], max(1, room))

    def _check_context(self, request: Instance, prompt_tokens: int, answer_tokens: int) -> None:
        if prompt_tokens + answer_tokens > self.max_length:
            shorter = "; or lower --max-new-tokens" if prompt_tokens < self.max_length else ""
            raise EvaluationError(
                "A prompt and its answer exceed the model's context.",
                key=f"problem {request.doc_id}",
                expected=f"at most {self.max_length} tokens",
                actual=f"prompt tokens: {prompt_tokens}, new tokens: up to {answer_tokens}",
                hint=f"{self._context_hint}{shorter}",
            )


def alike(waiting: Sequence[int], settings: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The requests grouped by settings, in their original order."""
    groups: dict[str, list[int]] = {}
    for index in waiting:
        groups.setdefault(repr(settings[index]), []).append(index)
    return list(groups.values())


def likelihood_batches(texts: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[list[int]]:
    """The text indices in lm-eval's own batches, so that processes can share the batches without changing them.

    lm-eval computes texts that differ only in the last token once, and takes the longest first.

    Args:
        texts: Tokens of each prompt and its continuation.
        batch_size: Distinct texts per batch.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, continuation) in enumerate(texts):
        alike.setdefault((*prompt, *continuation[:-1]), []).append(index)
    firsts = {seen: max(found, key=lambda index: len(texts[index][1])) for seen, found in alike.items()}
    order = sorted(alike, key=lambda seen: (-len(seen), (*seen, texts[firsts[seen]][1][-1])))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [[index for seen in batch for index in alike[seen]] for batch in batches]
