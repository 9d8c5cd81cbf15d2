"""The parts of a Super-Tuning adapter of peft: how many entries it changes, and the values that it adds to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

from mftctl.errors import MaskingError
from mftctl.masking.delta.steps import Bits, step_from
from mftctl.masking.delta.values import signed
from mftctl.masking.dtypes import INTEGER_VIEWS, bits

INDICES: Final = "supertuning_indices"
VALUES: Final = "supertuning_values"
PREFIX: Final = "base_model.model."

_MOST_WEIGHTS: Final = 2**31 - 1
_TRIES: Final = 64


def entries(weights: int, sparsity: float) -> int:
    """The number of entries that peft changes in a layer.

    Source: peft 0.21, `SupertuningLayer._num_trainable`.
    """
    return int(weights * (1 - sparsity))


def settle_sparsity(kept: Mapping[str, tuple[int, int]]) -> float:
    """The largest sparsity that leaves room for the changed entries of every layer.

    An adapter has one sparsity, so the layer with the largest share of changed entries decides; the others are filled
    up with entries to which nothing is added.

    Args:
        kept: Changed entries and weights of each layer, by name.

    Raises:
        MaskingError: A layer has too many weights, or changes all of them.
    """
    for name, (changed, weights) in kept.items():
        if weights > _MOST_WEIGHTS:
            raise MaskingError(
                "A layer has too many weights for a Super-Tuning adapter, whose indices have 32 bits.",
                key=name,
                expected=f"at most {_MOST_WEIGHTS:,}",
                actual=f"{weights:,}",
            )
        if changed == weights:
            raise MaskingError(
                "Every weight of a layer is changed, but a Super-Tuning adapter leaves some unchanged.",
                key=name,
                expected=f"fewer than {weights:,} changed weights",
                actual=f"{changed:,}",
                hint="mftctl delta BASE TUNED --ratio 0.9 changes fewer",
            )
    sparsity = 1 - max(changed / weights for changed, weights in kept.values())
    for _ in range(_TRIES):
        if all(entries(weights, sparsity) >= changed for changed, weights in kept.values()):
            return sparsity
        sparsity = math.nextafter(sparsity, 0)
    raise MaskingError(
        "No sparsity gives the number of changed entries of every layer.",
        expected="int(weights * (1 - sparsity)) entries in each layer",
        actual=", ".join(f"{name}: {changed}" for name, (changed, _) in list(kept.items())[:3]),
    )


def added_values(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The fp32 values that peft adds to weights, and how many of the sums are not the wanted weight.

    peft rounds the values to the dtype of the weights and adds them in it. Where the rounded difference does not give
    the wanted sum, its two neighbours are tried.

    Args:
        before: The base's weights, flat.
        after: The wanted weights.
    """
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    values = (after.to(wide) - before.to(wide)).to(before.dtype)
    for towards in (2, 1):  # one step upwards, one downwards
        wrong = bits(before + values) != bits(after)
        if before.dtype == torch.float64 or not wrong.any():  # the adapter's values are fp32
            break
        tried = _stepped(values, towards)
        better = wrong & (bits(before + tried) == bits(after))
        values = torch.where(better, tried, values)
    stored = values.to(torch.float32)
    return stored, int((bits(before + stored.to(before.dtype)) != bits(after)).sum())


def _stepped(values: torch.Tensor, step: int) -> torch.Tensor:
    patterns: Bits = bits(values).numpy().view(np.dtype(f"<u{values.element_size()}"))
    moved = step_from(patterns, np.full_like(patterns, step))
    return torch.from_numpy(signed(moved)).view(INTEGER_VIEWS[values.element_size()]).view(values.dtype)
