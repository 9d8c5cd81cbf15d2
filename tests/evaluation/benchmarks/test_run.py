from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.lm_eval_tasks import task_config
from mftctl.evaluation.benchmarks.local_task import build_task, quiet_libraries
from mftctl.evaluation.benchmarks.problems import read_problems
from mftctl.evaluation.benchmarks.result import BenchmarkResult
from mftctl.evaluation.benchmarks.run import run_benchmark
from mftctl.evaluation.inference import evaluation_mode
from mftctl.evaluation.lm.hf import ModelAnswers
from mftctl.evaluation.lm.output_cache import OutputCache
from mftctl.evaluation.statistics import standard_error_of_share
from tests.conftest import build_llama, build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from mftctl.evaluation.inference import OnProgress

ANSWERS = {
    "ann": " 3 + 4 = 7. The answer is 7.\n",
    "bob": " It is 9, so 1,234.",
    "cleo": " The answer is 12.\n\nQ: What is 5 + 5?",
    "dan": " No idea",
}
TARGETS = {"ann": "7", "bob": "1,234", "cleo": "13", "dan": "5"}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "problems.jsonl"
    path.parent.mkdir()
    records = [{"question": f"What has {name}?", "answer": f"so\n#### {TARGETS[name]}"} for name in TARGETS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def scripted_llama(prompts: list[str]) -> LlamaForCausalLM:
    """A model that writes `ANSWERS` depending on the person in the last question, and records its prompts."""
    model, tokenizer = build_llama(layers=1, max_position_embeddings=8192), build_tokenizer()

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        prompts.extend(texts)
        names = [text.rpartition("What has ")[2].partition("?")[0] for text in texts]
        new = tokenizer([ANSWERS[name] + "<|end|>" for name in names], padding=True, return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], dim=1)

    model.generate = generate
    return model


