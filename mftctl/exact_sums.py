"""Sums in fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def exact_sum(values: torch.Tensor) -> float:
    """The sum in fp64, which the GPU of a Mac leaves to its CPU."""
    import torch

    return float((values.cpu() if values.device.type == "mps" else values).sum(dtype=torch.float64))
