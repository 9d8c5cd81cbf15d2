"""The common form of all training and evaluation records."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any, Literal

from mftctl.data.image_reference import ImageReference

IGNORED_LABEL = -100
"""The label that the loss of every transformers model ignores."""

Kind = Literal["chat", "completion", "text", "tokens"]
Learn = Literal["all", "last"]
"""Answers of a conversation to train on."""
RecordKind = Literal["answers", "preferences"]
"""Records with one answer each, or with a chosen and a rejected one."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call by the assistant.

    Attributes:
        name: Name of the function.
        arguments: JSON text.
        id: The id that the tool's answer refers to; None if the record has none.
    """

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `developer`, `user`, `assistant` or `tool`.
        content: The text of the turn; empty only if the assistant calls a tool without any text.
        thinking: The assistant's thinking before its answer.
        tool_calls: The assistant's tool calls.
        name: Name of the speaker, or of the function that answers.
        tool_call_id: The call that a tool answers.
        is_learned: Whether to train on an assistant turn.
        image_places: Where the images of the turn are shown: character positions in its text, ascending.
    """

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    is_learned: bool = True
    image_places: tuple[int, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The text before, between and after the images; the whole text without images."""
        bounds = [0, *self.image_places, len(self.content)]
        return [self.content[start:end] for start, end in pairwise(bounds)]

    @property
    def parts(self) -> list[dict[str, str]]:
        """The content as chat templates take it from a turn with images: parts of type `text` and `image`."""
        first, *others = self.texts
        parts = [{"type": "text", "text": first}] if first else []
        for text in others:
            parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        return parts


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A pre-tokenised record.

    Attributes:
        input_ids: The token ids.
        labels: One label per token; -100 for tokens that are not trained on.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation record.

    Attributes:
        kind: `chat` (rendered with the chat template), `completion` (rendered with the template if there is one,
            otherwise prompt and completion are concatenated), `text` (plain text, never rendered with the template) or
            `tokens` (pre-tokenised, without messages).
        messages: The turns; the last is the assistant's answer. A `text` record is a single assistant turn unless it
            is a preference.
        where: Origin of the record, such as `train.jsonl:17`.
        has_turns: Whether the record is a list of turns, which needs a chat template to mark the roles.
        tools: JSON text of the list of functions that the assistant may call; empty if there are none.
        template_args: JSON text of the record's chat-template variables; empty if there are none.
        token_ids: The tokens of a `tokens` record.
        rejected: For a preference, the turns with the rejected answer, from the first; `messages` has the chosen one.
            Empty for a record with one answer.
        images: The images in the order in which its turns show them.
    """

    kind: Kind
    messages: tuple[Message, ...]
    where: str
    has_turns: bool = False
    tools: str = ""
    template_args: str = ""
    token_ids: TokenIds | None = None
    rejected: tuple[Message, ...] = ()
    images: tuple[ImageReference, ...] = ()

    @property
    def record_kind(self) -> RecordKind:
        """Whether the record has one answer or is a preference."""
        return "preferences" if self.rejected else "answers"

    @property
    def sides(self) -> tuple[Example, ...]:
        """The record itself; for a preference, a record with the chosen and one with the rejected answer."""
        if not self.rejected:
            return (self,)
        return replace(self, rejected=()), replace(self, messages=self.rejected, rejected=())

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the answer, or before both answers."""
        return shared_start(self.messages[:-1], self.rejected[:-1]) if self.rejected else self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last turn, the assistant's; empty for a `tokens` record."""
        return self.messages[-1].content if self.messages else ""

    @property
    def begins_without_system(self) -> bool:
        """Whether the conversation begins without a system turn, so that a template may add one."""
        return self.kind in ("chat", "completion") and self.messages[0].role not in ("system", "developer")

    def canonical(self) -> bytes:
        """Canonical JSON of the content; equal records give equal bytes, whatever their origin."""
        document: list[Any] = [self.kind, [_canonical(message) for message in self.messages]]
        if self.tools or self.template_args or self.token_ids is not None or self.rejected or self.images:
            ids = None if self.token_ids is None else [self.token_ids.input_ids, self.token_ids.labels]
            document.append([self.tools, self.template_args, ids])
        if self.rejected or self.images:
            document.append([_canonical(message) for message in self.rejected])
        if self.images:
            document.append([image.sha256 for image in self.images])
        return json.dumps(document).encode()

    @classmethod
    def from_canonical(
        cls, content: bytes, where: str, *, has_turns: bool, images: tuple[ImageReference, ...] = ()
    ) -> Example:
        """The example with this canonical JSON.

        Args:
            content: From `canonical`.
            where: Origin of the record.
            has_turns: Whether the record is a list of turns, which the canonical form leaves out.
            images: Its images, of which the canonical form has only the digests; without them, they have no content.
        """
        kind, messages, *more = json.loads(content)
        tools, template_args, ids = more[0] if more else ("", "", None)
        token_ids = None if ids is None else TokenIds(tuple(ids[0]), tuple(ids[1]))
        rejected = tuple(map(_message, more[1])) if len(more) > 1 else ()
        turns = tuple(map(_message, messages))
        images = images or tuple(map(ImageReference, more[2] if len(more) > 2 else ()))
        return cls(kind, turns, where, has_turns, tools, template_args, token_ids, rejected, images)

    def prompt_content(self) -> bytes:
        """Canonical JSON of the kind, the prompt and its images, or of the whole of a plain text or of token ids."""
        ids = None if self.token_ids is None else [self.token_ids.input_ids, self.token_ids.labels]
        messages = self.prompt or self.messages
        images = [[image.sha256 for image in self.images]] if self.images else []
        return json.dumps([self.kind, [_canonical(message) for message in messages] or ids, *images]).encode()


def shared_start(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns that two conversations have in common at their start."""
    same = takewhile(lambda turns: turns[0] == turns[1], zip(first, second, strict=False))
    return tuple(turn for turn, _ in same)


def _message(fields: list[Any]) -> Message:
    """The message with these canonical fields."""
    role, content, *more = fields
    if not more:
        return Message(role, content)
    thinking, calls, name, tool_call_id, is_learned, *places = more[0]
    called = tuple(ToolCall(*call) for call in calls)
    shown = tuple(places[0]) if places else ()
    return Message(role, content, thinking, called, name, tool_call_id, is_learned, shown)


def _canonical(message: Message) -> list[Any]:
    calls = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    more: list[Any] = [message.thinking, calls, message.name, message.tool_call_id, message.is_learned]
    more += [list(message.image_places)] if message.image_places else []
    return [message.role, message.content, *([] if more == ["", [], None, None, True] else [more])]
