"""Tokenises examples, with labels on the answers only.

Each span of text between two answer boundaries is tokenised separately, so no token spans the end of a prompt and the
start of its answer, and the prompt's ids are the ones the model sees during generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mftctl.data.examples import IGNORED_LABEL, Example, Learn, TokenIds
from mftctl.data.record_issues import RecordIssues
from mftctl.data.rendering import Rendered, Renderer
from mftctl.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised example.

    Attributes:
        input_ids: The token ids.
        labels: The token ids of the answers and -100 elsewhere; as many as `input_ids`.
        where: Origin of the record.
        is_cut: Whether the example was truncated.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    is_cut: bool = False

    @property
    def answer_tokens(self) -> int:
        """Number of tokens trained on."""
        return sum(label != IGNORED_LABEL for label in self.labels)


_PROGRESS_RECORDS = 500
_SHORT_CHARACTERS = 32
_KNOWN_TEXTS = 1024


class _Piece(NamedTuple):
    """The tokens of one span of an example, and whether they are trained on."""

    input_ids: list[int]
    is_answer: bool


class Encoder:
    """Turns examples into token ids.

    Args:
        tokenizer: Its chat template, if it has one, renders the examples.
        learn: Whether to train on all answers of a conversation or only on the last.
        now: The current time as the chat template sees it; by default, the system time.

    Attributes:
        tokenizer: The tokenizer.
        now: The current time as the template sees it.
        renderer: Renders the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, learn: Learn = "all", now: datetime | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.now = now or datetime.now().astimezone()
        self.renderer = Renderer(tokenizer, learn, self.now)

    def encode(self, example: Example, max_length_tokens: int, issues: RecordIssues | None = None) -> Encoded:
        """The example's tokens up to the maximum length, with labels on every answer and its end-of-turn marker.

        Args:
            example: The example to encode.
            max_length_tokens: Longer examples are truncated at the end.
            issues: Collects problems with the record.

        Raises:
            DataError: The chat template cannot render the example, or the record has no token to train on.
            PromptTooLongError: The prompt leaves no token to train on within the maximum length.
        """
        if example.token_ids is not None:
            return self._given(example, example.token_ids, max_length_tokens)
        rendered = self.renderer.render(example)
        pieces = self._pieces(rendered)
        if issues is not None:
            issues.without_thinking += rendered.cuts_thinking
            issues.last_only += rendered.is_last_only
            issues.tools_as_text += rendered.has_tools_as_text
            issues.open_turns += rendered.has_open_turn
        input_ids = [token for piece in pieces for token in piece.input_ids]
        labels = [token if piece.is_answer else IGNORED_LABEL for piece in pieces for token in piece.input_ids]
        return _cut(input_ids, labels, example.where, max_length_tokens, _prompt_tokens(pieces))

    def prompt(self, example: Example) -> list[int]:
        """The prompt ids for generating the last answer: those that `encode` puts before that answer's first label.

        Raises:
            DataError: The chat template cannot render the example.
        """
        *before, last = example.messages
        asked = replace(example, messages=(*before, replace(last, is_learned=True)))
        pieces = self._pieces(self.renderer.render(asked))
        last_answer = max(index for index, piece in enumerate(pieces) if piece.is_answer)
        return [token for piece in pieces[:last_answer] for token in piece.input_ids]

    def _given(self, example: Example, ids: TokenIds, max_length_tokens: int) -> Encoded:
        """The encoded form of a pre-tokenised record."""
        unknown = next((token for token in ids.input_ids if not 0 <= token < len(self.tokenizer)), None)
        if unknown is not None:
            raise DataError(
                "A token id is not in the tokenizer's vocabulary.",
                path=example.where,
                key="input_ids",
                expected=f"ids from 0 to {len(self.tokenizer) - 1}",
                actual=unknown,
                hint="use the tokenizer that produced the record",
            )
        prompt_tokens = sum(1 for _ in takewhile(lambda label: label == IGNORED_LABEL, ids.labels))
        return _cut(list(ids.input_ids), list(ids.labels), example.where, max_length_tokens, prompt_tokens)

    def _pieces(self, rendered: Rendered) -> list[_Piece]:
        """The tokens of the whole example, split as `render` splits its text."""
        bos = self._default_bos if rendered.add_bos and not self._begins_with_bos(rendered) else []
        pieces = [_Piece(bos, is_answer=False)] if bos else []
        for index, segment in enumerate(rendered.segments):
            ids = self._continuation_ids(segment.text) if index else self._ids(segment.text)
            pieces.append(_Piece(ids, segment.is_answer))
        eos = self.tokenizer.eos_token_id
        if rendered.add_eos and eos is not None and pieces[-1].input_ids[-1:] != [eos]:
            pieces[-1].input_ids.append(eos)
        return pieces

    def _begins_with_bos(self, rendered: Rendered) -> bool:
        """True if the text includes its own begin-of-sequence token."""
        bos = self.tokenizer.bos_token
        return bool(bos) and rendered.segments[0].text.startswith(bos)

    def _ids(self, text: str) -> list[int]:
        # verbose=False: the warning about the model's own maximum length does not concern --max-length.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _continuation_ids(self, text: str) -> list[int]:
        """The ids of text that continues other text.

        Tokenizers of the Llama 2 family prepend a space to what they take for the start of a text. A prepended newline
        takes that space and is dropped again, unless it merges with the text, which theirs never does.
        """
        if len(text) <= _SHORT_CHARACTERS:  # template text between turns, the same in every record
            return list(self._known_continuation(text))
        return self._new_continuation(text)

    def _new_continuation(self, text: str) -> list[int]:
        ids = self._ids("\n" + text)
        line_end = self._line_end
        return ids[len(line_end) :] if ids[: len(line_end)] == line_end else self._ids(text)

    @cached_property
    def _known_continuation(self) -> Callable[[str], list[int]]:
        return lru_cache(maxsize=_KNOWN_TEXTS)(self._new_continuation)

    @cached_property
    def _line_end(self) -> list[int]:
        return self._ids("\n")

    @cached_property
    def _default_bos(self) -> list[int]:
        """The begin-of-sequence token if the tokenizer adds it by default, otherwise nothing."""
        ids: list[int] = self.tokenizer("\n", verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and ids[:1] == [bos] else []


class PromptTooLongError(DataError):
    """The prompt of a record leaves no token to train on within the maximum length."""


@dataclass(frozen=True, slots=True)
class EncodedRecords:
    """The usable records.

    Attributes:
        records: The encoded records.
        examples: Their examples, in the same order.
    """

    records: list[Encoded]
    examples: list[Example]


def encode_all(
    examples: Sequence[Example],
    encoder: Encoder,
    max_length_tokens: int,
    issues: RecordIssues,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedRecords:
    """Encodes all examples that can be encoded, in order.

    Args:
        examples: The examples to encode.
        encoder: Encoder for the model's tokenizer.
        max_length_tokens: Longer examples are truncated at the end.
        issues: Collects problems with the records.
        on_progress: Called at intervals with the number of records done and the total.
    """
    records: list[Encoded] = []
    used: list[Example] = []
    issues.tokenised += len(examples)
    for number, example in enumerate(examples, start=1):
        try:
            encoded = encoder.encode(example, max_length_tokens, issues)
        except PromptTooLongError:
            issues.overlong += 1
        except DataError as error:
            issues.refused.append(error)
        else:
            issues.cut += encoded.is_cut
            issues.used += 1
            records.append(encoded)
            used.append(example)
        if on_progress is not None and (number % _PROGRESS_RECORDS == 0 or number == len(examples)):
            on_progress(number, len(examples))
    return EncodedRecords(records, used)


def _cut(input_ids: list[int], labels: list[int], where: str, max_length_tokens: int, prompt_tokens: int) -> Encoded:
    """The tokens, truncated to the maximum length.

    Raises:
        DataError: No token is left to train on.
    """
    is_cut = len(input_ids) > max_length_tokens
    encoded = Encoded(input_ids[:max_length_tokens], labels[:max_length_tokens], where, is_cut)
    # Nothing precedes the first token, so no model learns to predict it.
    if all(label == IGNORED_LABEL for label in encoded.labels[1:]):
        kind = PromptTooLongError if is_cut else DataError
        raise kind(
            "The answer has no token left to train on.",
            path=where,
            expected=f"an answer that begins within {max_length_tokens} tokens",
            actual=f"a prompt of {prompt_tokens} tokens, {len(input_ids)} tokens in total",
            hint="raise --max-length, or remove the record",
        )
    return encoded


def _prompt_tokens(pieces: Sequence[_Piece]) -> int:
    """Number of tokens before the first answer."""
    return sum(len(piece.input_ids) for piece in takewhile(lambda piece: not piece.is_answer, pieces))
