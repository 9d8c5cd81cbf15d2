"""Converts the published layouts of benchmark data to the layout that the prompts use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from mftctl.data.files import Record
from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.catalog import completion_form
from mftctl.evaluation.benchmarks.evalplus import humaneval_plus_problem, is_release_record, mbpp_plus_problem

_MMLU_CHOICES = ("choice0", "choice1", "choice2", "choice3")


def from_published_layout(found: Iterable[Record], task: str) -> Iterable[Record]:
    """The records with the fields that the benchmark's prompt uses; records of other tasks are unchanged.

    Args:
        found: Records as published, each with its location.
        task: Name of the benchmark.

    Raises:
        EvaluationError: A record's BIG-Bench Hard task is unknown, or there is no few-shot example in its language.
    """
    if task == "tydiqa":
        return _with_example_passages(found)
    convert = {
        "math": _math,
        "humaneval_plus": _humaneval_plus,
        "mbpp": _mbpp,
        "mbpp_plus": _mbpp_plus,
        "mmlu": _mmlu,
        "bbh": _bbh,
    }.get(completion_form(task))
    return found if convert is None else (Record(where, convert(record, where)) for where, record in found)


def _math(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """MATH-500 calls the type `subject`."""
    return {"type": record["subject"], **record} if "subject" in record else dict(record)


def _humaneval_plus(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Converts EvalPlus release records, whose `test` may contain only HumanEval's few tests."""
    return humaneval_plus_problem(record, where) if is_release_record(record) else dict(record)


def _mbpp(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """MBPP+ calls the text `prompt`."""
    return {"text": record.get("prompt"), **record}


def _mbpp_plus(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    return mbpp_plus_problem(record, where) if is_release_record(record) else _mbpp(record, where)


def _mmlu(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The hub has `subject` and `choices`; the original CSV files have the subject as name and a column per choice."""
    if not set(_MMLU_CHOICES) <= set(record):
        return dict(record)
    answer = record.get("answer")
    return {
        "subject": str(record.get("file", "")).removesuffix("_test"),
        "question": record.get("question"),
        "choices": [record[name] for name in _MMLU_CHOICES],
        "answer": int(answer) if isinstance(answer, str) and answer.isdecimal() else answer,
    }


def _bbh(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The task is the file's name; its few-shot examples come with lm-eval."""
    subtask = record.get("subtask", record.get("file"))
    examples = _bbh_examples().get(str(subtask))
    if examples is None:
        raise EvaluationError(
            "The record is not from a BIG-Bench Hard task.",
            path=where,
            key="subtask",
            expected=f"one of {', '.join(sorted(_bbh_examples()))}",
            actual=subtask,
        )
    return {**record, "subtask": subtask, "examples": examples}


@cache
def _bbh_examples() -> dict[str, str]:
    """The description and the few-shot examples of each task."""
    from mftctl.evaluation.benchmarks.lm_eval_tasks import folder_configs

    return {
        config["dataset_name"]: config["description"]
        + "".join(
            f"Q: {example['input']}\nA: Let's think step by step.\n{example['target']}\n\n"
            for example in config["fewshot_config"]["samples"]
        )
        for config in folder_configs("bbh/cot_fewshot")
    }


def _with_example_passages(found: Iterable[Record]) -> Iterator[Record]:
    """Each question of TyDiQA's gold-passage task, with a one-shot example in the same language.

    The example is the first record in the language with a different passage.

    Deviation: the example comes from the same file, because a data file is a single split.
    """
    rows = [(where, _tydiqa(record)) for where, record in found]
    by_language: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, row in rows:
        by_language[row["language"]].append(row)
    for where, row in rows:
        others = (other for other in by_language[row["language"]] if other["context"] != row["context"])
        example = next(others, None)
        if example is None:
            raise EvaluationError(
                "A question has no few-shot example in its language.",
                path=where,
                key="id",
                expected="a second passage in the same language",
                actual=f"one passage in {row['language']}",
            )
        shown = (example["answers"] or [""])[0]
        text = f"Passage: {example['context']}\nQuestion: {example['question']}\nAnswer: {shown}\n\n"
        yield Record(where, {**row, "example": text})


def _tydiqa(record: Mapping[str, Any]) -> dict[str, Any]:
    """The language is the first part of the record's id, such as `finnish-12-0`."""
    answers = record.get("answers")
    return {
        **record,
        "language": str(record.get("id", "")).partition("-")[0],
        "context": str(record.get("context", "")),
        "question": str(record.get("question", "")),
        "answers": answers.get("text") if isinstance(answers, dict) else answers,
    }
