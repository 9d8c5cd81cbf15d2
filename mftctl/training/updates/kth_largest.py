"""Exact selection among many numbers on a CPU: a sample brackets the threshold, and one pass finds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[Any]
Reader = Callable[[int, int, int], Integers]
"""Called with start, stop (excluded) and step; returns these entries of a flat array, the same on each call."""

_CHUNK_ENTRIES = 1 << 16
"""Entries per chunk of a pass, so that a chunk stays in a core's cache."""

_SAMPLE_ALL = 1 << 12
_STRIDE = 31
_MOST_SAMPLES = 1 << 18
_DEVIATIONS = 3.5
"""Half the width of the bracket, in standard deviations of a sample's rank; 1 bracket in 2,000 misses."""

_MOST_INSIDE = 1 / 12
"""Above this share, recording the entries inside a bracket would take more memory than the mask."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The selection of one array.

    Attributes:
        keep: Bool, of the array's shape, True where the entry is kept.
        highest: The highest of the ranked integers; 0 for an empty array.
    """

    keep: npt.NDArray[np.bool_]
    highest: int


def keep_by_bracket(
    readers: Sequence[Reader],
    sizes: Sequence[int],
    count: int,
    each: Callable[..., Iterable[Any]] = map,
) -> list[Kept] | None:
    """The keep masks without the `count` lowest numbers of all arrays, ties in index order; None if the bracket misses.

    The numbers are sampled to find two values that should bracket the threshold, then read once from first to last. The
    sample only decides whether there is a result; a threshold inside the bracket is exact.

    Args:
        readers: One per array. They return signed integers of one type, the bit patterns of floating-point numbers.
            Signs are ignored; magnitudes are ranked.
        sizes: Number of entries of each array.
        count: From 1 to the total number of entries.
        each: A function like `map` that distributes the work on the arrays.
    """
    low, high = _bracket(readers, sizes, count, each)
    scans: list[_Scan] = list(each(partial(_scan, low, high), readers, sizes))
    excess = count - (sum(sizes) - sum(scan.above_low for scan in scans))
    if low == 0 and excess <= 0:  # only the first zeros are left out
        for scan, size in zip(scans, sizes, strict=True):
            zeros = size - scan.above_low
            _keep_after(scan.keep, min(count, zeros))
            count -= min(count, zeros)
    elif excess <= 0 or not _leave_out(scans, excess):
        return None
    return [Kept(scan.keep, scan.highest) for scan in scans]


@dataclass(frozen=True, slots=True)
class _Scan:
    """The findings of one pass over an array.

    Attributes:
        keep: True above the bracket's lower end.
        above_low: The number of these entries.
        places: Indices of the entries inside the bracket, in order; None if there are too many.
        values: Their ranked integers.
        highest: The highest of all ranked integers.
    """

    keep: npt.NDArray[np.bool_]
    above_low: int
    places: Integers | None
    values: Integers
    highest: int


def _magnitudes(bits: Integers, out: Integers | None = None) -> Integers:
    # Non-negative floating-point numbers sort in the order of their bit patterns.
    return np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=out)


