"""The floating-point types that can be masked; all-zero bits mean +0.0 in each of them."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""safetensors name -> torch dtype. F8_E8M0 is excluded on purpose, since it has no zero."""

INTEGER_VIEWS: Final[dict[int, torch.dtype]] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per weight -> integer dtype of the same size, for operations on the raw bits."""


def item_bytes(dtype: str) -> int:
    """The bytes per weight of a maskable safetensors dtype."""
    return TORCH_DTYPES[dtype].itemsize


def unsigned_view(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The little-endian unsigned numpy dtype of the same size as a maskable safetensors dtype."""
    return np.dtype(f"<u{item_bytes(dtype)}")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own memory as integers of the same shape; 0 means +0.0 in every maskable dtype."""
    return tensor.detach().view(INTEGER_VIEWS[tensor.element_size()])


def can_hold(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """True if `wide` represents every value of the floating-point dtype `narrow` exactly."""
    outer, inner = torch.finfo(wide), torch.finfo(narrow)
    return outer.eps <= inner.eps and outer.max >= inner.max and outer.smallest_normal <= inner.smallest_normal
