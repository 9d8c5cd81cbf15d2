"""Entries of flat tensors on a CPU cleared, or held and put back: torch's `where` and `masked_fill_` are slow there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mftctl.masking.partitions import local_part

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether all entries lie one after the other in memory of a CPU, each of the size of an integer type."""
    is_whole = local_part(tensor) is tensor
    return is_whole and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.element_size() in _INTEGERS


def parts(numel: int, size: int) -> Iterator[slice]:
    """Consecutive parts of a flat tensor, all of the same size but the last."""
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def clear_unselected(tensor: torch.Tensor, selected: torch.Tensor) -> None:
    """Sets every entry that is not selected to zero, infinity included.

    Args:
        tensor: Floating point.
        selected: Bool, of its shape and on its device.
    """
    if not is_flat(tensor):
        tensor.masked_fill_(~selected, 0.0)
        return
    int_dtype = _INTEGERS[tensor.element_size()]
    bits, flat_selected = tensor.view(-1).view(int_dtype), selected.reshape(-1).view(torch.int8)
    for part in parts(bits.numel(), torch.get_num_threads() << 16):  # what stays in the cores' caches
        bits[part].bitwise_and_(flat_selected[part].neg().to(int_dtype))


class HeldEntries:
    """The entries of some tensors that are not selected, to be put back bit by bit.

    Args:
        tensors: Flat, of one size.
        selected: Bool, of that size.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], selected: torch.Tensor) -> None:
        self._tensors = tensors
        chosen = selected.numpy()
        self._are_few = 2 * np.count_nonzero(chosen) > selected.numel()
        if self._are_few:
            self._places = torch.from_numpy(np.flatnonzero(~chosen))
            self._held = [tensor.take(self._places) for tensor in tensors]
        else:
            self._places = torch.from_numpy(np.flatnonzero(chosen))
            self._held = [tensor.clone() for tensor in tensors]

    def put_back(self) -> None:
        """Gives the tensors their held entries again; the selected ones stay as they are now."""
        for tensor, held in zip(self._tensors, self._held, strict=True):
            if self._are_few:
                tensor.index_copy_(0, self._places, held)
            else:
                tensor.copy_(held.index_copy_(0, self._places, tensor.take(self._places)))
