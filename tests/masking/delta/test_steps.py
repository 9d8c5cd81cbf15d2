from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.masking.delta.steps import step_from, steps_between

WIDTHS = (8, 16, 32, 64)
patterns = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("width", WIDTHS)
@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(patterns, patterns), min_size=1, max_size=20))
def test_steps_lead_from_any_pattern_to_any_other(width: int, pairs: list[tuple[int, int]]) -> None:
    before, after = (np.array([pair[side] % 2**width for pair in pairs], f"u{width // 8}") for side in (0, 1))
    steps = steps_between(before, after)
    assert steps.dtype == before.dtype
    assert np.array_equal(step_from(before, steps), after)


def test_every_pair_of_8_bits() -> None:
    before, after = (side.reshape(-1).astype(np.uint8) for side in np.meshgrid(np.arange(256), np.arange(256)))
    assert np.array_equal(step_from(before, steps_between(before, after)), after)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_neighbours_are_one_step_apart(dtype: type[np.floating]) -> None:
    number = dtype(0.1)
    view = f"u{number.itemsize}"
    up, down = (np.array([np.nextafter(number, dtype(end))], dtype).view(view) for end in (1, 0))
    here = np.array([number]).view(view)
    assert steps_between(here, up)[0] == 2
    assert steps_between(here, down)[0] == 1
    assert steps_between(here, here)[0] == 0


def test_the_zeros_are_neighbours_and_the_way_leads_through_them() -> None:
    smallest = np.nextafter(np.float32(0), np.float32(1))
    line = np.array([-smallest, -0.0, 0.0, smallest], np.float32).view(np.uint32)
    assert steps_between(line[:-1], line[1:]).tolist() == [2, 2, 2]
    assert steps_between(line[3:], line[:1])[0] == 5  # three steps downwards
