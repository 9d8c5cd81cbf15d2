"""Which entries of some gradients a step updates: the largest or random ones, in exact numbers, without a sort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch

from mftctl.errors import MaskingError
from mftctl.masking.selection import check_ratio, keep_highest, removed_count

Scope = Literal["tensor", "global"]

_DIGIT_BITS = 16


@torch.no_grad()
def keep_largest(gradients: Sequence[torch.Tensor], ratio: float, scope: Scope = "tensor") -> list[torch.Tensor]:
    """The bool tensors that select all but the ratio's share of entries with the lowest |gradient|.

    Exactly `removed_count(numel, ratio)` entries are not selected: of each tensor, or of all tensors together. Among
    equal magnitudes the lowest index is left out first, where `global` counts through all tensors in the given order.

    Args:
        gradients: Any shapes, floating point, infinite values allowed; `global` ranks mixed dtypes by their exact
            values.
        ratio: Share of entries that are not updated, in [0, 1).
        scope: Whether the share holds for each tensor or for all of them together.

    Returns:
        One bool tensor a gradient, of its shape and on its device, True where the entry is updated.

    Raises:
        MaskingError: The ratio is out of range, or a gradient holds NaN.

    Source: GMT, section 2, equation 3. The paper leaves open over what its percentile goes, hence the scope; it would
        select all ties, which is no exact count.
    """
    check_ratio(ratio)
    for index, gradient in enumerate(gradients):
        _check_numbers(gradient, index)
    return _keep_highest([gradient.abs for gradient in gradients], gradients, ratio, scope)


@torch.no_grad()
def keep_random(
    gradients: Sequence[torch.Tensor], ratio: float, scope: Scope = "tensor", *, seed: int, step: int
) -> list[torch.Tensor]:
    """The bool tensors that select random entries, the same on every device and in every process.

    Args:
        gradients: Tells shapes and devices; the values are not read.
        ratio: Share of entries that are not updated, in [0, 1); the counts are exact, as those of `keep_largest`.
        scope: Whether the share holds for each tensor or for all of them together.
        seed: At least 0; with the step and a tensor's place in `gradients` it decides the entries.
        step: At least 0.

    Returns:
        One bool tensor a gradient, of its shape and on its device, True where the entry is updated.

    Raises:
        MaskingError: The ratio is out of range.

    Source: GMT, section 4.1, baseline Random Mask.
    """
    check_ratio(ratio)
    draws = [partial(_random_values, gradient.shape, (seed, step, index)) for index, gradient in enumerate(gradients)]
    masks = _keep_highest(draws, gradients, ratio, scope)
    return [mask.to(gradient.device) for mask, gradient in zip(masks, gradients, strict=True)]


def _check_numbers(gradient: torch.Tensor, index: int) -> None:
    # The maximum of anything with NaN is NaN; unlike `isnan` over all entries it needs no memory.
    if gradient.numel() and torch.isnan(gradient.max()):
        raise MaskingError(
            "Gradients must be numbers: NaN cannot be ranked.",
            key=f"gradients[{index}], shape {tuple(gradient.shape)}",
            expected="numbers",
            actual=f"{int(torch.isnan(gradient).sum())} NaN of {gradient.numel()}",
            hint="lower the learning rate",
        )


def _random_values(shape: torch.Size, seeds: tuple[int, ...]) -> torch.Tensor:
    """Uniform numbers in [0, 1), fp32, on the CPU, where a generator gives the same ones everywhere."""
    return torch.from_numpy(np.random.default_rng(seeds).random(shape, dtype=np.float32))


def _keep_highest(
    read_values: Sequence[Callable[[], torch.Tensor]], gradients: Sequence[torch.Tensor], ratio: float, scope: Scope
) -> list[torch.Tensor]:
    """The keep masks without the ratio's share of the lowest values.

    Args:
        read_values: A function for each gradient that gives its ranked values, none negative and the same at each call,
            so that those of one tensor alone are in memory.
        gradients: Tell shapes and dtypes.
        ratio: Share to leave out.
        scope: Of each tensor or of all together.
    """
    if scope == "tensor":
        return [keep_highest(read(), ratio) for read in read_values]
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    float_type, int_type = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)

    def read_bits(index: int) -> torch.Tensor:
        # Floating-point numbers that are not negative have the order of their bit patterns.
        return read_values[index]().to(float_type).reshape(-1).view(int_type)

    readers = [partial(read_bits, index) for index in range(len(gradients))]
    count = removed_count(sum(gradient.numel() for gradient in gradients), ratio)
    masks = _keep_highest_together(readers, count, int_type.itemsize * 8)
    return [mask.view(gradient.shape) for mask, gradient in zip(masks, gradients, strict=True)]


def _keep_highest_together(
    readers: Sequence[Callable[[], torch.Tensor]], count: int, value_bits: int
) -> list[torch.Tensor]:
    """The flat keep masks without the `count` lowest of the integers of all tensors, equal ones in order."""
    threshold, ties_left = (-1, 0) if count == 0 else _kth_lowest(readers, count, value_bits)
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


def _kth_lowest(readers: Sequence[Callable[[], torch.Tensor]], k: int, value_bits: int) -> tuple[int, int]:
    """The k-th lowest integer of all tensors (k from 1), and how many of the k lowest are equal to it.

    A radix selection: each pass counts the next 16 bits of the values that have the bits known so far.
    """
    known = 0
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
