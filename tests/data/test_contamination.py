"""13-gram contamination, against a small implementation with sets of tuples."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data import contamination
from mftctl.data.contamination import NgramIndex, compared_text
from mftctl.data.examples import Example, Message


def plain(text: str) -> Example:
    return Example("text", (Message("assistant", text),), "d:1")


def pairs_of(checked: list[str], train: list[str]) -> list[tuple[int, int]]:
    index = NgramIndex(map(plain, checked))
    for _ in index.look_up(map(plain, train)):
        pass
    found = index.matches()
    return list(zip(found.rows.tolist(), found.others.tolist(), strict=True))


def ngrams_of(text: str) -> set[tuple[str, ...]]:
    """The 13-grams of a text; the whole of a shorter one."""
    found = "".join(character if character.isalnum() else " " for character in text.lower()).split()
    if len(found) < 13:
        return {tuple(found)} if found else set()
    return {tuple(found[start : start + 13]) for start in range(len(found) - 12)}


def expected(checked: list[str], train: list[str]) -> list[tuple[int, int]]:
    known = [ngrams_of(text) for text in train]
    first = [next((n for n, grams in enumerate(known) if grams & ngrams_of(text)), None) for text in checked]
    return [(number, other) for number, other in enumerate(first) if other is not None]


_NUMBERS = [str(number) for number in range(40)]

_words = st.lists(st.sampled_from(["a", "B", "b", "x1", "é"]), max_size=17).map(" ".join)
_repeats = st.integers(0, 20).map(lambda count: "one " * count)
_parts = st.tuples(st.integers(0, 8), st.integers(9, 25)).map(lambda ends: " ".join(_NUMBERS[slice(*ends)]))
_texts = st.lists(st.one_of(_words, _repeats, _parts, st.tuples(_words, _parts).map(" ".join)), max_size=7)


@given(_texts, _texts, st.sampled_from([1, 30, 10_000]))
def test_as_with_sets_of_tuples(checked: list[str], train: list[str], batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "_BATCH_CHARACTERS", batch)
        assert pairs_of(checked, train) == expected(checked, train)


@given(st.lists(st.text(max_size=9), max_size=5), st.lists(st.text(max_size=9), max_size=5))
def test_short_texts_of_any_characters(checked: list[str], train: list[str]) -> None:
    assert pairs_of(checked, train) == expected(checked, train)


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not() -> None:
    train = [" ".join(_NUMBERS[:20])]
    assert pairs_of([f"before {' '.join(_NUMBERS[5:18])} after"], train) == [(0, 0)]
    assert pairs_of([f"before {' '.join(_NUMBERS[5:17])} after"], train) == []


def test_case_punctuation_and_line_ends_do_not_matter() -> None:
    text = " ".join(f"Word{number}" for number in range(13))
    assert pairs_of([text.upper().replace(" ", ", \n_")], [text]) == [(0, 0)]


def test_a_short_record_counts_only_if_it_is_the_whole_of_another() -> None:
    assert pairs_of(["two and two?"], ["Two and two", "two and two are four"]) == [(0, 0)]
    assert pairs_of(["two and two?"], ["two and two are four", " ".join(["two and two"] * 6)]) == []
    assert pairs_of(["two and"], ["two and 0"]) == []


def test_the_first_of_several_training_records_is_named() -> None:
    assert pairs_of(["x", "a b", "c d"], ["q", "c d", "a b", "c d"]) == [(1, 2), (2, 1)]


def test_a_record_without_words_equals_none() -> None:
    assert pairs_of(["", "?!", "a"], ["", "?!"]) == []


def test_no_records() -> None:
    assert pairs_of([], ["a"]) == []
    assert pairs_of(["a"], []) == []


def test_an_ngram_never_spans_two_records() -> None:
    halves = [" ".join(_NUMBERS[:9]), " ".join(_NUMBERS[9:18])]
    assert pairs_of([" ".join(_NUMBERS[:18])], halves) == []


def test_a_conversation_without_its_system_prompt() -> None:
    turns = (
        Message("system", "Be brief."),
        Message("user", "What's 2?"),
        Message("assistant", "Two", thinking="Hm"),
    )
    assert compared_text(Example("chat", turns, "d:1")).split() == ["What's", "2?", "Hm", "Two"]


@given(st.text(max_size=40), st.text(max_size=40))
def test_words_are_runs_of_letters_and_digits(one: str, other: str) -> None:
    hashes, owners = contamination._words([one.lower(), other.lower()])
    words = [re.sub(r"[\W_]", " ", text.lower()).split() for text in (one, other)]
    assert owners.tolist() == [0] * len(words[0]) + [1] * len(words[1])
    numbers = {word: int(value) for word, value in zip(words[0] + words[1], hashes, strict=True)}
    assert [numbers[word] for word in words[0] + words[1]] == hashes.tolist()
    assert len(set(numbers.values())) == len(numbers)


def test_different_orders_of_the_same_words_have_different_hashes() -> None:
    orders = [[(word + turn) % 13 for word in range(13)] for turn in range(13)]
    hashes, owners = contamination._ngrams(np.array(orders, np.uint64).ravel(), np.repeat(np.arange(13), 13), 13)
    assert len(np.unique(hashes)) == 13
    assert owners.tolist() == list(range(13))
