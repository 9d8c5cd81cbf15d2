"""The values of changed entries: exact steps, changes in bf16 or 8 bits with a scale per block, signs, or multipliers.

Exact values are bit patterns and need no arithmetic. Multipliers are those of a soft mask. The others are changes that
are added to the base in fp32 (fp64 for F64), and the sum is rounded to the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mftctl.masking.delta.steps import Bits, step_from, steps_between
from mftctl.masking.dtypes import INTEGER_VIEWS, TORCH_DTYPES, item_bytes, unsigned_view
from mftctl.masking.soft_mask import Limit, largest_code, multiplied

ValuesKind = Literal["exact", "bf16", "int8", "sign", "scale"]
ChangeKind = Literal["exact", "bf16", "int8", "sign"]
RoundedKind = Literal["bf16", "int8", "sign"]
BLOCK: Final = 128
"""Consecutive kept changes that share a scale in 8 bits: a quarter of a bit per value."""

_LARGEST_CODE: Final = 127
_SCALE_BYTES: Final = 4

Raw = npt.NDArray[np.uint8]


class KeptValues(Protocol):
    """The decoded values of the kept entries of a tensor."""

    def put(self, weights: Bits, places: npt.NDArray[np.signedinteger[Any]], first: int) -> None:
        """Changes some weights in place.

        Args:
            weights: Bit patterns of consecutive weights of the base.
            places: Indices of the kept entries among them.
            first: Index of the first of them among all kept entries of the tensor.
        """


@dataclass(frozen=True, slots=True)
class ExactSteps:
    """Steps from the base's bit patterns.

    Attributes:
        steps: From `steps_between`, one per kept entry.
    """

    steps: Bits

    def put(self, weights: Bits, places: npt.NDArray[np.signedinteger[Any]], first: int) -> None:
        """Changes some weights in place."""
        steps = self.steps[first : first + len(places)]
        if len(places) == len(weights):
            weights[:] = step_from(weights, steps)
        else:
            weights[places] = step_from(weights[places], steps)


@dataclass(frozen=True, slots=True)
class RoundedChanges:
    """Changes to add to the base.

    Attributes:
        changes: fp32, one per kept entry.
        dtype: Dtype of the weights.
    """

    changes: torch.Tensor
    dtype: torch.dtype

    def put(self, weights: Bits, places: npt.NDArray[np.signedinteger[Any]], first: int) -> None:
        """Changes some weights in place."""
        before = torch.from_numpy(signed(weights[places])).view(self.dtype)
        sums = before.to(wide_dtype(self.dtype)) + self.changes[first : first + len(places)]
        after = sums.to(self.dtype).view(INTEGER_VIEWS[self.dtype.itemsize]).numpy()
        weights[places] = after.view(weights.dtype)


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Multipliers of a soft mask.

    Attributes:
        codes: uint8, one per kept entry.
        limit: The largest multiplier.
        dtype: Dtype of the weights.
    """

    codes: torch.Tensor
    limit: Limit
    dtype: torch.dtype

    def put(self, weights: Bits, places: npt.NDArray[np.signedinteger[Any]], first: int) -> None:
        """Multiplies some weights in place."""
        before = torch.from_numpy(signed(weights[places])).view(self.dtype)
        after = multiplied(before, self.codes[first : first + len(places)], self.limit)
        weights[places] = after.view(INTEGER_VIEWS[self.dtype.itemsize]).numpy().view(weights.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that changes of weights of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def signed(patterns: Bits) -> npt.NDArray[Any]:
    """Bit patterns as the integers that torch has in all versions: signed, except 8 bits."""
    size: int = patterns.dtype.itemsize
    return patterns.view(np.dtype("u1" if size == 1 else f"<i{size}"))


def values_size_bytes(kind: ValuesKind, kept: int, dtype: str) -> int:
    """The bytes of the values of `kept` entries before compression.

    Args:
        kind: Kind of the values.
        kept: Number of kept entries, at least 1.
        dtype: safetensors dtype of the tensor.
    """
    match kind:
        case "exact":
            return kept * item_bytes(dtype)
        case "bf16":
            return 2 * kept
        case "int8":
            return kept + _SCALE_BYTES * -(-kept // BLOCK)
        case "sign":
            return _SCALE_BYTES + (kept + 7) // 8
        case "scale":
            return 1 + kept


def encode_exact(before: Bits, after: Bits) -> Raw:
    """The bytes of exact values.

    Args:
        before: Bit patterns of the base at the kept entries.
        after: Bit patterns after the change.
    """
    return _planes(steps_between(before, after))


def encode_rounded(kind: RoundedKind, changes: torch.Tensor) -> Raw:
    """The bytes of rounded values.

    Args:
        kind: Kind of the values.
        changes: Changes of the kept entries, finite, fp32 or fp64 and flat.

    Source: sign: BitDelta, Liu et al. 2024 (arXiv 2402.10193), section 3.1, equations 1 to 3, without distillation of
        the scales.
    """
    values = changes.to(torch.float32)
    match kind:
        case "bf16":
            return _planes(values.to(torch.bfloat16).view(torch.int16).numpy().view("<u2"))
        case "int8":
            scales = _largest_in_blocks(values) / np.float32(_LARGEST_CODE)
            codes = _codes(values.numpy(), scales)
            return np.concatenate([scales.astype("<f4").view(np.uint8), codes.view(np.uint8)])
        case "sign":
            scale = np.array([changes.abs().to(torch.float64).mean().item()], dtype="<f4")
            positive = np.packbits((values > 0).numpy(), bitorder="little")
            return np.concatenate([scale.view(np.uint8), positive])


def encode_multipliers(codes: torch.Tensor, limit: Limit) -> Raw:
    """The bytes of multipliers: the limit, then the codes.

    Args:
        codes: uint8 codes of the kept entries, flat.
        limit: The largest multiplier.
    """
    return np.concatenate([np.array([limit], dtype=np.uint8), codes.numpy()])


def decode_values(kind: ValuesKind, raw: Raw, kept: int, dtype: str) -> KeptValues:
    """The values in their bytes.

    Args:
        kind: Kind of the values.
        raw: As many bytes as `values_size_bytes` states.
        kept: Number of kept entries.
        dtype: safetensors dtype of the tensor.

    Raises:
        ValueError: A multiplier is above the limit, or the limit is not one of a soft mask.
    """
    if kind == "exact":
        return ExactSteps(_unplaned(raw, unsigned_view(dtype)))
    if kind == "scale":
        limit = int(raw[0])
        if limit not in (1, 2):
            raise ValueError(f"the largest multiplier must be 1 or 2, not {limit}")
        known: Limit = 1 if limit == 1 else 2
        if (raw[1:] > largest_code(known)).any():
            raise ValueError(f"a code is above {largest_code(known)}")
        return Multipliers(torch.from_numpy(raw[1:].copy()), known, TORCH_DTYPES[dtype])
    match kind:
        case "bf16":
            patterns = _unplaned(raw, np.dtype("<u2"))
            changes = torch.from_numpy(signed(patterns)).view(torch.bfloat16).to(torch.float32)
        case "int8":
            scales = raw[:-kept].copy().view("<f4")
            codes = raw[-kept:].view(np.int8)
            changes = torch.from_numpy(codes.astype(np.float32) * np.repeat(scales, BLOCK)[:kept])
        case "sign":
            scale = raw[:_SCALE_BYTES].copy().view("<f4")[0]
            positive = np.unpackbits(raw[_SCALE_BYTES:], count=kept, bitorder="little").view(np.bool_)
            changes = torch.from_numpy(np.where(positive, scale, -scale))
    return RoundedChanges(changes, TORCH_DTYPES[dtype])


def _largest_in_blocks(values: torch.Tensor) -> npt.NDArray[np.float32]:
    sizes = values.abs().numpy()
    largest: npt.NDArray[np.float32] = np.maximum.reduceat(sizes, np.arange(0, len(sizes), BLOCK))
    return largest


def _codes(values: npt.NDArray[np.float32], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """Each value as a multiple of its block's scale, rounded half to even; 0 in a block of zeros."""
    divisors = np.repeat(np.where(scales > 0, scales, np.float32(1)), BLOCK)[: len(values)]
    codes: npt.NDArray[np.int8] = np.clip(np.rint(values / divisors), -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8)
    return codes


def _planes(numbers: Bits) -> Raw:
    """The lowest bytes of all numbers, then the next ones: equal places have similar statistics, which compresses."""
    size = numbers.dtype.itemsize
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, size).T).reshape(-1)


def _unplaned(raw: Raw, dtype: np.dtype[np.unsignedinteger]) -> Bits:
    size = dtype.itemsize
    return np.ascontiguousarray(raw.reshape(size, -1).T).reshape(-1).view(dtype)
