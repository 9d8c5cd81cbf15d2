"""Counts the bytes that tensors take while code runs, on real tensors and on tensors without data alike."""

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
    """A part of what runs; each is another one, also of the same kind and layer.

    Attributes:
        kind: Pass through a decoder layer, or what runs outside of them.
        layer: Index of the decoder layer.
    """

    kind: Kind = "outside"
    layer: int | None = None


class Event(NamedTuple):
    """A change of the bytes that are alive.

    Attributes:
        stretch: When it happened.
        made_in: When the storage concerned was made.
        size_bytes: Allocated, or freed if negative.
        gradient_bytes: Of gradients; a gradient becomes one in an event of its own, after its allocation.
    """

    stretch: Stretch
    made_in: Stretch
    size_bytes: int
    gradient_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tally:
    """What events add up to.

    Attributes:
        live_bytes: Alive at the end, gradients included.
        gradient_bytes: Of these, the ones marked as gradients.
        peak_bytes: The most alive at once.
        peak_other_bytes: The most alive at once without gradients.
    """

    live_bytes: int = 0
    gradient_bytes: int = 0
    peak_bytes: int = 0
    peak_other_bytes: int = 0


def add_up(events: Iterable[Event]) -> Tally:
    """The tally of events in their order."""
    live = gradients = peak = peak_other = 0
    for _, _, size_bytes, gradient_bytes in events:
        live += size_bytes
        gradients += gradient_bytes
        peak = max(peak, live)
        peak_other = max(peak_other, live - gradients)
    return Tally(live, gradients, peak, peak_other)


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, records the storages that operations make, until they are freed.

    What a kernel allocates inside for itself is not seen.

    Args:
        existing: Tensors made before; their storages do not count.

    Attributes:
        events: What was allocated and freed so far.
        stretch: What runs now, told by hooks.
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
                self._watch(made.untyped_storage())
        return result

    def mark_gradient(self, parameter: torch.Tensor) -> None:
        """Counts the gradient that a parameter has got as one; a hook for after its accumulation."""
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
    """Identifies a storage while it lives: its Python object may be made anew."""
    return int(storage._cdata)
