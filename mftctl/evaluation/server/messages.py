"""Requests for completions, and what a server sends back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mftctl.errors import EvaluationError, ServerError
from mftctl.evaluation.server.failures import without_key

_MOST_STOPS = 4
"""OpenAI's API and vLLM take no more; the caller cuts answers at all of them."""

_ROUNDING = 1e-3
"""A log-likelihood of 0 may be rounded up."""

_LONGEST_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Form:
    """What a server understands.

    Attributes:
        takes_tokens: Prompts as token ids; otherwise as text, which the server tokenises itself.
        is_extended: Fields that vLLM, SGLang and llama.cpp add to OpenAI's.
    """

    takes_tokens: bool
    is_extended: bool


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to continue.

    Attributes:
        token_ids: The prompt.
        text: The text that the model's tokenizer turns into these ids; only for servers without token ids.
        stops: Texts that end the answer.
        end_tokens: Tokens that end the answer.
        max_new_tokens: Maximum tokens of the answer.
        temperature: Sampling temperature; 0 is greedy.
        seed: Seed of a sample.
    """

    token_ids: Sequence[int]
    text: str
    stops: Sequence[str]
    end_tokens: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """An answer.

    Attributes:
        text: Its text; it may go on after a stop that the server was not told.
        tokens: Its length in tokens; 0 if the server does not say.
    """

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Likelihoods of a text's tokens after the first one.

    Attributes:
        logprobs: The log-likelihood of each token after those before it, in nats.
        is_likeliest: Whether it is the likeliest token there.
    """

    logprobs: Sequence[float]
    is_likeliest: Sequence[bool]


def question_body(question: Question, form: Form, model: str) -> dict[str, Any]:
    """The fields of a request for an answer.

    All settings that change an answer are stated: a server may otherwise take penalties or sampling from the
    checkpoint.

    Args:
        question: The prompt and its settings.
        form: What the server understands.
        model: Name of the model on the server.
    """
    stops = [stop for stop in question.stops if stop]
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(question.token_ids) if form.takes_tokens else question.text,
        "max_tokens": question.max_new_tokens,
        "temperature": question.temperature,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if stops:
        body["stop"] = stops[:_MOST_STOPS]
    if question.temperature:
        body["seed"] = question.seed
    if form.is_extended:
        body["extra_body"] = {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "repeat_penalty": 1.0,  # llama.cpp's name for it
            "stop_token_ids": list(question.end_tokens),
        }
    return body


def scoring_body(token_ids: Sequence[int], form: Form, model: str) -> dict[str, Any]:
    """The fields of a request for the likelihoods of a text.

    Args:
        token_ids: The text.
        form: What the server understands.
        model: Name of the model on the server.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": 1,  # not every server accepts 0
        "temperature": 0.0,
        "echo": True,
        "logprobs": 1,
    }
    if form.is_extended:  # the texts of two tokens can be the same
        body["extra_body"] = {"return_tokens_as_token_ids": True}
    return body


class _Received(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Likelihoods(_Received):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(_Received):
    text: str
    finish_reason: str | None = None
    logprobs: Any = None


class _Usage(_Received):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(_Received):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def read_answer(received: Any, question: Question, url: str) -> Written:
    """The answer in what a server sent.

    Args:
        received: The completion, as the client returns it.
        question: The question.
        url: The server's URL.

    Raises:
        ServerError: It is not a completion.
        EvaluationError: The server read another prompt, or ended the answer for a reason of its own.
    """
    found = _read(received, url)
    choice, usage = found.choices[0], found.usage or _Usage()
    if usage.prompt_tokens is not None and usage.prompt_tokens != len(question.token_ids):
        raise EvaluationError(
            "The server did not read the prompt as the model's tokenizer does.",
            path=url,
            expected=f"{len(question.token_ids)} tokens",
            actual=f"{usage.prompt_tokens} tokens",
            hint="serve the same checkpoint with the same tokenizer, with room for the whole prompt",
        )
    if choice.finish_reason not in (None, "stop", "length", "eos_token", "stop_sequence"):
        raise EvaluationError(
            "The server ended an answer early.", path=url, expected="its end or its limit", actual=choice.finish_reason
        )
    tokens = usage.completion_tokens
    if choice.finish_reason == "length" and tokens is not None and tokens < question.max_new_tokens:
        raise EvaluationError(
            "The server cut an answer.",
            path=url,
            expected=f"up to {question.max_new_tokens} tokens after a prompt of {len(question.token_ids)}",
            actual=f"{tokens} tokens",
            hint="start the server with a longer context, or lower --max-new-tokens",
        )
    return Written(choice.text, tokens or 0)


def read_likelihoods(received: Any, token_ids: Sequence[int], url: str) -> Scored:
    """The likelihoods of a text in what a server sent.

    Args:
        received: The completion, as the client returns it.
        token_ids: The text.
        url: The server's URL.

    Raises:
        ServerError: It has no likelihoods of exactly these tokens.
    """
    count = len(token_ids)
    try:
        found = _Likelihoods.model_validate(_read(received, url).choices[0].logprobs)
    except ValidationError as error:
        raise _no_likelihoods(url, count, "none") from error
    tokens, likeliest = found.token_logprobs, found.top_logprobs
    if not count <= len(tokens) <= count + 1 or len(likeliest) != len(tokens):
        raise _no_likelihoods(url, count, f"those of {len(tokens)} tokens")
    logprobs = [math.nan if value is None else value for value in tokens[1:count]]
    best = [max(values.values(), default=math.nan) if values else math.nan for values in likeliest[1:count]]
    if any(math.isnan(value) or value > _ROUNDING for value in (*logprobs, *best)):
        raise _no_likelihoods(url, count, "values that are no log-likelihoods")
    return Scored(logprobs, [value >= top for value, top in zip(logprobs, best, strict=True)])


def _no_likelihoods(url: str, count: int, found: str) -> ServerError:
    return ServerError(
        "The server does not return the likelihoods of a text.",
        path=url,
        expected=f"log-likelihoods of the {count} tokens of a text (echo with logprobs)",
        actual=found,
    )


def _read(received: Any, url: str) -> _Completion:
    document = received.model_dump(warnings=False) if isinstance(received, BaseModel) else received
    try:
        return _Completion.model_validate(document)
    except ValidationError as error:
        shown = without_key(str(document))
        raise ServerError(
            "The server sent something other than a completion.",
            path=url,
            expected="the JSON document of OpenAI's completions",
            actual=shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…",
            hint="check --base-url, which often ends in /v1",
        ) from error
