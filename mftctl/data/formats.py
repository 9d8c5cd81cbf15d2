"""The supported record formats and their conversion to `Example`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mftctl.data.conversations import (
    SYSTEM,
    TURNS,
    Build,
    answer_text,
    chat_example,
    messages_of,
    pair,
    prompt_completion,
    with_system,
)
from mftctl.data.examples import IGNORED_LABEL, Example, Message, TokenIds
from mftctl.data.images import IMAGES, given_images, placed_images
from mftctl.data.preferences import CHOSEN, REJECTED, preference
from mftctl.data.turns import Fields, text, unused_keys, wrong_type
from mftctl.errors import DataError

_MEDIA = ("videos", "video", "audios", "audio")
_LABELS = ("labels", "completion_mask", "assistant_masks", "attention_mask")
_TOKEN_EXTRAS = (*_LABELS, "token_type_ids", "position_ids", "length")


@dataclass(frozen=True, slots=True)
class _Format:
    """A record format.

    Attributes:
        keys: Required fields.
        build: Builds the example.
        optional: Fields used if present.
    """

    keys: tuple[str, ...]
    build: Build
    optional: tuple[str, ...] = ()


def to_example(record: Mapping[str, Any], where: str) -> Example:
    """The record as an `Example`, by the first format whose required fields are all present.

    A field that is None counts as absent; `unused_fields` lists the fields that are ignored.

    Args:
        record: One record of a data file.
        where: Its origin, such as `train.jsonl:17`, kept in errors and in the example.

    Raises:
        DataError: No format matches, a field has the wrong type, or there is no answer to train on.
    """
    fields = _present(record)
    _refuse_half_preferences(fields, where)
    _refuse_media(fields, where)
    found = _format_of(fields)
    if found is None:
        raise DataError(
            "The record has an unknown format.",
            path=where,
            expected=" | ".join("+".join(known.keys) for known in _FORMATS),
            actual=f"the fields {', '.join(map(str, fields))}" if fields else "no field with a value",
            hint="rename the fields to match one of the formats",
        )
    return placed_images(found.build(fields, where), given_images(fields, where), where)


def is_record(fields: Mapping[str, Any]) -> bool:
    """True if the fields match a known format."""
    return _format_of(_present(fields)) is not None


def unused_fields(record: Mapping[str, Any]) -> set[str]:
    """The fields of a record that `to_example` ignores, such as `id`, or `messages.id` of its turns."""
    fields = _present(record)
    found = _format_of(fields)
    if found is None:
        return set()
    unused = {str(key) for key in fields if key not in (*found.keys, *found.optional, *IMAGES)}
    for key in found.keys:
        if isinstance(fields[key], list):
            unused |= {f"{key}.{field}" for turn in fields[key] for field in unused_keys(turn)}
    return unused


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def _format_of(fields: Fields) -> _Format | None:
    return next((known for known in _FORMATS if all(key in fields for key in known.keys)), None)


def _refuse_half_preferences(fields: Fields, where: str) -> None:
    """Rejects answers that are known to be right or wrong without the other one: not to be trained on as right."""
    keys = [key for key in (CHOSEN, REJECTED) if key in fields]
    if "prompt" in fields and "completion" in fields and isinstance(fields.get("label"), bool):
        keys = ["label"]
    if len(keys) == 1:
        raise DataError(
            "The record is half of a preference.",
            path=where,
            key=keys[0],
            expected="both chosen and rejected, or a question and its answer",
            actual=f"the field {keys[0]}" + (" (for KTO)" if keys == ["label"] else ""),
            hint="to train on the preferred answers alone, write records with prompt and completion",
        )


def _refuse_media(fields: Fields, where: str) -> None:
    """Rejects records with video or audio: a question about a film cannot be learned from its text."""
    key = next((key for key in _MEDIA if fields.get(key)), None)
    if key is not None:
        raise DataError(
            "The record contains video or audio.",
            path=where,
            key=key,
            expected="text and images, no videos or audio",
            actual=type(fields[key]).__name__,
            hint="remove the record, or the field if the text works without it",
        )


def _conversation(key: str) -> Build:
    """The builder for a list of turns in the field `key`."""

    def build(fields: Fields, where: str) -> Example:
        messages = with_system(messages_of(fields[key], where, key), fields, where)
        return chat_example(messages, fields, where, key)

    return build


def _alpaca(fields: Fields, where: str) -> Example:
    prompt = _instruction(fields, "input", where)
    answer = answer_text(fields, "output", where)
    earlier = _history(fields.get("history", []), where)
    messages = with_system((*earlier, Message("user", prompt), Message("assistant", answer)), fields, where)
    return Example("chat", messages, where, has_turns=len(messages) > 2)


def _dolly(fields: Fields, where: str) -> Example:
    """An instruction with its context (Dolly)."""
    prompt, answer = _instruction(fields, "context", where), answer_text(fields, "response", where)
    messages = with_system((Message("user", prompt), Message("assistant", answer)), fields, where)
    return Example("chat", messages, where, has_turns=len(messages) > 2)


def _instruction(fields: Fields, context_key: str, where: str) -> str:
    """An instruction and, after a blank line, its context, if any."""
    parts = (text(fields, "instruction", where), text(fields, context_key, where, default=""))
    return "\n\n".join(part for part in parts if part.strip())


def _history(pairs: object, where: str) -> tuple[Message, ...]:
    """The earlier questions and answers of an Alpaca record as turns."""
    if not isinstance(pairs, list):
        raise wrong_type(where, "history", "a list of pairs of a question and an answer", pairs)
    messages: list[Message] = []
    for index, exchange in enumerate(pairs):
        key = f"history[{index}]"
        if not isinstance(exchange, Sequence) or isinstance(exchange, str) or len(exchange) != 2:
            raise wrong_type(where, key, "a question and an answer", exchange)
        question, answer = exchange
        messages.append(Message("user", text({"question": question}, "question", where, f"{key}[0]")))
        messages.append(Message("assistant", answer_text({"answer": answer}, "answer", where, f"{key}[1]")))
    return tuple(messages)


def _mbpp(text_key: str) -> Build:
    """The builder for an MBPP problem: the prompt of the benchmark `mbpp`, and the code with Unix line ends."""

    def build(fields: Fields, where: str) -> Example:
        tests = _texts(fields["test_list"], where, "test_list")
        prompt = "\n".join(['"""', text(fields, text_key, where), *tests, '"""', ""])
        code = answer_text(fields, "code", where).replace("\r\n", "\n")
        return Example("completion", (Message("user", prompt), Message("assistant", code)), where)

    return build


def _texts(value: object, where: str, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong_type(where, key, "a list of texts", value)
    return value


def _plain_text(fields: Fields, where: str) -> Example:
    return Example("text", (Message("assistant", answer_text(fields, "text", where)),), where)


def _token_ids(fields: Fields, where: str) -> Example:
    """Token ids as given, without the padding that an attention mask excludes."""
    input_ids = _integers(fields["input_ids"], where, "input_ids")
    given = {key: _integers(fields[key], where, key) for key in _LABELS if key in fields}
    for key, values in given.items():
        if len(values) != len(input_ids):
            raise DataError(
                "A list differs in length from input_ids.",
                path=where,
                key=key,
                expected=str(len(input_ids)),
                actual=str(len(values)),
            )
    labels = given.get("labels") or input_ids
    for key in ("completion_mask", "assistant_masks"):
        if key in given:
            labels = [label if on else IGNORED_LABEL for label, on in zip(labels, given[key], strict=True)]
    attended = given.get("attention_mask", [1] * len(input_ids))
    for index, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        if label not in (IGNORED_LABEL, token):
            raise DataError(
                "A label differs from the token at its position.",
                path=where,
                key=f"labels[{index}]",
                expected=f"{token} or {IGNORED_LABEL} (models shift the labels themselves)",
                actual=str(label),
            )
    kept = [(token, label) for token, label, on in zip(input_ids, labels, attended, strict=True) if on]
    ids = TokenIds(tuple(token for token, _ in kept), tuple(label for _, label in kept))
    return Example("tokens", (), where, token_ids=ids)


def _integers(value: object, where: str, key: str) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise wrong_type(where, key, "a list of integers", value)
    return value


_FORMATS = (
    _Format((CHOSEN, REJECTED), preference, ("prompt", *TURNS)),
    _Format(("input_ids",), _token_ids, _TOKEN_EXTRAS),
    _Format(("messages",), _conversation("messages"), TURNS),
    _Format(("conversations",), _conversation("conversations"), TURNS),
    _Format(("prompt", "completion"), prompt_completion, TURNS),
    _Format(("prompt", "response"), pair("prompt", "response", "completion"), SYSTEM),
    _Format(("question", "answer"), pair("question", "answer", "chat"), SYSTEM),
    _Format(("question", "response"), pair("question", "response", "chat"), SYSTEM),
    _Format(("instruction", "output"), _alpaca, ("input", "history", *SYSTEM)),
    _Format(("instruction", "response"), _dolly, ("context", *SYSTEM)),
    _Format(("problem", "solution"), pair("problem", "solution", "chat"), SYSTEM),
    _Format(("query", "response"), pair("query", "response", "chat"), SYSTEM),
    _Format(("query", "answer"), pair("query", "answer", "chat"), SYSTEM),
    _Format(("inputs", "targets"), pair("inputs", "targets", "chat"), SYSTEM),
    _Format(("text", "code", "test_list"), _mbpp("text")),
    _Format(("prompt", "code", "test_list"), _mbpp("prompt")),
    _Format(("text",), _plain_text),
)