def _bracket(
    readers: Sequence[Reader], sizes: Sequence[int], count: int, each: Callable[..., Iterable[Any]]
) -> tuple[int, int]:
    """Two integers; the threshold is very probably above the first and not above the second."""
    size = sum(sizes)
    stride = 1 if size <= _SAMPLE_ALL else max(_STRIDE, size // _MOST_SAMPLES)
    sample = np.concatenate(list(each(partial(_sample, stride), readers, sizes)))
    share = count / size
    width = _DEVIATIONS * (share * (1 - share) * sample.size) ** 0.5 + 2
    first, last = int(share * sample.size - width), int(share * sample.size + width)
    inside = [rank for rank in (first, last) if 0 <= rank < sample.size]
    if inside:
        sample.partition(inside)
    low = int(sample[first]) if first >= 0 else -1
    high = int(sample[last]) if last < sample.size else int(np.iinfo(sample.dtype).max)
    return low, high


def _sample(stride: int, read: Reader, size: int) -> Integers:
    """The magnitudes of every n-th entry, with n near the stride and coprime to the row length."""
    while size and math.gcd(stride, size) > 1:
        stride += 1
    return _magnitudes(read(0, size, stride))


def _scan(low: int, high: int, read: Reader, size: int) -> _Scan:
    dtype = read(0, 0, 1).dtype
    scratch, inside = np.empty(_CHUNK_ENTRIES, dtype), np.empty(_CHUNK_ENTRIES, dtype=bool)
    keep = np.empty(size, dtype=bool)
    places, values = [np.empty(0, np.int64)], [np.empty(0, dtype)]
    above_low = highest = found = 0
    room = max(_CHUNK_ENTRIES, int(size * _MOST_INSIDE))
    for start in range(0, size, _CHUNK_ENTRIES):
        chunk = read(start, min(start + _CHUNK_ENTRIES, size), 1)
        ranked = _magnitudes(chunk, scratch[: chunk.size])
        kept = np.greater(ranked, low, out=keep[start : start + chunk.size])
        above_low += int(np.count_nonzero(kept))
        highest = max(highest, int(ranked.max()))
        if found <= room:
            within = np.less_equal(ranked, high, out=inside[: chunk.size])
            here = np.flatnonzero(np.logical_and(within, kept, out=within))
            found += here.size
            places.append(here + start)
            values.append(ranked[here])
    return _Scan(keep, above_low, np.concatenate(places) if found <= room else None, np.concatenate(values), highest)


def _leave_out(scans: Sequence[_Scan], count: int) -> bool:
    """Removes the `count` lowest entries inside the bracket from the masks; False if they are unknown or too few."""
    values = np.concatenate([scan.values for scan in scans])
    if count > values.size or any(scan.places is None for scan in scans):
        return False
    threshold = np.partition(values, count - 1)[count - 1]
    out = values < threshold
    out[np.flatnonzero(values == threshold)[: count - np.count_nonzero(out)]] = True
    start = 0
    for scan in scans:
        end = start + scan.values.size
        scan.keep[scan.places[out[start:end]]] = False  # type: ignore[index]
        start = end
    return True


def _keep_after(keep: npt.NDArray[np.bool_], count: int) -> None:
    """Sets the mask to True after the first `count` entries that are False."""
    for start in range(0, keep.size, _CHUNK_ENTRIES):
        chunk = keep[start : start + _CHUNK_ENTRIES]
        left_out = chunk.size - int(np.count_nonzero(chunk))
        if left_out >= count:
            end = np.flatnonzero(~chunk)[count - 1] + 1 if count else 0
            keep[start + end :] = True
            return
        count -= left_out


_DIGIT_BITS = 16


def keep_by_digits(readers: Sequence[Callable[[], torch.Tensor]], count: int) -> list[torch.Tensor]:
    """The keep masks without the `count` lowest numbers of all tensors, ties in index order.

    Every tensor is read once per 16 bits of its numbers, and once for the mask.

    Args:
        readers: One function per tensor, which returns the same flat tensor of non-negative integers of one type on
            each call.
        count: From 1 to the total number of entries.

    Returns:
        One flat bool tensor per tensor, on its device, True where the entry is kept.
    """
    threshold, ties_left = _kth_lowest(readers, count)
    masks = []
    for read in readers:
        values = read()
        keep = values >= threshold
        if ties_left:
            ties = (values == threshold).nonzero().squeeze(1)[:ties_left]
            keep[ties] = False
            ties_left -= ties.numel()
        masks.append(keep)
    return masks


def _kth_lowest(readers: Sequence[Callable[[], torch.Tensor]], k: int) -> tuple[int, int]:
    """The k-th lowest integer of all tensors (k from 1), and the number of the k lowest that equal it."""
    known = 0
    value_bits = readers[0]().dtype.itemsize * 8
    for shift in range(value_bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
        for read in readers:
            digits = read() >> shift
            if shift + _DIGIT_BITS < value_bits:
                digits = digits[digits >> _DIGIT_BITS == known] - (known << _DIGIT_BITS)
            counts += torch.bincount(digits, minlength=counts.numel()).cpu()
        reached = counts.cumsum(0)
        digit = int(torch.searchsorted(reached, k))
        k -= int(reached[digit] - counts[digit])
        known = known << _DIGIT_BITS | digit
    return known, k
