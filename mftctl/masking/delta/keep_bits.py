"""Which entries of a tensor stay changed: packed bits, all of them, or bits that follow from a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mftctl.masking.counter_random import random_bits
from mftctl.masking.mask_file.codecs import Packed

SEEDED_BYTES: Final = 16

_CHUNK: Final = 2**18
_BUCKETS: Final = 2**16
_BUCKET_SHIFT: Final = np.uint64(48)
_CPU: Final = torch.device("cpu")


class KeepBits(Protocol):
    """Which entries of a tensor stay changed."""

    def part(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """The bits of the entries from `first` on, `(count,)`, True = changed.

        Args:
            first: Flat index, a multiple of 8.
            count: Number of entries.
        """


@dataclass(frozen=True, slots=True)
class PackedBits:
    """Bits as they are stored, one per entry.

    Attributes:
        packed: As returned by `codecs.pack`.
    """

    packed: Packed

    def part(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """The bits of the entries from `first` on."""
        return np.unpackbits(self.packed[first // 8 :], count=count, bitorder="little").view(np.bool_)


@dataclass(frozen=True, slots=True)
class AllBits:
    """Every entry stays changed."""

    def part(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """The bits of the entries from `first` on."""
        return np.ones(count, dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class SeededBits:
    """Random bits that follow from a key, so that they need not be stored.

    An entry is kept if its 64 random bits are below a limit. They differ between all entries of a stream, so a limit
    between two of them keeps an exact number.

    Attributes:
        key: Key of the stream of `counter_random`.
        limit: The limit.
    """

    key: int
    limit: int

    def part(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """The bits of the entries from `first` on."""
        return _random(self.key, first, first + count) < np.uint64(self.limit)

    def payload(self) -> bytes:
        """The key and the limit, 8 bytes each."""
        return self.key.to_bytes(8, "little") + self.limit.to_bytes(8, "little")

    @classmethod
    def of_payload(cls, payload: bytes) -> SeededBits:
        """The bits with the key and the limit in 16 bytes."""
        return cls(int.from_bytes(payload[:8], "little"), int.from_bytes(payload[8:], "little"))


def seeded_bits(key: int, weights: int, kept: int) -> SeededBits:
    """Bits that keep exactly `kept` random entries of a tensor.

    A histogram finds the bucket of the limit, and a second pass the limit in it, so memory does not grow with the
    tensor.

    Args:
        key: Key of the stream.
        weights: Number of entries of the tensor.
        kept: Number of entries to keep, fewer than `weights`.
    """
    counts = np.zeros(_BUCKETS, dtype=np.int64)
    for first in range(0, weights, _CHUNK):
        values = _random(key, first, min(first + _CHUNK, weights))
        counts += np.bincount((values >> _BUCKET_SHIFT).astype(np.int64), minlength=_BUCKETS)
    ends = np.cumsum(counts)
    bucket = int(np.searchsorted(ends, kept, side="right"))
    in_bucket = []
    for first in range(0, weights, _CHUNK):
        values = _random(key, first, min(first + _CHUNK, weights))
        in_bucket.append(values[(values >> _BUCKET_SHIFT) == np.uint64(bucket)])
    below = int(ends[bucket - 1]) if bucket else 0
    return SeededBits(key, int(np.sort(np.concatenate(in_bucket))[kept - below]))


def _random(key: int, first: int, end: int) -> npt.NDArray[np.uint64]:
    found: npt.NDArray[np.uint64] = random_bits(key, first, end, device=_CPU).numpy().view(np.uint64)
    return found
