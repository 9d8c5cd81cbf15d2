"""Estimates a mask: its tensors, the number of removed weights, and the file size."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.mask_file.codecs import packed_size_bytes
from mftctl.masking.selection import removed_count
from mftctl.masking.targets import MaskTarget

_BLOCK_BYTES = 32_767  # zlib ends a block when its symbol buffer is full (memory level 9)
_BLOCK_HEADER_BITS = 550


@dataclass(frozen=True, slots=True)
class MaskedTensor:
    """A projection to be masked.

    Attributes:
        name: Name of the weight in the model; for fused experts, the name in the checkpoint.
        shape: Shape of the weight.
        weights: Number of entries.
        removed: Entries that the mask removes; None if a threshold decides.
        packed_bytes: Size of the mask bits.
        deflate_bytes: Expected size in the mask file; None if a threshold decides.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    removed: int | None
    packed_bytes: int
    deflate_bytes: int | None


@dataclass(frozen=True, slots=True)
class MaskEstimate:
    """The mask of a stage.

    Attributes:
        layers: Masked layers in words.
        tensors: The tensors that it covers.
    """

    layers: str
    tensors: tuple[MaskedTensor, ...]

    @property
    def weights(self) -> int:
        """Number of entries."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def removed(self) -> int | None:
        """Entries that the mask removes; None if a threshold decides."""
        return _total(tensor.removed for tensor in self.tensors)

    @property
    def packed_bytes(self) -> int:
        """Size of the mask bits."""
        return sum(tensor.packed_bytes for tensor in self.tensors)

    @property
    def deflate_bytes(self) -> int | None:
        """Expected size in the mask file; None if a threshold decides."""
        return _total(tensor.deflate_bytes for tensor in self.tensors)

    def document(self) -> dict[str, Any]:
        """Returns the mask as plain data."""
        return {
            "layers": self.layers,
            "tensors": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors],
            "weights": self.weights,
            "removed": self.removed,
            "packed_bytes": self.packed_bytes,
            "deflate_bytes": self.deflate_bytes,
        }


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum of counts, or None if one of them is unknown."""
    found = list(counts)
    known = [count for count in found if count is not None]
    return sum(known) if len(known) == len(found) else None


def masked_tensors(targets: Sequence[MaskTarget], options: MaskTrainOptions) -> list[MaskedTensor]:
    """The tensors that a mask covers, with their counts.

    Args:
        targets: Result of `find_targets` for a model with or without weights.
        options: Options with a ratio, a threshold, a pattern or none of them.

    Raises:
        MaskingError: A ratio is out of range, or the pattern does not divide a tensor.
    """
    found = []
    for target in targets:
        weight, ratio = target.weight, options.ratio_of(target.projection)
        if options.blocks is not None:
            options.blocks.require_blocks(target.fan_in, target.name)
        removed = None if ratio is None else removed_count(weight.numel(), ratio)
        found.append(
            MaskedTensor(
                target.weight_name,
                tuple(weight.shape),
                weight.numel(),
                removed,
                packed_size_bytes(weight.numel()),
                None if removed is None else deflate_size_bytes(weight.numel(), removed),
            )
        )
    return found


@functools.cache
def deflate_size_bytes(weights: int, removed: int) -> int:
    """The expected payload size with the `deflate` codec, for a mask with randomly placed removed entries.

    A byte holds 8 entries, and the number of removed entries in it is binomially distributed. Huffman coding assigns
    each of the 256 bytes a whole number of bits, and an additional symbol ends a block.

    Args:
        weights: Number of entries of the tensor.
        removed: Number of entries that the mask removes.
    """
    size_bytes = packed_size_bytes(weights)
    share = removed / weights
    chances = [share ** (8 - byte.bit_count()) * (1 - share) ** byte.bit_count() for byte in range(256)]
    block_bytes = min(size_bytes, _BLOCK_BYTES)
    # A byte expected less than once per block has no code in most blocks.
    likely = [chance for chance in chances if chance * block_bytes >= 0.5] + [1 / block_bytes]
    bits = size_bytes * _huffman_bits(likely) + math.ceil(size_bytes / block_bytes) * _BLOCK_HEADER_BITS
    return min(math.ceil(bits / 8), size_bytes + 5 * math.ceil(size_bytes / block_bytes))


def _huffman_bits(chances: Sequence[float]) -> float:
    """The mean length of the optimal prefix code for symbols with these probabilities: the sum over all merges."""
    heap = list(chances)
    heapq.heapify(heap)
    bits = 0.0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits
