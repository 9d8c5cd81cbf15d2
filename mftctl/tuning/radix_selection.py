"""Exact selection among the numbers of several tensors on any device, by counting their digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

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
