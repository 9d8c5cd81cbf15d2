"""The text of an example, cut where the answers start and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from mftctl.data.chat_rendering import ChatRenderer, Conversation
from mftctl.data.examples import Example, Learn
from mftctl.errors import DataError


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text.

    Attributes:
        text: The stretch, not empty.
        is_answer: Whether it is learned: an answer with its end-of-turn marker.
    """

    text: str
    is_answer: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """What an example looks like to the model.

    Attributes:
        segments: The text in order.
        add_bos: Whether a begin-of-sequence token goes in front if the tokenizer adds one by default.
        add_eos: Whether an end-of-sequence token has to end the last answer.
        cuts_thinking: Whether the chat template leaves out what was thought before an answer.
        is_last_only: Whether earlier answers are not learned, since they are not to be found in the text.
        has_open_turn: Whether an earlier answer is learned without anything that ends it.
        has_tools_as_text: Whether functions or calls are written as JSON, since the template has no place for them.
    """

    segments: tuple[Segment, ...]
    add_bos: bool
    add_eos: bool
    cuts_thinking: bool = False
    is_last_only: bool = False
    has_open_turn: bool = False
    has_tools_as_text: bool = False


class Renderer:
    """Brings examples into the form that a model sees.

    Args:
        tokenizer: Its chat template renders the examples where it has one.
        learn: Whether all answers of a conversation are learned, or the last one alone.
        now: What a chat template takes for the present.
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
        """The example through the tokenizer's chat template, or as plain text where it has none.

        Args:
            example: What to render; a `text` example never goes through the template.

        Raises:
            DataError: There is no template for a list of turns, it fails on them, leaves out a text, or the last answer
                is not to be found in what it writes.
        """
        if example.kind == "text":
            return Rendered((Segment(example.answer, is_answer=True),), add_bos=True, add_eos=True)
        if self.chat is not None:
            return self._chat(self.chat.render(example))
        if example.has_turns:
            raise DataError(
                "The model has no chat template, without which turns cannot be told apart.",
                path=example.where,
                expected="a model whose tokenizer has a chat template",
                actual=f"a conversation of {', '.join(message.role for message in example.messages)}",
                hint="--chat-template tulu (or chatml, llama3, zephyr, alpaca), --chat-template FILE.jinja, or records "
                "of prompt and completion",
            )
        prompt = "\n\n".join(message.content for message in example.prompt)
        separator = "\n" if example.kind == "chat" else ""
        segments = _segments([(prompt + separator, False), (example.answer, True)])
        return Rendered(segments, add_bos=True, add_eos=True)

    def _chat(self, conversation: Conversation) -> Rendered:
        """The text of a conversation, cut at its answers."""
        text, answers = conversation.text, conversation.answers
        pieces: list[tuple[str, bool]] = []
        position = 0
        for answer in answers:
            is_learned = answer.is_learned and (self._learn == "all" or answer is answers[-1])
            pieces += [(text[position : answer.start], False), (text[answer.start : answer.end], is_learned)]
            position = answer.end
        rest = text[position:]
        # Only an added token can end an answer behind which the template writes nothing.
        add_eos = not answers[-1].has_stop and not rest.strip()
        if not add_eos:
            pieces.append((rest, False))
        return Rendered(
            _segments(pieces),
            add_bos=False,
            add_eos=add_eos,
            cuts_thinking=conversation.cuts_thinking,
            is_last_only=conversation.is_last_only,
            has_open_turn=self._learn == "all" and any(not item.has_stop and item.is_learned for item in answers[:-1]),
            has_tools_as_text=conversation.has_tools_as_text,
        )


def _segments(pieces: Sequence[tuple[str, bool]]) -> tuple[Segment, ...]:
    return tuple(Segment(text, is_answer) for text, is_answer in pieces if text)
