"""Masked weights, compared bit by bit with a choice made in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.masking.dtypes import INTEGER_VIEWS, TORCH_DTYPES
from mftctl.masking.masked_values import mask_in_place, masked_values, removable

ENTRIES = st.lists(
    st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.booleans()), min_size=1, max_size=30
)


def of_bits(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor with the lowest bits of these numbers: any value, such as NaN with a payload, infinity or -0.0."""
    width = 8 * dtype.itemsize
    integers = INTEGER_VIEWS[dtype.itemsize]
    lowest = [value % 2**width for value in values]
    signed = [value - 2**width if integers.is_signed and value >= 2 ** (width - 1) else value for value in lowest]
    return torch.tensor(signed, dtype=integers).view(dtype)


def to_bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(INTEGER_VIEWS[tensor.element_size()]).tolist()


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=TORCH_DTYPES)
@given(entries=ENTRIES)
def test_every_bit_is_that_of_the_weight_or_of_the_base(
    dtype: torch.dtype, entries: list[tuple[int, int, bool]]
) -> None:
    weight, base = (of_bits([entry[which] for entry in entries], dtype) for which in (0, 1))
    kept = [entry[2] for entry in entries]
    keep = torch.tensor(kept)
    before = to_bits(weight)
    zero = [own if stays else 0 for own, stays in zip(before, kept, strict=True)]
    reset = [own if stays else its for own, its, stays in zip(before, to_bits(base), kept, strict=True)]
    assert to_bits(masked_values(weight, keep)) == zero
    assert to_bits(masked_values(weight, keep, base)) == reset
    assert to_bits(weight) == before
    for expected, earlier in ((zero, None), (reset, base)):
        spaced = torch.stack([weight, weight], dim=1)
        mask_in_place(spaced[:, 1], keep, earlier)  # a view that is not contiguous
        assert to_bits(spaced[:, 1].clone()) == expected
        assert to_bits(spaced[:, 0].clone()) == before


def test_a_change_is_computed_in_the_wider_dtype() -> None:
    weight, base = torch.tensor([1.0, 1.0078125]).bfloat16(), torch.tensor([2.0**-20, 1.0]).bfloat16()
    assert removable(weight, base, torch.float32).tolist() == [1 - 2**-20, 2**-7]
    assert removable(weight, None, torch.float32) is weight
    wide = weight.float()
    assert removable(wide, base.float(), torch.float32).tolist() == [1 - 2**-20, 2**-7]
    assert torch.equal(wide, weight.float())
