"""The one form every training record is brought into."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

IGNORED_LABEL = -100
"""The label that the loss of every transformers model leaves out."""

Kind = Literal["chat", "completion", "text", "tokens"]
Learn = Literal["all", "last"]
"""Which answers of a conversation."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a function by the assistant.

    Attributes:
        name: Of the function.
        arguments: JSON text.
        id: What the tool's answer refers to; None if the record has none.
    """

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `developer`, `user`, `assistant` or `tool`.
        content: The text of the turn; empty only where the assistant calls a tool and says nothing.
        thinking: What the assistant thought before it answered.
        tool_calls: The assistant's.
        name: Who speaks, or which function answers.
        tool_call_id: The call that a tool answers.
        is_learned: Whether an assistant's turn is to be learned.
    """

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    is_learned: bool = True


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A record that is tokenised already.

    Attributes:
        input_ids: The token ids.
        labels: As many; -100 where nothing is learned.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation record.

    Attributes:
        kind: `chat` (rendered with the chat template), `completion` (rendered with it where there is one, otherwise
            prompt and completion are joined as they are), `text` (plain text, every token is a label) or `tokens`
            (tokenised already, without messages).
        messages: The turns; the last is the assistant's answer. A `text` record is a single assistant turn.
        where: Where the record came from, such as `train.jsonl:17`.
        has_turns: Whether the record is a list of turns, whose roles only a chat template can tell apart.
        tools: JSON text of the list of functions that the assistant may call; empty if there are none.
        template_args: JSON text of the variables that the record gives the chat template; empty if there are none.
        token_ids: Of a `tokens` record.
    """

    kind: Kind
    messages: tuple[Message, ...]
    where: str
    has_turns: bool = False
    tools: str = ""
    template_args: str = ""
    token_ids: TokenIds | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last turn, the assistant's; empty of a `tokens` record."""
        return self.messages[-1].content if self.messages else ""

    def canonical(self) -> bytes:
        """What makes two records the same, wherever they come from, as JSON."""
        document: list[Any] = [self.kind, [_canonical(message) for message in self.messages]]
        if self.tools or self.template_args or self.token_ids is not None:
            ids = None if self.token_ids is None else [self.token_ids.input_ids, self.token_ids.labels]
            document.append([self.tools, self.template_args, ids])
        return json.dumps(document).encode()


def _canonical(message: Message) -> list[Any]:
    calls = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    more = [message.thinking, calls, message.name, message.tool_call_id, message.is_learned]
    return [message.role, message.content, *([] if more == ["", [], None, None, True] else [more])]
