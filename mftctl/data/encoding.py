"""Token ids with labels on the answers alone.

Each stretch of text between two answer boundaries is tokenised by itself, so no token spans the end of a prompt and the
beginning of its answer, and the prompt's ids are the ones the model sees when it is asked to generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mftctl.data.examples import Example
from mftctl.data.rendering import render
from mftctl.errors import DataError

IGNORED_LABEL = -100
"""The label that the loss of every transformers model leaves out."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as a model takes it.

    Attributes:
        input_ids: The token ids.
        labels: The token ids of the answers, and -100 everywhere else; as many as `input_ids`.
        where: Where the record came from.
    """

    input_ids: list[int]
    labels: list[int]
    where: str

    @property
    def answer_tokens(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED_LABEL for label in self.labels)


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length_tokens: int
) -> list[Encoded]:
    """Every example encoded, in order.

    Raises:
        DataError: as `encode`, for the first example that cannot be encoded.
    """
    return [encode(example, tokenizer, max_length_tokens) for example in examples]


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length_tokens: int) -> Encoded:
    """The front of the example's tokens, with labels on every answer and its end-of-turn marker.

    Args:
        example: What to encode.
        tokenizer: Its chat template renders the example where it has one.
        max_length_tokens: What is longer is cut off at the end.

    Raises:
        DataError: no token to learn is left within the length, or the chat template cannot render the example.
    """
    pieces = _pieces(example, tokenizer)
    input_ids = [token for piece in pieces for token in piece.input_ids]
    labels = [token if piece.is_answer else IGNORED_LABEL for piece in pieces for token in piece.input_ids]
    encoded = Encoded(input_ids[:max_length_tokens], labels[:max_length_tokens], example.where)
    # Nothing comes before the first token, so no model learns to predict it.
    if all(label == IGNORED_LABEL for label in encoded.labels[1:]):
        raise DataError(
            "No token of the answer is left to learn.",
            path=example.where,
            expected=f"an answer that begins within {max_length_tokens} tokens",
            actual=f"a prompt of {_prompt_tokens(pieces)} tokens, {len(input_ids)} in all",
            hint="raise --max-length, or remove the record",
        )
    return encoded


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids to generate the last answer from: what `encode` puts before that answer's first label.

    Raises:
        DataError: the chat template cannot render the example.
    """
    pieces = _pieces(example, tokenizer)
    last_answer = max(index for index, piece in enumerate(pieces) if piece.is_answer)
    return [token for piece in pieces[:last_answer] for token in piece.input_ids]


class _Piece(NamedTuple):
    """The tokens of one stretch of an example, and whether they are learned."""

    input_ids: list[int]
    is_answer: bool


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[_Piece]:
    """The tokens of the whole example, cut as `render` cuts its text."""
    rendered = render(example, tokenizer)
    pieces = [_Piece(_default_bos(tokenizer), is_answer=False)] if rendered.add_bos else []
    for index, segment in enumerate(rendered.segments):
        ids = _continuation_ids(segment.text, tokenizer) if index else _ids(segment.text, tokenizer)
        pieces.append(_Piece(ids, segment.is_answer))
    eos = tokenizer.eos_token_id
    if rendered.add_eos and eos is not None and pieces[-1].input_ids[-1:] != [eos]:
        pieces[-1].input_ids.append(eos)
    return pieces


def _prompt_tokens(pieces: Sequence[_Piece]) -> int:
    """How many tokens come before the first answer."""
    return sum(len(piece.input_ids) for piece in takewhile(lambda piece: not piece.is_answer, pieces))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: the warning about the model's own maximum says nothing about --max-length.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _continuation_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of text that goes on after other text.

    Tokenizers of the Llama 2 family put a space in front of what they take for the start of a text. A line end in
    front takes that space and is dropped again, unless it merges with the text, which theirs never does.
    """
    line_end = _ids("\n", tokenizer)
    ids = _ids("\n" + text, tokenizer)
    return ids[len(line_end) :] if ids[: len(line_end)] == line_end else _ids(text, tokenizer)


def _default_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-sequence token where the tokenizer adds it by itself, otherwise nothing."""
    ids: list[int] = tokenizer("\n", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []
