"""Which record formats are known, and how each becomes an `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mftctl.data.examples import Example, Kind, Message
from mftctl.errors import DataError

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}

Fields = Mapping[str, Any]
_Build = Callable[[Fields, str], Example]


def to_example(record: Mapping[str, Any], where: str) -> Example:
    """The record as an `Example`; the first known format whose fields are all there decides.

    A field that is None counts as absent, and fields that no format asks for are ignored.

    Args:
        record: One record of a data file.
        where: Where it came from, such as `train.jsonl:17`; errors and the example carry it.

    Raises:
        DataError: no known format fits, a field has the wrong type, or there is no answer to learn.
    """
    fields = {key: value for key, value in record.items() if value is not None}
    for keys, build in _FORMATS:
        if all(key in fields for key in keys):
            return build(fields, where)
    raise DataError(
        "The record has no known format.",
        path=where,
        expected=" | ".join("+".join(keys) for keys, _ in _FORMATS),
        actual=f"the fields {', '.join(map(str, fields))}" if fields else "no field with a value",
        hint="rename the fields to one of the formats",
    )


def _conversation(key: str) -> _Build:
    """The builder for a list of turns under `key`."""

    def build(fields: Fields, where: str) -> Example:
        turns = fields[key]
        if not isinstance(turns, list):
            raise _wrong_type(where, key, "a list of turns", turns)
        messages = tuple(_turn(turn, where, f"{key}[{index}]") for index, turn in enumerate(turns))
        if "system" in fields and messages and messages[0].role != "system":
            system = _text(fields, "system", where)
            messages = (Message("system", system), *messages) if system.strip() else messages
        if not messages or messages[-1].role != "assistant":
            raise DataError(
                "The conversation does not end with an answer.",
                path=where,
                key=key,
                expected="an assistant turn at the end",
                actual=f"a {messages[-1].role} turn" if messages else "no turns",
                hint="remove the turns after the last answer",
            )
        if len(messages) == 1:
            raise DataError(
                "The conversation has an answer and no question.",
                path=where,
                key=key,
                expected="a turn before the answer",
                hint="use a `text` record to train on plain text",
            )
        return Example("chat", messages, where)

    return build


def _turn(turn: object, where: str, key: str) -> Message:
    if not isinstance(turn, Mapping):
        raise _wrong_type(where, key, "a turn with role and content (or from and value)", turn)
    role_key = "from" if turn.get("role") is None else "role"
    content_key = "value" if turn.get("content") is None else "content"
    name = turn.get(role_key)
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            "The role of a turn is not known.",
            path=where,
            key=f"{key}.{role_key}",
            expected=", ".join(_ROLES),
            actual=repr(name),
        )
    read = _answer if role == "assistant" else _text
    return Message(role, read(turn, content_key, where, f"{key}.{content_key}"))


def _pair(prompt_key: str, answer_key: str, kind: Kind) -> _Build:
    """The builder for one question and one answer."""

    def build(fields: Fields, where: str) -> Example:
        prompt = _text(fields, prompt_key, where)
        answer = _answer(fields, answer_key, where)
        return Example(kind, (Message("user", prompt), Message("assistant", answer)), where)

    return build


def _alpaca(fields: Fields, where: str) -> Example:
    instruction = _text(fields, "instruction", where)
    context = _text(fields, "input", where) if "input" in fields else ""
    prompt = "\n\n".join(part for part in (instruction, context) if part.strip())
    answer = _answer(fields, "output", where)
    return Example("chat", (Message("user", prompt), Message("assistant", answer)), where)


def _mbpp(text_key: str) -> _Build:
    """The builder for a problem of MBPP: the prompt of the benchmark `mbpp`, and the code with plain line ends."""

    def build(fields: Fields, where: str) -> Example:
        tests = fields["test_list"]
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise _wrong_type(where, "test_list", "a list of texts", tests)
        prompt = "\n".join(['"""', _text(fields, text_key, where), *tests, '"""', ""])
        code = _answer(fields, "code", where).replace("\r\n", "\n")
        return Example("completion", (Message("user", prompt), Message("assistant", code)), where)

    return build


def _plain_text(fields: Fields, where: str) -> Example:
    return Example("text", (Message("assistant", _answer(fields, "text", where)),), where)


_FORMATS: tuple[tuple[tuple[str, ...], _Build], ...] = (
    (("messages",), _conversation("messages")),
    (("conversations",), _conversation("conversations")),
    (("prompt", "completion"), _pair("prompt", "completion", "completion")),
    (("prompt", "response"), _pair("prompt", "response", "completion")),
    (("question", "answer"), _pair("question", "answer", "chat")),
    (("instruction", "output"), _alpaca),
    (("instruction", "response"), _pair("instruction", "response", "chat")),
    (("problem", "solution"), _pair("problem", "solution", "chat")),
    (("query", "response"), _pair("query", "response", "chat")),
    (("query", "answer"), _pair("query", "answer", "chat")),
    (("inputs", "targets"), _pair("inputs", "targets", "chat")),
    (("text", "code", "test_list"), _mbpp("text")),
    (("prompt", "code", "test_list"), _mbpp("prompt")),
    (("text",), _plain_text),
)


def _text(fields: Fields, field: str, where: str, key: str | None = None) -> str:
    """The text under `field`, which an error calls `key`."""
    value = fields.get(field)
    if not isinstance(value, str):
        raise _wrong_type(where, key or field, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "The text holds half of a surrogate pair, which no tokenizer can read.",
            path=where,
            key=key or field,
            actual=f"U+{ord(value[error.start]):04X} at character {error.start}",
        ) from error
    return value


def _answer(fields: Fields, field: str, where: str, key: str | None = None) -> str:
    """The text under `field`, which must hold something to learn."""
    text = _text(fields, field, where, key)
    if not text.strip():
        raise DataError(
            "The answer is empty.",
            path=where,
            key=key or field,
            expected="text other than white space",
            actual=repr(text),
            hint="remove the record",
        )
    return text


def _wrong_type(where: str, key: str, expected: str, value: object) -> DataError:
    return DataError(
        "A field has the wrong type.",
        path=where,
        key=key,
        expected=expected,
        actual="nothing" if value is None else type(value).__name__,
    )
