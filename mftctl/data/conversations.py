"""Questions and answers, as texts or as lists of turns, as examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from mftctl.data.examples import Example, Kind, Message
from mftctl.data.turns import Fields, empty_answer, functions, json_text, text, to_message, wrong_type
from mftctl.errors import DataError

FUNCTIONS = ("tools", "functions")
SYSTEM = ("system", "system_prompt")
TURNS = (*FUNCTIONS, *SYSTEM, "chat_template_kwargs")
"""Fields of a record that go with a list of turns."""

Build = Callable[[Fields, str], Example]
"""Builds an example from the fields of a record and its origin."""


def chat_example(messages: tuple[Message, ...], fields: Fields, where: str, key: str) -> Example:
    """A conversation, checked to end with an answer to a previous turn.

    Args:
        messages: Its turns.
        fields: The record, for its functions and template variables.
        where: Location of the record, for errors.
        key: The field that the turns come from, for errors.

    Raises:
        DataError: It does not end with an answer, there is no question or nothing to train on, or a field has the
            wrong type.
    """
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
            "The conversation has an answer but no question.",
            path=where,
            key=key,
            expected="a turn before the answer",
            hint="use a `text` record to train on plain text",
        )
    if not any(message.is_learned for message in messages[1:] if message.role == "assistant"):
        raise DataError(
            "The conversation has no turn to train on.", path=where, key=key, expected="an answer with weight 1"
        )
    tools = next((functions(fields[name], where, name) for name in FUNCTIONS if name in fields), "")
    args = fields.get("chat_template_kwargs") or {}
    if not isinstance(args, Mapping):
        raise wrong_type(where, "chat_template_kwargs", "an object", args)
    return Example(
        "chat",
        messages,
        where,
        has_turns=True,
        tools=tools,
        template_args=json_text(args, where, "chat_template_kwargs") if args else "",
    )


def messages_of(turns: object, where: str, key: str) -> tuple[Message, ...]:
    """The turns of a list.

    Args:
        turns: The list.
        where: Location of the record, for errors.
        key: Location of the list within it.

    Raises:
        DataError: It is not a list, or a turn cannot be used.
    """
    if not isinstance(turns, list):
        raise wrong_type(where, key, "a list of turns", turns)
    return tuple(to_message(turn, where, f"{key}[{index}]") for index, turn in enumerate(turns))


def with_system(messages: tuple[Message, ...], fields: Fields, where: str) -> tuple[Message, ...]:
    """The turns, preceded by the record's system prompt unless they begin with one."""
    key = next((name for name in SYSTEM if name in fields), None)
    if key is None or (messages and messages[0].role in ("system", "developer")):
        return messages
    system = text(fields, key, where)
    return (Message("system", system), *messages) if system.strip() else messages


def unlearned(message: Message) -> Message:
    """The turn, not trained on if it is the assistant's."""
    return replace(message, is_learned=message.role != "assistant")


def prompt_completion(fields: Fields, where: str, key: str = "completion") -> Example:
    """A prompt and its completion as texts, or both as turns (TRL), training only on the completion's turns.

    Args:
        fields: The record.
        where: Its origin, for errors.
        key: The field of the completion.

    Raises:
        DataError: A field has the wrong type, or there is no answer to train on.
    """
    if not isinstance(fields["prompt"], list):
        found = pair("prompt", key, "completion")(fields, where)
        called = any(fields.get(name) for name in (*FUNCTIONS, "chat_template_kwargs"))
        return chat_example(found.messages, fields, where, key) if called else found
    before = tuple(unlearned(turn) for turn in messages_of(fields["prompt"], where, "prompt"))
    completion = messages_of(fields[key], where, key)
    return chat_example(with_system((*before, *completion), fields, where), fields, where, key)


def pair(prompt_key: str, answer_key: str, kind: Kind) -> Build:
    """The builder for one question and one answer as texts.

    Args:
        prompt_key: The field of the question.
        answer_key: The field of the answer.
        kind: Kind of the example, if the record has no system prompt.
    """

    def build(fields: Fields, where: str) -> Example:
        prompt = text(fields, prompt_key, where)
        answer = answer_text(fields, answer_key, where)
        messages = with_system((Message("user", prompt), Message("assistant", answer)), fields, where)
        return Example(kind if len(messages) == 2 else "chat", messages, where, has_turns=len(messages) > 2)

    return build


def answer_text(fields: Fields, field: str, where: str, key: str | None = None) -> str:
    """The text in `field`, which errors call `key`.

    Raises:
        DataError: It is not text, or contains only white space.
    """
    content = text(fields, field, where, key)
    if not content.strip():
        raise empty_answer(where, key or field, content)
    return content
