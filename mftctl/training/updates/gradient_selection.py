"""Selection of the gradient entries that a step updates: the largest or random ones, with exact counts, no sorting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from mftctl.errors import MaskingError
from mftctl.masking.counter_random import random_bits, stream_key
from mftctl.masking.device_selection import Ranked, holding_nan, leave_out_lowest
from mftctl.masking.selection import check_ratio, removed_count
from mftctl.training.updates.kth_largest import keep_by_bracket, keep_by_digits

Scope = Literal["tensor", "global"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def keep_largest(gradients: Sequence[torch.Tensor], ratio: float, scope: Scope = "tensor") -> list[torch.Tensor]:
    """Bool tensors that select all but the given share of entries with the lowest |gradient|.

    Exactly `removed_count(numel, ratio)` entries are not selected, of each tensor or of all tensors together. Among
    equal magnitudes the lowest index is left out first; `global` counts indices across all tensors in the given order.

    Args:
        gradients: Floating-point tensors of any shape, infinite values allowed; `global` ranks mixed dtypes by exact
            value.
        ratio: Share of entries that are not updated, in [0, 1).
        scope: Whether the share applies to each tensor or to all of them together.

    Returns:
        One bool tensor per gradient, of its shape and on its device, True where the entry is updated.

    Raises:
        MaskingError: The ratio is out of range, or a gradient contains NaN.

    Source: GMT, section 2, equation 3. The paper does not state what its percentile is taken over, hence the scope; it
        would select all ties, which gives no exact count.
    """
    check_ratio(ratio)
    selections = _select([_Numbers.tensor(gradient) for gradient in gradients], ratio, scope)
    for index, (gradient, selection) in enumerate(zip(gradients, selections, strict=True)):
        if selection.holds_nan:
            raise MaskingError(
                "Gradients must not contain NaN, which cannot be ranked.",
                key=f"gradients[{index}], shape {tuple(gradient.shape)}",
                expected="gradients without NaN",
                actual=f"{int(torch.isnan(gradient).sum())} NaN of {gradient.numel()}",
                hint="lower the learning rate",
            )
    return [selection.keep.view(gradient.shape) for selection, gradient in zip(selections, gradients, strict=True)]


@torch.no_grad()
def keep_random(
    gradients: Sequence[torch.Tensor], ratio: float, scope: Scope = "tensor", *, seed: int, step: int
) -> list[torch.Tensor]:
    """Bool tensors that select random entries, the same on every device and in every process.

    Args:
        gradients: Provide shapes and devices; their values are not read.
        ratio: Share of entries that are not updated, in [0, 1); counts are exact, as in `keep_largest`.
        scope: Whether the share applies to each tensor or to all of them together.
        seed: At least 0; together with the step and a tensor's index in `gradients`, decides the entries.
        step: Step number, at least 0.

    Returns:
        One bool tensor per gradient, of its shape and on its device, True where the entry is updated.

    Raises:
        MaskingError: The ratio is out of range.

    Source: GMT, section 4.1, baseline Random Mask.
    """
    check_ratio(ratio)
    drawn = [
        _Numbers(
            gradient.numel(),
            partial(_random_numbers, stream_key("random entries", seed, step, index), gradient.device),
            torch.int32,
            gradient.device,
        )
        for index, gradient in enumerate(gradients)
    ]
    selections = _select(drawn, ratio, scope)
    return [selection.keep.view(gradient.shape) for selection, gradient in zip(selections, gradients, strict=True)]


def _random_numbers(key: int, device: torch.device, start: int, stop: int, step: int) -> torch.Tensor:
    """Uniform int32 numbers whose sign is to be ignored: the upper half of the random bits."""
    return random_bits(key, start, stop, step, device=device).view(torch.int32)[1::2]


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Numbers to rank by magnitude.

    Attributes:
        numel: The number of entries.
        read: Called with start, stop (excluded) and step; returns these entries, flat and the same on each call, so
            that few need to be in memory.
        dtype: Floating point, or int32 with signs to be ignored.
        device: The device of the tensors that `read` returns.
    """

    numel: int
    read: Callable[[int, int, int], torch.Tensor]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def tensor(cls, values: torch.Tensor) -> _Numbers:
        flat = values.detach().reshape(-1)
        return cls(flat.numel(), lambda start, stop, step: flat[start:stop:step], values.dtype, values.device)

    def magnitudes(self, dtype: torch.dtype) -> Ranked:
        """The numbers to rank, converted to another dtype."""
        if not dtype.is_floating_point:
            highest = torch.iinfo(dtype).max
            return Ranked(self.numel, lambda start, stop, step: self.read(start, stop, step) & highest)
        return Ranked(self.numel, lambda start, stop, step: self.read(start, stop, step).to(dtype).abs())


