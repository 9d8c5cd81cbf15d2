"""What torch's FSDP2 spreads over the processes, as whole tensors and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from mftctl.masking.partitions import whole
from mftctl.tuning.masked_optimizer import UpdateRule
from mftctl.tuning.partitioned_gradients import select_whole


class FsdpPartitions:
    """The parameters of a model under `fully_shard`, with their gradients and optimizer state.

    Every method is to be called in all processes at once.

    Attributes:
        inner: The torch optimizer, over the parts of this process.

    Args:
        optimizer: Whose parameters are `DTensor`s, as FSDP2 makes them.
    """

    shares_weights = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The trained parameters in the optimizer's order."""
        return (parameter for group in self.inner.param_groups for parameter in group["params"])

    def value(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The whole parameter."""
        return whole(parameter)

    def put(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Replaces a parameter by what each process has."""
        with torch.no_grad():
            parameter.copy_(_part(value, parameter))

    def state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """A whole tensor of the optimizer's state that has one number an entry, such as Adam's `exp_avg`."""
        return whole(self.inner.state[parameter][key])

    def select(self, rule: UpdateRule, step: int) -> dict[torch.Tensor, torch.Tensor]:
        """The entries of this process that a step updates, by parameter; all other gradients are set to zero.

        Args:
            rule: What is chosen.
            step: Number of the step, from 0.

        Raises:
            MaskingError: A gradient holds NaN.

        Source: GMT, section 2, equations 3 and 4.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        selected: dict[torch.Tensor, torch.Tensor] = {}

        def take(index: int, mask: torch.Tensor) -> None:
            mine = _part(mask.to(gradients[index].device), gradients[index]).to_local()
            gradients[index].to_local().masked_fill_(~mine, 0.0)
            selected[parameters[index]] = mine

        shapes = [gradient.shape for gradient in gradients]
        device = gradients[0].device if gradients else torch.device("cpu")
        select_whole(shapes, lambda index: whole(gradients[index]), rule, step, take, device=device)
        return selected

    def state_dict(self) -> dict[str, Any]:
        """The state that the optimizer would have with whole parameters, on the CPU."""
        stored = self.inner.state_dict()
        state = {
            index: {key: whole(value).cpu() if isinstance(value, DTensor) else value for key, value in values.items()}
            for index, values in stored["state"].items()
        }
        return {**stored, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state that `state_dict` gave, or the optimizer in one process."""
        state = {}
        for index, parameter in enumerate(self.parameters()):
            values = state_dict["state"].get(index, {})
            state[index] = {
                key: _part(value, parameter) if _has_shape(value, parameter) else value for key, value in values.items()
            }
        self.inner.load_state_dict({**state_dict, "state": state})


def _has_shape(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _part(value: torch.Tensor, like: Any) -> DTensor:
    """A whole tensor that every process has, spread as another one is."""
    value = value.detach().to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
