from __future__ import annotations

import math
from typing import Any

import pytest

from mftctl.evaluation.benchmarks.output_checks import (
    can_cross,
    check_outputs,
    padded_digit_distance,
    same,
    upright_pyramid_surface,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("found", "expected", "tolerance"),
    [
        (3, 3, 0),
        (1.0, 1, 0),
        ("a", "a", 0),
        (1.0000001, 1.0, 0),
        ([1.0000001, 2.0], [1.0, 2.0], 0),
        ((1.0000001,), (1.0,), 0),
        (1.00009, 1.0, 1e-4),
        ([(1.00009, 2)], [(1.0, 2)], 1e-4),
        (1e12 + 1000, 1e12, 0),
        (NAN, NAN, 0),
        ([NAN, 1.0], [NAN, 1.0], 0),
        (math.inf, math.inf, 0),
    ],
)
def test_a_right_result(found: Any, expected: Any, tolerance: float) -> None:
    assert same(found, expected, tolerance)


@pytest.mark.parametrize(
    ("found", "expected", "tolerance"),
    [
        (3, 4, 0),
        (None, 1.0, 0),
        (None, None.__class__, 0),
        ("1.0", 1.0, 0),
        (1.00001, 1.0, 0),
        (1.0002, 1.0, 1e-4),
        ([1.0], (1.0,), 1e-4),
        ([1.0], [1.0, 2.0], 1e-4),
        ([1.0000001, 2], [1.0, 2], 0),
        (True, 1.0000001, 0),
        (1.0, NAN, 0),
        (math.inf, -math.inf, 1e-4),
        ("b", "a", 1e-4),
    ],
)
def test_a_wrong_result(found: Any, expected: Any, tolerance: float) -> None:
    assert not same(found, expected, tolerance)


def outcome(function: Any, reference: str, inputs: list[list[Any]], rule: str = "", tolerance: float = 0) -> bool:
    try:
        check_outputs(function, reference, "f", inputs, tolerance, rule)
    except (AssertionError, TypeError):
        return False
    return True


@pytest.mark.parametrize(
    ("rule", "reference", "right", "wrong"),
    [
        ("any order", "def f(x): return [1, 2]", lambda x: (2, 1), lambda x: [1]),
        ("is there", "def f(x): return 'match'", lambda x: True, lambda x: None),
        ("is there", "def f(x): return 'match'", lambda x: object(), lambda x: False),
        ("is there", "def f(x): return None", lambda x: None, lambda x: object()),
        ("any truth", "def f(x): return True", lambda x: False, lambda x: None),
        ("or zero", "def f(x): return 7", lambda x: 0, lambda x: None),
        ("upright height", "def f(b, h): return 33", lambda b, h: 35, lambda b, h: 34),
        ("padded digits", "def f(a, b): return 1", lambda a, b: 2, lambda a, b: 3),
    ],
)
def test_a_rule_accepts_other_correct_results(rule: str, reference: str, right: Any, wrong: Any) -> None:
    inputs = {"upright height": [[3, 4]], "padded digits": [[12, 1]]}.get(rule, [[1]])
    assert outcome(right, reference, inputs, rule)
    assert not outcome(wrong, reference, inputs, rule)


def test_any_root_is_accepted() -> None:
    reference = "def poly(xs, x): return sum(c * x**i for i, c in enumerate(xs))\ndef f(xs): return -1.0"
    assert outcome(lambda xs: 1.0, reference, [[[-1, 0, 1]]], "root", 1e-4)
    assert not outcome(lambda xs: 1.1, reference, [[[-1, 0, 1]]], "root", 1e-4)


def test_solution_and_answer_get_separate_copies_of_the_input() -> None:
    inputs = [[[1, 2]]]
    assert outcome(lambda xs: xs.pop(), "def f(xs): return xs.pop()", inputs)
    assert inputs == [[[1, 2]]]


def test_every_input_counts() -> None:
    assert not outcome(lambda x: 1, "def f(x): return x", [[1], [1], [2]])


@pytest.mark.slow
def test_a_result_that_cannot_cross_is_left_out_and_no_other() -> None:
    reference = "def f(n): return [''] * n"
    assert outcome(lambda n: [""] * n if n < 9 else pytest.fail("asked"), reference, [[2], [5 * 10**6]])
    assert not outcome(lambda n: [], reference, [[2], [5 * 10**6]])
    assert can_cross({"a": [1, (2.0, "b"), {3}], "b": 10**1000})
    assert not can_cross({"a" * 2**25: 1})


def test_the_other_readings_of_two_problems() -> None:
    assert upright_pyramid_surface(6, 4) == 36 + 4 * (6 * 5 // 2)
    assert padded_digit_distance(123, 256) == 1 + 3 + 3
    assert padded_digit_distance(1, 20) == 2 + 1
