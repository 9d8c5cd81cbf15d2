"""Contamination by n-grams: records that share 13 consecutive words with the training data.

Source: Language Models are Few-Shot Learners (arXiv 2005.14165), appendix C, without its filter of frequent n-grams.
Words and n-grams are compared by hashes of 8 bytes, computed for many records at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

from mftctl.data.examples import Example
from mftctl.data.overlap import Matches

NGRAM_WORDS = 13

_BATCH_CHARACTERS = 1 << 19
_CHARACTERS = 0x110000
_BASE = np.uint64(0x2545F4914F6CDD1D)


class NgramIndex:
    """The n-grams of the records to check, against which training records are looked up as a stream.

    A word is a run of letters and digits in lower case. Records of fewer words than an n-gram match as a whole.

    Args:
        examples: The records to check, such as the validation and test data. Their n-grams are kept, 28 bytes each.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        self._records = 0
        for texts in _batches(examples):
            found, of = _ngrams(*_words(texts), len(texts))
            hashes.append(found)
            owners.append((of + self._records).astype(np.int32))
            self._records += len(texts)
        self._owners = np.concatenate(owners)
        self._known, self._ngrams = np.unique(np.concatenate(hashes), return_inverse=True)
        self._first = np.full(len(self._known), -1, np.int64)
        self._looked_up = 0

    def look_up(self, examples: Iterable[Example]) -> Iterator[int]:
        """Notes which n-grams occur in training records; yields the number of records done now and then.

        Args:
            examples: Training records, continuing those of earlier calls.
        """
        for texts in _batches(examples):
            found, of = _ngrams(*_words(texts), len(texts))
            order = np.argsort(found)  # a sorted search stays in the processor's cache
            found, of = found[order], of[order]
            if len(self._known):
                places = np.minimum(np.searchsorted(self._known, found), len(self._known) - 1)
                new = np.flatnonzero((self._known[places] == found) & (self._first[places] < 0))
                new = new[np.argsort(-of[new])]  # the first of several records last, so that it stays
                self._first[places[new]] = self._looked_up + of[new]
            self._looked_up += len(texts)
            yield self._looked_up

    def matches(self) -> Matches:
        """The records to check that share an n-gram with a training record looked up, and the first such record."""
        none = np.iinfo(np.int64).max
        first = np.full(self._records, none, np.int64)
        found = self._first[self._ngrams]
        np.minimum.at(first, self._owners[found >= 0], found[found >= 0])
        rows = np.flatnonzero(first != none)
        return Matches(rows, first[rows])


def compared_text(example: Example) -> str:
    """The text of an example whose words are compared: its turns, one after another, with both answers of a preference.

    System prompts are left out: many records share theirs. So are tools and token ids.
    """
    messages = (*example.messages, *example.rejected[len(example.prompt) :])
    turns = [message for message in messages if message.role not in ("system", "developer")]
    return "\n".join(part for turn in turns for part in (turn.thinking, turn.content))


def _batches(examples: Iterable[Example]) -> Iterator[list[str]]:
    """The lower-case texts of some examples at a time."""
    texts: list[str] = []
    characters = 0
    for example in examples:
        texts.append(compared_text(example).lower())
        characters += len(texts[-1])
        if characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _words(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the words of some texts, uint64, and the number of the text of each, int64."""
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    is_word = _alphanumeric()[codes]
    edges = np.flatnonzero(np.diff(is_word, prepend=False, append=False))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    if not len(starts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    firsts = np.cumsum(lengths) - lengths
    within = np.arange(int(lengths.sum())) - np.repeat(firsts, lengths)
    terms = _character_hashes()[codes[is_word]] * _powers(int(lengths.max()))[within]
    text_ends = np.cumsum([len(text) + 1 for text in texts])
    return _mixed(np.add.reduceat(terms, firsts)), np.searchsorted(text_ends, starts, side="right")


def _ngrams(words: np.ndarray, owners: np.ndarray, records: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the n-grams of some records, uint64, and the number of the record of each, int64.

    Args:
        words: Hashes of the words of all records.
        owners: The record of each word, ascending.
        records: Number of records.
    """
    counts = np.bincount(owners, minlength=records)
    # Shorter records are filled up with zeros, so each is one n-gram and equals only the same words.
    lengths = np.where(counts > 0, np.maximum(counts, NGRAM_WORDS), 0)
    padded = np.zeros(int(lengths.sum()), np.uint64)
    moved = (np.cumsum(lengths) - lengths) - (np.cumsum(counts) - counts)
    padded[np.arange(len(words)) + moved[owners]] = words
    count = len(padded) - NGRAM_WORDS + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = np.zeros(count, np.uint64)
    for place, factor in enumerate(_powers(NGRAM_WORDS)):
        hashes += padded[place : place + count] * factor
    of_word = np.repeat(np.arange(records), lengths)
    is_within = of_word[:count] == of_word[NGRAM_WORDS - 1 :]
    return _mixed(hashes[is_within]), of_word[:count][is_within]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each value as 64 bits that look random, a bijection (SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _powers(count: int) -> np.ndarray:
    """The first powers of an odd number, uint64."""
    return np.multiply.accumulate(np.concatenate([[np.uint64(1)], np.full(count - 1, _BASE)]))


@cache
def _character_hashes() -> np.ndarray:
    return _mixed(np.arange(_CHARACTERS, dtype=np.uint64))


@cache
def _alphanumeric() -> np.ndarray:
    """Whether each Unicode character is a letter or a digit."""
    return np.fromiter((chr(code).isalnum() for code in range(_CHARACTERS)), np.bool_, _CHARACTERS)
