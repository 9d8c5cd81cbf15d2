"""The text of an example, cut where the answers start and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import jinja2
from transformers import PreTrainedTokenizerBase

from mftctl.data.examples import Example, Message
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
    """

    segments: tuple[Segment, ...]
    add_bos: bool
    add_eos: bool


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The example through the tokenizer's chat template, or as plain text where it has none.

    Args:
        example: What to render; a `text` example never goes through the template.
        tokenizer: Its chat template is used.

    Raises:
        DataError: the template fails on the example, or a conversation cut short does not render as a prefix of the
            whole one, so that the answers cannot be found in the text.
    """
    if example.kind == "text":
        return Rendered((Segment(example.answer, is_answer=True),), add_bos=True, add_eos=True)
    if tokenizer.chat_template:
        return _render_template(example, tokenizer)
    prompt = "\n\n".join(message.content for message in example.prompt)
    separator = "\n" if example.kind == "chat" else ""
    segments = _segments([(prompt + separator, False), (example.answer, True)])
    return Rendered(segments, add_bos=True, add_eos=True)


def _render_template(example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Every assistant turn but an opening one, which answers nothing, becomes an answer."""
    messages = example.messages
    whole = _apply(messages, example, tokenizer)
    pieces: list[tuple[str, bool]] = []
    position = 0
    for index, message in enumerate(messages):
        if message.role != "assistant" or index == 0:
            continue
        before = _apply(messages[:index], example, tokenizer, add_generation_prompt=True)
        through = _apply(messages[: index + 1], example, tokenizer)
        if not (whole.startswith(before) and whole.startswith(through) and position <= len(before) < len(through)):
            raise _not_a_prefix(example, index)
        # The line end that templates put after the end-of-turn marker is never generated.
        answer = through[len(before) :].rstrip()
        pieces += [(whole[position : len(before)], False), (answer, True)]
        position = len(before) + len(answer)
    if _ends_without_marker(whole, messages[-1]):
        return Rendered(_segments(pieces), add_bos=False, add_eos=True)
    return Rendered(_segments([*pieces, (whole[position:], False)]), add_bos=False, add_eos=False)


def _apply(
    messages: Sequence[Message],
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise DataError(
            "The chat template of the tokenizer fails on this record.",
            path=example.where,
            expected="roles in an order that the template takes",
            actual=f"{', '.join(message.role for message in messages)}: {error}",
        ) from error
    return cast(str, text)


def _segments(pieces: Sequence[tuple[str, bool]]) -> tuple[Segment, ...]:
    return tuple(Segment(text, is_answer) for text, is_answer in pieces if text)


def _ends_without_marker(whole: str, last: Message) -> bool:
    """Whether the template writes nothing after the last answer, so that only an added token can end it."""
    return whole.rstrip().endswith(last.content.rstrip())


def _not_a_prefix(example: Example, index: int) -> DataError:
    return DataError(
        "The chat template changes earlier turns when later ones follow, so the answers cannot be found in its text.",
        path=example.where,
        key=f"messages[{index}]",
        expected="the conversation up to any turn renders as the beginning of the whole conversation",
        actual="another text",
        hint="use a template without that, or records of one question and one answer",
    )
