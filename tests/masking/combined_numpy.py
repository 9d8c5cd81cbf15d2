"""Weighted sums of stored tensors, written again with numpy alone, from the definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Wide = npt.NDArray[np.float32] | npt.NDArray[np.float64]


def widened(raw: bytes, dtype: str) -> Wide:
    """The values of a tensor in fp32, or fp64 if they are stored so."""
    match dtype:
        case "F64":
            return np.frombuffer(raw, "<f8").copy()
        case "F32":
            return np.frombuffer(raw, "<f4").copy()
        case "F16":
            return np.frombuffer(raw, "<f2").astype(np.float32)
        case "BF16":
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(dtype)


def narrowed(values: Wide, dtype: str) -> bytes:
    """Finite values rounded to the nearest stored one, ties to even."""
    if dtype == "BF16":
        bits = values.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def combined(raws: Sequence[bytes], weights: Sequence[float], dtype: str) -> bytes:
    """The weighted sum: entries equal in all tensors are kept, all others are summed in order and rounded once."""
    used = [(widened(raw, dtype), weight) for raw, weight in zip(raws, weights, strict=True) if weight]
    wide = used[0][0].dtype.type
    total = np.zeros_like(used[0][0])
    for number, (values, weight) in enumerate(used):
        product = values * wide(weight)
        total = product if number == 0 else total + product
    if len(used) == 1:
        total = used[0][0]
    found = np.frombuffer(narrowed(total, dtype), np.uint8).reshape(len(total), -1).copy()
    same = np.all([values == used[0][0] for values, _ in used], axis=0)
    first = next(raw for raw, weight in zip(raws, weights, strict=True) if weight)
    found[same] = np.frombuffer(first, np.uint8).reshape(len(total), -1)[same]
    return found.tobytes()
