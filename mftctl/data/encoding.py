"""Tokenises examples, with labels on the answers only.

Each span of text between two answer boundaries is tokenised separately, so no token spans the end of a prompt and the
start of its answer, and the prompt's ids are the ones the model sees during generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate, takewhile
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from mftctl.data.examples import IGNORED_LABEL, Example, Learn, TokenIds
from mftctl.data.image_inputs import ImageInputs
from mftctl.data.image_reference import ImageReference
from mftctl.data.image_segments import image_segment_ids, require_no_image_token, require_vision
from mftctl.data.record_issues import RecordIssues, Remark
from mftctl.data.rendering import Rendered, Renderer
from mftctl.data.template_limits import template_limits
from mftctl.data.text_tokens import Text, TextTokens
from mftctl.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised example.

    Attributes:
        input_ids: The token ids.
        labels: The token ids of the answers and -100 elsewhere; as many as `input_ids`.
        where: Origin of the record.
        remarks: What the user is told about the record.
        rejected: For a preference, the same prompt with the rejected answer; `input_ids` has the chosen one.
        reference: For a preference, the log-probabilities of the chosen and the rejected answer under the reference
            model, in nats; None if they are not known.
        images: The images that some of the tokens stand for, in order.
        image_inputs: What turns the images of a batch into model inputs, also for a record without images in data
            with some; None for data without any.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    remarks: Remark = Remark.NONE
    rejected: Encoded | None = None
    reference: tuple[float, float] | None = None
    images: tuple[ImageReference, ...] = ()
    image_inputs: ImageInputs | None = None

    @property
    def sides(self) -> tuple[Encoded, ...]:
        """The record itself; for a preference, the sequences with the chosen and with the rejected answer."""
        if self.rejected is None:
            return (self,)
        return replace(self, rejected=None, reference=None), self.rejected

    @property
    def tokens(self) -> int:
        """Number of tokens, of both sequences of a preference."""
        return sum(len(side.input_ids) for side in self.sides)

    @property
    def longest_tokens(self) -> int:
        """Number of tokens of its sequence, or of the longer one of a preference."""
        return max(len(side.input_ids) for side in self.sides)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens trained on, in both answers of a preference."""
        return sum(label != IGNORED_LABEL for side in self.sides for label in side.labels)

    def ignored(self) -> Encoded:
        """The record without anything to train on."""
        rejected = None if self.rejected is None else self.rejected.ignored()
        return replace(self, labels=[IGNORED_LABEL] * len(self.labels), rejected=rejected)


_BATCH_RECORDS = 256


class _Piece(NamedTuple):
    """The tokens of one span of an example, whether they are trained on, and whether it shows images."""

    input_ids: list[int]
    is_answer: bool
    has_images: bool = False


class _Shown(NamedTuple):
    """A rendered example, and the tokens of the segments that show images by their number."""

    rendered: Rendered
    image_ids: dict[int, list[int]]


