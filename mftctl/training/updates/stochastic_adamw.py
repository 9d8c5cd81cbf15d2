"""AdamW for parameters in bf16, with moments in bf16: 8 bytes an entry with its gradient, instead of 16 in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from mftctl.masking.counter_random import random_bits, stream_key

_CPU_ENTRIES = 1 << 17  # what is computed of so many stays in the cache
_DEVICE_ENTRIES = 1 << 24  # few kernels a tensor, and temporary tensors of a bounded size
_TEMPORARY_BYTES = 44
"""Of an entry that is being computed: six fp32 numbers, random bits and what is made of them."""
_LOST_BITS = 16


def round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The values in bf16, each rounded up or down by chance, so that it is right on average.

    A step much smaller than the spacing of bf16 numbers would be lost if it were rounded to the nearest: so it is
    taken whole, now and then.

    Args:
        values: fp32, finite or not, contiguous.
        noise: int32, evenly spread over the numbers below 65,536; of the values' shape.
    """
    # Infinity and NaN as torch makes them end in 16 zeros, which noise does not carry over.
    return (values.view(torch.int32) + noise).bitwise_and_(-(1 << _LOST_BITS)).view(torch.float32).bfloat16()


def step_workspace_bytes(largest: int, device: torch.device) -> int:
    """The most that a step of `StochasticAdamW` holds besides parameters, gradients and state.

    Args:
        largest: Entries of the largest parameter.
        device: Of the parameters.
    """
    return min(largest, _chunk_entries(device)) * _TEMPORARY_BYTES


def _chunk_entries(device: torch.device) -> int:
    return _CPU_ENTRIES if device.type == "cpu" else _DEVICE_ENTRIES


class StochasticAdamW(Optimizer):
    """AdamW that computes in fp32, a part of a parameter at a time, and keeps parameters and moments in bf16.

    The noise of an entry follows from the seed, the step and the entry's place alone, so that a resumed training goes
    on as it would have, and is the same on every device.

    Args:
        params: Parameters in bf16, or groups of them with a learning rate `lr` each.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, as in torch's AdamW.
        seed: Decides the noise.

    Source: AdamW as torch has it; stochastic rounding of all that is kept is ours.
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
        """Adds a group of parameters, each of which gets noise of its own."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._numbers[parameter] = len(self._numbers)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        # By a number of its own, since a masked optimizer has one parameter at a time stepped.
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
        size = _chunk_entries(parameter.device)
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
            # 64 random bits an entry, of which each rounding takes 16.
            drawn = random_bits(key, start, start + wide.numel(), device=wide.device)
            start += wide.numel()
            noise = drawn.view(torch.int16).view(-1, 4)
            for index, (kept, new) in enumerate(((mean, new_mean), (square, new_square), (weight, new_weight))):
                kept.copy_(round_stochastically(new, noise[:, index].int().bitwise_and_((1 << _LOST_BITS) - 1)))
