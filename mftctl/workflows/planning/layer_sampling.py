"""Measures a few decoder layers to account for all: identical layers allocate and free the same memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mftctl.workflows.planning.allocation_meter import AllocationMeter, Event, Kind, Stretch


def stand_ins(layers: nn.ModuleList) -> list[int]:
    """Returns, for each decoder layer, the index of its stand-in: itself or an earlier equivalent layer.

    Layers are equivalent if they have the same structure and train the same parameters, and if both or neither follow
    a layer that trains any. Tensors shared by layers of one structure, such as position embeddings, are freed with the
    first or last of them, so these two layers only stand in for themselves.
    """
    structures: defaultdict[Hashable, list[int]] = defaultdict(list)
    passes_gradients = False
    for index, layer in enumerate(layers):
        structures[passes_gradients, _structure(layer)].append(index)
        passes_gradients |= bool(_trained(layer))
    chosen = list(range(len(layers)))
    for indices in structures.values():
        first: dict[Hashable, int] = {}
        for index in indices[1:-1]:
            chosen[index] = first.setdefault(_trained(layers[index]), index)
    return chosen


def keep_stand_ins(model: PreTrainedModel, layers: nn.ModuleList, chosen: Sequence[int]) -> dict[int, nn.Module]:
    """Removes all decoder layers that are not stand-ins from a model.

    Args:
        model: The model, changed in place.
        layers: The model's decoder layers.
        chosen: The result of `stand_ins`.

    Returns:
        The remaining layers, in order, by their original index.
    """
    kept = {index: layers[index] for index in sorted(set(chosen))}
    config = model.config.get_text_config()
    # Some models use the layer index to look up whether attention is sliding-window.
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(kinds) == len(layers):
        config.layer_types = [kinds[index] for index in kept]
    del layers[:]
    layers.extend(kept.values())
    return kept


@contextmanager
def telling_stretches(model: nn.Module, layers: Mapping[int, nn.Module], meter: AllocationMeter) -> Iterator[None]:
    """Context in which the meter is notified of the decoder layer that runs forward or backward.

    Args:
        model: The whole model.
        layers: Its decoder layers, by their index in the full model.
        meter: Receives the stretches; anything after a backward pass belongs to its last layer.
    """

    def begin(kind: Kind, index: int | None, *_: object) -> None:
        meter.stretch = Stretch(kind, index)

    def watch_gradient(index: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(partial(begin, "backward", index))  # type: ignore[no-untyped-call]

    hooks = [model.register_forward_hook(partial(begin, "outside", None))]
    for index, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(partial(begin, "forward", index)))
        hooks.append(layer.register_forward_hook(partial(watch_gradient, index)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def repeat_layers(events: Iterable[Event], chosen: Sequence[int]) -> Iterator[Event]:
    """Extends the events of a model with a few layers to the full model.

    Each layer repeats the events of its stand-in. Code outside layers runs once, but frees what every layer left.

    Args:
        events: Events of a model reduced to the layers in `chosen`.
        chosen: The stand-in of each layer, from `stand_ins`.

    Yields:
        Events with the stretches of the stand-ins.
    """
    times: Counter[Stretch] = Counter()
    for stretch, changes in _in_full(events, chosen):
        for event in changes:
            count = 1 if stretch.layer is not None or event.made_in is stretch else times[event.made_in]
            yield from [event] * count
        times[stretch] += 1


def _in_full(events: Iterable[Event], chosen: Sequence[int]) -> Iterator[tuple[Stretch, list[Event]]]:
    """The stretches of the full model."""
    stretches = [(stretch, list(changes)) for stretch, changes in groupby(events, lambda event: event.stretch)]
    for kind, group in groupby(stretches, lambda item: item[0].kind):
        if kind == "outside":
            yield from group
            continue
        measured = {stretch.layer: (stretch, changes) for stretch, changes in group}
        for index in chosen if kind == "forward" else reversed(chosen):
            if index in measured:  # without gradients there is no backward pass
                yield measured[index]


def _structure(layer: nn.Module) -> Hashable:
    """A key for a layer's computation: its modules with their settings, and its tensor shapes."""
    modules = ((name, type(module), _settings(module)) for name, module in layer.named_modules())
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return (*modules, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors))


def _settings(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """The plain attributes of a module, except its position in the model."""
    found = vars(module).items()
    return tuple((key, value) for key, value in found if key != "layer_idx" and isinstance(value, str | int | float))


def _trained(layer: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, parameter in layer.named_parameters() if parameter.requires_grad)
