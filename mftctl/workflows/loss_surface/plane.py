"""The plane through three models in weight space."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mftctl.errors import ModelError
from mftctl.evaluation.losses import exact_sum

Weights = Mapping[str, torch.Tensor]

_NARROWEST = 1e-6
"""Squared sine of the smallest angle at which two directions count as distinct."""


@dataclass(frozen=True, slots=True)
class PlanePoint:
    """A point on the plane: its distances from the origin along the two axes, in the norm over all weights.

    Attributes:
        x: Along the first axis, from the origin towards the second corner.
        y: Along the second axis, at right angles to the first, on the side of the third corner.
    """

    x: float
    y: float


class WeightPlane:
    """Sets the weights of a model to those of any point on the plane through three corners.

    The axes come from Gram-Schmidt orthogonalisation: u = second - first, and v, the part of third - first orthogonal
    to u. Points are recomputed from the corners, one tensor at a time in fp32, so that none depends on earlier ones.

    Attributes:
        corners: Coordinates of the three corners: (0, 0), (x, 0) and (x, y), with y above 0 in the last.

    Args:
        model: The model whose weights are set; in fp32, with everything that the corners have in common.
        weights: The parameters of the three corners by name, in any dtype, on the model's device. A tensor that equals
            that of the first corner may be the same object.

    Raises:
        ModelError: The corners' parameters differ from the model's, or the corners do not span a plane.

    Source: MFT, figures 6 and 10.
    """

    corners: tuple[PlanePoint, PlanePoint, PlanePoint]

    def __init__(self, model: nn.Module, weights: tuple[Weights, Weights, Weights]) -> None:
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        form = {name: parameter.shape for name, parameter in self._parameters.items()}
        for corner in weights:
            if {name: tensor.shape for name, tensor in corner.items()} != form:
                raise ModelError("The three models do not have the same parameters, so they span no plane.")
        self._weights = weights
        first, second, third = self._products()
        if first == 0:
            raise ModelError("The first two of the three models have the same weights, so they span no plane.")
        height = third - second * second / first
        if height <= _NARROWEST * third:
            raise ModelError(
                "The three models lie on a line, so they span no plane.",
                actual=f"the third lies on the line through the others, {math.sqrt(third):.3g} from the first",
            )
        length, tall = math.sqrt(first), math.sqrt(height)
        self.corners = PlanePoint(0.0, 0.0), PlanePoint(length, 0.0), PlanePoint(second / length, tall)

    def set_corner(self, number: int) -> None:
        """Sets the model to the exact weights of a corner: 0, 1 or 2."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._weights[number][name])

    def set_point(self, point: PlanePoint) -> None:
        """Sets the model to the weights of a point."""
        _, second, third = self.corners
        of_third = point.y / third.y
        of_second = (point.x - of_third * third.x) / second.x
        for name, parameter in self._parameters.items():
            parameter.copy_(self._weights[0][name])
            for share, difference in zip((of_second, of_third), self._differences(name), strict=True):
                if difference is not None:
                    parameter.add_(difference, alpha=share)

    def _differences(self, name: str) -> Iterator[torch.Tensor | None]:
        """Second and third corner minus the first for one parameter, in fp32; None if there is no difference."""
        origin = self._weights[0][name]
        for corner in self._weights[1:]:
            tensor = corner[name]
            yield None if tensor is origin else tensor.to(torch.float32, copy=True).sub_(origin)

    def _products(self) -> tuple[float, float, float]:
        """The inner products (d, d), (d, e) and (e, e) of the two differences d and e over all weights."""
        found = [[0.0], [0.0], [0.0]]
        for name in self._parameters:
            one, other = self._differences(name)
            for sums, (left, right) in zip(found, ((one, one), (one, other), (other, other)), strict=True):
                if left is not None and right is not None:
                    sums.append(exact_sum(left * right))
        first, second, third = (math.fsum(sums) for sums in found)
        return first, second, third
