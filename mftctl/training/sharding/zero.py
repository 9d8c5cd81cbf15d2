"""Conversion between parameters sharded by DeepSpeed's ZeRO stages 2 and 3 and whole tensors.

Each process's optimizer works on flat tensors that hold the process's parts of the trained parameters in sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from mftctl.errors import ConfigError
from mftctl.masking.checkpoints.outlines import Rows
from mftctl.masking.full_tensor import whole_shape
from mftctl.training.sharding.gradients import select_whole
from mftctl.training.updates.masked_optimizer import UpdateRule

STAGES = (2, 3)


@dataclass(frozen=True, slots=True)
class Fragment:
    """This process's part of a parameter.

    Attributes:
        parameter: The model's parameter.
        flat: The flat fp32 tensor that the optimizer updates.
        offset: Start of the part in the flat tensor.
        start: Start of the part in the flattened parameter.
        numel: Number of entries; 0 if the parameter is entirely in other processes.
    """

    parameter: torch.nn.Parameter
    flat: torch.Tensor
    offset: int
    start: int
    numel: int

    def within(self, flat: torch.Tensor) -> torch.Tensor:
        """A view of this part within a tensor of the flat tensor's shape."""
        return flat.narrow(0, self.offset, self.numel)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of a tensor of the parameter's shape, flattened."""
        return whole.reshape(-1).narrow(0, self.start, self.numel)


