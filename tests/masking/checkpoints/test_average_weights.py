from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import ConfigError
from mftctl.masking.checkpoints.average_weights import settled_weights


@pytest.mark.parametrize(
    ("given_weights", "expected"),
    [
        (None, (0.25,) * 4),
        ([1, 1, 1, 1], (0.25,) * 4),
        ([3, 1, 0, 0], (0.75, 0.25, 0.0, 0.0)),
        ([2, -1, 0, 0], (2.0, -1.0, 0.0, 0.0)),
        ([-2, 1, 0, 0], (2.0, -1.0, 0.0, 0.0)),
        ([1e100, 1e100, 1e100, 1e100], (0.25,) * 4),
        ([0, 5e-324, 0, 0], (0.0, 1.0, 0.0, 0.0)),
    ],
)
def test_weights_are_divided_by_their_sum(given_weights: list[float] | None, expected: tuple[float, ...]) -> None:
    assert settled_weights(given_weights, 4) == expected


@given(st.lists(st.floats(0, 1e100), min_size=2, max_size=9).filter(any))
def test_settled_weights_sum_to_1_and_keep_their_proportions(weights: list[float]) -> None:
    found = settled_weights(weights, len(weights))
    assert math.fsum(found) == pytest.approx(1)
    largest = weights.index(max(weights))
    for share, weight in zip(found, weights, strict=True):
        assert share == pytest.approx(found[largest] * (weight / weights[largest]))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_checkpoints_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="at least two checkpoints") as caught:
        settled_weights(None, count)
    assert (caught.value.key, caught.value.actual) == ("CHECKPOINT", count)


def test_weights_of_another_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="one weight per checkpoint") as caught:
        settled_weights([0.5, 0.5], 3)
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("--weights", "3 numbers", "0.5,0.5")


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e308])
def test_weights_that_are_too_large_or_no_numbers_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        settled_weights([1, weight], 2)
    assert caught.value.actual == f"1,{weight:g}"


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [0.1, 0.2, -0.3], [1e100, -1e100], [5e-324, -5e-324]])
def test_weights_of_sum_0_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="must not be 0"):
        settled_weights(weights, len(weights))
