"""IFEval on answers with known verdicts, and compared with lm-eval's checker on every kind of instruction."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest

from mftctl.errors import EvaluationError, MissingDataError
from mftctl.evaluation.benchmarks.problems import read_problems
from mftctl.evaluation.benchmarks.result import BenchmarkResult
from mftctl.evaluation.benchmarks.run import run_benchmark
from mftctl.evaluation.benchmarks.sentence_data import check_sentence_data, fetch_sentence_data
from mftctl.evaluation.lm.hf import WrittenAnswers


@pytest.fixture
def sentence_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK's data, shipped with the test requirement llama-index-core."""
    import nltk

    found = importlib.util.find_spec("llama_index")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llama-index-core, which carries NLTK's data, is not installed")
    folder = Path(next(iter(found.submodule_search_locations))) / "core" / "_static" / "nltk_cache"
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    check_sentence_data()


def score(path: Path, outputs: list[str]) -> BenchmarkResult:
    from mftctl.evaluation.benchmarks.lm_eval_tasks import task_config
    from mftctl.evaluation.benchmarks.local_task import build_task

    problems = read_problems(path, "ifeval")
    task = build_task(task_config("ifeval"), problems, is_local=True)
    answers = WrittenAnswers([[output] for output in outputs])
    return run_benchmark(answers, task, problems, limit=len(outputs), chat_template=False, seed=0)


@pytest.mark.slow
def test_known_answers_by_prompt_and_by_instruction_strict_and_loose(sentence_data: None, tmp_path: Path) -> None:
    asked = {
        "key": 1,
        "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, {}],
    }
    path = tmp_path / "i.jsonl"
    path.write_text(f"{json.dumps(asked)}\n" * 3)
    result = score(path, ["all of it is kept here", "Half, of it", "Sure!\nall of it is kept here"])
    assert {s.metric: s.value for s in result.scores} == pytest.approx(
        {
            "prompt_level_strict_acc": 1 / 3,
            "inst_level_strict_acc": 3 / 6,
            "prompt_level_loose_acc": 2 / 3,
            "inst_level_loose_acc": 4 / 6,
        }
    )
    assert result.samples[0].weights == {"inst_level_strict_acc,none": 2, "inst_level_loose_acc,none": 2}
    assert all(s.standard_error is not None and s.standard_error > 0 for s in result.scores)


@pytest.mark.slow
def test_every_kind_of_instruction_as_lm_evals_checker_judges_it(sentence_data: None, real_data: Path) -> None:
    from lm_eval.tasks.ifeval import utils as checker

    path = real_data / "ifeval" / "input_data.jsonl"
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = ["", "Yes, it is so.", "<<title>>\n\n* one\n* two\n\nP.S. *three* [name]", '"all of it"', '{"a": 1}']
    outputs = [
        texts[number % len(texts)] + (problem["prompt"] if number % 3 else "")
        for number, problem in enumerate(problems)
    ]
    result = score(path, outputs)
    kinds = set()
    for problem, output, sample in zip(problems, outputs, result.samples, strict=True):
        kinds.update(problem["instruction_id_list"])
        asked = checker.InputExample(
            problem["key"], problem["instruction_id_list"], problem["prompt"], problem["kwargs"]
        )
        random.seed(0)  # same seed as for our checker: some instructions draw their keywords
        strict = checker.test_instruction_following_strict(asked, output)
        loose = checker.test_instruction_following_loose(asked, output)
        assert sample.scores == {
            "prompt_level_strict_acc,none": strict.follow_all_instructions,
            "inst_level_strict_acc,none": sum(strict.follow_instruction_list),
            "prompt_level_loose_acc,none": loose.follow_all_instructions,
            "inst_level_loose_acc,none": sum(loose.follow_instruction_list),
        }
    assert len(kinds) == 25


def test_missing_sentence_data_is_an_error_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_: pytest.fail("fetched"))
    with pytest.raises(EvaluationError, match="NLTK's sentence data") as caught:
        check_sentence_data()
    assert "NLTK_DATA" in str(caught.value.hint)
    assert "mftctl data fetch ifeval" in str(caught.value.hint)


def test_sentence_data_that_cannot_be_downloaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.downloader._downloader, "_url", "http://127.0.0.1:9/index.xml")
    with pytest.raises(MissingDataError, match="cannot be downloaded") as caught:
        fetch_sentence_data()
    assert str(caught.value.actual).startswith("Error loading punkt_tab")
