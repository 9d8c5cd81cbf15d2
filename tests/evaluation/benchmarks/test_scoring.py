from __future__ import annotations

import gzip
import json
import time
from itertools import islice
from pathlib import Path

import pytest

from mftctl.evaluation.benchmarks.scoring import (
    has_long_line,
    is_too_long,
    length_scores,
    marked_answers,
    maths_scores,
    passage_scores,
)


def maths(gold: str, output: str) -> tuple[float, float]:
    scores = maths_scores({"solution": f"So it is $\\boxed{{{gold}}}$."}, [output])
    return scores["strict"], scores["flexible"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gold", "output", "expected"),
    [
        ("2", r"Thus \boxed{2}.", (1, 1)),
        ("2", "Final Answer: The final answer is $2$. I hope it is correct.", (1, 1)),
        ("2", "The answer is $2$.", (0, 1)),
        ("2", r"Thus \boxed{3}.", (0, 0)),
        (r"\frac{1}{2}", r"\boxed{\dfrac12}", (0, 1)),
        ("2", r"Final Answer: The final answer is $2$. I hope it is correct. \boxed\frac{1}{2}", (1, 1)),
        ("2", r"\boxed\frac{4}{2}", (0, 1)),
        (r"\frac{1}{2}", "So $0.5$", (0, 1)),
        ("(3,4)", r"\boxed{(3, 4)}", (1, 1)),
        ("(3,4)", r"\boxed{(4, 3)}", (0, 0)),
        ("2", "", (0, 0)),
    ],
)
def test_a_maths_answer(gold: str, output: str, expected: tuple[float, float]) -> None:
    strict, flexible = maths(gold, output)
    assert flexible == expected[1]
    assert strict <= flexible
    if expected != (0, 1):
        assert strict == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "output",
    [
        r"\boxed{" + "1" * 10**6 + "}",
        r"\boxed{" + "1," * 10**5 + "1}",
        r"\boxed{" + "(" * 10**5 + "}",
        r"\boxed{" + "9^" * 10**5 + "9}",
        r"\boxed{" + "x+" * 10**5 + "x}",
        "Final Answer: The final answer is $" + "1, " * 10**5 + "1$. I hope it is correct.",
        "1" * 10**6,
        "$" + "1+" * 10**5 + "1$",
    ],
    ids=lambda output: output[:12],
)
def test_a_huge_formula_is_wrong_at_once(output: str) -> None:
    """Such a formula with a million digits took 150 s and more."""
    start_seconds = time.process_time()
    assert maths("1", output) == (0, 0)
    assert is_too_long(output)
    assert time.process_time() - start_seconds < 10


def test_a_long_way_to_a_short_answer_is_not_too_long() -> None:
    output = "There are 12 apples, and 13 pears: 12 + 13 = 25.\n" * 1000 + r"\boxed{25}"
    assert not is_too_long(output)
    assert maths("25", output) == (1, 1)


def test_a_huge_sum_beside_the_answer_in_its_form() -> None:
    assert maths("2", "1+" * 10**4 + "1\n" + r"\boxed{2}") == (1, 1)


@pytest.mark.parametrize(
    "output",
    ["#### 1234", "So 4.\n#### 1,234", "####1234", "#### $1,234", "#### 1234.", "#### 1234.00", "#### +1234 pens\nQ"],
)
def test_a_right_answer_in_gsm8ks_own_form(output: str) -> None:
    assert marked_answers([[output]], [{"answer": "Why.\n#### 1,234"}]) == ["1,234"]


@pytest.mark.parametrize(
    ("output", "taken"),
    [
        ("The answer is 1,234.", "[invalid]"),
        ("1234", "[invalid]"),
        ("####\n1234", "[invalid]"),
        ("#### -1234", "-1234"),
        ("#### 123", "123"),
        ("#### 1234%", "1234%"),
        ("#### 7\nQ: Next?\n#### 1234", "7"),
    ],
)
def test_a_wrong_answer_or_another_form(output: str, taken: str) -> None:
    assert marked_answers([[output]], [{"answer": "Why.\n#### 1,234"}]) == [taken]


@pytest.mark.slow
def test_strict_and_flexible_agree_with_lm_evals_own_on_the_same_outputs(real_data: Path) -> None:
    from lm_eval.tasks.minerva_math import utils as minerva

    outputs = ["Final Answer: The final answer is {}. I hope it is correct.", r"It is $\boxed{{{}}}$."]
    with gzip.open(real_data / "math" / "MATH_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in islice(lines, 40)]
    for number, problem in enumerate(problems):
        answer = minerva.remove_boxed(minerva.last_boxed_only_string(problems[number - number % 2]["solution"]))
        for form in outputs:
            output = form.format(answer)
            theirs = minerva.process_results(
                {
                    **problem,
                    "answer": minerva.normalize_final_answer(
                        minerva.remove_boxed(minerva.last_boxed_only_string(problem["solution"]))
                    ),
                },
                [output],
            )
            ours = maths_scores(problem, [output])
            if form is outputs[0]:
                assert ours["strict"] == theirs["exact_match"]
            assert ours["flexible"] == max(ours["strict"], theirs["math_verify"])


@pytest.mark.slow
def test_gold_solutions_are_right(real_data: Path) -> None:
    """All 5,000 are correct, which takes eight minutes to check; here every fiftieth."""
    with gzip.open(real_data / "math" / "MATH_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in islice(lines, 0, None, 50):
            problem = json.loads(line)
            assert maths_scores(problem, [problem["solution"]]) == {"strict": 1, "flexible": 1}


@pytest.mark.slow
def test_words_of_a_passage_answer_in_other_languages_keep_their_articles() -> None:
    english = passage_scores({"answers": ["the red one"], "language": "english"}, ["red one"])
    finnish = passage_scores({"answers": ["the red one"], "language": "finnish"}, ["red one"])
    assert english == {"exact_match": 1, "f1": 1}
    assert finnish == {"exact_match": 0, "f1": pytest.approx(0.8)}


def test_the_best_of_several_reference_answers_counts() -> None:
    assert passage_scores({"answers": ["a b", "c"], "language": "korean"}, ["c"])["exact_match"] == 1


def test_the_length_of_an_answer() -> None:
    assert length_scores({}, ["four"]) == {"characters": 4}


@pytest.mark.parametrize(("line", "long"), [("[" * 10_001, True), ("[" * 9_999, False), ("a line\n" * 10**5, False)])
def test_a_line_too_long_for_the_checkers_of_instructions(line: str, long: bool) -> None:
    assert has_long_line(line) is long
