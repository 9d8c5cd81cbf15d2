"""Weighted sums of the tensors of several checkpoints, in memory or from file to file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch

from mftctl.errors import ModelError
from mftctl.masking.checkpoints.shards import Advance, WriteTensor, opened_at, write_shards
from mftctl.masking.checkpoints.tensors import StoredTensor, read_chunks, read_tensor, tensor_index
from mftctl.masking.dtypes import TORCH_DTYPES

MIXED_DTYPES: Final = ("F64", "F32", "F16", "BF16")
"""safetensors dtypes whose values are weights by themselves; 8-bit values need scales."""

Parts = Mapping[str, Sequence[StoredTensor]]
"""The tensors to sum for each name, one per checkpoint, of the same dtype and shape."""


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The sum of tensors times their weights, in their dtype.

    It is accumulated in fp32 (fp64 for fp64 tensors) in the given order and rounded once. An entry that is equal in all
    tensors keeps its value, so that rounding changes nothing that training left alone.

    Args:
        tensors: CPU tensors of the same dtype and shape.
        weights: One weight each, with sum 1.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = first.to(wide) * weights[0]
    same = torch.ones_like(first, dtype=torch.bool)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        # Not `add(alpha=)`, whose vectorised and scalar loops may round differently, which would depend on the chunks.
        total += tensor.to(wide) * weight
        same &= tensor == first
    return torch.where(same, first, total.to(first.dtype))


def sum_of_parts(parts: Sequence[StoredTensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum of stored tensors, on the CPU.

    Args:
        parts: One tensor per checkpoint; those of weight 0 are not read.
        weights: One weight each, with sum 1.

    Raises:
        ModelError: The sum of some entries is not finite.
    """
    used, their_weights = _used(parts, weights)
    tensors = [read_tensor(part) for part in used]
    found = weighted_sum(tensors, their_weights)
    _require_finite(found, tensors, parts[0])
    return found


def write_mixture(
    source: Path,
    parts: Parts,
    weights: Sequence[float],
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the weight files of a checkpoint with weighted sums in place of some tensors.

    One chunk of each checkpoint per thread is in memory at a time; the bytes of a tensor do not depend on its chunks.

    Args:
        source: The checkpoint whose files are written, with all other bytes unchanged.
        parts: The tensors to sum, by name in the source.
        weights: One weight per checkpoint, with sum 1.
        folder: Destination folder, with no weight files yet.
        on_progress: Called with the bytes written so far and in total.

    Raises:
        ModelError: The sum of some entries is not finite, or a file was truncated in the meantime.
    """
    write_shards(tensor_index(source).values(), parts, _writing_sums(parts, weights), folder, on_progress)


def _writing_sums(parts: Parts, weights: Sequence[float]) -> WriteTensor:
    def write_tensor(stored: StoredTensor, target: Path, advance: Advance) -> None:
        used, their_weights = _used(parts[stored.name], weights)
        dtype = TORCH_DTYPES[stored.dtype]
        with ExitStack() as files:
            _, writer = files.enter_context(opened_at(stored.offset_bytes, stored.path, target))
            chunks = []
            for part in used:
                stream = files.enter_context(part.path.open("rb"))
                stream.seek(part.offset_bytes)
                chunks.append(read_chunks(stream, part.length_bytes, part.path))
            for together in zip(*chunks, strict=True):
                tensors = [torch.frombuffer(chunk, dtype=dtype) for chunk in together]
                found = weighted_sum(tensors, their_weights)
                _require_finite(found, tensors, stored)
                writer.write(found.view(torch.uint8).numpy().data)
                advance(len(together[0]))

    return write_tensor


def _used(parts: Sequence[StoredTensor], weights: Sequence[float]) -> tuple[list[StoredTensor], list[float]]:
    """The parts whose weight is not 0, and their weights: 0 times infinity or a negative zero would leave a trace."""
    pairs = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight != 0]
    return [part for part, _ in pairs], [weight for _, weight in pairs]


def _require_finite(found: torch.Tensor, tensors: Sequence[torch.Tensor], stored: StoredTensor) -> None:
    """Checks that every entry of a sum is finite, except those that are equal in all tensors."""
    if len(tensors) == 1 or torch.isfinite(found).all():
        return
    differs = torch.zeros_like(found, dtype=torch.bool)
    for tensor in tensors:
        differs |= tensor != found
    wrong = int((differs & ~torch.isfinite(found)).sum())
    if wrong:
        raise ModelError(
            "The weighted sum of some entries is not finite.",
            path=stored.path,
            key=stored.name,
            expected=f"numbers that {stored.dtype} can hold",
            actual=f"{wrong:,} infinite or NaN entries",
            hint="use checkpoints from before training diverged, and smaller weights",
        )
