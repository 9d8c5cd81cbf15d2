from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.text import counted, visible, visible_line
from tests.hostile_texts import OBEYED, TEXTS


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;PWN\x07", "\\x1b]0;PWN\\x07"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("a\rb\x00\x7f", "a\\x0db\\x00\\x7f"),
        ("\u202eab\u2066", "\\u202eab\\u2066"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("\ud800\U000e0041", "\\ud800\\U000e0041"),
        ("a\tb\nc", "a\tb\nc"),
        ("± 中 😀 é \u200d", "± 中 😀 é \u200d"),
    ],
)
def test_only_control_characters_are_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_line_is_one_line() -> None:
    assert visible_line("a\n\n\tb\r\n") == "a b\\x0d "


@given(TEXTS)
def test_escaping_leaves_no_control_character_and_is_idempotent(text: str) -> None:
    assert not OBEYED & set(visible(text))
    assert visible(visible(text)) == visible(text)
    assert not set("\t\n") & set(visible_line(text))


@given(st.characters(categories=["Cc", "Zl", "Zp", "Cs"]))
def test_no_control_character_but_tab_and_line_feed_is_left(character: str) -> None:
    assert (visible(character) == character) == (character in "\t\n")
    assert all(unicodedata.category(part) not in ("Cc", "Zl", "Zp", "Cs") for part in visible_line(character))


def test_a_noun_is_in_the_singular_only_for_one() -> None:
    assert [counted(number, "record") for number in (0, 1, 2, 1234)] == [
        "0 records",
        "1 record",
        "2 records",
        "1,234 records",
    ]
