"""What a mask makes of a weight: its removed entries are +0.0 or, in a delta mask, those of the base.

Entries are selected bit by bit, without arithmetic, so that training, evaluation and `apply` agree exactly; only
`finite_rescaled` computes.
"""

from __future__ import annotations

import torch

from mftctl.errors import MaskingError
from mftctl.masking.dtypes import bits


def masked_values(weight: torch.Tensor, keep: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """The masked weight as a new tensor.

    Args:
        weight: The weight, of any floating-point dtype.
        keep: Bool keep mask of its shape, on its device.
        base: The weight before fine-tuning, of the same shape, dtype and device; None for a weight mask.
    """
    if base is None:
        return (bits(weight) * keep).view(weight.dtype)  # 8 times as fast as masked_fill on a CPU
    return torch.where(keep, bits(weight), bits(base)).view(weight.dtype)


def mask_in_place(weight: torch.Tensor, keep: torch.Tensor, base: torch.Tensor | None = None) -> None:
    """Masks a weight itself; the arguments are those of `masked_values`, and the weight may be a view."""
    values = bits(weight)
    if base is None:
        values.mul_(keep)
    else:
        torch.where(keep, values, bits(base), out=values)


def finite_rescaled(weight: torch.Tensor, base: torch.Tensor, scale: float, name: str) -> torch.Tensor:
    """The weight with a multiplied change, base + scale * (weight - base), as a new tensor of the same dtype.

    Each operation is rounded to fp32 (fp64 for an fp64 weight), and so is the scale, and their result to the dtype.

    Args:
        weight: The weight, in fp64, fp32, fp16 or bf16.
        base: The weight before fine-tuning, of the same shape, dtype and device.
        scale: The factor of the change.
        name: Name of the tensor, for the error.

    Raises:
        MaskingError: A result is not finite.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    start = base.to(wide)
    result = weight.to(wide, copy=True).sub_(start).mul_(scale).add_(start).to(weight.dtype)
    if not torch.isfinite(result).all():
        raise MaskingError(
            "A rescaled weight is not finite.",
            key=name,
            expected=f"finite weights in {str(weight.dtype).removeprefix('torch.')}",
            actual=f"{int((~torch.isfinite(result)).sum())} of {result.numel()} are not",
            hint="remove a smaller share of the changes, or do not rescale the others",
        )
    return result


def removable(weight: torch.Tensor, base: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What removing each entry takes away: the weight itself or, in a delta mask, its change since the base.

    Args:
        weight: The weight.
        base: The weight before fine-tuning; None for a weight mask.
        dtype: Dtype that a change is computed in; a weight is returned as it is.
    """
    return weight if base is None else weight.to(dtype, copy=True).sub_(base)