def run(
    model: LlamaForCausalLM,
    name: str,
    data_file: Path,
    *,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> BenchmarkResult:
    problems, config = read_problems(data_file, name), task_config(name)
    with quiet_libraries(), evaluation_mode(model):
        task = build_task(config, problems, is_local=True)
        answers = ModelAnswers(
            model,
            tokenizer or build_tokenizer(),
            batch_size=2,
            max_new_tokens=None,
            seed=0,
            cache=OutputCache(),
            on_progress=on_progress,
        )
        return run_benchmark(answers, task, problems, limit=limit, chat_template=False, seed=0)


def test_scores_of_known_answers_under_both_filters(problems: Path) -> None:
    result = run(scripted_llama([]), "gsm8k_0shot", problems)
    assert (result.name, result.shots, result.data, result.chat_template) == ("gsm8k_0shot", 0, str(problems), False)
    assert (result.task_version, result.lm_eval_version[:4]) == ("3.0", "0.4.")
    assert len(result.data_digest) == 64
    assert {score.name: score.value for score in result.scores} == {
        "exact_match,strict-match": 0.25,
        "exact_match,flexible-extract": 0.5,
        "exact_match,marked-match": 0.0,
    }
    for score in result.scores:
        correct = [sample.scores[score.name] == 1 for sample in result.samples]
        assert score.samples == len(correct) == 4
        assert score.value == sum(correct) / 4
        assert score.standard_error == pytest.approx(standard_error_of_share(correct))


def test_samples_keep_outputs_and_extracted_answers(problems: Path) -> None:
    samples = run(scripted_llama([]), "gsm8k_0shot", problems).samples
    assert [sample.doc_id for sample in samples] == [0, 1, 2, 3]
    bob = samples[1]
    assert (bob.target, bob.outputs, bob.prompt) == ("1,234", (ANSWERS["bob"],), "Q: What has bob?\nA:")
    assert bob.answers == {
        "strict-match": "[invalid]",
        "flexible-extract": "1,234.",
        "marked-match": "[invalid]",
    }
    assert bob.scores == {
        "exact_match,strict-match": 0,
        "exact_match,flexible-extract": 1,
        "exact_match,marked-match": 0,
    }
    # Text after the stop string is not part of the answer.
    assert samples[2].outputs == (" The answer is 12.\n\n",)
    assert samples[2].answers["flexible-extract"] == "12."


def test_the_prompt_has_lm_evals_eight_examples_or_none(problems: Path) -> None:
    with_examples: list[str] = []
    alone: list[str] = []
    assert run(scripted_llama(with_examples), "gsm8k", problems, limit=1).shots == 8
    run(scripted_llama(alone), "gsm8k_0shot", problems, limit=1)
    assert alone == ["Q: What has ann?\nA:"]
    assert with_examples[0].endswith(alone[0])
    assert with_examples[0].count("Q: ") == 9
    assert with_examples[0].count("The answer is ") == 8


def test_a_limit_takes_the_first_problems_of_the_same_data(problems: Path) -> None:
    every, first = (run(scripted_llama([]), "gsm8k_0shot", problems, limit=limit) for limit in (None, 1))
    assert first.data_digest == every.data_digest
    assert [sample.doc_id for sample in first.samples] == [0]
    assert all(score.samples == 1 and score.standard_error is None for score in first.scores)


def test_a_limit_above_the_number_of_problems_takes_all(problems: Path) -> None:
    assert {s.samples for s in run(scripted_llama([]), "gsm8k_0shot", problems, limit=99).scores} == {4}


@pytest.mark.slow
def test_nothing_is_printed_written_or_left_changed(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    model, tokenizer = build_llama(layers=1, max_position_embeddings=8192).train(), build_tokenizer()
    tokenizer.pad_token = None
    model.generation_config.temperature = 0.7
    before = (random.getstate(), torch.get_rng_state().tolist(), logging.getLogger("lm_eval").level)
    run(model, "gsm8k_0shot", problems, limit=2, tokenizer=tokenizer)
    assert before == (random.getstate(), torch.get_rng_state().tolist(), logging.getLogger("lm_eval").level)
    assert capfd.readouterr() == ("", "")
    assert list(folder.iterdir()) == []
    assert [path.name for path in problems.parent.iterdir()] == [problems.name]
    assert model.training
    assert tokenizer.pad_token is None


@pytest.mark.slow
def test_progress_reaches_the_end(problems: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = build_llama(layers=1)
    run(model, "gsm8k_0shot", problems, limit=3, on_progress=lambda *call: calls.append(call))
    assert calls == [(2, 3), (3, 3)]


@pytest.mark.slow
def test_real_problems_through_lm_eval(real_data: Path) -> None:
    model = build_llama(layers=2, max_position_embeddings=8192)
    result = run(model, "gsm8k", real_data / "gsm8k" / "test.jsonl", limit=2)
    assert [sample.target for sample in result.samples] == ["18", "3"]
    assert [(score.filter, score.value) for score in result.scores] == [
        ("strict-match", 0.0),
        ("flexible-extract", 0.0),
        ("marked-match", 0.0),
    ]
    assert all(sample.outputs[0] for sample in result.samples)


@pytest.mark.slow
def test_gold_answers_of_real_problems_are_correct(real_data: Path) -> None:
    """lm-eval's flexible filter takes the last number, which is the answer in a gold solution."""
    model, tokenizer = build_llama(layers=1, max_position_embeddings=8192), build_tokenizer()
    path = real_data / "gsm8k" / "test.jsonl"
    with path.open(encoding="utf-8") as lines:
        gold = {
            r["question"]: r["answer"] for r in (json.loads(line) for _, line in zip(range(20), lines, strict=False))
        }
    known = {question.encode("ascii", "ignore").decode(): answer for question, answer in gold.items()}

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        replies = [known[text.removeprefix("Q: ").removesuffix("\nA:")] for text in texts]
        new = tokenizer(replies, padding=True, return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], dim=1)

    model.generate = generate
    result = run(model, "gsm8k_0shot", path, limit=20)
    assert {score.filter: score.value for score in result.scores}["flexible-extract"] == 1.0


def test_wrong_fields_are_an_error_before_generation(problems: Path) -> None:
    model = build_llama(layers=1)
    model.generate = lambda **_: pytest.fail("generated")
    with problems.open("a") as stream:
        stream.write('{"prompt": "?", "answer": "#### 1"}\n')
    with pytest.raises(EvaluationError) as caught:
        run(model, "gsm8k", problems)
    assert (caught.value.path, caught.value.key) == (f"{problems}:5", "question")


def test_a_context_that_is_too_long_is_an_error_before_generation(problems: Path) -> None:
    model = build_llama(layers=1, max_position_embeddings=512)
    model.generate = lambda **_: pytest.fail("generated")
    with pytest.raises(EvaluationError, match="exceed the model's context") as caught:
        run(model, "gsm8k", problems, limit=1)
    assert caught.value.key == "problem 0"
    assert "512" in str(caught.value.expected)


def passage(id: str, context: str, answer: str) -> dict[str, object]:
    return {"id": id, "context": context, "question": "Which?", "answers": {"text": [answer], "answer_start": [0]}}


def fixed_llama(text: str) -> LlamaForCausalLM:
    """A model that always generates the same text."""
    model, tokenizer = build_llama(layers=1, max_position_embeddings=8192), build_tokenizer()

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        new = tokenizer([text + "<|end|>"] * len(input_ids), return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], dim=1)

    model.generate = generate
    return model


@pytest.mark.slow
def test_a_passage_question_has_an_example_of_its_language_and_scores_words(tmp_path: Path) -> None:
    rows = [
        passage("english-1-0", "Red and blue.", "the red one"),
        passage("finnish-1-0", "Punainen.", "punainen"),
        passage("english-2-0", "Green.", "green"),
        passage("finnish-2-0", "Vihre.", "vihre"),
    ]
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(fixed_llama(" red"), "tydiqa", path)
    assert result.shots == 1
    assert result.samples[0].prompt == (
        "Passage: Green.\nQuestion: Which?\nAnswer: green\n\nPassage: Red and blue.\nQuestion: Which?\nAnswer:"
    )
    # The article "the" is ignored in English, so one word of two is correct.
    assert [sample.scores["f1,none"] for sample in result.samples] == pytest.approx([2 / 3, 0, 0, 0])
    assert [sample.scores["exact_match,none"] for sample in result.samples] == [0, 0, 0, 0]


@pytest.mark.slow
def test_the_likeliest_letter_counts(tmp_path: Path) -> None:
    path = tmp_path / "anatomy_test.csv"
    path.write_text("question,choice0,choice1,choice2,choice3,answer\nWhich?,a,b,c,d,2\nWhat?,a,b,c,d,0\n")
    result = run(build_llama(layers=1), "mmlu", path)
    assert "about anatomy.\n\nWhich?\nA. a\nB. b" in result.samples[0].prompt
    assert [sample.outputs for sample in result.samples] == [(), ()]
    (score,) = result.scores
    assert (score.name, score.samples) == ("acc,none", 2)
    assert {sample.scores["acc,none"] for sample in result.samples} <= {0, 1}


def test_the_probability_of_true_answers(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"question": "Is it?", "mc2_targets": {"choices": ["yes", "no"], "labels": [1, 0]}}))
    (sample,) = run(build_llama(layers=1, max_position_embeddings=2048), "truthfulqa_mc2", path).samples
    assert 0 < sample.scores["acc,none"] < 1


def test_a_hard_task_comes_with_its_three_examples(real_data: Path) -> None:
    result = run(
        fixed_llama(" So the answer is False."), "bbh", real_data / "bbh" / "boolean_expressions.json", limit=4
    )
    assert result.shots == 3
    assert result.samples[0].prompt.startswith("Evaluate the result of a random Boolean expression.\n\nQ: ")
    assert result.samples[0].prompt.count("A: Let's think step by step.") == 4
    assert [sample.answers["get-answer"] for sample in result.samples] == ["False"] * 4
    assert sum(sample.scores["exact_match,get-answer"] for sample in result.samples) == sum(
        sample.target == "False" for sample in result.samples
    )