class ZeroModel:
    """The trained parameters of a DeepSpeed engine, with their gradients and optimizer state.

    Unless stated otherwise, a method must be called in all processes at once.

    Attributes:
        stage: 2 or 3.
        inner: The torch optimizer over flat tensors.
        groups: The trained parameters of each of its groups, in their original order.

    Args:
        engine: A `DeepSpeedEngine` with an optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self.stage: int = engine.zero_optimization_stage()
        self.inner: torch.optim.Optimizer = self._zero.optimizer
        self.groups: list[list[torch.nn.Parameter]]
        if self.stage == 2:
            self.groups = [list(group) for group in self._zero.bit16_groups]
        else:
            self.groups = [[] for _ in self.inner.param_groups]
            for index, group in enumerate(self._zero.fp16_groups):
                self.groups[self._zero.sub_group_to_group_id[index]] += group

    @property
    def shares_weights(self) -> bool:
        """True if weights are sharded as well."""
        return self.stage == 3

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The trained parameters in the optimizer's order."""
        return (parameter for group in self.groups for parameter in group)

    def fragment(self, parameter: torch.nn.Parameter) -> Fragment:
        """This process's part of a parameter; may be called in one process alone."""
        if self.stage == 2:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return Fragment(parameter, self._zero.single_partition_of_fp32_groups[0], 0, 0, 0)
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
            return Fragment(parameter, flat, inside.start, outside.start, inside.numel)
        group, offset, part = self._zero.grad_position[self._zero.get_param_id(parameter)]
        numel: int = parameter.ds_numel  # type: ignore[attr-defined]
        start = min(part * torch.distributed.get_rank(), numel)
        flat = self._zero.fp32_partitioned_groups_flat[group]
        return Fragment(parameter, flat, offset, start, min(part, numel - start))

    def value(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The whole parameter in fp32, as held by the optimizer."""
        return self._gather(parameter, lambda part: part.flat)

    def put(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Replaces a parameter in the optimizer and in the model."""
        part = self.fragment(parameter)
        with torch.no_grad():
            part.within(part.flat).copy_(part.of(value))
            if self.stage == 2 or self._is_whole(parameter):
                parameter.copy_(value)
            if self.stage == 3:
                parameter.ds_tensor.narrow(0, 0, part.numel).copy_(part.of(value))  # type: ignore[attr-defined]

    def local_values(self) -> list[torch.Tensor]:
        """Views of this process's part of each trained parameter, in fp32; may be called in one process alone."""
        parts = map(self.fragment, self.parameters())
        return [part.within(part.flat).detach() for part in parts]

    def refresh(self) -> None:
        """Gives the model the values held by the optimizer."""
        for parameter in self.parameters():
            self.put(parameter, self.value(parameter))

    def state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """A whole tensor of optimizer state with one number per entry, such as Adam's `exp_avg`."""
        return self._gather(parameter, lambda part: self.inner.state[part.flat][key])

    def gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The whole gradient in fp32, reduced over processes; available between the last backward pass and the step."""
        from deepspeed.utils import safe_get_full_grad

        gradient: torch.Tensor = safe_get_full_grad(parameter)
        return gradient

    def change_gradient(
        self, parameter: torch.nn.Parameter, change: Callable[[Fragment, torch.Tensor], object]
    ) -> None:
        """Changes this process's part of a gradient; may be called in one process alone.

        Args:
            parameter: The parameter whose gradient is changed.
            change: Called with the part and its flat gradient, which it changes in place.
        """
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        part = self.fragment(parameter)
        if self.stage == 2:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                change(part, mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1))  # type: ignore[attr-defined]
            return
        gradient = safe_get_local_grad(parameter)
        change(part, gradient.view(-1)[: part.numel])
        safe_set_local_grad(parameter, gradient)

    def clip(self, parameters: list[torch.nn.Parameter], max_norm: float) -> float:
        """Scales gradients down to `max_norm` if that is above 0, and returns the norm before scaling.

        Both are computed from whole gradients, so they are bit-identical to those of a single process.

        Args:
            parameters: Those with gradients, in the model's order.
            max_norm: Maximum norm; 0 disables scaling.
        """
        norms = [torch.linalg.vector_norm(self.gradient(parameter)) for parameter in parameters]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if max_norm > 0 and factor < 1:
            for parameter in parameters:
                self.change_gradient(parameter, lambda _, gradient: gradient.mul_(factor))
        return float(norm)

    def select(
        self, rule: UpdateRule, step: int, excluded: Collection[torch.Tensor] = ()
    ) -> dict[torch.Tensor, torch.Tensor]:
        """This process's entries that a step updates, by flat tensor; all other gradients are set to zero.

        Args:
            rule: Decides which entries are selected, between the last backward pass of a step and the engine's step.
            step: Step number, from 0.
            excluded: Parameters whose entries are all updated.

        Raises:
            MaskingError: A gradient holds NaN.

        Source: GMT, section 2, equations 3 and 4.
        """
        parameters = list(self.parameters())
        selected: dict[torch.Tensor, torch.Tensor] = {}

        def take(index: int, mask: torch.Tensor) -> None:
            def blank(part: Fragment, gradient: torch.Tensor) -> None:
                mine = part.of(mask).to(gradient.device)
                gradient.masked_fill_(~mine, 0.0)
                chosen = selected.setdefault(part.flat, torch.zeros_like(part.flat, dtype=torch.bool))
                part.within(chosen).copy_(mine)

            self.change_gradient(parameters[index], blank)

        shapes = [whole_shape(parameter) for parameter in parameters]
        device = parameters[0].device
        whole_ones = [index for index, parameter in enumerate(parameters) if parameter in excluded]
        select_whole(
            shapes,
            lambda index: self.gradient(parameters[index]),
            rule,
            step,
            take,
            device=device,
            excluded=whole_ones,
        )
        return selected

    def state_dict(self) -> dict[str, Any]:
        """The state the torch optimizer would have with whole parameters; empty except in the first process."""
        is_first = torch.distributed.get_rank() == 0
        state: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(self.parameters()):
            for key, value in self.inner.state[self.fragment(parameter).flat].items():
                # Adam counts steps in a tensor, which parameters must not share.
                gathered = self.state(parameter, key) if _is_by_entry(value) else copy.deepcopy(value)
                if is_first:
                    state.setdefault(index, {})[key] = gathered.cpu() if _is_by_entry(value) else gathered
                del gathered  # otherwise two whole tensors would be in memory at once
        if not is_first:
            return {}
        groups, first = [], 0
        for options, parameters in zip(self.inner.param_groups, self.groups, strict=True):
            indices = list(range(first, first := first + len(parameters)))
            groups.append({**{key: value for key, value in options.items() if key != "params"}, "params": indices})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state from `state_dict`, or from a torch optimizer in a single process."""
        for index, parameter in enumerate(self.parameters()):
            part = self.fragment(parameter)
            mine = self.inner.state[part.flat]
            for key, value in state_dict["state"].get(index, {}).items():
                if not _is_by_entry(value):
                    mine[key] = copy.deepcopy(value)
                    continue
                if key not in mine:
                    mine[key] = torch.zeros_like(part.flat)
                part.within(mine[key]).copy_(part.of(value))
        for options, stored in zip(self.inner.param_groups, state_dict["param_groups"], strict=True):
            # The implementation of a step is specific to this process; a fused one needs its counter on the GPU.
            options.update({key: value for key, value in stored.items() if key not in ("params", "fused")})

    def _gather(self, parameter: torch.nn.Parameter, flat_of: Callable[[Fragment], torch.Tensor]) -> torch.Tensor:
        """A tensor of the parameter's shape, gathered from the parts in each process's flat tensor."""
        part = self.fragment(parameter)
        gathered = torch.zeros(whole_shape(parameter), dtype=part.flat.dtype, device=part.flat.device)
        if part.numel:
            part.of(gathered).copy_(part.within(flat_of(part)))
        torch.distributed.all_reduce(gathered)  # the parts of other processes are 0 here
        return gathered

    @staticmethod
    def _is_whole(parameter: torch.nn.Parameter) -> bool:
        """True if a stage 3 parameter is currently in memory as a whole, as small ones always are."""
        return parameter.data.numel() == parameter.ds_numel  # type: ignore[attr-defined,no-any-return]


def partition_outline(model: torch.nn.Module, zero_config: dict[str, Any], rows: Rows) -> None:
    """Gives each process its shard of a model's parameters under stage 3, one whole parameter in memory at a time.

    The first process reads the values.

    Args:
        model: Has its parameters on the meta device.
        zero_config: DeepSpeed's `zero_optimization` section.
        rows: Returns the values of a parameter by its name in the model's state.
    """
    import deepspeed

    offload = zero_config.get("offload_param") or {}
    remote = offload.get("device", "none")
    options = {
        "mem_efficient_linear": zero_config.get("memory_efficient_linear", True),
        "remote_device": None if remote == "none" else remote,
        "pin_memory": offload.get("pin_memory", False),
    }
    is_first = torch.distributed.get_rank() == 0
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    places: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                places.setdefault(parameter, []).append((module, name))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    names = {parameter: name for name, parameter in model.named_parameters()}
    partition: Callable[..., object] | None = None
    for parameter, owners in places.items():
        value = rows(names[parameter], 0, None) if is_first else torch.empty(parameter.shape, dtype=parameter.dtype)
        made = torch.nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
        del value
        for module, name in owners:
            setattr(module, name, made)
        if partition is None:
            deepspeed.zero.Init(torch.nn.ParameterList([made]), dtype=made.dtype, **options)
            partition = made.convert_to_zero_parameters  # type: ignore[attr-defined]
        else:
            partition(param_list=[made])


class SteppingEngine:
    """Replaces accelerate's wrapper of a DeepSpeed engine and calls a function before each step.

    Args:
        engine: A `DeepSpeedEngine`.
        before_step: Called when all gradients of a step are available.
    """

    def __init__(self, engine: Any, before_step: Callable[[], None]) -> None:
        self.engine = engine
        self._before_step = before_step

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Runs a backward pass, and the step after its last backward pass."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self._before_step()
            self.engine.step()

    def get_global_grad_norm(self) -> float:
        """The norm of the gradients as computed by the engine."""
        return float(self.engine.get_global_grad_norm())


def check_plan(plugin: Any) -> None:
    """Checks that a DeepSpeed configuration supports exact training.

    Args:
        plugin: accelerate's `DeepSpeedPlugin`.

    Raises:
        ConfigError: The ZeRO stage is not 2 or 3, or the loss is scaled for fp16.
    """
    if plugin.zero_stage not in STAGES:
        raise ConfigError(
            "DeepSpeed must shard the optimizer's state.",
            key="zero_stage",
            expected="2 or 3",
            actual=plugin.zero_stage,
            hint="recipes/accelerate/zero2.yaml, or ddp.yaml for plain data parallelism",
        )
    if plugin.hf_ds_config.is_true("fp16.enabled"):
        raise ConfigError(
            "With fp16 loss scaling, DeepSpeed may skip steps.",
            key="mixed_precision",
            expected="no, or bf16",
            actual="fp16",
        )


def _is_by_entry(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
