"""Turns in every notation that data sets use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mftctl.data.examples import Message, ToolCall
from mftctl.data.turns import functions, to_message, unused_keys
from mftctl.errors import DataError

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "developer", "content": "a"}, Message("developer", "a")),
        ({"from": "human", "value": "a"}, Message("user", "a")),
        ({"role": "model", "content": "a"}, Message("assistant", "a")),
        ({"role": "user", "content": "a", "name": "Ann"}, Message("user", "a", name="Ann")),
        ({"role": "user", "content": ["a", {"type": "text", "text": "b"}, {"text": "c"}]}, Message("user", "abc")),
        ({"role": "tool", "content": "14", "tool_call_id": "c1"}, Message("tool", "14", tool_call_id="c1")),
        ({"from": "observation", "value": "14"}, Message("tool", "14")),
        ({"role": "assistant", "content": "a", "reasoning_content": "r"}, Message("assistant", "a", thinking="r")),
        ({"role": "assistant", "content": "a", "thinking": "r"}, Message("assistant", "a", thinking="r")),
        ({"role": "assistant", "content": "a", "weight": 0}, Message("assistant", "a", is_learned=False)),
        ({"role": "assistant", "content": "a", "train": False}, Message("assistant", "a", is_learned=False)),
        ({"role": "assistant", "content": "a", "loss": False}, Message("assistant", "a", is_learned=False)),
        ({"role": "assistant", "content": "a", "weight": 1.0}, Message("assistant", "a")),
    ],
)
def test_turn(turn: dict[str, Any], message: Message) -> None:
    assert to_message(turn, "d:1", "messages[0]") == message


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}]},
    ],
)
def test_tool_call_with_arguments_as_object_or_text(turn: dict[str, Any]) -> None:
    assert to_message(turn, "d:1", "k") == Message("assistant", "", tool_calls=(ToolCall("f", '{"x": 1}', "c1"),))


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": 1}})},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ],
)
def test_older_function_call(turn: dict[str, Any]) -> None:
    assert to_message(turn, "d:1", "k") == Message("assistant", "", tool_calls=(ToolCall("f", '{"x": 1}'),))


@pytest.mark.parametrize(
    ("turn", "key", "actual"),
    [
        ({"role": "narrator", "content": "a"}, "k.role", "'narrator'"),
        ({"content": "a"}, "k.from", "None"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "k.content[0].type", "image_url"),
        ({"role": "assistant", "content": " "}, "k.content", "' '"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "k.weight", "0.5"),
        ({"role": "assistant", "content": "a", "tool_calls": {}}, None, None),
        ({"role": "assistant", "content": "a", "tool_calls": ["f"]}, "k.tool_calls[0]", "str"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"function": 3}]}, "k.tool_calls[0].function", "int"),
        ({"role": "user", "content": "\ud800"}, "k.content", "U+D800 at character 0"),
    ],
)
def test_unusable_turn(turn: dict[str, Any], key: str | None, actual: str | None) -> None:
    if key is None:
        assert to_message(turn, "d:1", "k").tool_calls == ()
        return
    with pytest.raises(DataError) as caught:
        to_message(turn, "d:1", "k")
    assert (caught.value.path, caught.value.key, caught.value.actual) == ("d:1", key, actual)


def test_function_call_that_is_not_json() -> None:
    with pytest.raises(DataError, match="not JSON") as caught:
        to_message({"from": "function_call", "value": "f(1)"}, "d:1", "k")
    assert caught.value.key == "k.value"


def test_functions_that_are_not_a_list() -> None:
    with pytest.raises(DataError, match="wrong type"):
        functions({"name": "f"}, "d:1", "tools")


def test_unused_keys() -> None:
    assert unused_keys({"role": "user", "content": "a", "id": 1, "loss": None, "emotion": "joy"}) == {"id", "emotion"}
    assert unused_keys("text") == set()


@pytest.mark.parametrize("tools", [[{"type": "function", "function": "clock"}], ["clock"], "[1]"])
def test_an_invalid_function_is_refused(tools: object) -> None:
    with pytest.raises(DataError, match="wrong type") as caught:
        functions(tools, "d:1", "tools")
    assert caught.value.key == "tools[0]"


def test_a_lone_surrogate_in_arguments_is_refused() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "\ud800"}}}
    with pytest.raises(DataError, match="surrogate") as caught:
        to_message({"role": "assistant", "content": None, "tool_calls": [call]}, "d:1", "messages[1]")
    assert caught.value.key == "messages[1].tool_calls[0].arguments"
