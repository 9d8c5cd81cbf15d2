"""Records that occur more than once: within a part of the data, or in two parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mftctl.data.examples import Example
from mftctl.data.prepared.examples import Examples


@dataclass(frozen=True, slots=True)
class Matches:
    """Pairs of equal records.

    Attributes:
        rows: The numbers of the records found again, ascending, int64.
        others: For each of them, the number of the first record that it equals.
    """

    rows: np.ndarray
    others: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def question_keys(examples: Examples) -> np.ndarray:
    """An 8-byte digest of each record's question, uint64: equal for prompts that differ only in space around turns.

    The question is the texts and images before the answer, or the whole of a plain text or of token ids.
    """
    keys = (
        hashlib.blake2b(json.dumps(_question(example)).encode(), digest_size=8).digest() for example in parsed(examples)
    )
    return np.fromiter((int.from_bytes(key, "big") for key in keys), np.uint64, len(examples))


def parsed(examples: Examples) -> Iterator[Example]:
    """The examples without their places, one at a time."""
    for content in examples.contents():
        yield Example.from_canonical(bytes(content), "", has_turns=False)


def repeated(keys: np.ndarray) -> Matches:
    """The records whose key an earlier one has."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    firsts = first[group]
    rows = np.flatnonzero(firsts != np.arange(len(keys)))
    return Matches(rows, firsts[rows])


def shared(keys: np.ndarray, known: np.ndarray) -> Matches:
    """The records whose key also occurs among others.

    Args:
        keys: The keys of the records.
        known: The keys of the others.
    """
    values, first = np.unique(known, return_index=True)
    if not len(values):
        return Matches(np.empty(0, np.int64), np.empty(0, np.int64))
    places = np.minimum(np.searchsorted(values, keys), len(values) - 1)
    rows = np.flatnonzero(values[places] == keys)
    return Matches(rows, first[places[rows]])


def _question(example: Example) -> list[str] | list[int]:
    if example.token_ids is not None:
        return list(example.token_ids.input_ids)
    texts = [message.content.strip() for message in example.prompt or example.messages]
    return [*texts, *(image.sha256 for image in example.images)]
