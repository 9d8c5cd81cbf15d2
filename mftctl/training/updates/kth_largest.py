"""Exact selection among very many numbers on a CPU: a sample says where the threshold lies, one pass finds it."""

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
"""Gives the entries of a flat array from a first one to before another, every n-th; the same at each call."""

_CHUNK_ENTRIES = 1 << 16
"""What a pass works on at a time, so that it stays in a core's cache."""

_SAMPLE_ALL = 1 << 12
_STRIDE = 31
_MOST_SAMPLES = 1 << 18
_DEVIATIONS = 3.5
"""Half the width of the bracket, in standard deviations of a sample's rank: one in 2,000 misses."""

_MOST_INSIDE = 1 / 12
"""Above this share, what is noted of the entries inside a bracket would take more memory than the mask."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What was selected of one array.

    Attributes:
        keep: Bool, of the array's shape, True where the entry is kept.
        highest: The highest of the ranked integers; 0 of an empty array.
    """

    keep: npt.NDArray[np.bool_]
    highest: int


def keep_by_bracket(
    readers: Sequence[Reader],
    sizes: Sequence[int],
    count: int,
    each: Callable[..., Iterable[Any]] = map,
) -> list[Kept] | None:
    """The keep masks without the `count` lowest of the numbers of all arrays, equal ones in order; None if that failed.

    The numbers are read at random places, for two values that should enclose the threshold, and once from first to
    last. The sample decides only whether there is a result: a threshold between the two is the exact one.

    Args:
        readers: Of each array, of signed integers of one type: the bit patterns of floating-point numbers. Signs are
            ignored: magnitudes are ranked.
        sizes: Of the arrays.
        count: From 1 to the number of all entries.
        each: How the work on the arrays is shared out, as by `map`.
    """
    low, high = _bracket(readers, sizes, count, each)
    scans: list[_Scan] = list(each(partial(_scan, low, high), readers, sizes))
    excess = count - (sum(sizes) - sum(scan.above_low for scan in scans))
    if low == 0 and excess <= 0:  # only zeros are left out, the first of them
        for scan, size in zip(scans, sizes, strict=True):
            zeros = size - scan.above_low
            _keep_after(scan.keep, min(count, zeros))
            count -= min(count, zeros)
    elif excess <= 0 or not _leave_out(scans, excess):
        return None
    return [Kept(scan.keep, scan.highest) for scan in scans]


@dataclass(frozen=True, slots=True)
class _Scan:
    """What one pass over an array found.

    Attributes:
        keep: True above the bracket's lower end.
        above_low: How many these are.
        places: Of the entries inside the bracket, in order; None where they are too many.
        values: Their ranked integers.
        highest: The highest of all ranked integers.
    """

    keep: npt.NDArray[np.bool_]
    above_low: int
    places: Integers | None
    values: Integers
    highest: int


def _magnitudes(bits: Integers, out: Integers | None = None) -> Integers:
    # Floating-point numbers that are not negative have the order of their bit patterns.
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
    """The magnitudes of every n-th entry, n near the stride and without a divisor that a row's length has too."""
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
    """Takes the `count` lowest of the entries inside the bracket out of the masks, if all are known and enough."""
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
    """Sets the mask True behind the first `count` entries that are False."""
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
    """The keep masks without the `count` lowest of the numbers of all tensors, equal ones in order.

    Every tensor is read once for each 16 bits of its numbers, and once for the mask.

    Args:
        readers: A function for each flat tensor of integers of one type, none negative, that gives the same tensor at
            each call.
        count: From 1 to the number of all entries.

    Returns:
        One flat bool tensor for each, on its device, True where the entry is kept.
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
    """The k-th lowest integer of all tensors (k from 1), and how many of the k lowest are equal to it."""
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
