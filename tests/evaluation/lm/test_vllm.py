"""vLLM's answers compared with those of transformers; skipped where vLLM is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from lm_eval.api.instance import Instance

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.local_task import quiet_libraries
from mftctl.evaluation.lm.hf import ModelAnswers
from mftctl.evaluation.lm.output_cache import OutputCache
from mftctl.experiments.recipe import EvalOptions
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from tests.conftest import build_llama, build_tokenizer

if TYPE_CHECKING:
    from mftctl.evaluation.lm.vllm import VllmAnswers

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of vLLM

PROMPTS = ["one", "a much longer prompt than the first", "mid length"]
GREEDY = {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}


def requests(prompts: list[str], **settings: object) -> list[Instance]:
    return [
        Instance("generate_until", {}, (prompt, {**GREEDY, **settings}), 0, metadata=("task", number, 1))
        for number, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "llama"
    # vLLM's CPU kernels need a head size of at least 32.
    build_llama(hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vllm(checkpoint: Path) -> Iterator[VllmAnswers]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from mftctl.evaluation.lm.vllm import VllmAnswers

    with quiet_libraries():
        yield VllmAnswers(checkpoint, dtype="float32", seed=0, options=EvalOptions(), needed_tokens=400)


@pytest.fixture
def answers(vllm: VllmAnswers) -> VllmAnswers:
    vllm.keep_outputs(OutputCache(), max_new_tokens=None, on_progress=None)
    return vllm


@pytest.fixture
def plain(checkpoint: Path) -> ModelAnswers:
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), load_tokenizer(checkpoint)
    with quiet_libraries():
        return ModelAnswers(
            model, tokenizer, batch_size=1, max_new_tokens=None, seed=0, cache=OutputCache(), on_progress=None
        )


def test_greedy_outputs_are_those_of_transformers(answers: VllmAnswers, plain: ModelAnswers) -> None:
    expected = plain.generate_until(requests(PROMPTS))
    assert answers.generate_until(requests(PROMPTS)) == expected
    assert len(set(expected)) == 3
    assert answers.generated_tokens == plain.generated_tokens == 36


def test_an_answer_ends_before_a_stop_string(answers: VllmAnswers, plain: ModelAnswers) -> None:
    until = plain.generate_until(requests(["one"]))[0][2:4]
    stopped = answers.generate_until(requests(PROMPTS, until=[until]))
    assert stopped == plain.generate_until(requests(PROMPTS, until=[until]))
    assert len(stopped[0]) <= 2


def test_likelihoods_are_those_of_transformers(answers: VllmAnswers, plain: ModelAnswers) -> None:
    asked = [Instance("loglikelihood", {}, (prompt, " two"), 0, metadata=("task", 0, 1)) for prompt in PROMPTS]
    mine, theirs = answers.loglikelihood(asked), plain.loglikelihood(asked)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]


def test_samples_of_one_prompt_differ_and_repeat(answers: VllmAnswers) -> None:
    asked = requests(["one"] * 4, do_sample=True, temperature=1.5)
    first = answers.generate_until(asked)
    answers.keep_outputs(OutputCache(), max_new_tokens=None, on_progress=None)
    assert answers.generate_until(asked) == first
    assert len(set(first)) > 1


def test_saved_outputs_are_not_generated_again(answers: VllmAnswers, tmp_path: Path) -> None:
    answers.keep_outputs(OutputCache(tmp_path / "kept.jsonl"), max_new_tokens=3, on_progress=None)
    first = answers.generate_until(requests(PROMPTS))
    answers.keep_outputs(OutputCache(tmp_path / "kept.jsonl"), max_new_tokens=3, on_progress=None)
    assert answers.generate_until(requests(PROMPTS)) == first
    assert answers.generated_tokens == 0


def test_a_prompt_that_is_too_long_is_an_error(answers: VllmAnswers) -> None:
    with pytest.raises(EvaluationError, match="exceed the model's context") as caught:
        answers.generate_until(requests(["x" * 600]))
    assert caught.value.key == "problem 0"
