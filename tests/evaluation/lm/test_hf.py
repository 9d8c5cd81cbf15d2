from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.local_task import quiet_libraries
from mftctl.evaluation.lm.hf import ModelAnswers, WrittenAnswers
from mftctl.evaluation.lm.output_cache import OutputCache
from mftctl.evaluation.lm.stop_strings import StopStrings, cut_at
from tests.conftest import build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

GREEDY = {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}


def requests(prompts: list[str], **settings: object) -> list[Instance]:
    return [
        Instance("generate_until", {}, (prompt, {**GREEDY, **settings}), 0, metadata=("task", number, 1))
        for number, prompt in enumerate(prompts)
    ]


def answers(model: LlamaForCausalLM, cache: OutputCache | None = None, **options: object) -> ModelAnswers:
    settings = {"batch_size": None, "max_new_tokens": None, "seed": 0, "on_progress": None, **options}
    with quiet_libraries():
        return ModelAnswers(model, build_tokenizer(), cache=cache or OutputCache(), **settings)  # type: ignore[arg-type]


@pytest.mark.slow
def test_outputs_do_not_depend_on_the_batches_and_keep_their_order(llama: LlamaForCausalLM) -> None:
    prompts = ["one", "a much longer prompt than the first", "mid length"]
    alone = answers(llama, batch_size=1).generate_until(requests(prompts))
    assert answers(llama, batch_size=2).generate_until(requests(prompts)) == alone
    assert answers(llama).generate_until(requests(prompts)) == alone
    assert len(set(alone)) == 3


def test_tokens_are_counted_without_the_padding_of_rows_that_ended_before_others(llama: LlamaForCausalLM) -> None:
    prompts = ["one", "two and more", "three"]
    until = answers(llama).generate_until(requests(["one"]))[0][2:4]
    alone, together = answers(llama, batch_size=1), answers(llama, batch_size=3)
    for model in (alone, together):
        model.generate_until(requests(prompts, until=[until]))
    assert alone.generated_tokens == together.generated_tokens < 3 * 12


def test_greedy_outputs_are_those_of_lm_evals_own_generation(llama: LlamaForCausalLM) -> None:
    from lm_eval.models.huggingface import HFLM

    prompts = ["one", "two and more", "three"]
    until = answers(llama).generate_until(requests(["one"]))[0][2:4]
    with quiet_libraries():
        theirs = HFLM(pretrained=llama, tokenizer=build_tokenizer(), batch_size=2)
        expected = theirs.generate_until(requests(prompts, until=[until]), disable_tqdm=True)
    assert answers(llama).generate_until(requests(prompts, until=[until])) == expected


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed(llama: LlamaForCausalLM) -> None:
    asked = requests(["one"] * 4, do_sample=True, temperature=1.5)
    state = torch.get_rng_state().tolist()
    first = answers(llama).generate_until(asked)
    assert answers(llama).generate_until(asked) == first
    assert answers(llama, seed=1).generate_until(asked) != first
    assert len(set(first)) > 1
    assert torch.get_rng_state().tolist() == state


def test_a_likelihood_whose_prompt_is_too_long_is_an_error(llama: LlamaForCausalLM) -> None:
    asked = [Instance("loglikelihood", {}, ("x" * 600, " a"), 0, metadata=("task", 7, 1))]
    with pytest.raises(EvaluationError, match="exceed the model's context") as caught:
        answers(llama).loglikelihood(asked)
    assert caught.value.key == "problem 7"


def test_unknown_sampling_options_are_an_error(llama: LlamaForCausalLM) -> None:
    with pytest.raises(EvaluationError, match="unsupported sampling settings") as caught:
        answers(llama).generate_until(requests(["one"], do_sample=True, temperature=1.0, top_p=0.9))
    assert caught.value.actual == "top_p"
    answers(llama, max_new_tokens=1).generate_until(requests(["one"], top_p=0.9))


def test_the_limit_on_new_tokens_applies_to_every_task(llama: LlamaForCausalLM) -> None:
    model = answers(llama, max_new_tokens=3)
    model.generate_until(requests(["one", "two"]))
    assert model.generated_tokens == 6


@pytest.mark.slow
def test_an_interrupted_evaluation_resumes_where_it_stopped(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path, prompts = tmp_path / "outputs.jsonl", ["one", "two", "three"]
    whole = answers(llama, batch_size=1).generate_until(requests(prompts))

    class StoppedError(Exception):
        pass

    def stop_after_two(done: int, total: int) -> None:
        if done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        answers(llama, OutputCache(path), batch_size=1, on_progress=stop_after_two).generate_until(requests(prompts))
    with path.open("a") as file:
        file.write('["half a li')
    resumed = answers(llama, OutputCache(path), batch_size=1)
    assert resumed.generate_until(requests(prompts)) == whole
    assert resumed.generated_tokens <= 12


def test_outputs_of_another_model_are_not_reused(tmp_path: Path) -> None:
    first, other = (OutputCache(tmp_path / "outputs.jsonl", written_by) for written_by in ("one model", "another"))
    first.add({first.keys([("p", {})])[0]: "its output"})
    assert OutputCache(tmp_path / "outputs.jsonl", "one model")[first.keys([("p", {})])[0]] == "its output"
    assert other.keys([("p", {})])[0] not in OutputCache(tmp_path / "outputs.jsonl", "another")


def test_a_damaged_file_of_outputs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "outputs.jsonl").write_text('["a", "b"]\nnonsense\n["c", "d"]\n')
    with pytest.raises(EvaluationError, match="are damaged"):
        OutputCache(tmp_path / "outputs.jsonl")


def test_equal_requests_are_separate_samples() -> None:
    keys = OutputCache().keys([("p", {"a": 1}), ("p", {"a": 1}), ("p", {"a": 2}), ("q", {"a": 1})])
    assert len(set(keys)) == 4


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_a_text_is_cut_at_the_first_stop_string(text: str, strings: list[str]) -> None:
    cut = cut_at(text, strings)
    assert text.startswith(cut)
    assert not any(string in cut for string in strings)
    assert cut == text or any(text[len(cut) :].startswith(string) for string in strings)


def test_a_row_stops_once_a_stop_string_is_in_its_new_text() -> None:
    tokenizer = build_tokenizer()
    prompt, rest = tokenizer("stop")["input_ids"], tokenizer("a stop b")["input_ids"]
    stop = StopStrings(tokenizer, ["stop"], len(prompt))
    done = [bool(stop(torch.tensor([prompt + rest[:length]]), torch.empty(0))[0]) for length in range(1, len(rest) + 1)]
    texts = [tokenizer.decode(rest[:length]) for length in range(1, len(rest) + 1)]
    assert done == ["stop" in text for text in texts]
    assert not StopStrings(tokenizer, [], 0)(torch.tensor([prompt]), torch.empty(0)).any()


def test_saved_outputs_are_returned_by_problem_and_truncated() -> None:
    asked = [
        Instance("generate_until", {}, ("p", {"until": "\n\n"}), 0, metadata=("task", number, 2))
        for number in (0, 0, 1, 1)
    ]
    given_outputs = [["a\n\nb", "c"], ["d", "e"]]
    assert WrittenAnswers(given_outputs).generate_until(asked) == ["a", "c", "d", "e"]


def test_saved_outputs_have_no_probabilities() -> None:
    with pytest.raises(EvaluationError, match="probabilities"):
        WrittenAnswers([]).loglikelihood([])
