"""AdamW with parameters, gradients and moments in bf16: 8 bytes per entry instead of 16 in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from mftctl.masking.counter_random import random_bits, stream_key

_CPU_ENTRIES = 1 << 17  # intermediate results of this many entries stay in the cache
_DEVICE_ENTRIES = 1 << 24  # few kernels per tensor, and temporary tensors of bounded size
_TEMPORARY_BYTES = 44
"""Temporary bytes per entry being computed: six fp32 numbers, random bits and values derived from them."""
LOST_BITS = 16


def round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The values stochastically rounded to bf16, so that they are unbiased.

    An update much smaller than the spacing of bf16 numbers would be lost with rounding to nearest; stochastic rounding
    occasionally applies a whole step instead.

    Args:
        values: fp32, finite or not, contiguous.
        noise: int32, uniform over the integers from 0 to 65,535; of the values' shape.
    """
    # torch's infinities and NaN end in 16 zero bits, so adding noise causes no carry.
    return (values.view(torch.int32) + noise).bitwise_and_(-(1 << LOST_BITS)).view(torch.float32).bfloat16()


def step_workspace_bytes(largest: int, device: torch.device) -> int:
    """Peak memory of a `StochasticAdamW` step in addition to parameters, gradients and state.

    Args:
        largest: Number of entries of the largest parameter.
        device: Device of the parameters.
    """
    return min(largest, chunk_entries(device)) * _TEMPORARY_BYTES


def chunk_entries(device: torch.device) -> int:
    """Entries of a tensor to compute at a time, so that temporary tensors stay small."""
    return _CPU_ENTRIES if device.type == "cpu" else _DEVICE_ENTRIES


class StochasticAdamW(Optimizer):
    """AdamW that computes in fp32, one chunk of a parameter at a time, and stores parameters and moments in bf16.

    The noise of an entry depends only on the seed, the step and the entry's position, so that a resumed training run
    continues as if it had not been interrupted, and is the same on every device.

    Args:
        params: Parameters in bf16, or parameter groups, each with a learning rate `lr`.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay, as in torch's AdamW.
        seed: Decides the noise.

    Source: AdamW as in torch; stochastic rounding of all stored values is ours.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        eps: float,
        weight_decay: float,
        seed: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self._numbers: dict[torch.Tensor, int] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, each with its own noise."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._numbers[parameter] = len(self._numbers)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        # Each parameter has a number of its own, since a masked optimizer steps one parameter at a time.
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter, parameter.grad, self._numbers[parameter])

    def _update(
        self, group: dict[str, Any], parameter: torch.Tensor, whole_gradient: torch.Tensor, number: int
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        key = stream_key("rounding", self._seed, step, number)
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1**step)
        correction = (1 - beta2**step) ** 0.5
        size = chunk_entries(parameter.device)
        flat = [
            torch.split(tensor.view(-1), size)
            for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"], whole_gradient.reshape(-1))
        ]
        start = 0
        for weight, mean, square, gradient in zip(*flat, strict=True):
            wide = gradient.float()
            new_mean = mean.float().lerp_(wide, 1 - beta1)
            new_square = square.float().mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
            new_weight = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
            new_weight.addcdiv_(new_mean, new_square.sqrt().div_(correction).add_(group["eps"]), value=-step_size)
            # 64 random bits per entry; each rounding uses 16 of them.
            drawn = random_bits(key, start, start + wide.numel(), device=wide.device)
            start += wide.numel()
            noise = drawn.view(torch.int16).view(-1, 4)
            for index, (kept, new) in enumerate(((mean, new_mean), (square, new_square), (weight, new_weight))):
                kept.copy_(round_stochastically(new, noise[:, index].int().bitwise_and_((1 << LOST_BITS) - 1)))
