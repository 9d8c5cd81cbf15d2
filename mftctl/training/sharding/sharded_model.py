"""A whole view of a model whose trained parameters are sharded across processes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
import torch.distributed
from transformers import PreTrainedModel

from mftctl.masking.full_tensor import whole, whole_shape
from mftctl.training.updates.masked_optimizer import UpdateRule


class ShardedModel(Protocol):
    """Operations that training needs from DeepSpeed's ZeRO and FSDP2; all are collective calls."""

    @property
    def shares_weights(self) -> bool:
        """True if weights are sharded too, not only the optimizer's state."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The trained parameters in the optimizer's order."""

    def value(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The whole parameter, as held by the optimizer."""

    def put(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Replaces a parameter with the value given in each process, in the optimizer and in the model."""

    def local_values(self) -> list[torch.Tensor]:
        """Views of this process's part of each trained parameter, as held by the optimizer; not a collective call."""

    def refresh(self) -> None:
        """Gives the model the values held by the optimizer, after `local_values` were changed in all processes."""

    def state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """A whole tensor of optimizer state with one number per entry, such as Adam's `exp_avg`."""

    def select(
        self, rule: UpdateRule, step: int, excluded: Collection[torch.Tensor] = ()
    ) -> dict[torch.Tensor, torch.Tensor]:
        """This process's entries that a step updates, by optimizer tensor; other gradients become 0."""

    def state_dict(self) -> dict[str, Any]:
        """The state the torch optimizer would have with whole parameters; empty except in the first process."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state from `state_dict`, or from a torch optimizer in a single process."""


def model_state(sharded_model: ShardedModel, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state with whole tensors on the CPU, trained ones in fp32; empty except in the first process.

    Args:
        sharded_model: The sharded model; must be called in all processes at once.
        model: The model.
    """
    trained = set(sharded_model.parameters())
    is_first = torch.distributed.get_rank() == 0
    values: dict[torch.Tensor, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in values:
            value = sharded_model.value(cast("torch.nn.Parameter", tensor)) if tensor in trained else whole(tensor)
            values[tensor] = value.cpu() if is_first else torch.empty(0)
        state[name] = values[tensor]
    return state if is_first else {}


def put_model(sharded_model: ShardedModel, model: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Replaces the trained parameters of a model in all processes with those of the first process.

    Args:
        sharded_model: The sharded model; must be called in all processes at once.
        model: The model.
        stored: Whole tensors by name; only read in the first process.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = torch.empty(whole_shape(parameter), dtype=torch.float32, device=parameter.device)
            if name in stored:
                value.copy_(stored[name].detach())
            torch.distributed.broadcast(value, 0)
            sharded_model.put(parameter, value)


def whole_model(sharded_model: ShardedModel, model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy of the model with whole parameters on the CPU, in the first process; None in the others.

    Args:
        sharded_model: The sharded model; must be called in all processes at once.
        model: The model.
    """
    state = model_state(sharded_model, model)
    if not state:
        return None
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(state, strict=False, assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy
