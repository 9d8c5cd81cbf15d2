"""The fields that each benchmark requires of a record, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.catalog import completion_form
from mftctl.evaluation.exact_match import MARKER

_Check = tuple[str, Callable[[Any], bool]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


TEXT: _Check = ("non-empty text", _is_text)
TEXTS: _Check = ("a list of texts", _is_texts)
FOUR_TEXTS: _Check = ("four texts", lambda value: _is_texts(value) and len(value) == 4)
LETTER: _Check = ("0, 1, 2 or 3", lambda value: type(value) is int and 0 <= value <= 3)
GOLD: _Check = (f"a last line like '{MARKER} 18'", lambda value: _is_text(value) and MARKER in value)
BOXED: _Check = (
    r"a solution with its answer in a \boxed{}",
    lambda value: _is_text(value) and ("\\boxed" in value or "\\fbox" in value),
)
KWARGS: _Check = (
    "a list of objects",
    lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value),
)
CHOICES: _Check = (
    "choices and the same number of labels, 0 or 1, with at least one of each",
    lambda value: (
        isinstance(value, dict)
        and _is_texts(value.get("choices"))
        and len(value.get("labels") or ()) == len(value["choices"])
        and set(value["labels"]) == {0, 1}
    ),
)

_MATHS = {"problem": TEXT, "solution": BOXED}
_CODE = {"task_id": TEXT, "prompt": TEXT, "entry_point": TEXT, "test": TEXT}
_FIELDS: Mapping[str, Mapping[str, _Check]] = {
    "gsm8k": {"question": TEXT, "answer": GOLD},
    "gsm8k_0shot": {"question": TEXT, "answer": GOLD},
    "math": _MATHS,
    "math_0shot": _MATHS,
    "humaneval": _CODE,
    "humaneval_plus": _CODE,
    "mbpp": {"text": TEXT, "code": TEXT, "test_list": TEXTS},
    "mbpp_plus": {"text": TEXT, "code": TEXT, "test_list": TEXTS, "test": TEXT},
    "ifeval": {"prompt": TEXT, "instruction_id_list": TEXTS, "kwargs": KWARGS},
    "alpaca_eval": {"instruction": TEXT},
    "mmlu": {"subject": TEXT, "question": TEXT, "choices": FOUR_TEXTS, "answer": LETTER},
    "bbh": {"subtask": TEXT, "examples": TEXT, "input": TEXT, "target": TEXT},
    "tydiqa": {"example": TEXT, "context": TEXT, "question": TEXT, "answers": TEXTS},
    "truthfulqa_mc2": {"question": TEXT, "mc2_targets": CHOICES},
}
_MORE = {
    "math": ("type",),
    "humaneval": ("canonical_solution",),
    "humaneval_plus": ("canonical_solution", "reference"),
    "mbpp": ("task_id", "test_setup_code"),
    "mbpp_plus": ("task_id", "test_imports", "entry_point", "reference"),
    "ifeval": ("key",),
    "alpaca_eval": ("dataset", "output", "generator"),
    "tydiqa": ("id", "language"),
}
"""Optional fields, kept if present."""


def decided_by(task: str) -> tuple[str, ...]:
    """The fields on which a score depends; empty for lm-eval tasks.

    Args:
        task: Name of the benchmark.
    """
    return tuple(_FIELDS.get(completion_form(task), ()))


def check_problem(record: Mapping[str, Any], task: str, where: str) -> dict[str, Any]:
    """The record reduced to the fields that the benchmark uses; all fields for lm-eval tasks.

    Args:
        record: One problem.
        task: Name of the benchmark.
        where: Location of the record, for the error.

    Raises:
        EvaluationError: A field is missing or invalid; the error names the field and the location.
    """
    task = completion_form(task)
    if task not in _FIELDS:
        return {key: value for key, value in record.items() if key != "file"}
    for field, (expected, fits) in _FIELDS[task].items():
        if field not in record or not fits(record[field]):
            raise EvaluationError(
                "A record lacks a required field, or its value is invalid.",
                path=where,
                key=field,
                expected=expected,
                actual=_shown(record[field])
                if field in record
                else f"only the fields {sorted(set(record) - {'file'})}",
            )
    kept = {field: record[field] for field in _FIELDS[task]}
    return kept | {field: record[field] for field in _MORE.get(task, ()) if field in record}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"
