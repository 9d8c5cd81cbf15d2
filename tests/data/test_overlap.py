"""Records that occur twice, against plain dictionaries."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.examples import Example, Message, TokenIds
from mftctl.data.overlap import Matches, question_keys, repeated, shared
from tests.data.prepared_examples import prepared

_keys = st.lists(st.sampled_from([0, 1, 7, 2**63, 2**64 - 1]), max_size=9)


def array(keys: list[int]) -> np.ndarray:
    return np.array(keys, np.uint64)


def pairs(matches: Matches) -> list[tuple[int, int]]:
    return list(zip(matches.rows.tolist(), matches.others.tolist(), strict=True))


@given(_keys)
def test_repeated_keys_name_their_first_record(keys: list[int]) -> None:
    assert pairs(repeated(array(keys))) == [
        (number, keys.index(key)) for number, key in enumerate(keys) if key in keys[:number]
    ]


@given(_keys, _keys)
def test_shared_keys_name_the_first_of_the_others(keys: list[int], known: list[int]) -> None:
    found = shared(array(keys), array(known))
    assert pairs(found) == [(number, known.index(key)) for number, key in enumerate(keys) if key in known]
    assert len(found) == sum(key in known for key in keys)


def pair(question: str, answer: str = "a", *, system: str | None = None) -> Example:
    first = [] if system is None else [Message("system", system)]
    return Example("chat", (*first, Message("user", question), Message("assistant", answer)), "d:1")


def test_space_around_a_question_and_its_answer_do_not_matter() -> None:
    one, other, different, with_system = question_keys(
        prepared([pair("q"), pair(" q\n", "b"), pair("Q"), pair("q", system="s")])
    ).tolist()
    assert one == other
    assert len({one, different, with_system}) == 3


def test_texts_and_token_ids_are_compared_as_a_whole() -> None:
    def text(content: str) -> Example:
        return Example("text", (Message("assistant", content),), "d:1")

    def ids(*numbers: int) -> Example:
        return Example("tokens", (), "d:1", token_ids=TokenIds(numbers, numbers))

    keys = question_keys(prepared([text("1"), text(" 1 "), text("2"), ids(1), ids(1), ids(1, 2)])).tolist()
    assert keys[0] == keys[1]
    assert keys[3] == keys[4]
    assert len(set(keys)) == 4
