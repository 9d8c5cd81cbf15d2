"""Exact changes of floating-point numbers: the number of steps between two neighbours on the line of all bit patterns.

The bit patterns of a dtype are ordered like its numbers, with -0.0 just below +0.0, so a step count leads from any
pattern to any other, in every dtype. A difference of two numbers would be rounded, and adding it rounded again. Small
changes are few steps, which compress well.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.unsignedinteger]
"""Bit patterns as unsigned integers of the dtype's size."""


def steps_between(before: Bits, after: Bits) -> Bits:
    """The steps from each bit pattern to another, as even numbers upwards and odd ones downwards: 0, -1, 1, -2, ...

    Args:
        before: Unsigned integers.
        after: Unsigned integers of the same dtype and shape.
    """
    steps = _ordered(after) - _ordered(before)
    zigzag: Bits = np.bitwise_xor(steps << _one(steps), np.negative(steps >> _top_shift(steps)))
    return zigzag


def step_from(before: Bits, steps: Bits) -> Bits:
    """The bit patterns that lie these steps away.

    Args:
        before: Unsigned integers.
        steps: From `steps_between`, of the same dtype and shape.
    """
    one = _one(steps)
    signed: Bits = np.bitwise_xor(steps >> one, np.negative(steps & one))
    return _unordered(_ordered(before) + signed)


def _ordered(patterns: Bits) -> Bits:
    """The place of each bit pattern on the line, modulo the number of patterns."""
    flip = np.negative(patterns >> _top_shift(patterns))
    places: Bits = np.bitwise_xor(patterns, flip | _top(patterns))
    return places


def _unordered(places: Bits) -> Bits:
    flip = (places >> _top_shift(places)) - _one(places)
    patterns: Bits = np.bitwise_xor(places, flip | _top(places))
    return patterns


def _one(array: Bits) -> np.unsignedinteger:
    return array.dtype.type(1)


def _top_shift(array: Bits) -> np.unsignedinteger:
    return array.dtype.type(8 * array.dtype.itemsize - 1)


def _top(array: Bits) -> np.unsignedinteger:
    return array.dtype.type(1 << (8 * array.dtype.itemsize - 1))
