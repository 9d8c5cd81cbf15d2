from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.masking.delta.values import (
    BLOCK,
    RoundedChanges,
    RoundedKind,
    decode_values,
    encode_exact,
    encode_rounded,
    values_size_bytes,
)
from tests.masking.delta.plain_delta import plain_changes

changes_lists = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=300)
ROUNDED: tuple[RoundedKind, ...] = ("bf16", "int8", "sign")


def decoded(kind: RoundedKind, changes: torch.Tensor) -> np.ndarray:
    raw = encode_rounded(kind, changes)
    assert len(raw) == values_size_bytes(kind, len(changes), "F32")
    values = decode_values(kind, raw, len(changes), "F32")
    assert isinstance(values, RoundedChanges)
    return values.changes.numpy()


@pytest.mark.parametrize("kind", ROUNDED)
@settings(deadline=None, max_examples=50)
@given(numbers=changes_lists)
def test_values_are_those_of_the_definition(kind: RoundedKind, numbers: list[float]) -> None:
    changes = torch.tensor(numbers, dtype=torch.float32)
    plain = plain_changes(kind, encode_rounded(kind, changes).tobytes(), len(changes))
    assert np.array_equal(decoded(kind, changes).view(np.uint32), np.array(plain, np.float32).view(np.uint32))


@settings(deadline=None, max_examples=50)
@given(numbers=changes_lists)
def test_bf16_is_within_half_a_unit(numbers: list[float]) -> None:
    changes = torch.tensor(numbers, dtype=torch.float32)
    error = np.abs(decoded("bf16", changes) - changes.numpy())
    assert (error <= np.abs(changes.numpy()) * 2**-8 + 2.0**-133).all()


@settings(deadline=None, max_examples=50)
@given(numbers=changes_lists)
def test_8_bits_are_within_half_a_step_of_their_block(numbers: list[float]) -> None:
    changes = torch.tensor(numbers, dtype=torch.float32)
    found = decoded("int8", changes)
    for first in range(0, len(numbers), BLOCK):
        block = changes.numpy()[first : first + BLOCK]
        step = np.abs(block).max() / 127
        assert (np.abs(found[first : first + BLOCK] - block) <= step * (0.5 + 1e-5) + 127 * 2.0**-149).all()


def test_8_bits_of_a_formula() -> None:
    numbers = [0.5, -0.25, 0.1, 0.0] * 40
    found, scale = decoded("int8", torch.tensor(numbers)), np.float32(0.5) / np.float32(127)
    codes = [round(float(np.float32(number) / scale)) for number in numbers]
    assert found.tolist() == [float(np.float32(code) * scale) for code in codes]
    assert codes[:4] == [127, -64, 25, 0]


def test_a_block_of_zeros_stays_zero() -> None:
    assert not decoded("int8", torch.zeros(130)).any()


def test_sign_is_bitdelta() -> None:
    changes = torch.tensor([0.5, -0.25, 0.0, 1.0, -0.25])
    assert decoded("sign", changes).tolist() == [np.float32(value) for value in (0.4, -0.4, -0.4, 0.4, -0.4)]


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F8_E5M2"])
def test_exact_values_have_their_size(dtype: str) -> None:
    size = {"F64": 8, "F32": 4, "BF16": 2, "F8_E5M2": 1}[dtype]
    before, after = (np.arange(start, start + 5, dtype=f"u{size}") for start in (0, 100))
    raw = encode_exact(before, after)
    assert len(raw) == values_size_bytes("exact", 5, dtype) == 5 * size
    weights = before.copy()
    decode_values("exact", raw, 5, dtype).put(weights, np.arange(5), 0)
    assert np.array_equal(weights, after)
    assert raw[:5].tolist() == [200] * 5  # the low bytes of 100 steps upwards come first


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_changes_are_added_in_a_wide_dtype_and_rounded_once(dtype: torch.dtype) -> None:
    weights = torch.tensor([1.0, -0.3, 0.02], dtype=dtype)
    changes = torch.tensor([0.001, 0.2, -0.5])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (weights.to(wide) + changes).to(dtype)
    size = dtype.itemsize
    patterns = weights.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).numpy().view(f"<u{size}").copy()
    RoundedChanges(changes, dtype).put(patterns, np.arange(3), 0)
    assert patterns.tobytes() == expected.view(torch.uint8).numpy().tobytes()
