"""Contamination by n-grams: records that share 13 consecutive words with the training data.

Source: Language Models are Few-Shot Learners (arXiv 2005.14165), appendix C, without its filter of frequent n-grams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from mftctl.data.examples import Example
from mftctl.data.overlap import Matches

NGRAM_WORDS = 13

_WORD = re.compile(r"[^\W_]+")
_BATCH_RECORDS = 1_024
_NO_WORD = 0
"""Fills up records of fewer than 13 words, which so are one n-gram each and equal only as a whole."""
_UNKNOWN = -1


def words(example: Example) -> list[str]:
    """The lower-case alphanumeric words of an example's turns, one turn after another.

    System prompts are left out: many records share theirs. So are tools and token ids.
    """
    turns = [message for message in example.messages if message.role not in ("system", "developer")]
    text = "\n".join(part for turn in turns for part in (turn.thinking, turn.content))
    return _WORD.findall(text.lower())


class NgramIndex:
    """The n-grams of the records to check, against which training records are looked up as a stream.

    Args:
        examples: The records to check, such as the validation and test data. Their n-grams are kept, 28 bytes each.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self._vocabulary: dict[str, int] = {}
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        self._records = 0
        for batch in _batches(examples):
            found, of = _ngrams([[self._learned(word) for word in words(example)] for example in batch])
            hashes.append(found)
            owners.append(of + self._records)
            self._records += len(batch)
        self._owners = np.concatenate(owners).astype(np.int32)
        self._known, self._ngrams = np.unique(np.concatenate(hashes), return_inverse=True)
        self._first = np.full(len(self._known), -1, np.int64)
        self._looked_up = 0

    def look_up(self, examples: Iterable[Example]) -> Iterator[int]:
        """Notes which n-grams occur in training records; yields the number of records done now and then.

        Args:
            examples: Training records, continuing those of earlier calls.
        """
        for batch in _batches(examples):
            known = self._vocabulary
            found, of = _ngrams([[known.get(word, _UNKNOWN) for word in words(example)] for example in batch])
            if len(self._known):
                places = np.minimum(np.searchsorted(self._known, found), len(self._known) - 1)
                is_new = (self._known[places] == found) & (self._first[places] < 0)
                # In reverse, so that the first of several records stays.
                self._first[places[is_new][::-1]] = self._looked_up + of[is_new][::-1]
            self._looked_up += len(batch)
            yield self._looked_up

    def matches(self) -> Matches:
        """The records to check that share an n-gram with a training record looked up, and the first such record."""
        none = np.iinfo(np.int64).max
        first = np.full(self._records, none, np.int64)
        found = self._first[self._ngrams]
        np.minimum.at(first, self._owners[found >= 0], found[found >= 0])
        rows = np.flatnonzero(first != none)
        return Matches(rows, first[rows])

    def _learned(self, word: str) -> int:
        return self._vocabulary.setdefault(word, len(self._vocabulary) + 1)


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    rest = iter(examples)
    while batch := list(islice(rest, _BATCH_RECORDS)):
        yield batch


def _ngrams(records: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the n-grams of known words, uint64, and the number of the record of each, int64."""
    padded = [ids + [_NO_WORD] * (NGRAM_WORDS - len(ids)) if ids else ids for ids in records]
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    flat = np.fromiter((word for ids in padded for word in ids), np.int64, int(lengths.sum()))
    count = len(flat) - NGRAM_WORDS + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    owners = np.repeat(np.arange(len(padded)), lengths)
    unknown = np.concatenate([[0], np.cumsum(flat == _UNKNOWN)])
    is_within = (owners[:count] == owners[NGRAM_WORDS - 1 :]) & (unknown[NGRAM_WORDS:] == unknown[:count])
    starts = np.flatnonzero(is_within)
    mixed = _mixed(flat.astype(np.uint64))
    hashes = np.zeros(len(starts), np.uint64)
    for place, factor in enumerate(_FACTORS):
        hashes += mixed[starts + place] * factor
    return hashes, owners[starts]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each value as 64 bits that look random (the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


_FACTORS = _mixed(np.arange(1 << 32, (1 << 32) + NGRAM_WORDS, dtype=np.uint64)) | np.uint64(1)
"""An odd factor for each place in an n-gram."""
