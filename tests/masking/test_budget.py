"""A budget over tensors: exact in total, the highest gains first, at most half of a tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import MaskingError
from mftctl.masking.budget import counts_in_budget
from mftctl.masking.selection import removed_count

GAINS = st.lists(st.integers(-3, 3).map(lambda value: value / 4), min_size=1, max_size=12)


def counts_by_sorting(gains: list[torch.Tensor], budget: float) -> list[int]:
    """The counts from a sorted list of the highest half of each tensor's gains."""
    candidates = []
    for number, values in enumerate(gains):
        highest = sorted(values.flatten().tolist(), reverse=True)
        candidates += [(-gain, number) for gain in highest[: removed_count(values.numel(), 0.5)]]
    wanted = removed_count(sum(values.numel() for values in gains), budget)
    chosen = [number for _, number in sorted(candidates)[:wanted]]
    return [chosen.count(number) for number in range(len(gains))]


@given(st.lists(GAINS, min_size=1, max_size=5), st.floats(0.0, 0.5))
def test_the_highest_gains_of_all_tensors_are_removed(gains: list[list[float]], budget: float) -> None:
    tensors = [torch.tensor(values) for values in gains]
    found = counts_in_budget(tensors, budget)
    assert found == counts_by_sorting(tensors, budget)
    assert sum(found) == removed_count(sum(map(len, gains)), budget)


def test_numbers_of_all_sizes_are_told_apart() -> None:
    values = torch.tensor([1e-45, -1e-45, 3e38, -3e38, 0.0, -0.0, 1.0, 1.0 + 2**-23])
    assert counts_in_budget([values[:4].clone(), values[4:].clone()], 0.25) == [1, 1]
    assert counts_in_budget([values[:1], values[1:2], values[4:5]], 1 / 3) == [1, 0, 0]


def test_a_tensor_with_all_high_gains_loses_half() -> None:
    assert counts_in_budget([torch.ones(3, 4), torch.zeros(5, 4)], 0.25) == [6, 2]
    assert counts_in_budget([torch.ones(3), -torch.ones(3), torch.zeros(3)], 0.5) == [2, 1, 2]


def test_random_gains_agree_with_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    gains = [torch.randn(size, generator=generator) * scale for size, scale in ((700, 1.0), (300, 2.0), (900, 0.3))]
    assert counts_in_budget(gains, 0.1) == counts_by_sorting(gains, 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gains_must_be_finite(value: float) -> None:
    with pytest.raises(MaskingError, match="not finite") as error:
        counts_in_budget([torch.zeros(3), torch.tensor([0.0, value])], 0.1)
    assert (error.value.key, error.value.actual) == ("ratio", "1 of 2 are not")


def test_a_budget_must_be_a_share() -> None:
    with pytest.raises(MaskingError, match="out of range"):
        counts_in_budget([torch.zeros(3)], 1.5)
