"""Maps the tensors of a checkpoint to parts of parameters in memory.

transformers fuses the experts of a layer into one parameter in memory but writes one tensor per expert and projection;
it also renames others. To learn this layout, it is made to write small stand-ins whose values identify their origin.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from mftctl.errors import MaskingError
from mftctl.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS: Final = 12
"""Rows of a stand-in, divisible evenly among 2, 3, 4 or 6 stored tensors."""

_COLUMNS: Final = 5


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A checkpoint tensor as part of a parameter in memory.

    Attributes:
        name: Its name in the checkpoint.
        parameter: The parameter's name in the model.
        index: Selects the part from the parameter, such as `(expert, slice of rows)`; empty for the whole parameter.
    """

    name: str
    parameter: str
    index: tuple[int | slice, ...] = ()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of this part of a tensor of the parameter's shape."""
        return tensor[self.index]


def stored_parts(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> dict[str, list[StoredPart]]:
    """The checkpoint tensors in each parameter, in order.

    Args:
        model: Loaded or new; a model that is not from transformers is stored as is.
        parameters: Some of its parameters, by name.

    Raises:
        MaskingError: A parameter is not stored as whole experts or rows.
    """
    from transformers import PreTrainedModel  # slow to import, and not needed if names match those on disk

    if not isinstance(model, PreTrainedModel) or not parameters:
        return {name: [StoredPart(name, name)] for name in parameters}
    stand_ins = _stand_ins(parameters)
    names, starts = list(stand_ins), [int(values.min()) for values in stand_ins.values()]
    found: dict[str, list[tuple[int, StoredPart]]] = {name: [] for name in parameters}
    missing = {name: values.numel() for name, values in stand_ins.items()}
    for stored, values in _write(model, stand_ins).items():
        first = int(values.min())
        name = names[bisect_right(starts, first) - 1]
        index = _index(stand_ins[name], values, parameters[name].shape)
        missing[name] -= values.numel()
        if index is None:
            raise _unknown_layout(name, parameters[name], stored)
        found[name].append((first, StoredPart(stored, name, index)))
    for name, entries in missing.items():
        if entries:
            raise _unknown_layout(name, parameters[name], ", ".join(part.name for _, part in found[name]) or "nothing")
    return {name: [part for _, part in sorted(parts, key=itemgetter(0))] for name, parts in found.items()}


def _write(model: PreTrainedModel, stand_ins: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that transformers would write for these parameters, by checkpoint name."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        written: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(stand_ins))
    except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise MaskingError(
            "Cannot determine how transformers stores the parameters of this model.",
            key=type(model).__name__,
            expected="tensors that hold whole experts or rows of a parameter",
            actual=first_line(error),
            hint="leave it out: --target attn, or --target mlp",
        ) from error
    return written


def _stand_ins(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A small tensor for each parameter, with the same number of experts; all values differ across all of them."""
    stand_ins = {}
    start = 0
    for name, parameter in parameters.items():
        shape = (*parameter.shape[:-2], *(_ROWS, _COLUMNS)[: parameter.dim()])
        stand_ins[name] = torch.arange(start, start + math.prod(shape), device="cpu").reshape(shape)
        start += math.prod(shape)
    return stand_ins


def _index(stand_in: torch.Tensor, values: torch.Tensor, shape: torch.Size) -> tuple[int | slice, ...] | None:
    """The index that selects `values` from a parameter, derived from its stand-in; None if there is none.

    Args:
        stand_in: The parameter's stand-in.
        values: A written tensor.
        shape: The parameter's shape.
    """
    if torch.equal(values, stand_in):
        return ()
    first = int(values.min() - stand_in.min())
    block = stand_in
    index: tuple[int | slice, ...] = ()
    if values.dim() == stand_in.dim() - 1:
        expert = first // stand_in[0].numel()
        block, index = stand_in[expert], (expert,)
        first -= expert * block.numel()
    row = first // block[0].numel()
    rows = shape[len(index)]
    if not torch.equal(values, block[row : row + len(values)]) or rows * row % _ROWS or rows * len(values) % _ROWS:
        return None
    if len(values) == _ROWS:
        return index
    return (*index, slice(rows * row // _ROWS, rows * (row + len(values)) // _ROWS))


def _unknown_layout(name: str, parameter: torch.Tensor, stored: str) -> MaskingError:
    return MaskingError(
        "A parameter is stored in a form that masks do not support.",
        key=name,
        expected="tensors that hold whole experts or rows of the parameter",
        actual=f"{tuple(parameter.shape)} in memory, {stored} on disk",
        hint="leave it out: --target attn, or --target mlp",
    )
