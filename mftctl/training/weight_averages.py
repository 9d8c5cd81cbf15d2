"""Running averages of trained tensors, with several horizons at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from mftctl.masking.counter_random import random_bits, stream_key
from mftctl.training.updates.stochastic_adamw import LOST_BITS, chunk_entries, round_stochastically

MAX_HORIZONS = 4
"""One draw of 64 random bits gives each horizon 16 of them."""


class WeightAverages:
    """Exponential moving averages of trained tensors over the optimizer steps of a training.

    They start as the initial values. After each step, an average with horizon `h` moves towards the values by
    `1 / (h * steps)` of the difference, at most all of it. Averages have the dtype of the tensors; those in bf16 are
    computed in fp32 and rounded stochastically, with noise that depends only on the seed, the step and the entry's
    position.

    Attributes:
        horizons: Lengths of the averages as shares of all steps.

    Args:
        horizons: At most 4, each above 0 and at most 1.
        steps: Optimizer steps of the training.
        seed: Decides the noise.
        device: Device that holds the averages; None for that of the tensors.

    Source: Not from the papers. Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017), section
        2; several horizons at once, measured in shares of the steps, and stochastic rounding are ours.
    """

    def __init__(self, horizons: Sequence[float], steps: int, seed: int, device: torch.device | None = None) -> None:
        self.horizons = tuple(horizons)
        self._steps = steps
        self._seed = seed
        self._device = device
        self._averages: list[list[torch.Tensor]] = []

    def start(self, values: Sequence[torch.Tensor]) -> None:
        """Starts all averages with the initial values.

        Args:
            values: The trained tensors in fp32 or bf16, always in the same order.
        """
        self._averages = [
            [value.detach().to(self._device or value.device, copy=True) for value in values] for _ in self.horizons
        ]

    @torch.no_grad()
    def update(self, values: Sequence[torch.Tensor], step: int) -> None:
        """Includes the values after an optimizer step.

        Args:
            values: The trained tensors.
            step: Number of optimizer steps taken, from 1.
        """
        shares = [1 / max(1.0, horizon * self._steps) for horizon in self.horizons]
        for number, value in enumerate(values):
            means = [average[number] for average in self._averages]
            key = stream_key("average", self._seed, step, number)
            _include(means, value.detach().to(means[0].device), shares, key)

    @contextmanager
    def exchanged(
        self, index: int, values: Sequence[torch.Tensor], refresh: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Context in which the tensors hold an average and the average their values; afterwards all are as before.

        Args:
            index: Index of the horizon.
            values: The trained tensors.
            refresh: Called after each exchange, for a model that holds copies of the tensors.
        """
        self.exchange(index, values, refresh)
        try:
            yield
        finally:
            self.exchange(index, values, refresh)

    @torch.no_grad()
    def exchange(self, index: int, values: Sequence[torch.Tensor], refresh: Callable[[], None] = lambda: None) -> None:
        """Exchanges the values of the tensors with an average.

        Args:
            index: Index of the horizon.
            values: The trained tensors.
            refresh: Called afterwards, for a model that holds copies of the tensors.
        """
        for value, mean in zip(values, self._averages[index], strict=True):
            for mine, its in _pieces(value.detach(), mean):
                kept = mine.clone()
                mine.copy_(its)
                its.copy_(kept)
        refresh()


def _include(means: Sequence[torch.Tensor], value: torch.Tensor, shares: Sequence[float], key: int) -> None:
    """Moves each average of one tensor towards its latest value."""
    start, is_rounded = 0, value.dtype == torch.bfloat16
    for latest, *kept in _pieces(value, *means):
        wide = latest.float()
        noise = torch.empty(0)
        if is_rounded:
            drawn = random_bits(key, start, start + wide.numel(), device=wide.device)
            noise = drawn.view(torch.int16).view(*wide.shape, MAX_HORIZONS)
        start += wide.numel()
        for index, (mean, share) in enumerate(zip(kept, shares, strict=True)):
            # Rounded after each operation, so that the result does not depend on how torch vectorises them.
            new = (wide - mean).mul_(share).add_(mean)
            if is_rounded:
                new = round_stochastically(new, noise[..., index].int().bitwise_and_((1 << LOST_BITS) - 1))
            mean.copy_(new)


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Flat views of the same entries of each tensor, so that temporary tensors stay small."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    size = chunk_entries(tensors[0].device)
    yield from zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)
