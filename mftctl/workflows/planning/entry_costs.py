"""What a training holds and copies by the entry: each figure of the plan that does not come from running the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from mftctl.masking.device_selection import selection_workspace_bytes
from mftctl.training.updates.stochastic_adamw import step_workspace_bytes

Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw_8bit", "stochastic_adamw", "sgd", "rmsprop", "adagrad", "adafactor"
]

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits: half a byte, a byte for each block of 64, and a number of 4 bytes for 256 of those."""

EIGHT_BIT_BLOCK = 256
"""Entries of a moment in 8 bits, a byte each, that share a number of 4 bytes."""

EIGHT_BIT_SMALLEST = 4096
"""Parameters with fewer entries keep moments in fp32 (bitsandbytes)."""

SELECTED_BYTES = 1
"""Of an entry that a rule selects or not: a bool, from the selection to the end of the step."""

CPU_SELECTION_BYTES = 9
"""Of an entry of the tensor in which a CPU looks for the largest: its bits, a copy, a bool."""

CPU_SELECTING_TENSORS = 2
"""Tensors in which a CPU looks at a time."""

HELD_COPIES = 5
"""Of the parameter whose entries are held back: at the first step its weight twice, an empty gradient, two moments."""

PROMISED_BYTES = 13
"""Of an entry of the projection of which `probe --fast` adds up the gain: three numbers in fp32 and a bool."""


class Temporaries(NamedTuple):
    """What a step makes on the way, in copies of parameters.

    Attributes:
        on_cpu: Of one parameter at a time.
        on_gpu: Of all parameters at once, where torch steps all together.
        with_decay: More of the same, where weights decay.
    """

    on_cpu: int
    on_gpu: int
    with_decay: int = 0


_MOMENTS: dict[Optimizer, int] = {"adamw": 2, "stochastic_adamw": 2, "rmsprop": 1, "adagrad": 1, "adafactor": 1}
_TEMPORARIES: dict[Optimizer, Temporaries] = {
    "adamw": Temporaries(2, 0),  # on a GPU fused
    "sgd": Temporaries(0, 0, 1),
    "rmsprop": Temporaries(1, 1, 1),
    "adagrad": Temporaries(1, 2, 1),
}
_ADAFACTOR_COPIES = 3


def kept_bytes(parameter: torch.Tensor, optimizer: Optimizer, *, on_gpu: bool, is_embedding: bool = False) -> int:
    """What an optimizer keeps of a parameter between steps.

    Args:
        parameter: Trained; tells shape and dtype.
        optimizer: Which one.
        on_gpu: Whether paged moments can leave for the memory of the machine.
        is_embedding: Whether moments in 8 bits would be too coarse for it.
    """
    entries, size = parameter.numel(), parameter.element_size()
    if optimizer == "paged_adamw_8bit" and on_gpu:
        return 0
    if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        is_wide = is_embedding or entries < EIGHT_BIT_SMALLEST
        return 8 * entries if is_wide else 2 * (entries + 4 * -(-entries // EIGHT_BIT_BLOCK))
    if optimizer == "adafactor" and parameter.dim() > 1:
        return (entries // parameter.shape[-1] + entries // parameter.shape[-2]) * size
    return _MOMENTS.get(optimizer, 0) * entries * size


def step_bytes(trained: Sequence[torch.Tensor], optimizer: Optimizer, *, on_gpu: bool, decays: bool) -> int:
    """Temporary tensors of an optimizer's step.

    Args:
        trained: The parameters, at least one.
        optimizer: Which one.
        on_gpu: Whether torch steps all of them at once.
        decays: Whether weights decay.
    """
    sizes = [parameter.numel() * parameter.element_size() for parameter in trained]
    if optimizer == "stochastic_adamw":
        largest = max(parameter.numel() for parameter in trained)
        return step_workspace_bytes(largest, torch.device("cuda" if on_gpu else "cpu"))
    if optimizer == "adafactor":  # a parameter at a time everywhere
        return _ADAFACTOR_COPIES * max(sizes)
    found = _TEMPORARIES.get(optimizer)
    if found is None:
        return 0
    more = found.with_decay if decays else 0
    return (found.on_gpu + more) * sum(sizes) if on_gpu else (found.on_cpu + more) * max(sizes)


def selecting_bytes(
    trained: Sequence[torch.Tensor], optimizer: Optimizer, *, on_gpu: bool, decays: bool, holds: bool
) -> int:
    """Temporary tensors of a step that updates chosen entries.

    Args:
        trained: The parameters, at least one.
        optimizer: Which one.
        on_gpu: Whether torch steps all of them at once.
        decays: Whether weights decay.
        holds: Whether entries that are not chosen are held back, one parameter at a time.
    """
    largest = max(trained, key=lambda parameter: parameter.numel() * parameter.element_size())
    if on_gpu:
        looking = selection_workspace_bytes(largest.numel(), largest.numel(), largest.element_size())
    else:
        looking = CPU_SELECTING_TENSORS * CPU_SELECTION_BYTES * largest.numel()
    stepped = [largest] if holds else trained
    stepping = step_bytes(stepped, optimizer, on_gpu=on_gpu, decays=decays)
    if holds:
        stepping += HELD_COPIES * largest.numel() * largest.element_size()
    return SELECTED_BYTES * sum(parameter.numel() for parameter in trained) + max(looking, stepping)
