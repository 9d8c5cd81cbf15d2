"""Renders conversations with a chat template and locates the answers in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from mftctl.data import template_clock
from mftctl.data.examples import Example, Message, ToolCall
from mftctl.data.template_limits import TEMPLATE_FAILURES, render_template
from mftctl.data.turn_ends import TurnEnd, common_start, turn_end
from mftctl.errors import DataError
from mftctl.text import first_line

_MARK = "mftctlMark7041"
"""Placeholder for an answer, to see where a template puts it; a single word, so that no template changes it."""

_ASKED = "mftctlAsked7041"
"""Placeholder for a question."""

_SENTENCE_WORDS = 3
"""Fewer words are taken for a role name, not a system prompt."""

_THOUGHT_END = "</think>"
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_OTHER_TEMPLATE = "choose another template with --chat-template, or remove the record"


@dataclass(frozen=True, slots=True)
class Answer:
    """One assistant turn in the text of a conversation.

    Attributes:
        start: Start of the span to train on, in characters.
        end: End of the answer with its stop.
        is_learned: Whether the answer is trained on.
        has_stop: Whether the text ends the turn.
    """

    start: int
    end: int
    is_learned: bool
    has_stop: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the model sees it.

    Attributes:
        text: The whole text.
        answers: The answers in order, without an opening assistant turn that answers nothing.
        cuts_thinking: Whether the template drops the assistant's thinking in some turn.
        is_last_only: Whether some earlier answers cannot be located in the text.
        has_tools_as_text: Whether functions or calls are written as JSON because the template has no field for them.
    """

    text: str
    answers: tuple[Answer, ...]
    cuts_thinking: bool = False
    is_last_only: bool = False
    has_tools_as_text: bool = False


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer.

    Args:
        tokenizer: With a chat template.
        now: The current time as the template sees it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, now: datetime) -> None:
        self._tokenizer = tokenizer
        self._template = template_clock.at(cast(str, tokenizer.chat_template), now)
        self._arguments_are_text = False

    @cached_property
    def turn_end(self) -> TurnEnd:
        """The end of an assistant turn in the template."""
        question, answer = Message("user", _ASKED), Message("assistant", _MARK)
        for turns in ((question, answer, question, answer), (question, answer)):
            try:
                text = self._text(Example("chat", turns, "", has_turns=True), turns)
            except DataError:
                continue
            first, *behind = text.split(_MARK)
            if len(behind) == len(turns) // 2:
                between = behind[0] if len(behind) > 1 else None
                opening = self._opening(first.partition(_ASKED)[0])
                return turn_end(between, behind[-1], self._specials, opening=opening)
        return TurnEnd("")

    @cached_property
    def stop(self) -> str:
        """The text that ends an answer: the end of the last turn, else the start of the next; else empty."""
        question, answer = Message("user", _ASKED), Message("assistant", _MARK)
        turns = (question, answer, question, answer)
        try:
            behind = self._text(Example("chat", turns, "", has_turns=True), turns).split(_MARK)[1:]
        except DataError:
            behind = []
        tails = (behind[-1], behind[0]) if len(behind) > 1 else ()
        found = (self.turn_end.after(_MARK, tail, self._specials).strip() for tail in tails)
        return next(filter(None, found), self.turn_end.marker)

    def _opening(self, text: str) -> str | None:
        """The special token that opens a turn: the first one that is not the begin-of-sequence token."""
        known = [token for token in self._specials if token != self._tokenizer.bos_token and token in text]
        return min(known, key=text.index, default=None)

    @cached_property
    def _takes_parts(self) -> bool:
        """True if the template accepts a turn's content only as a list of parts, as vision-language models do."""
        found = []
        for content in (_MARK, [{"type": "text", "text": _MARK}]):
            try:
                text, _ = self._rendered([{"role": "user", "content": content}], {})
            except TEMPLATE_FAILURES:
                found.append(False)
            else:
                found.append(_MARK in text)
        return found == [False, True]

    @cached_property
    def added_system(self) -> str:
        """The system prompt that the template adds by default; empty if it adds none."""
        asked, told = Message("user", _MARK), Message("system", _MARK)
        try:
            alone = self._text(Example("chat", (asked,), ""), (asked,))
            after = self._text(Example("chat", (told, asked), ""), (told, asked))
        except DataError:
            return ""
        if _MARK not in alone or _MARK not in after:
            return ""
        before, start = alone.partition(_MARK)[0], after.partition(_MARK)[0]
        text = before[len(common_start(before, start)) :]
        for special in self._specials:
            text = text.partition(special)[0]
        return text.strip() if len(text.split()) >= _SENTENCE_WORDS else ""

    def render(self, example: Example) -> Conversation:
        """The rendered conversation, with every assistant turn located in it.

        Args:
            example: With messages.

        Raises:
            DataError: The template fails on the example or drops a question or an answer, or the last answer cannot be
                located.
        """
        whole = self._checked(example)
        return self._found(example, whole)

    def _found(self, example: Example, whole: str) -> Conversation:
        turns = [index for index, turn in enumerate(example.messages) if turn.role == "assistant" and index > 0]
        cuts = any(not _keeps_thinking(example.messages[index], whole) for index in turns)
        if _GENERATION.search(self._template):
            spans = self._generated(example)
            if len(spans) == len([turn for turn in example.messages if turn.role == "assistant"]):
                answers = self._with_ends(example, whole, turns, spans[-len(turns) :])
                return Conversation(whole, answers, cuts, has_tools_as_text=self._writes_tools(example))
        found = [self._span(example, whole, index) for index in turns]
        if found[-1] is None:
            raise _not_found(example, turns[-1])
        kept = [(index, span) for index, span in zip(turns, found, strict=True) if span is not None]
        answers = self._with_ends(example, whole, [index for index, _ in kept], [span for _, span in kept])
        return Conversation(whole, answers, cuts, len(kept) < len(turns), self._writes_tools(example))

    def _with_ends(
        self, example: Example, whole: str, turns: Sequence[int], spans: Sequence[tuple[int, int]]
    ) -> tuple[Answer, ...]:
        """The answers, each with its stop."""
        answers = []
        starts = [start for start, _ in spans[1:]] + [len(whole)]
        for index, (start, end), following in zip(turns, spans, starts, strict=True):
            stop = self.turn_end.after(whole[start:end], whole[end:following], self._specials)
            has_stop = bool(stop) or self.turn_end.ends(whole[start:end], self._specials)
            answers.append(Answer(start, end + len(stop), example.messages[index].is_learned, has_stop))
        return tuple(answers)

    def _generated(self, example: Example) -> list[tuple[int, int]]:
        """The character spans that the template itself marks as generated."""
        _, spans = self._rendered(self._turns(example, example.messages), self._variables(example), marked=True)
        return [(start, end) for start, end in spans[0] if end > start]

    def _span(self, example: Example, whole: str, index: int) -> tuple[int, int] | None:
        """The span of one answer; None if it cannot be located."""
        message = example.messages[index]
        span = self._marked_span(example, whole, index) or self._prefix_span(example, whole, index)
        if span is None or not _holds(whole[span[0] : span[1]], _said(message)):
            return None
        start, end = span
        if message.thinking or message.tool_calls or _THOUGHT_END in message.content:
            prompt = self._prompt(example, index)
            start = len(prompt) if whole.startswith(prompt) and len(prompt) <= start else start
        return start, end

    def _marked_span(self, example: Example, whole: str, index: int) -> tuple[int, int] | None:
        """The span that changes when the answer is replaced by the placeholder."""
        marked = replace(example.messages[index], content=_MARK, tool_calls=())
        try:
            other = self._text(example, (*example.messages[:index], marked, *example.messages[index + 1 :]))
        except DataError:
            return None
        if other.count(_MARK) != 1:
            return None
        before, _, behind = other.partition(_MARK)
        start = len(before) if whole.startswith(before) else len(common_start(whole, before))
        rest = whole[start:]
        same = len(behind) if rest.endswith(behind) else len(common_start(rest[::-1], behind[::-1]))
        return (start, len(whole) - same) if same < len(rest) else None

    def _prefix_span(self, example: Example, whole: str, index: int) -> tuple[int, int] | None:
        """The span that this turn adds to the conversation before it."""
        try:
            before, through = self._prompt(example, index), self._text(example, example.messages[: index + 1])
        except DataError:
            return None
        if not whole.startswith(through) or not through.startswith(before) or len(before) == len(through):
            return None
        answer = through[len(before) :].rstrip()
        return len(before), len(before) + len(answer.removesuffix(self.turn_end.marker))

    def _prompt(self, example: Example, index: int) -> str:
        """The prompt from which the model generates the turn at this index."""
        return self._text(example, example.messages[:index], add_generation_prompt=True)

    def _checked(self, example: Example) -> str:
        """The whole text, checked to contain the text of every turn."""
        whole = self._text(example, example.messages)
        for index, message in enumerate(example.messages):
            said = message.texts if message.image_places else [_said(message)]
            if message.role != "tool" and not all(_holds(whole, text.strip()) for text in said):
                raise DataError(
                    "The chat template drops text of the record.",
                    path=example.where,
                    key=f"messages[{index}]",
                    expected=f"the text of the {message.role} turn in the template's output",
                    actual=_shortened(_said(message)),
                    hint="--merge-system" if message.role == "system" else _OTHER_TEMPLATE,
                )
            for call in message.tool_calls:
                if call.name not in whole:
                    raise _not_rendered(example, index, f"the tool call {call.name}")
            if message.thinking and index == len(example.messages) - 1 and not _keeps_thinking(message, whole):
                raise _not_rendered(example, index, "the thinking of the last answer")
        for function in json.loads(example.tools or "[]"):
            name = function.get("function", function).get("name")
            if name is not None and str(name) not in whole:
                raise _not_rendered(example, 0, f"the function {name} in the field tools")
        return whole

    def _text(self, example: Example, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._applied(example, messages, add_generation_prompt)
        except TEMPLATE_FAILURES as error:
            if any(message.tool_calls for message in messages) and not self._arguments_are_text:
                self._arguments_are_text = True  # some templates concatenate them with other text
                try:
                    return self._applied(example, messages, add_generation_prompt)
                except TEMPLATE_FAILURES:
                    self._arguments_are_text = False
            raise DataError(
                "The tokenizer's chat template fails on this record.",
                path=example.where,
                expected="roles in an order that the template accepts",
                actual=f"{', '.join(message.role for message in messages)}: {first_line(error)}",
                hint="--merge-system if it accepts no system turn, or --chat-template to choose another template",
            ) from error

    def _applied(self, example: Example, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns, variables = self._turns(example, messages), self._variables(example)
        return self._rendered(turns, {**variables, "add_generation_prompt": add_generation_prompt})[0]

    def _rendered(
        self, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, marked: bool = False
    ) -> tuple[str, list[list[tuple[int, int]]]]:
        """The text of the turns and, on request, the spans that the template marks as generated."""
        named = {**self._tokenizer.special_tokens_map, **variables}
        return render_template(turns, self._template, marked=marked, **named)

    def _variables(self, example: Example) -> dict[str, Any]:
        variables = json.loads(example.template_args or "{}")
        tools = json.loads(example.tools) if example.tools else None
        return {**variables, "tools": tools}

    def _turns(self, example: Example, messages: Sequence[Message]) -> list[Mapping[str, Any]]:
        """The turns as template input; without a `tools` variable, the functions go into the system turn."""
        spoken = list(messages)
        if example.tools and not self._knows("tools"):
            system = spoken.pop(0) if spoken and spoken[0].role == "system" else Message("system", "")
            content = "\n\n".join(part for part in (system.content, example.tools) if part)
            spoken.insert(0, replace(system, content=content))
        return [self._turn(message) for message in spoken]

    def _knows(self, variable: str) -> bool:
        """True if the template reads a variable or a field of a turn."""
        return re.search(rf"\b{variable}\b", self._template) is not None

    def _writes_tools(self, example: Example) -> bool:
        """True if functions or calls are written as JSON text."""
        if example.tools and not self._knows("tools"):
            return True
        return any(message.tool_calls for message in example.messages) and not self._knows("tool_calls")

    def _turn(self, message: Message) -> Mapping[str, Any]:
        """A turn as template input."""
        role, content = message.role, message.content
        if role == "developer" and not self._knows("developer"):
            role = "system"
        if message.tool_calls and not self._knows("tool_calls"):
            content = "\n".join([*([content] if content else []), *map(_call_text, message.tool_calls)])
        turn: dict[str, Any] = {"role": role, "content": content}
        if message.image_places:
            turn["content"] = message.parts
        elif self._takes_parts:
            turn["content"] = [{"type": "text", "text": content}]
        if message.thinking:
            turn |= {"reasoning_content": message.thinking, "thinking": message.thinking}
        if message.tool_calls and self._knows("tool_calls"):
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments if self._arguments_are_text else json.loads(call.arguments),
                    },
                    **({} if call.id is None else {"id": call.id}),
                }
                for call in message.tool_calls
            ]
        return {
            **turn,
            **({} if message.name is None else {"name": message.name}),
            **({} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id}),
        }

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        added = self._tokenizer.added_tokens_decoder.values()
        return tuple({*(token.content for token in added if token.special), *self._tokenizer.all_special_tokens})


