"""Answers and likelihoods of a server compared with those of the local engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.local_task import quiet_libraries
from mftctl.evaluation.lm.hf import ModelAnswers
from mftctl.evaluation.lm.output_cache import OutputCache
from mftctl.evaluation.lm.served import ServedAnswers
from mftctl.evaluation.server.completion_server import connected
from mftctl.masking.checkpoints.load import load_tokenizer
from mftctl.progress import Silence
from tests.completions_stand_in import EXTENSIONS, Behaviour, Completions, serving
from tests.conftest import build_llama, build_tokenizer

PROMPTS = ["one", "a much longer prompt than the first", "mid length", "?!"]
GREEDY = {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}


def requests(prompts: list[str], **settings: object) -> list[Instance]:
    return [
        Instance("generate_until", {}, (prompt, {**GREEDY, **settings}), 0, metadata=("task", number, 1))
        for number, prompt in enumerate(prompts)
    ]


def likelihoods(kind: str, *arguments: tuple[str, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, 0, metadata=("task", number, 1)) for number, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_llama(layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> Path:
    folder = tmp_path_factory.mktemp("served") / "llama"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local(model: LlamaForCausalLM) -> ModelAnswers:
    return in_memory(model, build_tokenizer())


def in_memory(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **options: Any) -> ModelAnswers:
    settings = {"batch_size": 2, "max_new_tokens": None, "seed": 0, "cache": OutputCache(), "on_progress": None}
    with quiet_libraries():
        return ModelAnswers(model, tokenizer, **{**settings, **options})


@contextmanager
def served(
    checkpoint: Path,
    model: LlamaForCausalLM,
    behaviour: Behaviour | None = None,
    *,
    cache: OutputCache | None = None,
    concurrent: int = 3,
    **options: Any,
) -> Iterator[tuple[ServedAnswers, Completions]]:
    tokenizer = load_tokenizer(checkpoint)
    with (
        quiet_libraries(),
        serving(model, tokenizer, behaviour) as server,
        connected(
            server.url,
            served_model=None,
            concurrent_requests=concurrent,
            tokenizer=tokenizer,
            listener=Silence(),
        ) as connection,
    ):
        answers = ServedAnswers(connection, checkpoint, tokenizer, seed=0, **options)
        answers.keep_outputs(cache or OutputCache(), max_new_tokens=None, on_progress=None)
        yield answers, server


UNDERSTANDING_LESS = [
    Behaviour(),
    Behaviour(takes_extensions=False),
    Behaviour(takes_tokens=False),
    Behaviour(takes_tokens=False, takes_extensions=False),
]


@pytest.mark.parametrize("behaviour", UNDERSTANDING_LESS, ids=["all", "no extensions", "texts", "texts alone"])
def test_greedy_answers_are_those_of_the_local_engine(
    checkpoint: Path, model: LlamaForCausalLM, local: ModelAnswers, behaviour: Behaviour
) -> None:
    whole = local.generate_until(requests(PROMPTS))
    until = ["zzz", "yyy", "xxx", "www", whole[0][2:4]]  # OpenAI's API does not take the last one
    with served(checkpoint, model, behaviour) as (answers, server):
        assert answers.generate_until(requests(PROMPTS)) == whole
        assert answers.generated_tokens == 12 * len(PROMPTS)
        assert answers.generate_until(requests(PROMPTS, until=until)) == local.generate_until(
            requests(PROMPTS, until=until)
        )
    assert len(set(whole)) == len(PROMPTS)
    assert all(isinstance(body["prompt"], list) == behaviour.takes_tokens for body in server.answered)
    assert all(
        (EXTENSIONS <= set(body) | {"return_tokens_as_token_ids"}) == behaviour.takes_extensions
        for body in server.answered
    )


def test_requests_state_every_setting_that_changes_an_answer(checkpoint: Path, model: LlamaForCausalLM) -> None:
    with served(checkpoint, model) as (answers, server):
        answers.generate_until(requests(["one"]))
        answers.generate_until(requests(["one"] * 2, do_sample=True, temperature=0.5))
    greedy, *drawn = server.answered
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert all(neutral.items() <= body.items() for body in server.answered)
    assert (greedy["temperature"], greedy["max_tokens"], greedy["stop_token_ids"]) == (0.0, 12, [1])
    assert "seed" not in greedy
    assert [body["temperature"] for body in drawn] == [0.5, 0.5]
    assert drawn[0]["seed"] != drawn[1]["seed"]


def test_an_answer_ends_at_the_end_tokens_of_the_generation_settings(tmp_path: Path, local: ModelAnswers) -> None:
    end = local.tokenizer(local.generate_until(requests(["one"]))[0][3])["input_ids"][0]
    model = build_llama(layers=2)
    model.generation_config.eos_token_id = [1, end]
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    expected = in_memory(model, build_tokenizer()).generate_until(requests(PROMPTS))
    with served(tmp_path, model) as (answers, _):
        assert answers.generate_until(requests(PROMPTS)) == expected
    assert len(expected[0]) <= 3


def test_a_turn_ends_with_the_text_of_its_template(
    tmp_path: Path, model: LlamaForCausalLM, local: ModelAnswers
) -> None:
    text = local.generate_until(requests(["one"]))[0][4:6]
    template = "{% for message in messages %}{{ message['content'] + '" + text + "' }}{% endfor %}"
    model.save_pretrained(tmp_path)
    build_tokenizer(chat_template=template).save_pretrained(tmp_path)
    expected = in_memory(model, load_tokenizer(tmp_path), has_turns=True).generate_until(requests(PROMPTS))
    with served(tmp_path, model, has_turns=True) as (answers, _):
        assert answers.generate_until(requests(PROMPTS)) == expected
    assert text not in expected[0]
    assert len(expected[0]) <= 4


def test_a_begin_token_is_as_in_the_local_engine(tmp_path: Path, model: LlamaForCausalLM) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.bos_token_id)]
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ["one", "<|system|>two"]
    for begins in (None, False, True):
        expected = in_memory(model, load_tokenizer(tmp_path), add_bos_token=begins).generate_until(requests(prompts))
        with served(tmp_path, model, add_bos_token=begins) as (answers, server):
            assert answers.generate_until(requests(prompts)) == expected
        starts = [body["prompt"][0] == tokenizer.bos_token_id for body in server.answered]
        assert sorted(starts) == [begins is not False, True]  # the requests are sent at the same time
    with served(tmp_path, model, Behaviour(takes_tokens=False)) as (answers, server):
        answers.generate_until(requests(prompts))
    assert {body["prompt"] for body in server.answered} == {"one", "two"}  # the server adds the token to each
    with (
        served(tmp_path, model, Behaviour(takes_tokens=False), add_bos_token=False) as (answers, server),
        pytest.raises(EvaluationError, match="adds a token"),
    ):
        answers.generate_until(requests(prompts))


def test_likelihoods_are_those_of_the_local_engine(
    checkpoint: Path, model: LlamaForCausalLM, local: ModelAnswers
) -> None:
    greedy = local.generate_until(requests(["one"], max_gen_toks=3))[0]
    asked = likelihoods("loglikelihood", *((prompt, " two") for prompt in PROMPTS), ("one", greedy), ("one ", "x"))
    with served(checkpoint, model) as (answers, _):
        mine, theirs = answers.loglikelihood(asked), local.loglikelihood(asked)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [is_greedy for _, is_greedy in mine] == [is_greedy for _, is_greedy in theirs] == [False] * 4 + [True, False]


def test_likelihoods_of_whole_texts_are_those_of_the_local_engine(
    checkpoint: Path, model: LlamaForCausalLM, local: ModelAnswers
) -> None:
    asked = likelihoods("loglikelihood_rolling", ("a text",), ("another one",))
    with served(checkpoint, model) as (answers, _):
        assert answers.loglikelihood_rolling(asked) == pytest.approx(local.loglikelihood_rolling(asked), abs=1e-4)


def test_saved_outputs_are_not_asked_for_again(checkpoint: Path, model: LlamaForCausalLM, tmp_path: Path) -> None:
    for asked in (len(PROMPTS), 0):
        with served(checkpoint, model, cache=OutputCache(tmp_path / "kept.jsonl")) as (answers, server):
            answers.generate_until(requests(PROMPTS))
        assert len(server.answered) == asked


@pytest.mark.parametrize("concurrent", [1, 3])
def test_no_more_requests_are_sent_at_a_time_than_allowed(
    checkpoint: Path, model: LlamaForCausalLM, concurrent: int
) -> None:
    with served(checkpoint, model, concurrent=concurrent) as (answers, server):
        answers.generate_until(requests([f"prompt {number}" for number in range(9)], max_gen_toks=2))
    assert server.most_at_once <= concurrent
    assert len(server.answered) == 9


def test_a_prompt_longer_than_the_servers_context_is_an_error(checkpoint: Path, model: LlamaForCausalLM) -> None:
    with served(checkpoint, model, Behaviour(context_tokens=40)) as (answers, server):
        answers.generate_until(requests(["x" * 28]))
        with pytest.raises(EvaluationError, match="exceed the model's context") as caught:
            answers.generate_until(requests(["x" * 29]))
    assert caught.value.expected == "at most 40 tokens"
    assert "longer context" in str(caught.value.hint)
    assert len(server.answered) == 1


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Behaviour(most_tokens=5), "cut an answer"),
        (Behaviour(takes_tokens=False, begins_texts=True), "did not read the prompt"),
    ],
)
def test_an_answer_to_something_else_is_an_error(
    checkpoint: Path, model: LlamaForCausalLM, behaviour: Behaviour, message: str
) -> None:
    with served(checkpoint, model, behaviour) as (answers, _), pytest.raises(EvaluationError, match=message) as caught:
        answers.generate_until(requests(PROMPTS))
    assert caught.value.path == answers.server.url
