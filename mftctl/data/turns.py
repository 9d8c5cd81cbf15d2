"""Parses a conversation turn in any of the common record formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mftctl.data.examples import Message, ToolCall
from mftctl.errors import DataError

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")
_LEARNED_KEYS = ("weight", "train", "training", "loss")
_OTHER_KEYS = ("tool_calls", "function_call", "name", "tool_call_id")
_KNOWN = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS, *_THINKING_KEYS, *_LEARNED_KEYS, *_OTHER_KEYS))

IMAGE_KEYS = ("image", "path", "url")
"""Fields of an image part that name its image."""

Fields = Mapping[str, Any]


def to_message(turn: object, where: str, key: str) -> Message:
    """Parses one turn of a record.

    Args:
        turn: With role and content, or from and value.
        where: Location of the record, for errors.
        key: Location of the turn within it, such as `messages[1]`.

    Raises:
        DataError: The role is unknown, a field has the wrong type, or the assistant turn is empty.
    """
    if not isinstance(turn, Mapping):
        raise wrong_type(where, key, "a turn with role and content (or from and value)", turn)
    role_key, content_key = _present(turn, _ROLE_KEYS), _present(turn, _CONTENT_KEYS)
    spoken = turn.get(role_key)
    name = spoken.lower() if isinstance(spoken, str) else ""
    if name not in _ROLES:
        raise DataError(
            "A turn has an unknown role.",
            path=where,
            key=f"{key}.{role_key}",
            expected=", ".join(_ROLES),
            actual=repr(spoken),
        )
    role = _ROLES[name]
    content, places = _content(turn, content_key, where, key)
    calls = _calls(turn, where, key)
    if name == "function_call":
        calls, content = (_shared_call(content, where, f"{key}.{content_key}"),), ""
    if role != "assistant":
        return Message(
            role,
            content,
            name=_name(turn, "name", where, key),
            tool_call_id=_name(turn, "tool_call_id", where, key),
            image_places=places,
        )
    thinking = text(turn, _present(turn, _THINKING_KEYS), where, f"{key}.thinking", default="")
    is_learned = _is_learned(turn, where, key)
    if not calls and not content.strip() and not (thinking.strip() and is_learned):
        raise empty_answer(where, f"{key}.{content_key}", content)
    speaker = _name(turn, "name", where, key)
    return Message(role, content, thinking, calls, speaker, is_learned=is_learned, image_places=places)


def unused_keys(turn: object) -> set[str]:
    """The fields of a turn that `to_message` ignores."""
    if not isinstance(turn, Mapping):
        return set()
    return {str(key) for key, value in turn.items() if key not in _KNOWN and value is not None}


def text(fields: Fields, field: str, where: str, key: str | None = None, *, default: str | None = None) -> str:
    """The text in `field`, which errors call `key`; `default` if it is missing.

    Raises:
        DataError: The value is not text, or cannot be tokenised.
    """
    value = fields.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise wrong_type(where, key or field, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "The text contains a lone surrogate, which cannot be tokenised.",
            path=where,
            key=key or field,
            actual=f"U+{ord(value[error.start]):04X} at character {error.start}",
        ) from error
    return value


def wrong_type(where: str, key: str, expected: str, value: object) -> DataError:
    """The error for a field whose type differs from the expected one."""
    return DataError(
        "A field has the wrong type.",
        path=where,
        key=key,
        expected=expected,
        actual="nothing" if value is None else type(value).__name__,
    )


def empty_answer(where: str, key: str, content: str) -> DataError:
    """The error for an answer that contains only white space."""
    return DataError(
        "The answer is empty.",
        path=where,
        key=key,
        expected="text other than white space",
        actual=repr(content),
        hint="remove the record",
    )


def functions(value: object, where: str, key: str) -> str:
    """The functions that the assistant may call in a record, as JSON text; empty if there are none.

    Args:
        value: A list of objects, or its JSON text.
        where: Location of the record, for errors.
        key: The field, for errors.
    """
    listed = _parsed(value, where, key) if isinstance(value, str) and value.strip() else value
    if not listed:
        return ""
    if not isinstance(listed, list):
        raise wrong_type(where, key, "a list of functions", listed)
    for index, item in enumerate(listed):
        if not isinstance(item, Mapping) or not isinstance(item.get("function", item), Mapping):
            raise wrong_type(where, f"{key}[{index}]", "a function with its name and parameters", item)
    return json_text(listed, where, key)


def json_text(value: object, where: str, key: str) -> str:
    """A value of a record as JSON text.

    Raises:
        DataError: It contains text that cannot be tokenised.
    """
    return text({key: json.dumps(value, ensure_ascii=False)}, key, where)


def _present(turn: Fields, keys: tuple[str, ...]) -> str:
    """The first key that has a value, or else the last key."""
    return next((key for key in keys if turn.get(key) is not None), keys[-1])


def _content(turn: Fields, content_key: str, where: str, key: str) -> tuple[str, tuple[int, ...]]:
    """The text of a turn, of which the parts of a list are joined, and where in it images are shown."""
    value = turn.get(content_key)
    if value is None and (turn.get("tool_calls") or turn.get("function_call")):
        return "", ()
    if not isinstance(value, list):
        return text(turn, content_key, where, f"{key}.{content_key}"), ()
    content, places = "", []
    for index, part in enumerate(value):
        if isinstance(part, Mapping) and part.get("type") == "image":
            _require_bare(part, where, f"{key}.{content_key}[{index}]")
            places.append(len(content))
        else:
            content += _part(part, where, f"{key}.{content_key}[{index}]")
    return content, tuple(places)


def _require_bare(part: Fields, where: str, key: str) -> None:
    """Checks that an image part marks a place and at most names its image."""
    known = ("type", *IMAGE_KEYS)
    held = next((name for name, value in part.items() if name not in known and value is not None), None)
    if held is not None:
        raise DataError(
            "An image part has an unknown field.",
            path=where,
            key=f"{key}.{held}",
            expected=f"one of {', '.join(IMAGE_KEYS)}, or the image in the field images of the record",
            actual=held,
        )


def _part(part: object, where: str, key: str) -> str:
    if isinstance(part, str):
        return text({"text": part}, "text", where, key)
    if not isinstance(part, Mapping):
        raise wrong_type(where, key, "a part with type and text", part)
    if part.get("type", "text") != "text":
        raise DataError(
            "A content part is neither text nor an image.",
            path=where,
            key=f"{key}.type",
            expected="text or image",
            actual=str(part.get("type")),
            hint="remove the record",
        )
    return text(part, "text", where, f"{key}.text")


def _calls(turn: Fields, where: str, key: str) -> tuple[ToolCall, ...]:
    """The tool calls of a turn, including the older `function_call`."""
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise wrong_type(where, f"{key}.tool_calls", "a list of calls", calls)
    found = [_call(call, where, f"{key}.tool_calls[{index}]") for index, call in enumerate(calls)]
    if turn.get("function_call") is not None:
        found.append(_call(turn["function_call"], where, f"{key}.function_call"))
    return tuple(found)


def _call(call: object, where: str, key: str) -> ToolCall:
    """A call in OpenAI's format, or only its function; the arguments are JSON text or an object."""
    if not isinstance(call, Mapping):
        raise wrong_type(where, key, "a call with function.name and function.arguments", call)
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise wrong_type(where, f"{key}.function", "an object with name and arguments", function)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(arguments, where, f"{key}.arguments")
    name = text(function, "name", where, f"{key}.name")
    return ToolCall(name, json_text(arguments or {}, where, f"{key}.arguments"), _name(call, "id", where, key))


def _shared_call(content: str, where: str, key: str) -> ToolCall:
    """The call in a ShareGPT `function_call` turn, whose text is JSON."""
    return _call(_parsed(content, where, key), where, key)


def _parsed(value: str, where: str, key: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError("A field is not JSON.", path=where, key=key, expected="JSON", actual=str(error)) from error


def _name(turn: Fields, field: str, where: str, key: str) -> str | None:
    value = turn.get(field)
    return None if value is None else text(turn, field, where, f"{key}.{field}")


def _is_learned(turn: Fields, where: str, key: str) -> bool:
    """True if all training switches of a turn are on: `weight` 0 or 1, the others true or false."""
    switches = [(name, turn[name]) for name in _LEARNED_KEYS if turn.get(name) is not None]
    for name, value in switches:
        if value not in (0, 1):  # includes True and False
            raise DataError(
                "A turn's weight is invalid.", path=where, key=f"{key}.{name}", expected="0 or 1", actual=repr(value)
            )
    return all(value == 1 for _, value in switches)