def _call_text(call: ToolCall) -> str:
    return json.dumps({"name": call.name, "arguments": json.loads(call.arguments)}, ensure_ascii=False)


def _said(message: Message) -> str:
    """The text of the turn without its thinking."""
    said = message.content.rpartition(_THOUGHT_END)[2] if message.role == "assistant" else message.content
    return said.strip()


def _keeps_thinking(message: Message, whole: str) -> bool:
    thought = message.thinking or message.content.rpartition(_THOUGHT_END)[0].rpartition("<think>")[2]
    return _holds(whole, thought.strip())


def _holds(whole: str, text: str) -> bool:
    """True if `whole` contains a text, ignoring changes in white space."""
    return text in whole or "".join(text.split()) in "".join(whole.split())


def _shortened(text: str) -> str:
    most = 60
    return repr(text if len(text) <= most else f"{text[:most]}…")


def _not_rendered(example: Example, index: int, what: str) -> DataError:
    return DataError(
        f"The chat template drops {what}.",
        path=example.where,
        key=f"messages[{index}]",
        expected="a template that renders it",
        hint="choose another template with --chat-template, or remove it from the record",
    )


def _not_found(example: Example, index: int) -> DataError:
    return DataError(
        "The last answer cannot be located in the chat template's output.",
        path=example.where,
        key=f"messages[{index}]",
        expected="a template that renders each answer once",
        hint="choose another template with --chat-template",
    )
