from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import MaskMismatchError
from mftctl.masking.overlap import diff, pairwise_overlaps
from tests.masking.mask_files import DELTA_METADATA, build_mask


def test_counts_and_jaccard_of_an_example() -> None:
    a = build_mask(w=torch.tensor([False, False, True, True, True]))
    b = build_mask(w=torch.tensor([True, False, False, False, True]))
    overlap = diff(a, b).tensors["w"]
    assert (overlap.weights, overlap.removed_a, overlap.removed_b, overlap.removed_both) == (5, 2, 3, 1)
    assert overlap.jaccard == 1 / 4
    assert overlap.expected_both == 6 / 5
    assert overlap.expected_jaccard == pytest.approx(1.2 / (5 - 1.2))


@pytest.mark.slow
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_counts_agree_with_numpy_sets(bits: list[tuple[bool, bool]]) -> None:
    first, second = np.array(bits).T
    found = diff(build_mask(w=torch.from_numpy(first.copy())), build_mask(w=torch.from_numpy(second.copy()))).total
    removed_a, removed_b = set(np.flatnonzero(~first)), set(np.flatnonzero(~second))
    assert (found.removed_a, found.removed_b) == (len(removed_a), len(removed_b))
    assert found.removed_both == len(removed_a & removed_b)
    either = len(removed_a | removed_b)
    assert found.jaccard == (len(removed_a & removed_b) / either if either else 1.0)


def test_total_is_the_sum_and_lists_tensors_covered_by_only_one() -> None:
    quarter = torch.arange(16).reshape(4, 4) >= 4
    a = build_mask(both=quarter, shared=quarter, left=quarter)
    b = build_mask(both=quarter.T, shared=quarter, right=quarter)
    found = diff(a, b)
    assert list(found.tensors) == ["both", "shared"]
    assert (found.only_a, found.only_b) == (("left",), ("right",))
    assert (found.total.weights, found.total.removed_a, found.total.removed_both) == (32, 8, 5)
    assert found.total.expected_both == 2.0


def test_independent_random_masks_overlap_as_expected_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (build_mask(w=torch.rand(200_000, generator=generator) >= 0.1) for _ in range(2))
    found = diff(a, b).total
    assert found.jaccard == pytest.approx(found.expected_jaccard, rel=0.05)
    assert found.expected_jaccard == pytest.approx(0.01 / 0.19, rel=0.02)


def test_masks_that_remove_nothing_are_equal() -> None:
    nothing = build_mask(w=torch.ones(4, dtype=torch.bool))
    assert (diff(nothing, nothing).total.jaccard, diff(nothing, nothing).total.expected_jaccard) == (1.0, 1.0)


def test_masks_without_a_common_tensor_are_refused() -> None:
    keep = torch.ones(4, dtype=torch.bool)
    with pytest.raises(MaskMismatchError, match="no tensor in common") as caught:
        diff(build_mask(v=keep), build_mask(w=keep))
    assert (caught.value.expected, caught.value.actual) == ("tensors such as v", "tensors such as w")


def test_masks_of_different_kinds_are_refused() -> None:
    keep = torch.ones(4, dtype=torch.bool)
    with pytest.raises(MaskMismatchError, match="differ in kind") as caught:
        diff(build_mask(w=keep), build_mask(DELTA_METADATA, w=keep))
    assert (caught.value.expected, caught.value.actual) == ("weight", "delta")


def test_delta_masks_are_compared() -> None:
    a = build_mask(DELTA_METADATA, w=torch.tensor([False, False, True]))
    b = build_mask(DELTA_METADATA, w=torch.tensor([True, False, False]))
    assert diff(a, b).total.removed_both == 1


def test_other_shapes_are_refused() -> None:
    keep = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(MaskMismatchError, match="different shapes") as caught:
        diff(build_mask(w=keep), build_mask(w=keep.T))
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("w", (2, 3), (3, 2))


def test_pairwise_overlaps_equal_those_of_each_pair() -> None:
    generator = torch.Generator().manual_seed(1)
    names = ("ab", "abc", "b", "c")
    masks = [build_mask(**{name: torch.rand(5, 7, generator=generator) >= 0.3 for name in have}) for have in names]
    found = pairwise_overlaps(masks)
    assert list(found) == [(0, 1), (0, 2), (1, 2), (1, 3)]  # the others have no tensor in common
    assert all(overlap == diff(masks[a], masks[b]).total for (a, b), overlap in found.items())
    assert pairwise_overlaps(masks[:1]) == pairwise_overlaps([]) == {}


def test_pairwise_overlaps_refuse_other_kinds_and_shapes() -> None:
    keep = torch.ones(4, dtype=torch.bool)
    with pytest.raises(MaskMismatchError, match="differ in kind"):
        pairwise_overlaps([build_mask(w=keep), build_mask(DELTA_METADATA, w=keep)])
    with pytest.raises(MaskMismatchError, match="different shapes"):
        pairwise_overlaps([build_mask(w=keep), build_mask(w=keep.reshape(2, 2))])
