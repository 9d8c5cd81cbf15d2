from __future__ import annotations

from typing import Any

import pytest

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.catalog import BENCHMARKS
from mftctl.evaluation.benchmarks.problem_fields import check_problem, decided_by

SOUND: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "1+1?", "answer": "#### 2"},
    "math": {"problem": "1+1?", "solution": r"\boxed{2}"},
    "humaneval": {"task_id": "H/0", "prompt": "def f():", "entry_point": "f", "test": "def check(f): ..."},
    "mbpp": {"text": "Add.", "code": "def f(): ...", "test_list": ["assert f()"]},
    "mbpp_plus": {"text": "Add.", "code": "def f(): ...", "test_list": ["assert f()"], "test": "assert f()"},
    "ifeval": {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "alpaca_eval": {"instruction": "Write."},
    "mmlu": {"subject": "anatomy", "question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 3},
    "bbh": {"subtask": "snarks", "examples": "Q: ...", "input": "Which?", "target": "(A)"},
    "tydiqa": {"example": "Passage: ...", "context": "Red.", "question": "Which?", "answers": ["red"]},
    "truthfulqa_mc2": {"question": "Is it?", "mc2_targets": {"choices": ["yes", "no"], "labels": [1, 0]}},
}
SOUND |= {f"{name}_instruct": SOUND[name] for name in ("mbpp", "mbpp_plus", "humaneval")}
SOUND |= {"humaneval_plus_instruct": SOUND["humaneval"]}
SOUND |= {"gsm8k_0shot": SOUND["gsm8k"], "math_0shot": SOUND["math"], "humaneval_plus": SOUND["humaneval"]}
CASES = [(name, field) for name, record in SOUND.items() for field in record]


def test_every_benchmark_is_here() -> None:
    assert set(SOUND) == set(BENCHMARKS)


@pytest.mark.parametrize("name", SOUND)
def test_only_required_fields_are_kept(name: str) -> None:
    assert check_problem({**SOUND[name], "file": "x", "more": 1}, name, "a:1") == SOUND[name]
    assert set(decided_by(name)) == set(SOUND[name])


@pytest.mark.parametrize(("name", "field"), CASES)
def test_a_missing_or_wrong_field_is_named_with_its_place(name: str, field: str) -> None:
    for record in ({k: v for k, v in SOUND[name].items() if k != field}, {**SOUND[name], field: None}):
        with pytest.raises(EvaluationError, match="lacks a required field") as caught:
            check_problem(record, name, "a.jsonl:7")
        assert (caught.value.path, caught.value.key) == ("a.jsonl:7", field)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gsm8k", "answer", "2"),
        ("math", "solution", "2"),
        ("mmlu", "answer", True),
        ("mmlu", "answer", 4),
        ("mmlu", "choices", ["a", "b"]),
        ("ifeval", "kwargs", [1]),
        ("truthfulqa_mc2", "mc2_targets", {"choices": ["a", "b"], "labels": [1, 1]}),
        ("truthfulqa_mc2", "mc2_targets", {"choices": ["a", "b"], "labels": [1]}),
        ("mbpp", "test_list", []),
    ],
)
def test_a_value_that_cannot_be_scored(name: str, field: str, value: object) -> None:
    with pytest.raises(EvaluationError, match="lacks a required field") as caught:
        check_problem({**SOUND[name], field: value}, name, "a:1")
    assert caught.value.key == field


def test_all_fields_of_other_tasks_are_kept() -> None:
    assert check_problem({"file": "x", "a": 1}, "hellaswag", "a:1") == {"a": 1}
    assert decided_by("hellaswag") == ()
