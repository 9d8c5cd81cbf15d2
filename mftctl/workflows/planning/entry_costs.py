"""Bytes per entry that training holds and copies: all constants of the plan not measured by running the model."""

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
"""Per 4-bit weight: half a byte, one byte per block of 64, and a 4-byte number per 256 blocks."""

EIGHT_BIT_BLOCK = 256
"""Entries of an 8-bit moment, one byte each, that share a 4-byte number."""

EIGHT_BIT_SMALLEST = 4096
"""Parameters with fewer entries keep moments in fp32 (bitsandbytes)."""

SELECTED_BYTES = 1
"""Per entry subject to selection: a bool, from the selection to the end of the step."""

CPU_SELECTION_BYTES = 9
"""Per entry of a tensor that a CPU searches for the largest entries: its bits, a copy, a bool."""

CPU_SELECTING_TENSORS = 2
"""Number of tensors that a CPU searches at a time."""

HELD_COPIES = 5
"""Per parameter with held entries: its weight twice at the first step, an empty gradient, and two moments."""

DIVERGENCE_LOGITS = 4
"""Tensors of fp32 logits that the divergence on retained data holds beyond those of the training loss."""

PROMISED_BYTES = 13
"""Per entry of the projection whose gain `probe --fast` is summing: three fp32 numbers and a bool."""


class Temporaries(NamedTuple):
    """Temporary tensors of an optimizer step, in copies of parameters.

    Attributes:
        on_cpu: Copies of one parameter at a time.
        on_gpu: Copies of all parameters at once, if torch steps all of them together.
        with_decay: Additional copies with weight decay.
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
    """Bytes that an optimizer keeps for a parameter between steps.

    Args:
        parameter: The trained parameter, used for its shape and dtype.
        optimizer: The optimizer.
        on_gpu: Whether paged moments can be moved to CPU memory.
        is_embedding: Whether it is an embedding, for which 8-bit moments are too coarse.
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
    """Bytes of the temporary tensors of an optimizer step.

    Args:
        trained: The trained parameters, at least one.
        optimizer: The optimizer.
        on_gpu: Whether torch steps all of them at once.
        decays: Whether weight decay is used.
    """
    sizes = [parameter.numel() * parameter.element_size() for parameter in trained]
    if optimizer == "stochastic_adamw":
        largest = max(parameter.numel() for parameter in trained)
        return step_workspace_bytes(largest, torch.device("cuda" if on_gpu else "cpu"))
    if optimizer == "adafactor":  # one parameter at a time on any device
        return _ADAFACTOR_COPIES * max(sizes)
    found = _TEMPORARIES.get(optimizer)
    if found is None:
        return 0
    more = found.with_decay if decays else 0
    return (found.on_gpu + more) * sum(sizes) if on_gpu else (found.on_cpu + more) * max(sizes)


def selecting_bytes(
    trained: Sequence[torch.Tensor], optimizer: Optimizer, *, on_gpu: bool, decays: bool, holds: bool
) -> int:
    """Bytes of the temporary tensors of a step that updates selected entries.

    Args:
        trained: The trained parameters, at least one.
        optimizer: The optimizer.
        on_gpu: Whether torch steps all of them at once.
        decays: Whether weight decay is used.
        holds: Whether unselected entries are kept unchanged, one parameter at a time.
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