class Encoder:
    """Turns examples into token ids.

    Args:
        tokenizer: Its chat template, if it has one, renders the examples.
        learn: Whether to train on all answers of a conversation or only on the last.
        now: The current time as the chat template sees it; by default, the system time.
        images: The image side of a vision-language model; None for a model that takes only text.

    Attributes:
        tokenizer: The tokenizer.
        images: The image side of the model.
        learn: The answers to train on.
        now: The current time as the template sees it.
        renderer: Renders the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        learn: Learn = "all",
        now: datetime | None = None,
        images: ImageInputs | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self.learn = learn
        self.now = now or datetime.now().astimezone()
        self.renderer = Renderer(tokenizer, learn, self.now)
        self._texts = TextTokens(tokenizer)

    def encode(self, example: Example, max_length_tokens: int) -> Encoded:
        """The example's tokens up to the maximum length, with labels on every answer and its end-of-turn marker.

        Args:
            example: The example to encode.
            max_length_tokens: Longer examples are truncated at the end.

        Raises:
            DataError: The chat template cannot render the example, or the record has no token to train on.
            PromptTooLongError: The prompt leaves no token to train on within the maximum length.
        """
        [outcome] = self.encode_batch([example], max_length_tokens)
        if isinstance(outcome, DataError):
            raise outcome
        return outcome

    def encode_batch(self, examples: Sequence[Example], max_length_tokens: int) -> list[Encoded | DataError]:
        """What `encode` returns or raises for each example; all texts are tokenised in one call.

        Args:
            examples: The examples to encode.
            max_length_tokens: Longer examples are truncated at the end; of a preference, each of its two sequences.
        """
        sides = [side for example in examples for side in example.sides]
        outcomes = iter(self._encode_sides(sides, max_length_tokens))
        return [
            _preference(next(outcomes), next(outcomes)) if example.rejected else next(outcomes) for example in examples
        ]

    def _encode_sides(self, examples: Sequence[Example], max_length_tokens: int) -> list[Encoded | DataError]:
        """The outcome for each example with one answer."""
        rendered: list[Rendered | DataError | None] = []
        with template_limits():
            for example in examples:
                try:
                    require_vision(example.images, self.images, example.where)
                    rendered.append(None if example.token_ids is not None else self.renderer.render(example))
                except DataError as error:
                    rendered.append(error)
        shown = [self._with_images(example, item) for example, item in zip(examples, rendered, strict=True)]
        pieces = iter(self._pieces([item for item in shown if isinstance(item, _Shown)]))
        outcomes: list[Encoded | DataError] = []
        for example, item in zip(examples, shown, strict=True):
            try:
                if isinstance(item, DataError):
                    outcomes.append(item)
                elif item is None:
                    outcomes.append(self._given(example, cast("TokenIds", example.token_ids), max_length_tokens))
                else:
                    outcomes.append(self._joined(example, item.rendered, next(pieces), max_length_tokens))
            except DataError as error:
                outcomes.append(error)
        return outcomes

    def prompt(self, example: Example) -> list[int]:
        """The prompt ids for generating the last answer: those that `encode` puts before that answer's first label.

        Raises:
            DataError: The chat template cannot render the example.
        """
        *before, last = example.messages
        asked = replace(example, messages=(*before, replace(last, is_learned=True)))
        require_vision(example.images, self.images, example.where)
        [pieces] = self._pieces([self._shown(asked, self.renderer.render(asked))])
        last_answer = max(index for index, piece in enumerate(pieces) if piece.is_answer)
        prompt = [token for piece in pieces[:last_answer] for token in piece.input_ids]
        if not example.images:
            require_no_image_token(prompt, self.images, example.where)
        return prompt

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
        require_no_image_token(ids.input_ids, self.images, example.where)
        return _cut(list(ids.input_ids), list(ids.labels), example.where, max_length_tokens, prompt_tokens)

    def _with_images(self, example: Example, item: Rendered | DataError | None) -> _Shown | DataError | None:
        """What is known of an example after its images were processed, outside the limits of chat templates."""
        if not isinstance(item, Rendered):
            return item
        try:
            return self._shown(example, item)
        except DataError as error:
            return error

    def _shown(self, example: Example, rendered: Rendered) -> _Shown:
        """A rendered example with the tokens of its segments with images.

        Raises:
            DataError: The template leaves out an image, or an image cannot be used.
        """
        if not example.images or self.images is None:
            return _Shown(rendered, {})
        ids = image_segment_ids(rendered.segments, example.images, self.images, self._texts.line_end, example.where)
        return _Shown(rendered, ids)

    def _joined(self, example: Example, rendered: Rendered, pieces: Sequence[_Piece], most_tokens: int) -> Encoded:
        """The pieces of an example as one record."""
        input_ids = [token for piece in pieces for token in piece.input_ids]
        labels = [token if piece.is_answer else IGNORED_LABEL for piece in pieces for token in piece.input_ids]
        prompt_tokens = sum(len(piece.input_ids) for piece in takewhile(lambda piece: not piece.is_answer, pieces))
        if not example.images:
            require_no_image_token(input_ids, self.images, example.where)
            return _cut(input_ids, labels, example.where, most_tokens, prompt_tokens, rendered.remarks)
        ends = accumulate(len(piece.input_ids) for piece in pieces)
        last = max(end for end, piece in zip(ends, pieces, strict=True) if piece.has_images)
        if last > most_tokens:
            raise PromptTooLongError(
                "The tokens of an image exceed the maximum length; images are never truncated.",
                path=example.where,
                expected=f"at most {most_tokens} tokens up to the last image",
                actual=last,
                hint="raise --max-length, or remove the record",
            )
        cut = _cut(input_ids, labels, example.where, most_tokens, prompt_tokens, rendered.remarks)
        return replace(cut, images=example.images, image_inputs=self.images)

    def _pieces(self, shown: Sequence[_Shown]) -> list[list[_Piece]]:
        """The tokens of each example, split as `render` splits its text."""
        texts = [
            [Text(segment.text, index > 0) for index, segment in enumerate(item.rendered.segments)] for item in shown
        ]
        ids = self._texts.tokenized(
            {
                text
                for item, segments in zip(shown, texts, strict=True)
                for number, text in enumerate(segments)
                if number not in item.image_ids
            }
        )
        found = []
        for (item, image_ids), segments in zip(shown, texts, strict=True):
            bos = self._texts.default_bos if item.add_bos and not self._begins_with_bos(item) else []
            pieces = [_Piece(bos, is_answer=False)] if bos else []
            for number, (segment, text) in enumerate(zip(item.segments, segments, strict=True)):
                has_images = number in image_ids
                pieces.append(_Piece(image_ids[number] if has_images else ids[text], segment.is_answer, has_images))
            eos = self.tokenizer.eos_token_id
            if item.add_eos and eos is not None and pieces[-1].input_ids[-1:] != [eos]:
                pieces[-1] = pieces[-1]._replace(input_ids=[*pieces[-1].input_ids, eos])
            found.append(pieces)
        return found

    def _begins_with_bos(self, rendered: Rendered) -> bool:
        """True if the text includes its own begin-of-sequence token."""
        bos = self.tokenizer.bos_token
        return bool(bos) and rendered.segments[0].text.startswith(bos)


class PromptTooLongError(DataError):
    """The prompt of a record leaves no token to train on within the maximum length."""


@dataclass(frozen=True, slots=True)
class EncodedRecords:
    """The usable records.

    Attributes:
        records: The encoded records.
        examples: Their examples, in the same order.
    """

    records: Sequence[Encoded]
    examples: Sequence[Example]


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
    for start in range(0, len(examples), _BATCH_RECORDS):
        batch = examples[start : start + _BATCH_RECORDS]
        for example, outcome in zip(batch, encoder.encode_batch(batch, max_length_tokens), strict=True):
            if isinstance(outcome, PromptTooLongError):
                issues.count_overlong(1, example.where)
            elif isinstance(outcome, DataError):
                issues.refused.append(outcome)
            else:
                issues.count_remarks(outcome.remarks)
                records.append(outcome)
                used.append(example)
        if on_progress is not None:
            on_progress(min(start + _BATCH_RECORDS, len(examples)), len(examples))
    if any(record.images for record in records):
        records = [replace(record, image_inputs=encoder.images) for record in records]
    return EncodedRecords(records, used)


def _preference(chosen: Encoded | DataError, rejected: Encoded | DataError) -> Encoded | DataError:
    """A preference of two encoded answers, or why it cannot be used."""
    if isinstance(chosen, DataError):
        return chosen
    if isinstance(rejected, DataError):
        return rejected
    remarks = chosen.remarks | rejected.remarks
    if (chosen.input_ids, chosen.labels) == (rejected.input_ids, rejected.labels):
        return DataError(
            "The chosen and the rejected answer have the same tokens.",
            path=chosen.where,
            expected="answers that differ within the maximum length",
            actual=f"the same {len(chosen.input_ids)} tokens",
            hint="raise --max-length, or remove the record" if Remark.CUT in remarks else "remove the record",
        )
    return replace(chosen, remarks=remarks, rejected=rejected)


def _cut(
    input_ids: list[int],
    labels: list[int],
    where: str,
    max_length_tokens: int,
    prompt_tokens: int,
    remarks: Remark = Remark.NONE,
) -> Encoded:
    """The tokens, truncated to the maximum length.

    Raises:
        DataError: No token is left to train on.
    """
    is_cut = len(input_ids) > max_length_tokens
    if is_cut:
        remarks |= Remark.CUT
    encoded = Encoded(input_ids[:max_length_tokens], labels[:max_length_tokens], where, remarks)
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
