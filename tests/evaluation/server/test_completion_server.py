"""What a server is found to serve and to understand, and how its failures are reported."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mftctl.errors import ConfigError, EvaluationError, MftError, ServerError
from mftctl.evaluation.server.completion_server import CompletionServer, connected, require_likelihoods
from mftctl.evaluation.server.messages import Form, Question
from mftctl.progress import Progress
from tests.completions_stand_in import Behaviour, Completions, serving
from tests.conftest import build_llama, build_tokenizer

KEY = "sk-a-secret-of-this-test"


@dataclass
class Heard:
    """A listener that remembers."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def progress(self, state: Progress) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_llama(layers=1)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@contextmanager
def connection(
    model: LlamaForCausalLM,
    behaviour: Behaviour | None = None,
    heard: Heard | None = None,
    *,
    name: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Iterator[tuple[CompletionServer, Completions]]:
    with (
        serving(model, build_tokenizer(), behaviour) as stand_in,
        connected(
            stand_in.url,
            served_model=name,
            concurrent_requests=2,
            tokenizer=tokenizer or build_tokenizer(),
            listener=heard or Heard(),
        ) as server,
    ):
        yield server, stand_in


def answer(server: CompletionServer, count: int = 1) -> list[str]:
    ids = build_tokenizer()("one")["input_ids"]
    question = Question(ids, "one", stops=(), end_tokens=(), max_new_tokens=3)
    return [written.text for _, written in server.answers([question] * count)]


def failure(behaviour: Behaviour, model: LlamaForCausalLM, name: str | None = None) -> MftError:
    """The error of connecting to a server and asking it for an answer."""
    with pytest.raises(MftError) as caught, connection(model, behaviour, name=name) as (server, _):
        answer(server)
    assert caught.value.path is not None
    assert caught.value.path.startswith("http://127.0.0.1:")
    return caught.value


def test_the_only_model_of_a_server_is_measured(model: LlamaForCausalLM, heard: Heard) -> None:
    with connection(model, Behaviour(models=("served",), context_tokens=99), heard) as (server, _):
        assert (server.model.name, server.model.owner, server.model.context_tokens) == ("served", "vllm", 99)
        assert server.form == Form(takes_tokens=True, is_extended=True)
    assert heard == Heard()


def test_one_of_several_models_must_be_named(model: LlamaForCausalLM) -> None:
    error = failure(Behaviour(models=("base", "masked")), model)
    assert error.key == "eval.served_model"
    assert "base, masked" in str(error.actual)
    with connection(model, Behaviour(models=("base", "masked")), name="masked") as (server, _):
        assert server.model.name == "masked"


def test_a_model_that_is_not_served_is_an_error(model: LlamaForCausalLM) -> None:
    error = failure(Behaviour(models=("base",)), model, name="masked")
    assert (error.message, error.actual) == ("The server does not serve this model.", "masked")
    assert "base" in str(error.expected)


def test_a_server_without_a_list_is_asked_for_the_named_model(model: LlamaForCausalLM) -> None:
    with connection(model, Behaviour(models=None), name="masked") as (server, stand_in):
        answer(server)
    assert {body["model"] for body in stand_in.asked} == {"masked"}
    assert "no models" in str(failure(Behaviour(models=None), model).actual)


def test_a_server_that_takes_fewer_fields_is_told_of(model: LlamaForCausalLM, heard: Heard) -> None:
    with connection(model, Behaviour(takes_extensions=False), heard) as (server, _):
        assert server.form == Form(takes_tokens=True, is_extended=False)
    [note] = heard.notes
    assert "OpenAI's own fields only" in note


def test_a_server_with_another_tokenizer_is_warned_of(model: LlamaForCausalLM, heard: Heard) -> None:
    from mftctl.data.quickstart.built_in import model_path
    from mftctl.masking.checkpoints.load import load_tokenizer

    other = load_tokenizer(model_path())
    with connection(build_llama(layers=1, vocab_size=len(other)), heard=heard, tokenizer=other):
        pass
    [warning] = heard.warnings
    assert "may serve another model" in warning


def test_a_server_that_cannot_be_reached_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        options: Any = {"served_model": None, "concurrent_requests": 1, "listener": Heard()}
        with (
            pytest.raises(ServerError, match="cannot be reached") as caught,
            connected(url, tokenizer=build_tokenizer(), **options),
        ):
            pass
    assert caught.value.path == url
    assert "--base-url" in str(caught.value.hint)


def test_the_key_of_the_environment_is_sent(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    with connection(model, Behaviour(key=KEY)) as (server, _):
        assert len(answer(server)) == 1


@pytest.mark.parametrize("given", [None, KEY])
def test_a_refused_key_is_an_error_that_does_not_show_it(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if given:
        monkeypatch.setenv("OPENAI_API_KEY", given)
    error = failure(Behaviour(key="another"), model)  # the stand-in repeats the key, as some servers do
    assert (error.message, error.key) == ("The server refuses the API key.", "OPENAI_API_KEY")
    assert ("with a key" if given else "without a key") in str(error.actual)
    assert KEY not in str(error)


def test_a_key_that_no_header_can_contain_is_an_error(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("sk–typographic", "two words"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ConfigError, match="cannot be sent") as caught, connection(model):
            pass
        assert key not in str(caught.value)


def test_a_busy_server_is_asked_again(model: LlamaForCausalLM) -> None:
    with connection(model) as (server, stand_in):
        expected = answer(server)
        stand_in.behaviour.failures += [429, 503, 500, 429]
        before = len(stand_in.asked)
        assert answer(server) == expected
        assert len(stand_in.asked) == before + 5


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "takes no more requests"),
        (500, "server failed"),
        (400, "refuses a request"),
        (404, "no such address or model"),
    ],
)
def test_a_request_that_goes_on_failing_is_an_error(model: LlamaForCausalLM, status: int, message: str) -> None:
    with connection(model) as (server, stand_in):
        stand_in.behaviour.failures += [status] * 20
        with pytest.raises(ServerError, match=message) as caught:
            answer(server, count=4)
    assert str(status) in str(caught.value.actual)


def test_something_other_than_a_completion_is_an_error(model: LlamaForCausalLM) -> None:
    for body in ("<html>Welcome</html>", '{"choices": []}', '{"choices": [{"text": null}]}'):
        error = failure(Behaviour(body=body), model)
        assert isinstance(error, ServerError)
        assert error.message == "The server sent something other than a completion."


def test_a_server_that_completes_nothing_is_an_error(model: LlamaForCausalLM) -> None:
    error = failure(Behaviour(failures=[400] * 20), model)
    assert error.message == "The server completes no text."
    assert "try again" in str(error.actual)


def test_likelihoods_are_found_to_be_there(model: LlamaForCausalLM) -> None:
    with connection(model) as (server, _):
        require_likelihoods(server, build_tokenizer(), "mmlu")


@pytest.mark.parametrize(
    ("behaviour", "found"),
    [
        (Behaviour(echo="refused"), "Only no echo is supported"),
        (Behaviour(echo="ignored"), "those of 1 tokens"),
        (Behaviour(takes_tokens=False), "text only"),
    ],
)
def test_missing_likelihoods_are_an_error(model: LlamaForCausalLM, behaviour: Behaviour, found: str) -> None:
    with connection(model, behaviour) as (server, _), pytest.raises(EvaluationError) as caught:
        require_likelihoods(server, build_tokenizer(), "mmlu, truthfulqa_mc2")
    assert not isinstance(caught.value, ServerError)
    assert "mmlu, truthfulqa_mc2 needs" in str(caught.value.expected)
    assert found in str(caught.value.actual)
    assert "vLLM" in str(caught.value.hint)


def test_a_failing_server_is_not_taken_for_one_without_likelihoods(model: LlamaForCausalLM) -> None:
    with connection(model) as (server, stand_in):
        stand_in.behaviour.failures.append(503)
        with pytest.raises(ServerError, match="server failed"):
            require_likelihoods(server, build_tokenizer(), "mmlu")


def test_requests_under_way_end_with_the_connection(model: LlamaForCausalLM) -> None:
    import threading

    with connection(model, Behaviour(silent_over_tokens=2)) as (server, _):
        ids = build_tokenizer()("one")["input_ids"]
        long = Question(ids, "one", stops=(), end_tokens=(), max_new_tokens=3)
        short = Question(ids, "one", stops=(), end_tokens=(), max_new_tokens=2)
        answers = server.answers([short, long, long])
        assert next(answers)[0] == 0
        answers.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mftctl-requests"]
