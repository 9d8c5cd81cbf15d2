from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks import BENCHMARKS, BenchmarkResult, find_benchmark, run_benchmark
from mftctl.evaluation.statistics import standard_error_of_share
from tests.conftest import build_llama, build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

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
    """A model that writes `ANSWERS`, whichever person the last question is about, and keeps the prompts it saw."""
    model, tokenizer = build_llama(layers=1, max_position_embeddings=8192), build_tokenizer()

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        prompts.extend(texts)
        names = [text.rpartition("What has ")[2].partition("?")[0] for text in texts]
        new = tokenizer([ANSWERS[name] + "<|end|>" for name in names], padding=True, return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], dim=1)

    model.generate = generate
    return model


def run(model: LlamaForCausalLM, name: str, data_file: Path | None, **options: object) -> BenchmarkResult:
    options = {"limit": None, "batch_size": 2, "seed": 0, **options}
    return run_benchmark(model, build_tokenizer(), name, data_file=data_file, **options)  # type: ignore[arg-type]


def test_scores_of_known_answers_under_both_filters(problems: Path) -> None:
    result = run(scripted_llama([]), "gsm8k_0shot", problems)
    assert (result.name, result.task, result.shots, result.data) == ("gsm8k_0shot", "gsm8k_cot", 0, str(problems))
    assert (result.task_version, result.lm_eval_version[:4]) == ("3.0", "0.4.")
    assert len(result.data_digest) == 64
    assert {(score.metric, score.filter): score.value for score in result.scores} == {
        ("exact_match", "strict-match"): 0.25,
        ("exact_match", "flexible-extract"): 0.5,
    }
    for score in result.scores:
        correct = [sample.correct for sample in result.samples if sample.filter == score.filter]
        assert score.samples == len(correct) == 4
        assert score.value == sum(correct) / 4
        assert score.standard_error == pytest.approx(standard_error_of_share(correct))


def test_samples_keep_what_was_written_and_what_was_taken(problems: Path) -> None:
    samples = {(s.doc_id, s.filter): s for s in run(scripted_llama([]), "gsm8k_0shot", problems).samples}
    assert len(samples) == 8
    strict, flexible = samples[1, "strict-match"], samples[1, "flexible-extract"]
    assert (strict.target, strict.output, strict.answer, strict.correct) == (
        "1,234",
        ANSWERS["bob"],
        "[invalid]",
        False,
    )
    assert (flexible.output, flexible.answer, flexible.correct) == (ANSWERS["bob"], "1,234.", True)
    # What comes after the stop string is not part of the answer.
    assert samples[2, "flexible-extract"].output == " The answer is 12.\n\n"
    assert samples[2, "flexible-extract"].answer == "12."


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
    assert [sample.doc_id for sample in first.samples] == [0, 0]
    assert all(score.samples == 1 and score.standard_error is None for score in first.scores)


def test_a_limit_above_the_number_of_problems_takes_all(problems: Path) -> None:
    assert {s.samples for s in run(scripted_llama([]), "gsm8k_0shot", problems, limit=99).scores} == {4}


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
    run_benchmark(model, tokenizer, "gsm8k_0shot", data_file=problems, limit=2, batch_size=2, seed=0)
    assert before == (random.getstate(), torch.get_rng_state().tolist(), logging.getLogger("lm_eval").level)
    assert capfd.readouterr() == ("", "")
    assert list(folder.iterdir()) == []
    assert [path.name for path in problems.parent.iterdir()] == [problems.name]
    assert model.training
    assert tokenizer.pad_token is None


def test_progress_reaches_the_end(problems: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = build_llama(layers=1)
    run(model, "gsm8k_0shot", problems, limit=3, on_progress=lambda *call: calls.append(call))
    assert calls == [(2, 3), (3, 3)]


def test_real_problems_through_lm_eval(real_data: Path) -> None:
    model = build_llama(layers=2, max_position_embeddings=8192)
    result = run(model, "gsm8k", real_data / "gsm8k" / "test.jsonl", limit=2)
    assert [sample.target for sample in result.samples if sample.filter == "strict-match"] == ["18", "3"]
    assert [score.value for score in result.scores] == [0.0, 0.0]
    assert all(sample.output for sample in result.samples)


def test_the_gold_answers_of_real_problems_are_found_right(real_data: Path) -> None:
    """lm-eval's flexible filter takes the last number, which in a gold solution is the answer."""
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


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(EvaluationError, match="no benchmark named 'gsmk8'") as caught:
        find_benchmark("gsmk8")
    assert caught.value.hint is not None
    assert "gsm8k" in caught.value.hint
    assert all(name in str(caught.value.expected) for name in BENCHMARKS)


def test_a_name_like_no_other_is_an_error_without_a_guess(problems: Path) -> None:
    with pytest.raises(EvaluationError, match="no benchmark") as caught:
        run(build_llama(layers=1), "zzz", problems)
    assert caught.value.hint is None


@pytest.mark.parametrize("key", ["limit", "batch_size"])
def test_a_number_below_one_is_an_error(problems: Path, key: str) -> None:
    with pytest.raises(EvaluationError, match="too small") as caught:
        run(build_llama(layers=1), "gsm8k", problems, **{key: 0})
    assert caught.value.key == key


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
    with pytest.raises(EvaluationError, match="longer than the model's context") as caught:
        run(model, "gsm8k", problems, limit=1)
    assert caught.value.key == "problem 0"
    assert "512" in str(caught.value.expected)


def test_the_names_are_there_without_torch() -> None:
    code = (
        "import sys; from mftctl.evaluation.benchmarks import BENCHMARKS; assert 'gsm8k' in BENCHMARKS;"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
