"""EvalPlus's own release files of HumanEval+ and MBPP+, which contain inputs and a solution in place of tests.

Source: github.com/evalplus/evalplus, releases of `humanevalplus_release` and `mbppplus_release`. The canonical solution
provides the expected results; a few functions with more than one right result have their own rules.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import chain
from typing import Any

from mftctl.errors import EvaluationError

_RULES = {
    "humaneval_plus": {"find_zero": "root"},
    "mbpp_plus": {
        "are_equivalent": "any truth",
        "sum_div": "or zero",
        "surface_Area": "upright height",
        "digit_distance_nums": "padded digits",
        **dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), "is there"),
        **dict.fromkeys(
            (
                "similar_elements",
                "find_char_long",
                "common_in_nested_lists",
                "extract_singly",
                "larg_nnum",
                "intersection_array",
                "find_dissimilar",
                "Diff",
            ),
            "any order",
        ),
    },
}
"""Comparison rules in place of equality with the canonical result, for the functions for which EvalPlus has one too."""

Arguments = Sequence[Any]


def is_release_record(record: Mapping[str, Any]) -> bool:
    """True if a record comes from a release file.

    Args:
        record: A HumanEval+ or MBPP+ record.
    """
    return "plus_input" in record


def humaneval_plus_problem(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The problem of a release record, with a test on all its inputs.

    Args:
        record: A record of `HumanEvalPlus.jsonl.gz`, `HumanEvalPlus-Mini.jsonl.gz` and the like.
        where: Its location, for the error.

    Raises:
        EvaluationError: A field is missing or invalid.
    """
    _check(record, where)
    reference = f"{record['prompt']}{record['canonical_solution']}"
    inputs = [*record["base_input"], *record["plus_input"]]
    call = _comparison("candidate", record, reference, inputs, "humaneval_plus")
    return {**record, "reference": reference, "test": f"def check(candidate):\n    {call}\n"}


