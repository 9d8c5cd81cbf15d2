"""Which entries of a tensor stay changed: packed bits, all of them, or bits that follow from a key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mftctl.masking.counter_random import random_bits
from mftctl.masking.mask_file.codecs import Packed, packed_size_bytes

SEEDED_BYTES: Final = 16

_CHUNK: Final = 2**18
_LARGEST: Final = 2**64 - 1
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


def seeded_bits(key: int, weights: int, kept: int) -> tuple[SeededBits, Packed]:
    """Bits that keep exactly `kept` random entries of a tensor, and the same bits packed.

    The limit is all but certainly within eight standard deviations of its expected place, so one pass finds it and only
    the entries in between are held in memory.

    Args:
        key: Key of the stream.
        weights: Number of entries of the tensor.
        kept: Number of entries to keep, fewer than `weights`.
    """
    margin = 8 * math.sqrt(kept * (1 - kept / weights)) + 16
    low, high = (max(0, min(_LARGEST, int((kept + side * margin) / weights * _LARGEST))) for side in (-1, 1))
    found = _seeded_between(key, weights, kept, low, high)
    return found or _require(_seeded_between(key, weights, kept, 0, _LARGEST))


def _seeded_between(key: int, weights: int, kept: int, low: int, high: int) -> tuple[SeededBits, Packed] | None:
    """The bits if the limit is between two numbers, both included; otherwise None."""
    packed, below = np.zeros(packed_size_bytes(weights), dtype=np.uint8), 0
    places, between = [], []
    for first in range(0, weights, _CHUNK):
        values = _random(key, first, min(first + _CHUNK, weights))
        keep = values < np.uint64(low)
        below += int(np.count_nonzero(keep))
        bits = np.packbits(keep, bitorder="little")
        packed[first // 8 : first // 8 + len(bits)] = bits
        inside = np.flatnonzero(~keep & (values <= np.uint64(high)))
        places.append(inside + first)
        between.append(values[inside])
    candidates = np.concatenate(between)
    wanted = kept - below
    if not 0 <= wanted < len(candidates):
        return None
    limit = np.partition(candidates, wanted)[wanted]
    more = np.concatenate(places)[candidates < limit]
    np.bitwise_or.at(packed, more // 8, (1 << (more % 8)).astype(np.uint8))
    packed.flags.writeable = False
    return SeededBits(key, int(limit)), packed


def _require(found: tuple[SeededBits, Packed] | None) -> tuple[SeededBits, Packed]:
    if found is None:
        raise ValueError("fewer entries must be kept than the tensor has")
    return found


def _random(key: int, first: int, end: int) -> npt.NDArray[np.uint64]:
    found: npt.NDArray[np.uint64] = random_bits(key, first, end, device=_CPU).numpy().view(np.uint64)
    return found
