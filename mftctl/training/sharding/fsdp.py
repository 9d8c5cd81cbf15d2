"""Conversion between parameters sharded by torch's FSDP2 and whole tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mftctl.masking.checkpoints.outlines import Rows
from mftctl.masking.full_tensor import whole
from mftctl.training.sharding.gradients import select_whole
from mftctl.training.updates.masked_optimizer import UpdateRule


class FsdpModel:
    """The parameters of a model sharded by `fully_shard`, with their gradients and optimizer state.

    Every method must be called in all processes at once.

    Attributes:
        inner: The torch optimizer over this process's shards.

    Args:
        optimizer: An optimizer with `DTensor` parameters, as created by FSDP2.
        model: The model that they belong to.
    """

    shares_weights = True

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        self.inner = optimizer
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The trained parameters in the optimizer's order."""
        return (parameter for group in self.inner.param_groups for parameter in group["params"])

    def value(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The whole parameter."""
        return whole(parameter)

    def put(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Replaces a parameter with the value given in each process."""
        with torch.no_grad():
            parameter.copy_(_part(value, parameter))
        self.refresh()

    def local_values(self) -> list[torch.Tensor]:
        """Views of this process's part of each trained parameter; may be called in one process alone."""
        values: list[Any] = [parameter.detach() for parameter in self.parameters()]
        return [value.to_local() for value in values]

    def refresh(self) -> None:
        """Frees whole parameters that FSDP2 keeps after a forward pass, such as those of the root module."""
        for module in self._sharded:
            module.reshard()

    def state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """A whole tensor of optimizer state with one number per entry, such as Adam's `exp_avg`."""
        return whole(self.inner.state[parameter][key])

    def select(
        self, rule: UpdateRule, step: int, excluded: Collection[torch.Tensor] = ()
    ) -> dict[torch.Tensor, torch.Tensor]:
        """This process's entries that a step updates, by parameter; all other gradients are set to zero.

        Args:
            rule: Decides which entries are selected.
            step: Step number, from 0.
            excluded: Parameters whose entries are all updated.

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
        whole_ones = [index for index, parameter in enumerate(parameters) if parameter in excluded]
        select_whole(
            shapes, lambda index: whole(gradients[index]), rule, step, take, device=device, excluded=whole_ones
        )
        return selected

    def state_dict(self) -> dict[str, Any]:
        """The state the optimizer would have with whole parameters, on the CPU; empty except in the first process."""
        is_first = torch.distributed.get_rank() == 0
        stored = self.inner.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for index, values in stored["state"].items():
            for key, value in values.items():
                gathered = whole(value) if isinstance(value, DTensor) else value
                if is_first:
                    state.setdefault(index, {})[key] = gathered.cpu() if isinstance(value, DTensor) else gathered
                del gathered  # otherwise two whole tensors would be in memory at once
        return {**stored, "state": state} if is_first else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state from `state_dict`, or from an optimizer in a single process."""
        state = {}
        for index, parameter in enumerate(self.parameters()):
            values = state_dict["state"].get(index, {})
            state[index] = {
                key: _part(value, parameter) if _has_shape(value, parameter) else value for key, value in values.items()
            }
        self.inner.load_state_dict({**state_dict, "state": state})


def shard_outline(accelerator: Any, model: torch.nn.Module, rows: Rows) -> None:
    """Gives each process its shard of a model's parameters; each reads only its own shard.

    Args:
        accelerator: An `Accelerator` with an FSDP2 plugin.
        model: Has its parameters on the meta device.
        rows: Returns the values of a parameter by its name in the model's state.
    """
    from accelerate.utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, model)
    device = torch.device("cpu") if accelerator.state.fsdp_plugin.cpu_offload else accelerator.device
    made: dict[torch.Tensor, torch.nn.Parameter] = {}
    state = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if isinstance(parameter, DTensor):
            if parameter not in made:
                made[parameter] = _filled(parameter, functools.partial(rows, name), device)
            state[name] = made[parameter]  # the same object under all its names, so tied weights stay tied
    model.load_state_dict(state, strict=False, assign=True)


def _filled(
    parameter: DTensor, rows: Callable[[int, int | None], torch.Tensor], device: torch.device
) -> torch.nn.Parameter:
    """A parameter sharded like another one, filled with values."""
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    within = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
    if 0 in shape:  # more processes than rows
        local = torch.empty(shape, dtype=parameter.dtype)
    else:
        local = rows(offset[0], offset[0] + shape[0])[(slice(None), *within)]
    local = local.to(device=device, dtype=parameter.dtype).contiguous()
    spread = DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    return torch.nn.Parameter(spread, requires_grad=parameter.requires_grad)


def _has_shape(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _part(value: torch.Tensor, like: Any) -> DTensor:
    """A whole tensor present in every process, sharded like another one."""
    value = value.detach().to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
