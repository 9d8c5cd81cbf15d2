"""The supported record formats and their conversion to `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mftctl.data.examples import IGNORED_LABEL, Example, Kind, Message, TokenIds
from mftctl.data.turns import Fields, empty_answer, functions, json_text, text, to_message, unused_keys, wrong_type
from mftctl.errors import DataError

_Build = Callable[[Fields, str], Example]
_PREFERENCES = ("chosen", "rejected")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_FUNCTIONS = ("tools", "functions")
_SYSTEM = ("system", "system_prompt")
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
    build: _Build
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
    _refuse_preferences(fields, where)
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
    return found.build(fields, where)


def is_record(fields: Mapping[str, Any]) -> bool:
    """True if the fields match a known format."""
    return _format_of(_present(fields)) is not None


def unused_fields(record: Mapping[str, Any]) -> set[str]:
    """The fields of a record that `to_example` ignores, such as `id`, or `messages.id` of its turns."""
    fields = _present(record)
    found = _format_of(fields)
    if found is None:
        return set()
    unused = {str(key) for key in fields if key not in (*found.keys, *found.optional)}
    for key in found.keys:
        if isinstance(fields[key], list):
            unused |= {f"{key}.{field}" for turn in fields[key] for field in unused_keys(turn)}
    return unused


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def _format_of(fields: Fields) -> _Format | None:
    return next((known for known in _FORMATS if all(key in fields for key in known.keys)), None)


def _refuse_preferences(fields: Fields, where: str) -> None:
    """Rejects preference data, whose rejected answers would be trained on as if they were right."""
    keys = [key for key in _PREFERENCES if key in fields]
    if "prompt" in fields and "completion" in fields and isinstance(fields.get("label"), bool):
        keys = ["label"]
    if keys:
        raise DataError(
            "The record is preference data; mftctl trains on single correct answers.",
            path=where,
            key=keys[0],
            expected="records of questions and answers",
            actual=f"the field{'s' if len(keys) > 1 else ''} {' and '.join(keys)} (for DPO, KTO and the like)",
            hint="to train on the preferred answers, write records with prompt and completion",
        )


def _refuse_media(fields: Fields, where: str) -> None:
    """Rejects records with media: a question about an image cannot be learned from its text."""
    key = next((key for key in _MEDIA if fields.get(key)), None)
    if key is not None:
        raise DataError(
            "The record contains media.",
            path=where,
            key=key,
            expected="no images, videos or audio",
            actual=type(fields[key]).__name__,
            hint="mftctl trains language models on text; remove the record, or the field if the text works without it",
        )


def _conversation(key: str) -> _Build:
    """The builder for a list of turns in the field `key`."""

    def build(fields: Fields, where: str) -> Example:
        messages = _with_system(_messages(fields[key], where, key), fields, where)
        return _chat(messages, fields, where, key)

    return build


def _chat(messages: tuple[Message, ...], fields: Fields, where: str, key: str) -> Example:
    """A conversation, checked to end with an answer to a previous turn."""
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
    tools = next((functions(fields[name], where, name) for name in _FUNCTIONS if name in fields), "")
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


def _messages(turns: object, where: str, key: str) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise wrong_type(where, key, "a list of turns", turns)
    return tuple(to_message(turn, where, f"{key}[{index}]") for index, turn in enumerate(turns))


def _with_system(messages: tuple[Message, ...], fields: Fields, where: str) -> tuple[Message, ...]:
    """The turns, preceded by the record's system prompt unless they begin with one."""
    key = next((name for name in _SYSTEM if name in fields), None)
    if key is None or (messages and messages[0].role in ("system", "developer")):
        return messages
    system = text(fields, key, where)
    return (Message("system", system), *messages) if system.strip() else messages


def _prompt_completion(fields: Fields, where: str) -> Example:
    """A prompt and its completion as texts, or both as turns (TRL), training only on the completion's turns."""
    if not isinstance(fields["prompt"], list):
        pair = _pair("prompt", "completion", "completion")(fields, where)
        called = any(fields.get(name) for name in (*_FUNCTIONS, "chat_template_kwargs"))
        return _chat(pair.messages, fields, where, "completion") if called else pair
    before = tuple(_unlearned(turn) for turn in _messages(fields["prompt"], where, "prompt"))
    completion = _messages(fields["completion"], where, "completion")
    return _chat(_with_system((*before, *completion), fields, where), fields, where, "completion")


