from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.reporting.file_names import own_name, slug


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Loss on a/b.jsonl base", "loss-on-a-b-jsonl-base"), ("MFT, paper", "mft-paper"), ("é", "x")],
)
def test_a_slug_is_part_of_a_file_name(text: str, expected: str) -> None:
    assert slug(text) == expected


@given(st.text())
def test_any_text_has_a_slug(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug(text))
    assert len(slug(text)) <= 60


def test_long_texts_that_differ_at_their_end_have_slugs_that_differ() -> None:
    one, other = slug("a" * 230 + "1"), slug("a" * 230 + "2")
    assert one != other
    assert one.startswith("a" * 51)
    assert slug("a" * 60) == "a" * 60


@given(st.lists(st.sampled_from(["probe", "probe-2", "loss"])))
def test_no_name_is_given_twice_and_the_first_keeps_its_own(wished: list[str]) -> None:
    taken: set[str] = set()
    given_names = [own_name(name, taken) for name in wished]
    assert len(set(given_names)) == len(wished)
    assert given_names[:1] == wished[:1]
    assert all(own.startswith(name) for own, name in zip(given_names, wished, strict=True))