@dataclass(frozen=True, slots=True)
class _Selection:
    """The flat keep mask of a tensor, and whether it contains NaN, which makes the mask invalid."""

    keep: torch.Tensor
    holds_nan: bool


def _select(tensors: Sequence[_Numbers], ratio: float, scope: Scope) -> list[_Selection]:
    """The selection without the given share of the lowest magnitudes, of each tensor or of all together."""
    groups = [list(tensors)] if scope == "global" else [[one] for one in tensors]
    if any(one.device.type != "cpu" for one in tensors):
        # On an accelerator, one selection at a time: running two at once would use more memory without being faster.
        return [found for group in groups for found in _select_on_device(group, ratio)]
    with _map_in_threads() as each:
        if scope == "global":
            return _select_together(tensors, ratio, each)
        return [found for alone in each(lambda group: _select_together(group, ratio), groups) for found in alone]


@contextmanager
def _map_in_threads() -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` with as many threads as torch uses, since numpy uses only one."""
    if torch.get_num_threads() == 1:
        yield map
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield pool.map


def _select_on_device(tensors: Sequence[_Numbers], ratio: float) -> list[_Selection]:
    """The selection without the lowest magnitudes of all tensors, ties in index order, on an accelerator."""
    count = removed_count(sum(one.numel for one in tensors), ratio)
    dtype = _common_dtype([one.dtype for one in tensors])
    ranked = [one.magnitudes(dtype) for one in tensors]
    if count:
        selection = leave_out_lowest(ranked, count)
        return [_Selection(keep, nan) for keep, nan in zip(selection.keep, selection.holds_nan, strict=True)]
    keeps = [torch.ones(one.numel, dtype=torch.bool, device=one.device) for one in tensors]
    return [_Selection(keep, nan) for keep, nan in zip(keeps, holding_nan(ranked), strict=True)]


def _select_together(
    tensors: Sequence[_Numbers], ratio: float, each: Callable[..., Iterable[Any]] = map
) -> list[_Selection]:
    """The selection without the lowest magnitudes of all tensors, ties in index order, on a CPU."""
    sizes = [one.numel for one in tensors]
    count = removed_count(sum(sizes), ratio)
    dtype = _common_dtype([one.dtype for one in tensors])
    int_dtype = _INTEGERS[dtype.itemsize]
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(int_dtype)) if dtype.is_floating_point else (1 << 31) - 1

    def read_bits(index: int, start: int, stop: int, step: int) -> torch.Tensor:
        return tensors[index].read(start, stop, step).to(dtype).view(int_dtype)

    def read_magnitudes(index: int) -> torch.Tensor:
        # Non-negative floating-point numbers sort in the order of their bit patterns, with NaN above infinity.
        return read_bits(index, 0, sizes[index], 1) & torch.iinfo(int_dtype).max

    if count:
        arrays = [
            lambda start, stop, step, index=index: read_bits(index, start, stop, step).numpy()
            for index in range(len(tensors))
        ]
        if (kept := keep_by_bracket(arrays, sizes, count, each)) is not None:
            return [_Selection(torch.from_numpy(one.keep), one.highest > infinity) for one in kept]
    readers = [partial(read_magnitudes, index) for index in range(len(tensors))]
    nan = [size > 0 and int(read().max()) > infinity for read, size in zip(readers, sizes, strict=True)]
    if count == 0:
        masks = [torch.ones_like(read(), dtype=torch.bool) for read in readers]
    else:
        masks = keep_by_digits(readers, count)
    return [_Selection(keep, holds_nan) for keep, holds_nan in zip(masks, nan, strict=True)]


def _common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """A dtype that represents all values exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return torch.float64 if torch.float64 in dtypes else torch.float32
