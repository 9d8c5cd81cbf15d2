"""Every known format, and one named test per way in which a record can be invalid."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.examples import Example, Message, TokenIds
from mftctl.data.formats import to_example, unused_fields
from mftctl.errors import DataError

WHERE = "train.jsonl:17"
QUESTION_ANSWER = (Message("user", "2+2?"), Message("assistant", "4"))


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"prompt": "2+2?", "completion": "4"}, "completion"),
        ({"prompt": "2+2?", "response": "4"}, "completion"),
        ({"question": "2+2?", "answer": "4"}, "chat"),
        ({"instruction": "2+2?", "output": "4"}, "chat"),
        ({"instruction": "2+2?", "input": "", "output": "4"}, "chat"),
        ({"problem": "2+2?", "solution": "4", "level": 3}, "chat"),
        ({"instruction": "2+2?", "response": "4"}, "chat"),
        ({"query": "2+2?", "response": "4", "type": "GSM_AnsAug"}, "chat"),
        ({"query": "2+2?", "answer": "4", "resource": "evol"}, "chat"),
        ({"inputs": "2+2?", "targets": "4", "language": "English"}, "chat"),
        ({"conversations": [{"from": "User", "value": "2+2?"}, {"from": "Assistant", "value": "4"}]}, "chat"),
        ({"system": "", "conversations": [{"from": "User", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, "chat"),
        ({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}, "chat"),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, "chat"),
        ({"conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}, "chat"),
    ],
)
def test_question_and_answer_in_every_format(record: dict[str, Any], kind: str) -> None:
    has_turns = "messages" in record or "conversations" in record
    assert to_example(record, WHERE) == Example(kind, QUESTION_ANSWER, WHERE, has_turns=has_turns)


def test_text_is_one_assistant_turn() -> None:
    assert to_example({"text": "Once."}, WHERE) == Example("text", (Message("assistant", "Once."),), WHERE)


def test_alpaca_input_follows_the_instruction_after_a_blank_line() -> None:
    example = to_example({"instruction": "Add.", "input": "2 and 2", "output": "4"}, WHERE)
    assert example.prompt == (Message("user", "Add.\n\n2 and 2"),)


def test_dolly_context_follows_the_instruction_after_a_blank_line() -> None:
    record = {"instruction": "How many?", "context": "2 and 2", "response": "4", "category": "closed_qa"}
    assert to_example(record, WHERE).prompt == (Message("user", "How many?\n\n2 and 2"),)
    assert unused_fields(record) == {"category"}


@pytest.mark.parametrize("key", ["videos", "video", "audios"])
def test_records_of_more_than_text_are_refused(key: str) -> None:
    with pytest.raises(DataError, match="contains video or audio") as caught:
        to_example({"question": "What is this?", "answer": "A cat.", key: ["cat.png"]}, WHERE)
    assert caught.value.key == key
    assert to_example({"question": "2+2?", "answer": "4", key: []}, WHERE).messages == QUESTION_ANSWER


@pytest.mark.parametrize("key", ["text", "prompt"])
def test_mbpp_has_the_prompt_of_its_benchmark_and_plain_line_ends(key: str) -> None:
    code = "def one():\r\n    return 1\r\n"
    example = to_example({key: "Write one.", "code": code, "test_list": ["assert one()", "assert 1"]}, WHERE)
    prompt = '"""\nWrite one.\nassert one()\nassert 1\n"""\n'
    answer = "def one():\n    return 1\n"
    assert example == Example("completion", (Message("user", prompt), Message("assistant", answer)), WHERE)


@pytest.mark.parametrize("tests", ["assert 1", [1], {"assert 1": 1}])
def test_mbpp_without_a_list_of_tests_is_a_data_error(tests: object) -> None:
    with pytest.raises(DataError, match="wrong type") as caught:
        to_example({"text": "Write one.", "code": "one = 1", "test_list": tests}, WHERE)
    assert (caught.value.path, caught.value.key) == (WHERE, "test_list")


def test_conversation_keeps_system_tool_and_several_turns() -> None:
    roles = ["system", "user", "assistant", "tool", "assistant"]
    turns = [{"role": role, "content": f"{index}"} for index, role in enumerate(roles)]
    example = to_example({"messages": turns}, WHERE)
    assert example.messages == tuple(Message(role, f"{index}") for index, role in enumerate(roles))


def test_a_separate_system_prompt_comes_before_the_turns() -> None:
    turns = [{"from": "User", "value": "2+2?"}, {"from": "Assistant", "value": "4"}]
    example = to_example({"system": "Be brief.", "conversations": turns}, WHERE)
    assert example.messages == (Message("system", "Be brief."), *QUESTION_ANSWER)
    own = [{"role": "system", "content": "Be long."}, *turns]
    assert to_example({"system": "Be brief.", "conversations": own}, WHERE).messages[0].content == "Be long."


def test_null_column_counts_as_absent() -> None:
    record = {"messages": None, "instruction": "2+2?", "input": None, "output": "4", "text": None}
    assert to_example(record, WHERE) == Example("chat", QUESTION_ANSWER, WHERE)


def test_null_next_to_another_spelling_of_a_turn_counts_as_absent() -> None:
    turns = [
        {"role": None, "content": None, "from": "human", "value": "2+2?"},
        {"role": "assistant", "content": "4", "from": None, "value": None},
    ]
    assert to_example({"messages": turns}, WHERE).messages == QUESTION_ANSWER


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")).filter(str.strip))
def test_texts_arrive_unchanged(prompt: str, answer: str) -> None:
    example = to_example({"question": prompt, "answer": answer}, WHERE)
    assert example.messages == (Message("user", prompt), Message("assistant", answer))


def test_unknown_format_names_place_fields_and_formats() -> None:
    with pytest.raises(DataError) as caught:
        to_example({"input": "2+2?", "target": 4.0, "idx": None}, WHERE)
    assert caught.value.path == WHERE
    assert caught.value.actual == "the fields input, target"
    assert "question+answer" in str(caught.value.expected)
    assert "text" in str(caught.value.expected)


def test_record_of_nulls_has_no_format() -> None:
    with pytest.raises(DataError, match="unknown format") as caught:
        to_example({"text": None}, WHERE)
    assert caught.value.actual == "no field with a value"


@pytest.mark.parametrize(
    ("record", "key", "actual"),
    [
        ({"question": "2+2?", "answer": 4}, "answer", "int"),
        ({"question": ["2+2?"], "answer": "4"}, "question", "list"),
        ({"instruction": "a", "input": 3, "output": "4"}, "input", "int"),
        ({"text": {"a": 1}}, "text", "dict"),
        ({"messages": "hello"}, "messages", "str"),
        ({"messages": ["hello"]}, "messages[0]", "str"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]", "int"),
        ({"question": "a", "answer": "b", "system": 3}, "system", "int"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "history[0]", "str"),
        ({"messages": [], "input_ids": "1 2"}, "input_ids", "str"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value", "nothing"),
    ],
)
def test_wrong_type_names_place_and_key(record: dict[str, Any], key: str, actual: str) -> None:
    with pytest.raises(DataError, match="wrong type") as caught:
        to_example(record, WHERE)
    assert (caught.value.path, caught.value.key, caught.value.actual) == (WHERE, key, actual)


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"question": "2+2?", "answer": " \n"}, "answer"),
        ({"prompt": "2+2?", "completion": ""}, "completion"),
        ({"instruction": "a", "output": "\t"}, "output"),
        ({"text": ""}, "text"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}, "conversations[1].value"),
    ],
)
def test_empty_answer_names_place_and_key(record: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError, match="answer is empty") as caught:
        to_example(record, WHERE)
    assert (caught.value.path, caught.value.key) == (WHERE, key)


@pytest.mark.parametrize("role", ["narrator", None, 3])
def test_unknown_role(role: object) -> None:
    with pytest.raises(DataError, match="unknown role") as caught:
        to_example({"messages": [{"role": role, "content": "a"}]}, WHERE)
    assert caught.value.path == WHERE


def test_conversation_that_ends_with_a_question() -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(DataError, match="does not end with an answer") as caught:
        to_example({"messages": turns}, WHERE)
    assert caught.value.actual == "a user turn"


def test_conversation_without_turns() -> None:
    with pytest.raises(DataError, match="does not end with an answer") as caught:
        to_example({"conversations": []}, WHERE)
    assert caught.value.actual == "no turns"


def test_conversation_without_a_question() -> None:
    with pytest.raises(DataError, match="no question"):
        to_example({"messages": [{"role": "assistant", "content": "a"}]}, WHERE)


def test_lone_surrogate() -> None:
    with pytest.raises(DataError, match="surrogate") as caught:
        to_example({"text": "ab\ud83d"}, WHERE)
    assert (caught.value.path, caught.value.key) == (WHERE, "text")
    assert caught.value.actual == "U+D83D at character 2"


def test_prompt_and_completion_of_turns_are_one_conversation() -> None:
    record = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    example = to_example(record, WHERE)
    assert [(turn.role, turn.content, turn.is_learned) for turn in example.messages] == [
        ("user", "a", True),
        ("assistant", "b", False),
        ("user", "c", True),
        ("assistant", "d", True),
    ]


def test_alpaca_history_and_system_are_earlier_turns() -> None:
    record = {"system": "S", "instruction": "c", "output": "d", "history": [["a", "b"]]}
    example = to_example(record, WHERE)
    assert [turn.content for turn in example.messages] == ["S", "a", "b", "c", "d"]
    assert [turn.role for turn in example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert example.has_turns


def test_system_prompt_with_a_question() -> None:
    assert to_example({"question": "a", "answer": "b", "system_prompt": "S"}, WHERE).messages[0] == Message(
        "system", "S"
    )


def test_tools_and_template_variables_of_a_conversation() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for listed in (tools, json.dumps(tools)):
        example = to_example({"messages": turns, "tools": listed, "chat_template_kwargs": {"x": True}}, WHERE)
        assert json.loads(example.tools) == tools
        assert json.loads(example.template_args) == {"x": True}
    assert to_example({"messages": turns, "tools": "[]"}, WHERE).tools == ""


def test_conversation_without_anything_to_learn() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    with pytest.raises(DataError, match="no turn to train on"):
        to_example({"messages": turns}, WHERE)


def test_token_ids_with_labels_or_masks() -> None:
    ids = {"input_ids": [1, 5, 6, 2], "attention_mask": [1, 1, 1, 0]}
    expected = TokenIds((1, 5, 6), (-100, -100, 6))
    for extra in ({"labels": [-100, -100, 6, 2]}, {"completion_mask": [0, 0, 1, 1]}, {"assistant_masks": [0, 0, 1, 1]}):
        assert to_example({**ids, **extra}, WHERE) == Example("tokens", (), WHERE, token_ids=expected)
    assert to_example({"input_ids": [0, 7]}, WHERE).token_ids == TokenIds((0, 7), (0, 7))


def test_labels_of_the_wrong_length() -> None:
    with pytest.raises(DataError, match="differs in length") as caught:
        to_example({"input_ids": [1, 2], "labels": [1]}, WHERE)
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("labels", "2", "1")


def test_labels_that_are_shifted_already() -> None:
    with pytest.raises(DataError, match="differs from the token") as caught:
        to_example({"input_ids": [1, 2], "labels": [2, -100]}, WHERE)
    assert caught.value.key == "labels[0]"


def test_unused_fields_are_named() -> None:
    turns = [{"role": "user", "content": "a", "id": 3}, {"role": "assistant", "content": "b", "weight": 1}]
    assert unused_fields({"messages": turns, "source": "x", "tools": None, "id": 1}) == {"messages.id", "source", "id"}
    assert unused_fields({"question": "a", "answer": "b"}) == set()
    assert unused_fields({"unknown": 1}) == set()
