"""A server with OpenAI's API: finds out what it serves and understands, then asks it for answers and likelihoods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import openai
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from mftctl.errors import EvaluationError, ServerError
from mftctl.evaluation.server.connection import Connection, Request
from mftctl.evaluation.server.messages import (
    Form,
    Question,
    Scored,
    Written,
    question_body,
    read_answer,
    read_likelihoods,
    scoring_body,
)
from mftctl.progress import Listener

_SAMPLE = (
    "How many litres are 3.75 gallons? A gallon is about 4,546 millilitres.\n\n"
    "def litres(gallons: float) -> float:\n    return 4.546 * gallons  # naïve: größer als 0\n\n"
    "\\frac{a}{b} != 0; SELECT name FROM pupils WHERE id >= 42;"
)
"""Different tokenizers split it into different numbers of tokens."""

_BEGIN_AND_END = 2
"""Tokens that a server may add to a text."""

_FORMS = tuple(Form(*chosen) for chosen in product((True, False), repeat=2))
"""From the most exact one."""

_FEW_RETRIES = 1
"""Of a first request: a mistyped URL is reported at once."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model on a server.

    Attributes:
        name: Its name there.
        owner: What the server says of itself, such as `vllm` or `llamacpp`; None if it says nothing.
        context_tokens: Maximum tokens of prompt and answer; None if the server does not say.
    """

    name: str
    owner: str | None = None
    context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class CompletionServer:
    """A server that has been asked what it serves and understands.

    Attributes:
        connection: The open connection.
        model: The model to ask.
        form: What it understands.
    """

    connection: Connection
    model: ServedModel
    form: Form

    @property
    def url(self) -> str:
        """Its URL."""
        return self.connection.url

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Written]]:
        """Each answer with the index of its question, as soon as it is there.

        Args:
            questions: The prompts to continue.

        Raises:
            ServerError: The server cannot be reached, refuses a request, or sends something else.
            EvaluationError: The server read another prompt or cut an answer.
        """
        requests = [_completion(question_body(question, self.form, self.model.name)) for question in questions]
        for index, received in self.connection.ask_all(requests):
            yield index, read_answer(received, questions[index], self.url)

    def likelihoods(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Scored]]:
        """The likelihoods of each text with its index, as soon as they are there.

        Args:
            texts: Token ids, at least two each.

        Raises:
            ServerError: The server cannot be reached, refuses a request, or returns no likelihoods.
        """
        requests = [_completion(scoring_body(text, self.form, self.model.name)) for text in texts]
        for index, received in self.connection.ask_all(requests):
            yield index, read_likelihoods(received, texts[index], self.url)


@contextmanager
def connected(
    url: str,
    *,
    served_model: str | None,
    concurrent_requests: int,
    tokenizer: PreTrainedTokenizerBase,
    listener: Listener,
) -> Iterator[CompletionServer]:
    """Connects to a server and finds out what it serves and understands.

    Args:
        url: The server's URL.
        served_model: Name of the model there; None for the only one that it lists.
        concurrent_requests: Maximum number of requests at a time.
        tokenizer: The model's tokenizer.
        listener: Told if the server seems to serve another model, or understands less than others.

    Yields:
        The server.

    Raises:
        ConfigError: The API key cannot be sent.
        EvaluationError: It does not serve the model, or does not say which model it serves.
        ServerError: It cannot be reached, refuses the key, or completes no text.
    """
    with Connection(url, concurrent_requests) as connection:
        model = _chosen(connection, served_model)
        server = CompletionServer(connection, model, _understood(connection, model, tokenizer))
        if not server.form.is_extended:
            listener.note(
                f"{url} takes OpenAI's own fields only: settings of the checkpoint, such as a repetition penalty, may "
                "change its answers."
            )
        _compare_tokens(server, tokenizer, listener)
        yield server


def require_likelihoods(server: CompletionServer, tokenizer: PreTrainedTokenizerBase, needed_by: str) -> None:
    """Checks that a server returns the likelihoods of a text, before anything is measured.

    Args:
        server: The server.
        tokenizer: The model's tokenizer.
        needed_by: What needs them, for the error.

    Raises:
        EvaluationError: It does not.
        ServerError: It cannot be reached, or refuses the key.
    """
    token_ids = _sample_ids(tokenizer)
    expected = f"log-likelihoods of a given text, which {needed_by} needs: completions with echo and logprobs"
    hint = "serve the model with vLLM, measure it with --engine hf, or choose tasks with generated answers"
    if not server.form.takes_tokens:
        raise EvaluationError(
            "The server takes prompts as text only.", path=server.url, expected=expected, actual="text only", hint=hint
        )
    request = _completion(scoring_body(token_ids, server.form, server.model.name))
    try:
        read_likelihoods(server.connection.ask(request, retries=0), token_ids, server.url)
    except ServerError as error:
        if not _is_refusal(error):
            raise
        raise EvaluationError(
            "The server does not return the likelihoods of a text.",
            path=server.url,
            expected=expected,
            actual=error.actual,
            hint=hint,
        ) from error


class _Entry(BaseModel):
    """A model in a server's list, with the fields of vLLM, SGLang and llama.cpp."""

    model_config = ConfigDict(extra="ignore")

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    meta: dict[str, Any] | None = None

    def served(self) -> ServedModel:
        context = self.max_model_len or (self.meta or {}).get("n_ctx")
        return ServedModel(self.id, self.owned_by, context if isinstance(context, int) else None)


