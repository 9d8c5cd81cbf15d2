"""Conversations extracted from message trees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.examples import Message
from mftctl.data.files import Record
from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.data.trees import conversations, is_message, resolve_trees
from mftctl.errors import DataError


def message(number: int, parent: int | None, rank: int | None = None, role: str | None = None) -> dict[str, Any]:
    return {
        "message_id": f"m{number}",
        "parent_id": None if parent is None else f"m{parent}",
        "text": f"text {number}",
        "role": role or ("prompter" if parent is None else "assistant"),
        "rank": rank,
        "lang": "en",
    }


def records(*messages: dict[str, Any]) -> list[Record]:
    return [Record(f"line {number}", fields) for number, fields in enumerate(messages, start=1)]


def texts(record: Record) -> list[str]:
    return [turn["content"] for turn in record.fields["messages"]]


def test_the_reply_ranked_best_is_followed_at_every_turn() -> None:
    tree = records(
        message(1, None),
        message(2, 1, rank=1),
        message(3, 1, rank=0),
        message(4, 3, rank=None, role="prompter"),
        message(5, 3, rank=2, role="prompter"),
        message(6, 5, rank=0),
    )
    (found,) = conversations(tree)
    assert texts(found) == ["text 1", "text 3", "text 5", "text 6"]
    assert [turn["role"] for turn in found.fields["messages"]] == ["user", "assistant", "user", "assistant"]
    assert found.where == "line 1"


def test_a_last_question_is_left_out_and_so_is_a_tree_without_an_answer() -> None:
    tree = records(message(1, None), message(2, 1), message(3, 2, role="prompter"), message(4, None))
    (found,) = conversations(tree)
    assert texts(found) == ["text 1", "text 2"]


def test_circular_messages_terminate() -> None:
    loop = records(message(1, 2), message(2, 1), message(3, None), message(4, 3))
    (found,) = conversations(loop)
    assert texts(found) == ["text 3", "text 4"]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_every_root_with_an_answer_gives_one_conversation(parents: list[int]) -> None:
    tree = [message(0, None)]
    tree += [message(number, parent if parent < number else None) for number, parent in enumerate(parents, start=1)]
    found = conversations(records(*tree))
    roots = {fields["message_id"] for fields in tree if fields["parent_id"] is None}
    answered = {fields["parent_id"] for fields in tree if fields["parent_id"] in roots}
    assert len(found) == len(answered)
    seen = [text for record in found for text in texts(record)]
    assert len(seen) == len(set(seen))


def test_a_file_of_messages_is_read_as_conversations(tmp_path: Path) -> None:
    path = tmp_path / "oasst.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in (message(1, None), message(2, 1))))
    (example,) = load_examples([DataSource(str(path))])
    assert example.messages == (Message("user", "text 1"), Message("assistant", "text 2"))
    assert example.where == f"{path}:1"


def test_trees_without_any_answer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "oasst.jsonl"
    path.write_text(json.dumps(message(1, None)) + "\n")
    with pytest.raises(DataError, match="no answer"):
        load_examples([DataSource(str(path))])


def test_plain_text_is_not_a_message() -> None:
    assert not is_message(Record("x:1", {"text": "Once."}))
    assert is_message(Record("x:1", message(1, None)))


def test_message_among_other_records_is_an_error() -> None:
    other = Record("x:1", {"text": "Once."})
    first, error = resolve_trees(iter([other, Record("x:2", message(1, None))]), "x")
    assert first == other
    assert isinstance(error, DataError)
    assert error.path == "x:2"


def test_other_records_among_messages_are_errors() -> None:
    broken = DataError("Malformed.", path="x:1")
    stream = [broken, *records(message(1, None), message(2, 1)), Record("y:4", {"text": "Once."})]
    passed, foreign, conversation = resolve_trees(iter(stream), "x")
    assert passed is broken
    assert isinstance(foreign, DataError)
    assert (foreign.path, foreign.actual) == ("y:4", "no message_id, parent_id, role")
    assert texts(conversation) == ["text 1", "text 2"]


def test_rank_that_is_no_number_is_an_error() -> None:
    ranked = [message(1, None), {**message(2, 1), "rank": "best"}, {**message(3, 1), "rank": float("nan")}]
    error, conversation = resolve_trees(iter(records(*ranked, {**message(4, 1), "rank": 0.0})), "x")
    assert isinstance(error, DataError)
    assert (error.key, error.actual) == ("rank", "'best'")
    assert texts(conversation) == ["text 1", "text 4"]


def test_trees_may_lie_in_several_files(tmp_path: Path) -> None:
    for number, item in enumerate((message(1, None), message(2, 1))):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(item) + "\n")
    (example,) = load_examples([DataSource(str(tmp_path))])
    assert example.messages == (Message("user", "text 1"), Message("assistant", "text 2"))
