"""Counts the bytes that tensors take while code runs, on real tensors and on tensors without data alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, counts the storages that operations make, until they are freed.

    What a kernel allocates inside for itself is not seen.

    Args:
        existing: Tensors made before; their storages do not count.

    Attributes:
        live_bytes: Now alive, gradients included.
        gradient_bytes: Of these, the ones marked as gradients.
        peak_bytes: The most alive at once.
        peak_other_bytes: The most alive at once without gradients.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.gradient_bytes = 0
        self.peak_bytes = 0
        self.peak_other_bytes = 0
        self._storage_bytes = dict.fromkeys((_key(tensor.untyped_storage()) for tensor in existing), 0)
        self._gradients: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor):
                self._watch(made.untyped_storage())
        return result

    def mark_gradient(self, parameter: torch.Tensor) -> None:
        """Counts the gradient that a parameter has got as one; a hook for after its accumulation."""
        key = None if parameter.grad is None else _key(parameter.grad.untyped_storage())
        if key in self._storage_bytes and key not in self._gradients:
            self._gradients.add(key)
            self.gradient_bytes += self._storage_bytes[key]

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = _key(storage)
        if key in self._storage_bytes:
            return
        self._storage_bytes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.peak_other_bytes = max(self.peak_other_bytes, self.live_bytes - self.gradient_bytes)

    def _forget(self, key: int) -> None:
        size_bytes = self._storage_bytes.pop(key)
        self.live_bytes -= size_bytes
        if key in self._gradients:
            self._gradients.remove(key)
            self.gradient_bytes -= size_bytes


def _key(storage: torch.UntypedStorage) -> int:
    """Identifies a storage while it lives: its Python object may be made anew."""
    return int(storage._cdata)
