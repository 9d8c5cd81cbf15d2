from __future__ import annotations

from typing import Any

import pytest

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.problem_layouts import from_published_layout


def one(record: dict[str, Any], task: str) -> dict[str, Any]:
    ((where, found),) = from_published_layout([("a:1", record)], task)
    assert where == "a:1"
    return found


def test_mbpp_plus_calls_the_text_a_prompt() -> None:
    assert one({"prompt": "Add."}, "mbpp_plus")["text"] == "Add."
    assert one({"text": "Add.", "prompt": "no"}, "mbpp")["text"] == "Add."


def test_mmlu_from_the_csv_files_and_from_the_hub() -> None:
    row = {"file": "anatomy_test", "question": "Which?", "answer": "2", **{f"choice{n}": str(n) for n in range(4)}}
    hub = {"subject": "anatomy", "question": "Which?", "choices": ["0", "1", "2", "3"], "answer": 2}
    assert one(row, "mmlu") == one(hub, "mmlu") == hub


def test_a_hard_task_is_named_by_its_file_and_gets_its_examples() -> None:
    found = one({"file": "snarks", "input": "Which?", "target": "(A)"}, "bbh")
    assert found["subtask"] == "snarks"
    assert found["examples"].count("A: Let's think step by step.\n") == 3


def test_an_unknown_hard_task() -> None:
    with pytest.raises(EvaluationError, match="not from a BIG-Bench Hard task") as caught:
        one({"file": "chess", "input": "?", "target": "!"}, "bbh")
    assert (caught.value.path, caught.value.actual) == ("a:1", "chess")


def test_a_question_without_another_passage_in_its_language() -> None:
    row = {"id": "thai-1", "context": "a", "question": "b", "answers": {"text": ["c"]}}
    with pytest.raises(EvaluationError, match="no few-shot example"):
        one(row, "tydiqa")


@pytest.mark.parametrize("task", ["humaneval_plus", "humaneval_plus_instruct"])
def test_a_release_file_is_tested_on_its_inputs_and_not_on_humanevals_few(task: str) -> None:
    record = {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "canonical_solution": "    return x\n",
        "entry_point": "f",
        "test": "humaneval's",
        "base_input": [[1]],
        "plus_input": [[2]],
        "atol": 0,
    }
    assert "[[1], [2]]" in one(record, task)["test"]
    published = {"task_id": "HumanEval/0", "test": "all"}
    assert one(published, task) == published


def test_other_tasks_are_left_as_they_are() -> None:
    assert one({"question": "?"}, "gsm8k") == {"question": "?"}
