"""Exact selection on an accelerator: a sample brackets the threshold, and one pass over the numbers finds it.

It uses only comparisons, integer sums and sorts of a few entries, all of which are deterministic. torch's own
`kthvalue` uses one thread block per tensor, and its histograms are refused in deterministic mode.

Cost in bytes of memory traffic per fp32 entry: 30 with the sample, with one host synchronisation per tensor of up to
2^26 entries, and one at the end. If very many entries are equal, as in the gradients of embeddings, two more passes
count them. If both fail, in one selection of 2,000, counting finds the threshold bit by bit, with one pass per bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART_ENTRIES = 1 << 26
"""Entries per chunk of a pass, which bounds its memory."""
_SORT_ALL = 1 << 17
_STRIDE = 31
_MOST_SAMPLES = 1 << 20
_DEVIATIONS = 3.5
"""Half the width of the bracket, in standard deviations of a sample's rank."""
_INSIDE_SHARE = 12
_MOST_INSIDE = 1 << 25
"""Maximum number of entries recorded inside the bracket, and as a share of all entries, one in 12."""
_WIDTH = 1 << 12


@dataclass(frozen=True, slots=True)
class Ranked:
    """Numbers to rank, read into memory one part at a time.

    Attributes:
        numel: The number of entries.
        read: Called with start, stop (excluded) and step; returns these entries, flat and the same on each call. They
            are floating-point numbers or integers.
    """

    numel: int
    read: Callable[[int, int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Cut:
    """The boundary of the entries that are left out.

    Attributes:
        threshold: The highest value that is left out, entirely or in part; on the tensors' device, `(1,)`.
        last_place: Index of the last entry equal to it that is left out, counted across all tensors; int64 `(1,)`.
    """

    threshold: torch.Tensor
    last_place: torch.Tensor


@dataclass(frozen=True, slots=True)
class Selection:
    """The result of a selection.

    Attributes:
        keep: Flat bool mask for each tensor, True where the entry is kept.
        cut: The boundary from which `keep_beyond` computes the same masks.
        holds_nan: For each tensor, whether it contains NaN, which makes the selection meaningless.
    """

    keep: list[torch.Tensor]
    cut: Cut
    holds_nan: list[bool]


def leave_out_lowest(tensors: Sequence[Ranked], count: int) -> Selection:
    """The selection of all but the `count` lowest numbers of all tensors, ties in index order.

    Args:
        tensors: Tensors of one dtype on one device.
        count: From 1 to the total number of entries.
    """
    if sum(tensor.numel for tensor in tensors) <= _SORT_ALL:
        return _by_sorting(tensors, count)
    low, high = _bracket(tensors, count)
    found = _by_scan(tensors, count, low, high)
    return found or _by_ties(tensors, count, (low, high)) or _by_counting(tensors, count)


def keep_beyond(cut: Cut, tensor: Ranked, offset: int = 0) -> torch.Tensor:
    """The flat keep mask of a tensor for a known cut, without waiting for the device.

    Args:
        cut: From `leave_out_lowest`.
        tensor: One of the tensors that the cut was computed from.
        offset: Total number of entries in the tensors before it.
    """
    masks = [_beyond(cut.threshold, cut.last_place - (offset + start), values) for start, values in _parts(tensor)]
    if len(masks) == 1:
        return masks[0]
    return torch.cat(masks) if masks else torch.empty(0, dtype=torch.bool, device=cut.threshold.device)


def holding_nan(tensors: Sequence[Ranked]) -> list[bool]:
    """For each tensor, True if it contains NaN; the host synchronises only once for all of them."""
    found = [[_is_nan(part) for _, part in _parts(tensor)] for tensor in tensors]
    flags = [flag for flags in found for flag in flags]
    values = iter(torch.stack(flags).tolist() if flags else [])
    return [any([next(values) for _ in flags]) for flags in found]


def selection_workspace_bytes(largest: int, total: int, item_bytes: int) -> int:
    """Peak memory of a selection on an accelerator in addition to its inputs and the resulting masks.

    Args:
        largest: Number of entries of the largest tensor.
        total: Number of entries of all tensors ranked together, or of the largest if each is ranked on its own.
        item_bytes: Bytes per number.
    """
    part = min(largest, _PART_ENTRIES)
    inside = min(total // _INSIDE_SHARE, _MOST_INSIDE)
    # A ranked copy and two masks; in the worst case the index and value of each entry, or three sets of keys.
    passes = part * (item_bytes + 2 + max(8 + item_bytes, 3 * item_bytes))
    # Indices and values, concatenated and sorted, which takes keys and as much again for the sorted result.
    return passes + inside * (4 * 8 + 5 * item_bytes) + 4 * (8 + item_bytes) * max(_MOST_SAMPLES, _SORT_ALL)


def _parts(tensor: Ranked) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields a tensor's numbers part by part, with the index of each part's first entry."""
    for start in range(0, tensor.numel, _PART_ENTRIES):
        yield start, tensor.read(start, min(start + _PART_ENTRIES, tensor.numel), 1)


def _all_parts(tensors: Sequence[Ranked]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the numbers of several tensors part by part, with indices counted across all of them."""
    offset = 0
    for tensor in tensors:
        yield from ((offset + start, part) for start, part in _parts(tensor))
        offset += tensor.numel


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Integer keys in the order of the values, equal for equal values (including signed zeros); NaN sorts last."""
    if not values.is_floating_point():
        return values
    bits = values.view(_INTEGERS[values.element_size()])
    sign = bits >> (8 * bits.element_size() - 1)
    return (bits & torch.iinfo(bits.dtype).max).bitwise_xor_(sign).sub_(sign)


def _is_nan(values: torch.Tensor) -> torch.Tensor:
    """1 if any of the values (at least one) is NaN, otherwise 0, as a scalar int64."""
    return values.max().isnan().long()  # the maximum of values with NaN is NaN


def _by_sorting(tensors: Sequence[Ranked], count: int) -> Selection:
    sizes = [tensor.numel for tensor in tensors]
    values = torch.cat([tensor.read(0, tensor.numel, 1) for tensor in tensors])
    order = _keys(values).sort(stable=True).indices
    keep = torch.ones(values.shape, dtype=torch.bool, device=values.device).index_fill_(0, order[:count], False)
    place = order[count - 1 : count]
    cut = Cut(values.index_select(0, place), place)
    return Selection(list(torch.split(keep, sizes)), cut, holding_nan(tensors))


def _by_scan(tensors: Sequence[Ranked], count: int, low: torch.Tensor, high: torch.Tensor) -> Selection | None:
    """The selection from two values that should bracket the threshold; None if they do not, or bracket too much."""
    keeps, places, values, above, nan = [], [], [], [], []
    size, offset = sum(tensor.numel for tensor in tensors), 0
    room = min(size // _INSIDE_SHARE, _MOST_INSIDE)
    for tensor in tensors:
        keep = torch.empty(tensor.numel, dtype=torch.bool, device=low.device)
        keeps.append(keep)
        nan.append(torch.zeros((), dtype=torch.int64, device=low.device))
        for start, part in _parts(tensor):
            over = torch.gt(part, low, out=keep[start : start + part.numel()])
            above.append(over.sum())
            nan[-1] = nan[-1] + _is_nan(part)
            inside = (part <= high).logical_and_(over).nonzero().squeeze(1)
            room -= inside.numel()
            if room < 0:
                return None
            values.append(part.index_select(0, inside))
            places.append(inside.add_(offset + start))
        offset += tensor.numel
    *flags, over_low = torch.stack([*nan, torch.stack(above).sum()]).tolist()
    excess = count - (size - over_low)
    found, place = torch.cat(values), torch.cat(places)
    if not 0 < excess <= found.numel():
        return None
    order = _keys(found).sort(stable=True).indices[:excess]
    _clear(keeps, tensors, place.index_select(0, order))
    last = order[-1:]
    return Selection(keeps, Cut(found.index_select(0, last), place.index_select(0, last)), list(map(bool, flags)))


def _clear(keeps: Sequence[torch.Tensor], tensors: Sequence[Ranked], places: torch.Tensor) -> None:
    """Sets the masks to False at indices counted across all of them."""
    if len(keeps) == 1:
        keeps[0].index_fill_(0, places, False)
        return
    places = places.sort().values
    ends = torch.tensor([tensor.numel for tensor in tensors]).cumsum(0)
    borders = [0, *torch.searchsorted(places, ends.to(places.device)).tolist()]
    for keep, end, first, last in zip(keeps, ends.tolist(), borders[:-1], borders[1:], strict=True):
        keep.index_fill_(0, places[first:last] - (end - keep.numel()), False)


def _bracket(tensors: Sequence[Ranked], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two values, each `(1,)`; the threshold is very probably above the first and not above the second."""
    size = sum(tensor.numel for tensor in tensors)
    stride = max(_STRIDE, size // _MOST_SAMPLES)
    sample = torch.cat([_sample(tensor, stride) for tensor in tensors])
    order = _keys(sample).sort().indices
    share = count / size
    width = _DEVIATIONS * (share * (1 - share) * sample.numel()) ** 0.5 + 2
    first, last = int(share * sample.numel() - width), int(share * sample.numel() + width)
    lowest, highest = (-math.inf, math.inf) if sample.is_floating_point() else _ends(sample.dtype)
    low = sample.index_select(0, order[first : first + 1]) if first >= 0 else _one(sample, lowest)
    high = sample.index_select(0, order[last : last + 1]) if last < sample.numel() else _one(sample, highest)
    return low, high


def _ends(dtype: torch.dtype) -> tuple[int, int]:
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def _one(like: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full((1,), value, dtype=like.dtype, device=like.device)


def _sample(tensor: Ranked, stride: int) -> torch.Tensor:
    """Every n-th number, with n near the stride and coprime to the row length."""
    while tensor.numel and math.gcd(stride, tensor.numel) > 1:
        stride += 1
    return tensor.read(0, tensor.numel, stride)


def _by_ties(tensors: Sequence[Ranked], count: int, values: Sequence[torch.Tensor]) -> Selection | None:
    """The selection if one of the given values is the threshold, as happens when very many entries are equal."""
    for value in values:
        both = [torch.stack([(part < value).sum(), (part <= value).sum()]) for _, part in _all_parts(tensors)]
        lower, reached = torch.stack(both).sum(0).tolist()
        if lower < count <= reached:
            return _selection(tensors, _cut_at(tensors, _keys(value), count - lower))
    return None


def _by_counting(tensors: Sequence[Ranked], count: int) -> Selection:
    """The selection by finding the threshold bit by bit; the count of lower numbers decides each bit."""
    first = _keys(next(tensor for tensor in tensors if tensor.numel).read(0, 1, 1))
    bits = 8 * first.element_size()
    known = torch.full_like(first, torch.iinfo(first.dtype).min)
    for bit in reversed(range(bits)):
        candidate = torch.zeros_like(known) if bit == bits - 1 else known + (1 << bit)
        known = torch.where(_lower(tensors, candidate) < count, candidate, known)
    return _selection(tensors, _cut_at(tensors, known, count - int(_lower(tensors, known))))


def _selection(tensors: Sequence[Ranked], cut: Cut) -> Selection:
    """The selection for a known cut."""
    keeps, offset = [], 0
    for tensor in tensors:
        keeps.append(keep_beyond(cut, tensor, offset))
        offset += tensor.numel
    return Selection(keeps, cut, holding_nan(tensors))


def _cut_at(tensors: Sequence[Ranked], threshold: torch.Tensor, ties: int) -> Cut:
    """The cut after the first `ties` numbers equal to the threshold, of which there are at least that many."""
    for offset, values in _all_parts(tensors):
        places = (_keys(values) == threshold).nonzero().squeeze(1)
        if places.numel() >= ties:
            place = places[ties - 1 : ties]
            return Cut(values.index_select(0, place), place + offset)
        ties -= places.numel()
    raise ValueError("fewer numbers have this key")


def _lower(tensors: Sequence[Ranked], candidate: torch.Tensor) -> torch.Tensor:
    """The count of numbers in all tensors with a lower key."""
    counts = [(_keys(values) < candidate).sum() for _, values in _all_parts(tensors)]
    return counts[0] if len(counts) == 1 else torch.stack(counts).sum()


def _beyond(threshold: torch.Tensor, last_place: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """True where an entry is above the threshold, or equal to it and after a given index; flat."""
    whole = values.numel() // _WIDTH * _WIDTH
    if whole and whole < values.numel():
        tail = _beyond(threshold, last_place - whole, values[whole:])
        return torch.cat([_beyond(threshold, last_place, values[:whole]), tail])
    # Compares rows and columns, so that entry indices never need memory.
    rows = values.view(-1, _WIDTH if whole else values.numel())
    row, column = (torch.arange(size, out=values.new_empty(size, dtype=torch.int64)) for size in rows.shape)
    last_row = last_place.div(rows.shape[1], rounding_mode="floor")
    keep = (row == last_row)[:, None] & (column > last_place - last_row * rows.shape[1])
    keep.logical_or_((row > last_row)[:, None]).logical_and_(rows == threshold)
    return keep.logical_or_(rows > threshold).view(-1)