def _chosen(connection: Connection, name: str | None) -> ServedModel:
    """The model to ask, among those that the server lists.

    Raises:
        EvaluationError: It is not among them, or there are several and none was named.
    """
    listed = _listed(connection)
    names = ", ".join(model.name for model in listed)
    if name is None and len(listed) != 1:
        raise EvaluationError(
            "It is not clear which model of the server to measure.",
            path=connection.url,
            key="eval.served_model",
            expected="its name",
            actual=f"the server lists {names or 'no models'}",
            hint="--served-model NAME",
        )
    found = next((model for model in listed if name in (None, model.name)), None)
    if listed and found is None:
        raise EvaluationError(
            "The server does not serve this model.",
            path=connection.url,
            key="eval.served_model",
            expected=f"one of {names}",
            actual=name,
        )
    return found or ServedModel(str(name))


def _listed(connection: Connection) -> list[ServedModel]:
    """The models that the server lists; none if it keeps no list."""

    async def models(client: openai.AsyncOpenAI) -> Any:
        try:
            return await client.models.list()
        except (openai.NotFoundError, openai.APIResponseValidationError):
            return None
        except openai.APIStatusError as error:
            if error.status_code in (405, 501):
                return None
            raise

    page = connection.ask(models, retries=_FEW_RETRIES)
    entries = page.model_dump(warnings=False).get("data") if isinstance(page, BaseModel) else None
    try:
        return [_Entry.model_validate(entry).served() for entry in entries or []]
    except ValidationError:
        return []


def _understood(connection: Connection, model: ServedModel, tokenizer: PreTrainedTokenizerBase) -> Form:
    """The most exact form of a request that the server understands.

    Raises:
        ServerError: It understands none, or cannot be reached.
    """
    refused: ServerError | None = None
    for form in _FORMS:
        body = question_body(_sample(tokenizer, "1 + 1 ="), form, model.name)
        try:
            connection.ask(_completion(body), retries=_FEW_RETRIES)
        except ServerError as error:
            if not _is_refusal(error):
                raise
            refused = refused or error
        else:
            return form
    raise ServerError(
        "The server completes no text.",
        path=connection.url,
        expected="OpenAI's completions, at /completions",
        actual=refused and refused.actual,
        hint="serve the model with vLLM or llama.cpp; a server with chat completions only cannot repeat a benchmark",
    ) from refused


def _compare_tokens(server: CompletionServer, tokenizer: PreTrainedTokenizerBase, listener: Listener) -> None:
    """Warns if the server splits a text into other tokens than the model's tokenizer: it may serve another model."""
    question = _sample(tokenizer, _SAMPLE)
    body = question_body(question, Form(takes_tokens=False, is_extended=server.form.is_extended), server.model.name)
    try:
        received = server.connection.ask(_completion(body), retries=0)
    except ServerError as error:
        if not _is_refusal(error):
            raise
        return
    usage = getattr(received, "usage", None)
    found, expected = getattr(usage, "prompt_tokens", None), len(question.token_ids)
    if isinstance(found, int) and abs(found - expected) > _BEGIN_AND_END:
        listener.warn(
            f"{server.url} splits a sample text into {found} tokens, the model's own tokenizer into {expected}: the "
            "server may serve another model."
        )


def _sample(tokenizer: PreTrainedTokenizerBase, text: str) -> Question:
    token_ids = tokenizer(text)["input_ids"]
    return Question(token_ids, text, stops=(), end_tokens=(), max_new_tokens=1)


def _sample_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    token_ids: list[int] = tokenizer("1 + 1 = 2")["input_ids"]
    return token_ids


def _is_refusal(error: ServerError) -> bool:
    """True if a server refuses a request for what it asks, or cannot process it; False if it cannot be used at all."""
    cause = error.__cause__
    if not isinstance(cause, openai.APIStatusError):
        return not isinstance(cause, openai.OpenAIError)
    return cause.status_code in (400, 405, 413, 415, 422, 500, 501)


def _completion(body: dict[str, Any]) -> Request[Any]:
    async def send(client: openai.AsyncOpenAI) -> Any:
        return await client.completions.create(**body)

    return send
