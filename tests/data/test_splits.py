"""Subsets are seeded, nested and in order, and never share a prompt across parts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.examples import Example, Message
from mftctl.data.splits import sample_count, sample_fraction, split_validation
from mftctl.errors import DataError
from tests.data.prepared_examples import prepared


def chat(prompt: str, index: int = 0) -> Example:
    return Example("chat", (Message("user", prompt), Message("assistant", f"answer {index}")), f"data:{index}")


def chats(count: int) -> list[Example]:
    return [chat(f"question {index}", index) for index in range(count)]


def held_out_by_lists(examples: list[Example], fraction: float, seed: int) -> list[int]:
    """The indices that are held out for validation, chosen with lists and sets of texts."""
    groups: dict[object, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.prompt or example.messages, []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    count, chosen = max(1, int(len(examples) * fraction + 0.5)), []
    for group in shuffled:
        if len(chosen) + len(group) <= count:
            chosen += group
    if len(chosen) == len(examples):
        chosen = [index for index in chosen if index not in shuffled[0]]
    return sorted(chosen or min(shuffled, key=len))


prompts = st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1)
fractions = st.floats(0.001, 0.999)
seeds = st.integers(0, 1000)


@pytest.mark.slow
@given(prompts, fractions, seeds)
def test_split_parts_are_whole_disjoint_and_in_order(values: list[int], fraction: float, seed: int) -> None:
    examples = [chat(str(value), index) for index, value in enumerate(values)]
    train, validation = map(list, split_validation(prepared(examples), fraction, seed))
    assert train
    assert validation == [examples[index] for index in held_out_by_lists(examples, fraction, seed)]
    assert not {example.prompt for example in train} & {example.prompt for example in validation}
    for part in (train, validation):
        assert part == [example for example in examples if example in part]
    assert len(train) + len(validation) == len(examples)


@pytest.mark.slow
@given(st.integers(2, 200), fractions, seeds)
def test_split_of_distinct_prompts_has_the_exact_share(count: int, fraction: float, seed: int) -> None:
    _, validation = split_validation(prepared(chats(count)), fraction, seed)
    assert len(validation) == min(max(int(count * fraction + 0.5), 1), count - 1)


def test_split_depends_on_the_seed_alone() -> None:
    examples = prepared(chats(100))
    [first, again, other] = [list(split_validation(examples, 0.1, seed)[1]) for seed in (3, 3, 4)]
    assert first == again
    assert first != other


def test_split_of_plain_texts_goes_by_their_text() -> None:
    texts = [Example("text", (Message("assistant", text),), str(index)) for index, text in enumerate("abcabc")]
    train, validation = split_validation(prepared(texts), 0.34, 0)
    assert len(validation) == 2
    assert not {example.answer for example in train} & {example.answer for example in validation}


@pytest.mark.parametrize("examples", [[], chats(1), [chat("same", index) for index in range(9)]])
def test_split_without_two_prompts(examples: list[Example]) -> None:
    with pytest.raises(DataError, match="cannot be split") as caught:
        split_validation(prepared(examples), 0.1, 0)
    assert str(len(examples)) in str(caught.value.actual)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_share_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="out of range"):
        split_validation(prepared(chats(9)), fraction, 0)


@pytest.mark.slow
@given(st.integers(1, 100), st.floats(0.001, 1), st.floats(0.001, 1), seeds)
def test_samples_are_nested_and_in_order(count: int, one: float, other: float, seed: int) -> None:
    examples = chats(count)
    small, large = (list(sample_fraction(prepared(examples), fraction, seed)) for fraction in sorted((one, other)))
    assert len(small) == max(1, int(count * min(one, other) + 0.5))
    assert [example for example in large if example in small] == small
    assert [example for example in examples if example in large] == large


def test_whole_share_is_everything() -> None:
    assert list(sample_fraction(prepared(chats(9)), 1.0, 5)) == chats(9)


def test_sample_depends_on_the_seed() -> None:
    examples = prepared(chats(100))
    assert list(sample_fraction(examples, 0.1, 0)) != list(sample_fraction(examples, 0.1, 1))


def test_sample_count_takes_all_where_there_are_no_more() -> None:
    assert list(sample_count(prepared(chats(3)), 5, 0)) == chats(3)


@pytest.mark.parametrize("fraction", [0.0, 1.01, float("nan")])
def test_sample_share_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="out of range"):
        sample_fraction(prepared(chats(9)), fraction, 0)


def test_sample_of_nothing() -> None:
    with pytest.raises(DataError, match="no data"):
        sample_fraction(prepared([]), 0.5, 0)
