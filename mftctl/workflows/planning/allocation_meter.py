"""Counts the bytes of live tensors while code runs, for real tensors and tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["outside", "forward", "backward"]


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """A section of the execution; compared by identity, even with equal kind and layer.

    Attributes:
        kind: A pass through a decoder layer, or code outside decoder layers.
        layer: Index of the decoder layer.
    """

    kind: Kind = "outside"
    layer: int | None = None


class Event(NamedTuple):
    """A change in live bytes.

    Attributes:
        stretch: Stretch in which it happened.
        made_in: Stretch in which the storage was allocated.
        size_bytes: Bytes allocated, or freed if negative.
        gradient_bytes: Change in gradient bytes; a storage is marked as a gradient by a separate event.
    """

    stretch: Stretch
    made_in: Stretch
    size_bytes: int
    gradient_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tally:
    """Totals of a sequence of events.

    Attributes:
        live_bytes: Live bytes at the end, including gradients.
        gradient_bytes: The part of these marked as gradients.
        peak_bytes: Peak of live bytes.
        peak_other_bytes: Peak of live bytes without gradients.
    """

    live_bytes: int = 0
    gradient_bytes: int = 0
    peak_bytes: int = 0
    peak_other_bytes: int = 0


def add_up(events: Iterable[Event]) -> Tally:
    """Returns the totals of events in order."""
    live = gradients = peak = peak_other = 0
    for _, _, size_bytes, gradient_bytes in events:
        live += size_bytes
        gradients += gradient_bytes
        peak = max(peak, live)
        peak_other = max(peak_other, live - gradients)
    return Tally(live, gradients, peak, peak_other)


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the storages that operations allocate and free while the mode is active.

    Scratch memory allocated inside a kernel is not counted.

    Args:
        existing: Tensors created earlier; their storages are not counted.

    Attributes:
        events: The allocations and frees so far.
        stretch: The current stretch, set by hooks.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.stretch = Stretch()
        nothing = Event(self.stretch, self.stretch, 0)
        self._alive = dict.fromkeys((_key(tensor.untyped_storage()) for tensor in existing), nothing)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor):
                parts = (made._indices(), made._values()) if made.layout == torch.sparse_coo else (made,)
                for part in parts:
                    self._watch(part.untyped_storage())
        return result

    def mark_gradient(self, parameter: torch.Tensor) -> None:
        """Marks a parameter's gradient as such; a hook to run after accumulation."""
        if parameter.grad is None:
            return
        key = _key(parameter.grad.untyped_storage())
        made = self._alive.get(key)
        if made is not None and not made.gradient_bytes:
            self._alive[key] = made._replace(gradient_bytes=made.size_bytes)
            self.events.append(Event(self.stretch, made.made_in, 0, made.size_bytes))

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = _key(storage)
        if key in self._alive:
            return
        self._alive[key] = Event(self.stretch, self.stretch, storage.nbytes())
        weakref.finalize(storage, self._forget, key)
        self.events.append(self._alive[key])

    def _forget(self, key: int) -> None:
        made = self._alive.pop(key)
        self.events.append(Event(self.stretch, made.made_in, -made.size_bytes, -made.gradient_bytes))


def _key(storage: torch.UntypedStorage) -> int:
    """Identifies a live storage, whose Python object may be recreated."""
    return int(storage._cdata)
