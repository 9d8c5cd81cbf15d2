from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.evaluation.exact_match import exact_match, final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sells 9 eggs.\n#### 18", "18"),
        ("#### 18.", "18"),
        ("#### 18.0", "18"),
        ("####18", "18"),
        ("####\n18\nand so on", "18"),
        ("#### 18\nQuestion: more", "18"),
        ("#### 1 #### 2", "2"),
        ("#### $1,234,567.50", "1234567.5"),
        ("#### -7", "-7"),
        ("#### -$5", "-5"),
        ("#### −5", "-5"),
        ("#### +5", "5"),
        ("#### -0.0", "0"),
        ("#### .50", "0.5"),
        ("#### 007", "7"),
        ("#### 12.50%", "12.5%"),
        ("#### 1,2", "1,2"),
        ("#### 1,2345", "1,2345"),
        ("#### 5 dollars", "5 dollars"),
        ("#### 18...", "18"),
        ("#### .", ""),
        ("####", ""),
        ("", ""),
        ("42", "42"),
        ("#### 123456789012345678901234567890.0", "123456789012345678901234567890"),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("so\n#### 12.0", "thus\n#### 12"),
        ("#### 70,000", "#### 70000"),
        ("#### $-3.50", "#### -3.5"),
        ("  one\n two ", "one two"),
    ],
)
def test_right_answers(prediction: str, reference: str) -> None:
    assert exact_match(prediction, reference)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("12", "#### 12"),
        ("The answer is 12", "#### 12"),
        ("#### 5", "#### -5"),
        ("#### 1.25", "#### 125"),
        ("#### 12", "#### 12%"),
        ("#### 12 #### 13", "#### 12"),
        ("One two", "one two"),
        ("#### 12", "12"),
    ],
)
def test_wrong_answers(prediction: str, reference: str) -> None:
    assert not exact_match(prediction, reference)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_spellings_of_one_number_agree(number: Decimal) -> None:
    spellings = [f"{number:f}", f"{number:,f}", f"${number:,f}", f"{number:f}00", f" {number:f} "]
    assert len({final_answer(f"#### {spelling}") for spelling in spellings}) == 1
    assert Decimal(final_answer(f"#### {number:,f}")) == number


@given(st.integers(), st.integers())
def test_different_numbers_differ(one: int, two: int) -> None:
    assert exact_match(f"#### {one:,}", f"#### {two}") == (one == two)


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert final_answer(final_answer(text)) == final_answer(text)


@given(st.text())
def test_a_text_matches_itself(text: str) -> None:
    assert exact_match(text, text)
