"""Length-grouped order and padding."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mftctl.data.batching import LengthGroupedSampler, PaddingCollator, pad_token_id
from mftctl.data.encoding import Encoded
from mftctl.errors import DataError
from tests.conftest import build_tokenizer

lengths_of_records = st.lists(st.integers(1, 50), max_size=500)
batch_sizes = st.integers(1, 9)


def batches_of(sampler: LengthGroupedSampler) -> list[list[int]]:
    order = list(sampler)
    return [order[start : start + sampler.batch_size] for start in range(0, len(order), sampler.batch_size)]


@given(lengths_of_records, batch_sizes, st.integers(0, 100), st.integers(0, 5))
def test_epoch_holds_every_record_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


@given(lengths_of_records.filter(bool), batch_sizes, st.integers(0, 100))
def test_longest_record_is_in_the_first_batch(lengths: list[int], batch_size: int, seed: int) -> None:
    first = batches_of(LengthGroupedSampler(lengths, batch_size, seed))[0]
    assert max(lengths) in [lengths[index] for index in first]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(6, 9), st.integers(0, 100))
def test_batches_of_one_mega_batch_are_cut_from_the_sorted_lengths(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = batches_of(LengthGroupedSampler(lengths, batch_size, seed))
    ranked = sorted(lengths, reverse=True)
    expected = [ranked[start : start + batch_size] for start in range(0, len(ranked), batch_size)]
    assert sorted([lengths[index] for index in batch] for batch in batches) == sorted(expected)


def test_batches_after_the_first_are_not_in_order_of_length() -> None:
    lengths = list(range(1, 401))
    heads = [lengths[batch[0]] for batch in batches_of(LengthGroupedSampler(lengths, 8, 0))]
    assert heads[0] == 400
    assert heads != sorted(heads, reverse=True)


def test_padding_is_a_small_part_of_that_of_a_plain_shuffle() -> None:
    generator = random.Random(0)
    lengths = [generator.randint(1, 500) for _ in range(2000)]

    def padding(order: list[int]) -> int:
        batches = [[lengths[index] for index in order[start : start + 8]] for start in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    shuffled = random.Random(1).sample(range(len(lengths)), len(lengths))
    assert padding(list(LengthGroupedSampler(lengths, 8, 0))) < padding(shuffled) / 10


def test_order_follows_from_seed_and_epoch_alone() -> None:
    lengths = [index % 37 + 1 for index in range(1000)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    random.seed(1)
    torch.manual_seed(1)
    first = order(0, 0)
    random.seed(2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert order(0, 0) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert order(0, 1) != first
    assert order(1, 0) != first


def test_collator_pads_to_the_longest() -> None:
    batch = PaddingCollator(pad_token_id=9)([Encoded([1, 2, 3], [-100, 2, 3], "a"), Encoded([4], [4], "b")])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=6))
def test_collator_keeps_every_row(rows: list[list[int]]) -> None:
    batch = PaddingCollator(0)([Encoded(row, row, "") for row in rows])
    assert batch["input_ids"].shape == (len(rows), max(map(len, rows)))
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row) for row in rows]
    for index, row in enumerate(rows):
        assert batch["input_ids"][index, : len(row)].tolist() == row


def test_sampler_and_collator_in_a_data_loader() -> None:
    examples = [Encoded([1] * length, [1] * length, "") for length in (3, 9, 4, 8, 2)]
    sampler = LengthGroupedSampler([len(example.input_ids) for example in examples], 2, seed=0)
    loader = DataLoader(examples, batch_size=2, sampler=sampler, collate_fn=PaddingCollator(0))
    assert [tuple(batch["labels"].shape) for batch in loader] == [(2, 9), (2, 4), (1, 2)]


def test_pad_token_id_prefers_the_padding_token() -> None:
    tokenizer = build_tokenizer()
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id == 0
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id == 1


def test_tokenizer_without_padding_and_end_token() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no token to pad"):
        pad_token_id(tokenizer)


@given(lengths_of_records, batch_sizes, st.integers(0, 100), st.integers(1, 5))
def test_the_same_batches_in_another_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    sampler, other = LengthGroupedSampler(lengths, batch_size, seed), LengthGroupedSampler(lengths, batch_size, seed)
    sampler.same_batches = True
    assert list(sampler) == list(other)
    first = batches_of(sampler)
    sampler.set_epoch(epoch)
    later = batches_of(sampler)
    assert sorted(later) == sorted(first)
    assert later[:1] == first[:1] or lengths[later[0][0]] == lengths[first[0][0]] == max(lengths)


def test_another_epoch_has_another_order_of_the_same_batches() -> None:
    sampler = LengthGroupedSampler(list(range(100)), 4, 0)
    sampler.same_batches = True
    first = batches_of(sampler)
    sampler.set_epoch(1)
    assert batches_of(sampler) != first
    assert sorted(batches_of(sampler)) == sorted(first)
