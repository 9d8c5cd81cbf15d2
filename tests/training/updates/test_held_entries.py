"""Clearing entries and restoring them, compared with torch's `where` bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.training.updates.masked_optimizer import HeldEntries, clear_unselected, parts

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
STRANGE = [0.0, -0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan")]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).tolist()


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(STRANGE), st.booleans()), max_size=40), st.sampled_from(DTYPES))
def test_held_entries_are_restored_bit_by_bit(drawn: list[tuple[float, bool]], dtype: torch.dtype) -> None:
    selected = torch.tensor([choice for _, choice in drawn], dtype=torch.bool)
    old = [torch.tensor([value for value, _ in drawn], dtype=kind) for kind in (dtype, torch.float32)]
    tensors = [tensor.clone() for tensor in old]
    held = HeldEntries(tensors, selected)
    new = [tensor.fill_(2.0).clone() for tensor in tensors]
    held.put_back()
    for tensor, before, after in zip(tensors, old, new, strict=True):
        assert bits(tensor) == bits(torch.where(selected, after, before))


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(STRANGE), st.booleans()), max_size=40), st.sampled_from(DTYPES))
def test_cleared_entries_are_zero_whatever_they_were(drawn: list[tuple[float, bool]], dtype: torch.dtype) -> None:
    selected = torch.tensor([choice for _, choice in drawn], dtype=torch.bool)
    tensor = torch.tensor([value for value, _ in drawn], dtype=dtype)
    expected = bits(torch.where(selected, tensor, torch.zeros_like(tensor)))
    clear_unselected(tensor, selected)
    assert bits(tensor) == expected


def test_more_entries_than_a_pass_takes_at_once() -> None:
    values = torch.randn(3, 100_001)
    selected = values > 0.3
    cleared = values.clone()
    clear_unselected(cleared, selected)
    assert torch.equal(cleared, values * selected)


def test_a_transposed_tensor_is_cleared_in_its_own_order() -> None:
    tensor = torch.arange(1.0, 7.0).reshape(3, 2).t()
    clear_unselected(tensor, torch.tensor([[True, False, True], [False, True, False]]))
    assert tensor.tolist() == [[1.0, 0.0, 5.0], [0.0, 4.0, 0.0]]


@pytest.mark.parametrize(("numel", "sizes"), [(0, []), (3, [3]), (8, [4, 4]), (9, [4, 4, 1])])
def test_parts(numel: int, sizes: list[int]) -> None:
    assert [len(range(numel)[part]) for part in parts(numel, 4)] == sizes
