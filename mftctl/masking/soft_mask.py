"""Soft masks: a multiplier of 8 bits per weight in place of a bit, and the rule from scores to multipliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch

from mftctl.errors import MaskingError
from mftctl.masking.mask_file.codecs import Packed

Limit = Literal[1, 2]
"""The largest multiplier."""

IDENTITY_CODES: Final[dict[Limit, int]] = {1: 255, 2: 127}
"""The code of multiplier 1, which is the number of steps from 0 to 1: 0, 1 and 2 are exact."""

LEAST_TEMPERATURE: Final = 1e-3
"""Temperature of the last step of hardening; gradients are those of at least this one."""


def largest_code(limit: Limit) -> int:
    """The code of the largest multiplier."""
    return limit * IDENTITY_CODES[limit]


def multiplied(weight: torch.Tensor, codes: torch.Tensor, limit: Limit) -> torch.Tensor:
    """The weight times its multipliers, as a new tensor of its dtype.

    Both factors are rounded to fp32 (fp64 for an fp64 weight), and their product to the dtype. Multiplier 1 leaves the
    bits of a weight as they are, and multiplier 0 gives +0.0.

    Args:
        weight: The weight, in fp64, fp32, fp16 or bf16.
        codes: uint8 codes of its shape, on its device.
        limit: The largest multiplier.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    factors = codes.to(wide).div_(IDENTITY_CODES[limit])
    product = weight.to(wide).mul(factors).to(weight.dtype)
    product.masked_fill_(codes == 0, 0.0)
    return torch.where(codes == IDENTITY_CODES[limit], weight, product)


@dataclass(frozen=True, slots=True)
class SoftRule:
    """The rule from scores to multipliers: m = clamp((s - 1/2) / temperature + 1/2, 0, limit), rounded to a code.

    At temperature 1 a score is its multiplier. With a limit of 1 and a falling temperature, multipliers approach 0 and
    1; at temperature 0 they are 1 where the score is at least 1/2.

    Attributes:
        limit: The largest multiplier.
        temperature: At most 1; below 1 only with limit 1.
        dtype: Dtype of the weight in the checkpoint. Products are rounded to it, so that a model in fp32 computes with
            the weights that the file will make of a checkpoint in bf16. None for the weight's own.

    Source: ours. Soft masks of weights, learned beside hard ones, are those of arXiv 2512.23073, of which only the
        abstract was at hand.
    """

    limit: Limit = 1
    temperature: float = 1.0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 1.0 or (self.limit == 1 and 0.0 <= self.temperature < 1.0)):
            raise ValueError("the temperature must be 1, or between 0 and 1 with limit 1")

    @property
    def uses_magnitude(self) -> bool:
        """False: multipliers follow signed scores."""
        return False

    def cut(self, scores: torch.Tensor) -> None:
        """Nothing: each multiplier depends on its own score only."""

    def codes(self, scores: torch.Tensor) -> torch.Tensor:
        """The uint8 codes of the multipliers, of the scores' shape.

        Raises:
            MaskingError: A score is NaN.
        """
        if torch.isnan(scores).any():
            raise MaskingError(
                "A score is NaN.",
                expected="finite scores",
                actual=f"{int(torch.isnan(scores).sum())} of {scores.numel()} are NaN",
                hint="use a smaller learning rate",
            )
        return self._multipliers(scores.float()).mul_(IDENTITY_CODES[self.limit]).round_().to(torch.uint8)

    def product(
        self, weight: torch.Tensor, scores: torch.Tensor, base: torch.Tensor | None, cut: object = None
    ) -> torch.Tensor:
        """The weight times the multipliers of its scores, as a new tensor of its dtype; without a base."""
        return self.masked(weight, self.codes(scores))

    def masked(self, weight: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The weight times multipliers, as a new tensor of its dtype.

        Args:
            weight: The weight.
            codes: uint8 codes of its shape, on its device.
        """
        return multiplied(weight.to(self.dtype or weight.dtype), codes, self.limit).to(weight.dtype)

    def score_gradient(
        self, grad: torch.Tensor, scores: torch.Tensor, weight: torch.Tensor, base: torch.Tensor | None
    ) -> torch.Tensor:
        """The gradient of the scores, straight through the rounding to codes.

        dL/ds = dL/dV * W / temperature, but 0 where it would move a multiplier further beyond 0 or the limit, as in
        projected gradient descent.

        Args:
            grad: The gradient dL/dV of the masked weight V, in fp32 or fp64; overwritten.
            scores: The scores.
            weight: The weight W.
            base: None, as for `product`.
        """
        multipliers = self._multipliers(scores.to(grad.dtype))
        grad.mul_(weight.to(grad.dtype))
        outward = ((multipliers >= self.limit) & (grad < 0)) | ((multipliers <= 0) & (grad > 0))
        return grad.masked_fill_(outward, 0.0).div_(max(self.temperature, LEAST_TEMPERATURE))

    def _multipliers(self, scores: torch.Tensor) -> torch.Tensor:
        """The multipliers before rounding, as a new tensor of the scores' dtype."""
        if self.temperature == 0.0:
            return (scores >= 0.5).to(scores.dtype)
        if self.temperature == 1.0:
            return scores.clamp(0.0, self.limit)
        return scores.sub(0.5).div_(self.temperature).add_(0.5).clamp_(0.0, self.limit)

    def stored(self, scores: torch.Tensor) -> Packed:
        """The codes of the multipliers, one byte per weight, flat; read-only, and without memory if all are 1."""
        codes = self.codes(scores).cpu().contiguous().numpy().reshape(-1)
        if self.keeps_all(codes, len(codes)):
            return np.broadcast_to(codes[:1].copy(), codes.shape)
        return codes

    def mask(self, stored: Packed, shape: torch.Size) -> torch.Tensor:
        """The codes as a uint8 tensor of the weight's shape."""
        return torch.from_numpy(stored.copy()).view(shape)

    def keeps_all(self, stored: Packed, weights: int) -> bool:
        """True if every multiplier is 1."""
        return bool((stored == IDENTITY_CODES[self.limit]).all())

    def promised(self, gradient: torch.Tensor, scores: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> float:
        """The reduction of the loss, to first order, from one mask to another.

        Args:
            gradient: Mean gradient of the scores.
            scores: The scores.
            old: The mask before, from `mask`.
            new: The mask after.
        """
        change = old.to(gradient.dtype).sub_(new.to(gradient.dtype)).div_(IDENTITY_CODES[self.limit])
        return float((gradient * change).sum()) * max(self.temperature, LEAST_TEMPERATURE)
