"""Renders examples to text, split where answers start and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from mftctl.data.chat_rendering import ChatRenderer, Conversation
from mftctl.data.examples import Example, Learn
from mftctl.data.record_issues import Remark
from mftctl.errors import DataError


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of text.

    Attributes:
        text: The text, not empty.
        is_answer: Whether it is trained on: an answer with its end-of-turn marker.
    """

    text: str
    is_answer: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as the model sees it.

    Attributes:
        segments: The text in order.
        add_bos: Whether to prepend a begin-of-sequence token if the tokenizer adds one by default.
        add_eos: Whether to end the last answer with an end-of-sequence token.
        remarks: What the user is told about the record.
    """

    segments: tuple[Segment, ...]
    add_bos: bool
    add_eos: bool
    remarks: Remark = Remark.NONE


class Renderer:
    """Renders examples to the text that a model sees.

    Args:
        tokenizer: Its chat template, if it has one, renders the examples.
        learn: Whether to train on all answers of a conversation or only on the last.
        now: The current time as the chat template sees it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, learn: Learn, now: datetime) -> None:
        self.tokenizer = tokenizer
        self._learn = learn
        self._now = now

    @cached_property
    def chat(self) -> ChatRenderer | None:
        """The tokenizer's chat template; None if it has none."""
        return ChatRenderer(self.tokenizer, self._now) if self.tokenizer.chat_template else None

    def render(self, example: Example) -> Rendered:
        """The example rendered with the tokenizer's chat template, or as plain text without one.

        Args:
            example: The example to render; a `text` example never goes through the template.

        Raises:
            DataError: There is no template for a list of turns, or it fails on them, drops text, or its output does not
                contain the last answer.
        """
        if example.kind == "text":
            texts = [*((message.content, False) for message in example.prompt), (example.answer, True)]
            return Rendered(_segments(texts), add_bos=True, add_eos=True)
        if self.chat is not None:
            return self._chat(self.chat.render(example))
        if example.has_turns or example.images:
            raise DataError(
                "The model has no chat template to render turns with.",
                path=example.where,
                expected="a model whose tokenizer has a chat template",
                actual=f"a conversation of {', '.join(message.role for message in example.messages)}",
                hint="--chat-template tulu (or chatml, llama3, zephyr, alpaca), --chat-template FILE.jinja, or records "
                "with prompt and completion",
            )
        prompt = "\n\n".join(message.content for message in example.prompt)
        separator = "\n" if example.kind == "chat" else ""
        segments = _segments([(prompt + separator, False), (example.answer, True)])
        return Rendered(segments, add_bos=True, add_eos=True)

    def _chat(self, conversation: Conversation) -> Rendered:
        """The text of a conversation, split at its answers."""
        text, answers = conversation.text, conversation.answers
        pieces: list[tuple[str, bool]] = []
        position = 0
        for answer in answers:
            is_learned = answer.is_learned and (self._learn == "all" or answer is answers[-1])
            pieces += [(text[position : answer.start], False), (text[answer.start : answer.end], is_learned)]
            position = answer.end
        rest = text[position:]
        # If the template writes nothing after an answer, only an added token can end it.
        add_eos = not answers[-1].has_stop and not rest.strip()
        if not add_eos:
            pieces.append((rest, False))
        return Rendered(
            _segments(pieces),
            add_bos=False,
            add_eos=add_eos,
            remarks=self._remarks(conversation),
        )

    def _remarks(self, conversation: Conversation) -> Remark:
        has_open_turn = any(not item.has_stop and item.is_learned for item in conversation.answers[:-1])
        return (
            (Remark.WITHOUT_THINKING if conversation.cuts_thinking else Remark.NONE)
            | (Remark.LAST_ONLY if conversation.is_last_only else Remark.NONE)
            | (Remark.TOOLS_AS_TEXT if conversation.has_tools_as_text else Remark.NONE)
            | (Remark.OPEN_TURN if has_open_turn and self._learn == "all" else Remark.NONE)
        )


def _segments(pieces: Sequence[tuple[str, bool]]) -> tuple[Segment, ...]:
    return tuple(Segment(text, is_answer) for text, is_answer in pieces if text)
