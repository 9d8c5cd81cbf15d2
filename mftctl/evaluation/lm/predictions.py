"""Reads existing predictions, from mftctl or another tool, to score them without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.published_data import read_problem_records

_NAMES = ("task_id", "key", "id")
"""Fields that may identify a problem, as in the samples of an evaluation."""
_OUTPUTS = ("output", "completion", "response", "solution")


def read_predictions(path: Path, problems: Sequence[Mapping[str, Any]], *, limit: int | None) -> list[list[str]]:
    """The outputs of each problem, in the order of the problems; the same number for each.

    A record identifies its problem by `task_id`, `key` or `id` (the problem's own, or else its position from 0). Its
    text is in `output`, `completion`, `response` or `solution`, or several texts are in `outputs`. Records of the same
    problem are its samples.

    Args:
        path: JSON lines: the samples of an evaluation, or a file from another tool.
        problems: The benchmark's problems.
        limit: Number of problems, from the first; None for all.

    Raises:
        EvaluationError: A record has no identifier or no output, or identifies an unknown problem, or problems are
            missing or differ in their number of outputs.
    """
    asked = problems[:limit]
    places = {name: place for place, problem in enumerate(asked) for name in _names(problem, place)}
    outputs: list[list[str]] = [[] for _ in asked]
    for where, record in read_problem_records(path):
        name = next((str(record[field]) for field in _NAMES if field in record), None)
        if name not in places:
            raise EvaluationError(
                "A prediction does not match any problem of the benchmark.",
                path=where,
                key=" or ".join(_NAMES),
                expected=f"one of {len(asked)} problems, such as {next(iter(places), '0')}",
                actual=name or f"only the fields {sorted(set(record) - {'file'})}",
            )
        outputs[places[name]] += _texts(record, where)
    _check_numbers(outputs, asked, path)
    return outputs


def problem_name(problem: Mapping[str, Any], place: int) -> str:
    """The name of a problem: its own, or else its position.

    Args:
        problem: A benchmark problem.
        place: Its position, from 0.
    """
    return _names(problem, place)[0]


def _names(problem: Mapping[str, Any], place: int) -> list[str]:
    named = [str(problem[field]) for field in _NAMES if field in problem]
    return named or [str(place)]


def _texts(record: Mapping[str, Any], where: str) -> list[str]:
    found = record.get("outputs", [record.get(field) for field in _OUTPUTS if field in record])
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise EvaluationError(
            "A prediction has no output.",
            path=where,
            key=" or ".join((*_OUTPUTS, "outputs")),
            expected="a text, or a list of texts",
            actual=f"only the fields {sorted(set(record) - {'file'})}",
        )
    return found


def _check_numbers(outputs: Sequence[Sequence[str]], asked: Sequence[Mapping[str, Any]], path: Path) -> None:
    for place, written in enumerate(outputs):
        if len(written) != len(outputs[0]) or not written:
            raise EvaluationError(
                "The number of predictions differs between problems.",
                path=path,
                key=f"problem {problem_name(asked[place], place)}",
                expected=f"{max(len(outputs[0]), 1)} per problem",
                actual=len(written),
                hint="use the --limit that the predictions were generated with" if not written else None,
            )
