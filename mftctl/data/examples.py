"""The one form every training record is brought into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["chat", "completion", "text"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: The text of the turn.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation record.

    Attributes:
        kind: `chat` (rendered with the chat template), `completion` (rendered with it where there is one, otherwise
            prompt and completion are joined as they are) or `text` (plain text, every token is a label).
        messages: The turns; the last is the assistant's answer. A `text` record is a single assistant turn.
        where: Where the record came from, such as `train.jsonl:17`.
    """

    kind: Kind
    messages: tuple[Message, ...]
    where: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last turn, the assistant's."""
        return self.messages[-1].content
