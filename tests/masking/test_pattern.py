"""N:M patterns compared with a sort of each block, on both layouts of a weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from mftctl.errors import MaskingError
from mftctl.masking.pattern import LARGEST_BLOCK, Pattern
from mftctl.masking.selection import Ranking, keep_highest_of_blocks

PATTERNS = st.integers(2, 8).flatmap(lambda block: st.builds(Pattern, st.integers(1, block - 1), st.just(block)))


def keep_by_sorting(values: np.ndarray, pattern: Pattern) -> np.ndarray:
    """A stable sort of every block: lowest first, equal values by index."""
    keep = np.ones(values.shape, dtype=bool)
    for row, bits in zip(values, keep, strict=True):
        for start in range(0, len(row), pattern.block):
            order = np.argsort(row[start : start + pattern.block], kind="stable")
            bits[start + order[: pattern.block - pattern.kept]] = False
    return keep


@pytest.mark.slow
@given(
    PATTERNS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from(["signed", "absolute"])
)
def test_equals_a_stable_sort_of_each_block(
    pattern: Pattern, rows: int, blocks: int, seed: int, ranking: Ranking
) -> None:
    values = np.random.default_rng(seed).integers(-3, 4, (rows, blocks * pattern.block)).astype(np.float32)
    expected = keep_by_sorting(np.abs(values) if ranking == "absolute" else values, pattern)
    keep = keep_highest_of_blocks(torch.from_numpy(values), pattern, -1, ranking=ranking)
    assert np.array_equal(keep.numpy(), expected)
    transposed = keep_highest_of_blocks(torch.from_numpy(values).t().contiguous(), pattern, -2, ranking=ranking)
    assert np.array_equal(transposed.t().numpy(), expected)
    assert (keep.view(rows, blocks, pattern.block).sum(-1) == pattern.kept).all()


def test_experts_have_blocks_along_their_inputs() -> None:
    values = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))  # (experts, inputs, outputs)
    keep = keep_highest_of_blocks(values, Pattern(2, 4), -2)
    assert (keep.view(3, 2, 4, 5).sum(2) == 2).all()


def test_a_2_4_mask_is_one_that_torch_compresses_without_loss() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half()
    masked = weight * keep_highest_of_blocks(weight.float().abs(), Pattern(2, 4), -1)
    compressed = sparse_semi_structured_from_dense_cutlass(masked)
    assert compressed[0].shape == (64, 32)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*compressed), masked)


@pytest.mark.parametrize("text", ["2:4", "1:2", "31:32"])
def test_a_pattern_is_read_as_written(text: str) -> None:
    assert str(Pattern.parse(text)) == text


def test_the_ratio_is_the_share_removed() -> None:
    assert Pattern(1, 4).ratio == 0.75


@pytest.mark.parametrize("text", ["", "2", "4:4", "4:2", "0:4", "2:4:8", "2:33", "-1:4", " 2:4", "02:4"])
def test_text_that_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=f"M at most {LARGEST_BLOCK}, such as 2:4"):
        Pattern.parse(text)


def test_inputs_that_are_no_whole_blocks() -> None:
    with pytest.raises(MaskingError, match="a multiple of 4 inputs, for the pattern 2:4") as error:
        keep_highest_of_blocks(torch.zeros(4, 6), Pattern(2, 4), -1)
    assert error.value.actual == 6


def test_nan_cannot_be_ranked() -> None:
    with pytest.raises(MaskingError, match="NaN"):
        keep_highest_of_blocks(torch.full((1, 4), torch.nan), Pattern(2, 4), -1)
