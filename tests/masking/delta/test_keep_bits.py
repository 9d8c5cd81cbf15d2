from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.masking.delta import keep_bits
from mftctl.masking.delta.keep_bits import AllBits, PackedBits, SeededBits, seeded_bits
from tests.masking.delta.plain_delta import plain_random


@settings(deadline=None, max_examples=40)
@given(key=st.integers(0, 2**64 - 1), weights=st.integers(2, 300), share=st.floats(0, 1))
def test_seeded_bits_keep_the_entries_with_the_lowest_random_bits(key: int, weights: int, share: float) -> None:
    kept = min(weights - 1, max(1, round(share * weights)))
    bits, packed = seeded_bits(key, weights, kept)
    order = sorted(range(weights), key=lambda place: plain_random(key, place))
    found = bits.part(0, weights)
    assert found.sum() == kept
    assert set(np.flatnonzero(found)) == set(order[:kept])
    assert np.array_equal(PackedBits(packed).part(0, weights), found)
    assert SeededBits.of_payload(bits.payload()) == bits


def test_seeded_bits_do_not_depend_on_the_parts_they_are_read_in(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, packed = seeded_bits(5, 1000, 77)
    monkeypatch.setattr(keep_bits, "_CHUNK", 64)
    again = seeded_bits(5, 1000, 77)
    assert again[0] == whole
    assert np.array_equal(again[1], packed)
    parts = [whole.part(first, min(64, 1000 - first)) for first in range(0, 1000, 64)]
    assert np.array_equal(np.concatenate(parts), whole.part(0, 1000))


def test_seeded_bits_are_spread_evenly() -> None:
    found = seeded_bits(1, 40_000, 4_000)[0].part(0, 40_000)
    assert abs(int(found[:20_000].sum()) - 2_000) < 150  # 3.5 standard deviations


def test_an_improbable_limit_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seeded_bits(5, 1000, 77)
    monkeypatch.setattr(keep_bits.math, "sqrt", lambda _: -5.0)  # nothing lies in between
    assert seeded_bits(5, 1000, 77)[0] == whole[0]


def test_packed_bits_are_read_from_a_byte_on() -> None:
    packed = np.array([0b10110010, 0b00000001], np.uint8)
    assert PackedBits(packed).part(0, 9).tolist() == [False, True, False, False, True, True, False, True, True]
    assert PackedBits(packed).part(8, 2).tolist() == [True, False]
    assert AllBits().part(8, 2).tolist() == [True, True]
