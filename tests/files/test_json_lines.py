from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.files.json_files import json_lines, readable_json

TEXTS = st.text(st.characters(exclude_categories=()))


@pytest.mark.slow
@given(st.lists(st.dictionaries(TEXTS, TEXTS)))
def test_any_text_is_written_and_read_again(rows: list[dict[str, str]]) -> None:
    lines = json_lines(rows).encode().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == rows


def test_valid_text_stays_readable() -> None:
    assert json_lines([{"a": "\u00fc"}]) == '{"a": "\u00fc"}\n'
    assert readable_json(["\u00fc"], indent=1) == '[\n "\u00fc"\n]'


def test_a_lone_surrogate_is_escaped() -> None:
    assert json_lines([{"a": "\ud800"}]) == '{"a": "\\ud800"}\n'
