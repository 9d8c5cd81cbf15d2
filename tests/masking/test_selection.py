"""Selection compared with a plain sort, and its guarantees: exact, deterministic, monotone, identity at ratio 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mftctl.errors import MaskingError
from mftctl.masking.selection import keep_above, keep_highest, rank, removed_count

# A coarse grid of values makes ties common.
VALUES = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.integers(-4, 4).map(lambda value: np.float32(value / 4))
)
RATIOS = st.floats(0, 0.999)


def keep_by_sorting(values: np.ndarray, ratio: float) -> np.ndarray:
    """The paper's ratio indicator as a stable sort: lowest first, equal values by flat index."""
    order = np.argsort(values.ravel(), kind="stable")
    keep = np.ones(values.size, dtype=bool)
    keep[order[: int(np.floor(ratio * values.size + 0.5))]] = False
    return keep.reshape(values.shape)


@pytest.mark.slow
@given(VALUES, RATIOS)
def test_equals_a_stable_sort(values: np.ndarray, ratio: float) -> None:
    keep = keep_highest(torch.from_numpy(values), ratio)
    assert np.array_equal(keep.numpy(), keep_by_sorting(values, ratio))


@pytest.mark.slow
@given(VALUES, RATIOS)
def test_removes_the_exact_count(values: np.ndarray, ratio: float) -> None:
    keep = keep_highest(torch.from_numpy(values), ratio)
    assert int((~keep).sum()) == removed_count(values.size, ratio)


@pytest.mark.slow
@given(VALUES, RATIOS, RATIOS)
def test_a_larger_ratio_removes_a_superset(values: np.ndarray, first: float, second: float) -> None:
    low, high = sorted((first, second))
    fewer, more = (keep_highest(torch.from_numpy(values), ratio) for ratio in (low, high))
    assert not (more & ~fewer).any()


@pytest.mark.slow
@given(VALUES)
def test_ratio_zero_is_the_identity(values: np.ndarray) -> None:
    assert keep_highest(torch.from_numpy(values), 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_ranks_alike(dtype: torch.dtype) -> None:
    values = (torch.arange(60) % 7).to(dtype).reshape(6, 10)
    expected = keep_by_sorting(values.float().numpy(), 0.3)
    assert np.array_equal(keep_highest(values, 0.3).numpy(), expected)


def test_matrices_are_ranked_by_row_major_index() -> None:
    keep = keep_highest(torch.zeros(2, 3), 0.5)
    assert keep.tolist() == [[False, False, False], [True, True, True]]


def test_a_transposed_view_is_ranked_by_its_own_order() -> None:
    values = torch.zeros(3, 2).t()
    assert keep_highest(values, 0.5).tolist() == [[False, False, False], [True, True, True]]


def test_zero_and_minus_zero_are_equal() -> None:
    assert keep_highest(torch.tensor([0.0, -0.0, 0.0, -0.0]), 0.5).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("numel", "ratio", "expected"), [(10, 0.1, 1), (5, 0.1, 1), (4, 0.1, 0), (15, 0.1, 2), (7, 0, 0)]
)
def test_count_rounds_half_up(numel: int, ratio: float, expected: int) -> None:
    assert removed_count(numel, ratio) == expected


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(MaskingError, match="share of weights") as caught:
        keep_highest(torch.zeros(4), ratio)
    assert caught.value.key == "ratio"


def test_scores_that_are_not_numbers() -> None:
    with pytest.raises(MaskingError, match="NaN") as caught:
        keep_highest(torch.tensor([1.0, float("nan")]), 0.5)
    assert caught.value.actual == "1 NaN of 2"


def test_infinite_scores_have_a_rank() -> None:
    values = torch.tensor([float("inf"), 0.0, float("-inf"), 1.0])
    assert keep_highest(values, 0.5).tolist() == [True, False, False, True]


@pytest.mark.slow
@given(VALUES, st.floats(-1, 1, width=32))
def test_threshold_removes_what_is_below_it(values: np.ndarray, threshold: float) -> None:
    keep = keep_above(torch.from_numpy(values), threshold)
    assert np.array_equal(keep.numpy(), ~(values < np.float32(threshold)))


def test_both_rankings() -> None:
    scores = torch.tensor([-3.0, 1.0, 2.0])
    assert rank(scores, "absolute").tolist() == [3.0, 1.0, 2.0]
    assert rank(scores, "signed").tolist() == [-3.0, 1.0, 2.0]