def mbpp_plus_problem(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The problem of a release record, with a test on all its inputs.

    Args:
        record: A record of `MbppPlus.jsonl.gz`, `MbppPlus-NoExtreme.jsonl.gz` and the like.
        where: Its location, for the error.

    Raises:
        EvaluationError: A field is missing or invalid.
    """
    _check(record, where)
    name, reference = str(record["entry_point"]), str(record["canonical_solution"])
    shape = _shape(str(record["task_id"]))
    try:
        inputs = [shape(arguments) for arguments in chain(record["base_input"], record["plus_input"])]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise EvaluationError(
            "An input has the wrong type for this problem.", path=where, key="plus_input", actual=str(error)
        ) from error
    text, shown = _text_and_assertions(str(record["prompt"]))
    return {
        "task_id": record["task_id"],
        "text": text,
        "code": reference,
        "entry_point": name,
        "reference": reference,
        "test_list": _statements(str(record.get("assertion") or "")) or shown,
        "test": _comparison(name, record, reference, inputs, "mbpp_plus") + "\n",
    }


def comparison_source() -> str:
    """The source that is prepended to the generated tests."""
    return files("mftctl.evaluation.benchmarks").joinpath("output_checks.py").read_text(encoding="utf-8")


def _check(record: Mapping[str, Any], where: str) -> None:
    kinds: dict[str, tuple[type | tuple[type, ...], str]] = {
        "task_id": (str, "text"),
        "prompt": (str, "text"),
        "entry_point": (str, "the name of a function"),
        "canonical_solution": (str, "the source of the solution"),
        "base_input": (list, "a list of lists of arguments"),
        "plus_input": (list, "a list of lists of arguments"),
        "atol": ((int, float), "a number"),
    }
    for field, (kind, expected) in kinds.items():
        value = record.get(field)
        # An MBPP+ problem without additional inputs has an empty object.
        lists = value == {} or (isinstance(value, list) and all(isinstance(each, list) for each in value))
        if not (lists if field.endswith("_input") else isinstance(value, kind)):
            raise EvaluationError(
                "A record of an EvalPlus release lacks a required field, or its value is invalid.",
                path=where,
                key=field,
                expected=expected,
                actual=type(value).__name__ if field in record else f"only the fields {sorted(set(record) - {'file'})}",
            )
    if not record["base_input"] and not record["plus_input"]:
        raise EvaluationError("A problem has no test inputs.", path=where, key="base_input")


def _comparison(
    function: str, record: Mapping[str, Any], reference: str, inputs: Sequence[Arguments], benchmark: str
) -> str:
    name = str(record["entry_point"])
    rule = _RULES[benchmark].get(name, "")
    parts = (function, repr(reference), repr(name), repr(inputs), repr(record["atol"]), repr(rule))
    return f"check_outputs({', '.join(parts)})"


def _text_and_assertions(prompt: str) -> tuple[str, list[str]]:
    """The description and the assertions of a prompt, which is a docstring."""
    body = prompt.strip().strip("\"'").strip()
    text, _, shown = body.partition("\nassert ")
    return text.strip(), _statements(f"assert {shown}") if shown else []


def _statements(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    found = [ast.get_source_segment(source, statement) or "" for statement in tree.body]
    return [statement for statement in found if statement.startswith("assert")]


def _tuples(value: Any, depth: int) -> Any:
    """The value with lists at a given depth converted to tuples: 0 is the value itself, 1 its items."""
    if depth == 0:
        return tuple(value) if isinstance(value, list) else value
    return [_tuples(item, depth - 1) for item in value] if isinstance(value, list) else value


def _tuple_of_all(value: Any) -> Any:
    return tuple(_tuple_of_all(item) for item in value) if isinstance(value, list) else value


def _all_tuples(arguments: Arguments) -> Arguments:
    return [_tuple_of_all(argument) for argument in arguments]


def _each(depth: int) -> Callable[[Arguments], Arguments]:
    """Converts the lists at a given depth of every argument to tuples."""
    return lambda arguments: [_tuples(argument, depth) for argument in arguments]


def _one(place: int, depth: int) -> Callable[[Arguments], Arguments]:
    """Converts the lists at a given depth of one argument to tuples."""
    return lambda arguments: [
        _tuples(argument, depth) if n == place else argument for n, argument in enumerate(arguments)
    ]


def _tuples_of_tuples(arguments: Arguments) -> Arguments:
    return [_tuples(_tuples(argument, 1), 0) for argument in arguments]


def _sets_or_empty(arguments: Arguments) -> Arguments:
    return [[set(item) if item else {} for item in arguments[0]]]


def _with_complex(arguments: Arguments) -> Arguments:
    return [float(arguments[0]), complex(arguments[1])]


def _complex(arguments: Arguments) -> Arguments:
    return [complex(arguments[0])]


def _dict_of_tuples(arguments: Arguments) -> Arguments:
    return [{key: tuple(value) for key, value in arguments[0].items()}, *arguments[1:]]


_Numbers = Iterable[int]
_SHAPES: tuple[tuple[_Numbers, Callable[[Arguments], Arguments]], ...] = (
    (
        (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
        _each(0),
    ),
    ((63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780), _each(1)),
    ((75, 413, 444, 753), _one(0, 1)),
    ((106, 750), _one(1, 0)),
    ((250, 307, 405, 446, 617, 720, 763, 808), _one(0, 0)),
    ((259, 278, 401, 445), _tuples_of_tuples),
    ((580, 615, 791), _all_tuples),
    ((115,), _sets_or_empty),
    ((124,), _with_complex),
    ((252,), _complex),
    ((722,), _dict_of_tuples),
)
"""Input conversions by MBPP problem number, since JSON has no tuples, sets or complex numbers."""


def _shape(task_id: str) -> Callable[[Arguments], Arguments]:
    digits = task_id.rpartition("/")[2]
    number = int(digits) if digits.isdecimal() else -1
    return next((shape for numbers, shape in _SHAPES if number in numbers), list)