def _unlearned(message: Message) -> Message:
    return Message(
        message.role,
        message.content,
        message.thinking,
        message.tool_calls,
        message.name,
        message.tool_call_id,
        is_learned=message.role != "assistant",
    )


def _pair(prompt_key: str, answer_key: str, kind: Kind) -> _Build:
    """The builder for one question and one answer."""

    def build(fields: Fields, where: str) -> Example:
        prompt = text(fields, prompt_key, where)
        answer = _answer(fields, answer_key, where)
        messages = _with_system((Message("user", prompt), Message("assistant", answer)), fields, where)
        return Example(kind if len(messages) == 2 else "chat", messages, where, has_turns=len(messages) > 2)

    return build


def _alpaca(fields: Fields, where: str) -> Example:
    prompt = _instruction(fields, "input", where)
    answer = _answer(fields, "output", where)
    earlier = _history(fields.get("history", []), where)
    messages = _with_system((*earlier, Message("user", prompt), Message("assistant", answer)), fields, where)
    return Example("chat", messages, where, has_turns=len(messages) > 2)


def _dolly(fields: Fields, where: str) -> Example:
    """An instruction with its context (Dolly)."""
    prompt, answer = _instruction(fields, "context", where), _answer(fields, "response", where)
    messages = _with_system((Message("user", prompt), Message("assistant", answer)), fields, where)
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
    for index, pair in enumerate(pairs):
        key = f"history[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise wrong_type(where, key, "a question and an answer", pair)
        question, answer = pair
        messages.append(Message("user", text({"question": question}, "question", where, f"{key}[0]")))
        messages.append(Message("assistant", _answer({"answer": answer}, "answer", where, f"{key}[1]")))
    return tuple(messages)


def _mbpp(text_key: str) -> _Build:
    """The builder for an MBPP problem: the prompt of the benchmark `mbpp`, and the code with Unix line ends."""

    def build(fields: Fields, where: str) -> Example:
        tests = _texts(fields["test_list"], where, "test_list")
        prompt = "\n".join(['"""', text(fields, text_key, where), *tests, '"""', ""])
        code = _answer(fields, "code", where).replace("\r\n", "\n")
        return Example("completion", (Message("user", prompt), Message("assistant", code)), where)

    return build


def _texts(value: object, where: str, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong_type(where, key, "a list of texts", value)
    return value


def _plain_text(fields: Fields, where: str) -> Example:
    return Example("text", (Message("assistant", _answer(fields, "text", where)),), where)


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


def _answer(fields: Fields, field: str, where: str, key: str | None = None) -> str:
    """The text in `field`, which must contain more than white space."""
    content = text(fields, field, where, key)
    if not content.strip():
        raise empty_answer(where, key or field, content)
    return content


_TURNS = (*_FUNCTIONS, *_SYSTEM, "chat_template_kwargs")
_FORMATS = (
    _Format(("input_ids",), _token_ids, _TOKEN_EXTRAS),
    _Format(("messages",), _conversation("messages"), _TURNS),
    _Format(("conversations",), _conversation("conversations"), _TURNS),
    _Format(("prompt", "completion"), _prompt_completion, _TURNS),
    _Format(("prompt", "response"), _pair("prompt", "response", "completion"), _SYSTEM),
    _Format(("question", "answer"), _pair("question", "answer", "chat"), _SYSTEM),
    _Format(("question", "response"), _pair("question", "response", "chat"), _SYSTEM),
    _Format(("instruction", "output"), _alpaca, ("input", "history", *_SYSTEM)),
    _Format(("instruction", "response"), _dolly, ("context", *_SYSTEM)),
    _Format(("problem", "solution"), _pair("problem", "solution", "chat"), _SYSTEM),
    _Format(("query", "response"), _pair("query", "response", "chat"), _SYSTEM),
    _Format(("query", "answer"), _pair("query", "answer", "chat"), _SYSTEM),
    _Format(("inputs", "targets"), _pair("inputs", "targets", "chat"), _SYSTEM),
    _Format(("text", "code", "test_list"), _mbpp("text")),
    _Format(("prompt", "code", "test_list"), _mbpp("prompt")),
    _Format(("text",), _plain_text),
)
