"""A model whose trained parameters are spread over processes, as a whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
import torch.distributed
from transformers import PreTrainedModel

from mftctl.masking.full_tensor import whole, whole_shape
from mftctl.training.updates.masked_optimizer import UpdateRule


class Partitions(Protocol):
    """What a training needs of DeepSpeed's ZeRO and of FSDP2; every method is called in all processes at once."""

    @property
    def shares_weights(self) -> bool:
        """Whether weights, too, are spread, and not only the optimizer's state."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The trained parameters in the optimizer's order."""

    def value(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The whole parameter, as the optimizer has it."""

    def put(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Replaces a parameter by what each process has, for the optimizer and for the model."""

    def state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """A whole tensor of the optimizer's state that has one number an entry, such as Adam's `exp_avg`."""

    def select(
        self, rule: UpdateRule, step: int, excluded: Collection[torch.Tensor] = ()
    ) -> dict[torch.Tensor, torch.Tensor]:
        """The entries of this process that a step updates, by what the optimizer updates; other gradients become 0."""

    def state_dict(self) -> dict[str, Any]:
        """The state that the torch optimizer would have with whole parameters; empty but in the first process."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state that `state_dict` gave, or the torch optimizer in one process."""


def model_state(partitions: Partitions, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state with whole tensors on the CPU, trained ones in fp32; empty but in the first process.

    Args:
        partitions: Of the model; called in all processes at once.
        model: The model.
    """
    trained = set(partitions.parameters())
    is_first = torch.distributed.get_rank() == 0
    values: dict[torch.Tensor, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in values:
            value = partitions.value(cast("torch.nn.Parameter", tensor)) if tensor in trained else whole(tensor)
            values[tensor] = value.cpu() if is_first else torch.empty(0)
        state[name] = values[tensor]
    return state if is_first else {}


def put_model(partitions: Partitions, model: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Replaces the trained parameters of a model, in all processes, by what the first one has.

    Args:
        partitions: Of the model; called in all processes at once.
        model: The model.
        stored: Whole tensors by name; read in the first process only.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = torch.empty(whole_shape(parameter), dtype=torch.float32, device=parameter.device)
            if name in stored:
                value.copy_(stored[name].detach())
            torch.distributed.broadcast(value, 0)
            partitions.put(parameter, value)


def whole_model(partitions: Partitions, model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy of the model with whole parameters on the CPU, in the first process; None in the others.

    Args:
        partitions: Of the model; called in all processes at once.
        model: The model.
    """
    state = model_state(partitions, model)
    if not state:
        return None
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(state, strict=False, assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy
