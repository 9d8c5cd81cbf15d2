"""An optimizer around any other that updates chosen entries of the parameters and leaves all others as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from mftctl.errors import TrainingError
from mftctl.masking.full_tensor import local_part
from mftctl.masking.selection import check_ratio, removed_count
from mftctl.training.updates.gradient_selection import Scope, keep_largest, keep_random

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether all entries lie one after the other in memory of a CPU, each of the size of an integer type."""
    is_whole = local_part(tensor) is tensor
    return is_whole and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.element_size() in _INTEGERS


def parts(numel: int, size: int) -> Iterator[slice]:
    """Consecutive parts of a flat tensor, all of the same size but the last."""
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def clear_unselected(tensor: torch.Tensor, selected: torch.Tensor) -> None:
    """Sets every entry that is not selected to zero, infinity included.

    Args:
        tensor: Floating point.
        selected: Bool, of its shape and on its device.
    """
    if not is_flat(tensor):
        tensor.masked_fill_(~selected, 0.0)
        return
    int_dtype = _INTEGERS[tensor.element_size()]
    bits, flat_selected = tensor.view(-1).view(int_dtype), selected.reshape(-1).view(torch.int8)
    for part in parts(bits.numel(), torch.get_num_threads() << 16):  # what stays in the cores' caches
        bits[part].bitwise_and_(flat_selected[part].neg().to(int_dtype))


class HeldEntries:
    """The entries of some tensors that are not selected, to be put back bit by bit.

    Args:
        tensors: Flat, of one size.
        selected: Bool, of that size.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], selected: torch.Tensor) -> None:
        self._tensors = tensors
        chosen = selected.numpy()
        self._are_few = 2 * np.count_nonzero(chosen) > selected.numel()
        if self._are_few:
            self._places = torch.from_numpy(np.flatnonzero(~chosen))
            self._held = [tensor.take(self._places) for tensor in tensors]
        else:
            self._places = torch.from_numpy(np.flatnonzero(chosen))
            self._held = [tensor.clone() for tensor in tensors]

    def put_back(self) -> None:
        """Gives the tensors their held entries again; the selected ones stay as they are now."""
        for tensor, held in zip(self._tensors, self._held, strict=True):
            if self._are_few:
                tensor.index_copy_(0, self._places, held)
            else:
                tensor.copy_(held.index_copy_(0, self._places, tensor.take(self._places)))


STEPS_KEY = "masked_steps"
"""Where the state of a masked optimizer has the number of steps taken."""

_BY_ENTRY = (Adagrad, Adam, AdamW, RMSprop, SGD)
"""Optimizers whose step on an entry depends on that entry alone, with state that is changed in place."""

_PART_ENTRIES = 1 << 20


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """Which entries an optimizer step updates, and what happens to the others.

    Attributes:
        method: `gmt`: those with the largest |gradient|; `random`: random ones, others at each step.
        ratio: Share of entries that are not updated, in [0, 1).
        scope: Whether the share holds for each tensor or for all parameters together.
        unselected: `unchanged`: weights and optimizer state of other entries stay bit-identical; `momentum`: they get a
            gradient of zero, so that momentum and weight decay still move them.
        seed: Decides random entries, together with the number of the step; at least 0.

    Raises:
        MaskingError: The ratio is not in [0, 1).
    """

    method: Literal["gmt", "random"]
    ratio: float
    scope: Scope = "tensor"
    unselected: Literal["unchanged", "momentum"] = "unchanged"
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)


class MaskedOptimizer(Optimizer):
    """A step of the inner optimizer for the entries that a rule selects anew at every step.

    The inner optimizer must treat each parameter by itself, as those of torch do. State without the shape of its
    parameter (a step counter, Adafactor's factors) is not held back: it follows the masked gradient.

    Gradients must be whole and already reduced over the processes, as they are with DDP. Where they are partitioned, as
    with FSDP and ZeRO, `give` takes a selection that was made from those of all processes.

    Args:
        inner: The wrapped optimizer.
        rule: Which entries are updated.
        excluded: Parameters that are updated whole, and of which the rule chooses nothing: the ratio holds for all
            others.

    Attributes:
        inner: The wrapped optimizer; it shares `param_groups` and `state` with this one.
        rule: Which entries are updated.
        selected: The selection for the step to come, a bool tensor by parameter; empty but between `select` and `step`.
        updated_entries: Entries that the last selection updates.
        total_entries: Entries of all parameters that had a gradient then.

    Source: GMT, section 2, equations 3 and 4, and algorithm 1. The paper's update is that of plain gradient descent;
        `unchanged` keeps its meaning under optimizers with a state, `momentum` is their plain combination.
    """

    def __init__(self, inner: Optimizer, rule: UpdateRule, excluded: Collection[torch.Tensor] = ()) -> None:
        self.inner = inner
        self.rule = rule
        self._excluded = frozenset(excluded)
        self.selected: dict[torch.Tensor, torch.Tensor] = {}
        self.updated_entries = 0
        self.total_entries = 0
        self._masked_gradients: list[torch.Tensor] = []
        self._is_given = False
        self._steps = 0
        self._share("defaults", "state", "param_groups")

    def _share(self, *names: str) -> None:
        # As in unpickling: an optimizer around groups and state that exist, where Optimizer.__init__ makes new ones.
        self.__setstate__({name: getattr(self.inner, name) for name in names})

    @torch.no_grad()
    def select(self) -> None:
        """Chooses the entries to be updated and sets the gradient of all others to zero, once a step.

        To be called after the last backward pass of a step, before gradients are clipped, so that their norm is that
        of the masked gradient. Further calls before `step` change nothing.

        Raises:
            MaskingError: A gradient holds NaN.
            TrainingError: A gradient is sparse, or a process has only a part of it.
        """
        if self._is_given:
            return
        with_gradients = [parameter for _, parameter in self._with_gradients()]
        parameters = [parameter for parameter in with_gradients if parameter not in self._excluded]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # By identity, since a skipped step (mixed precision does that) leaves a selection for gradients of the past.
        if gradients and list(map(id, gradients)) == list(map(id, self._masked_gradients)):
            return
        for gradient in gradients:
            _check_whole(gradient)
        rule = self.rule
        if rule.method == "gmt":
            masks = keep_largest(gradients, rule.ratio, rule.scope)
        else:
            masks = keep_random(gradients, rule.ratio, rule.scope, seed=rule.seed, step=self._steps)
        for gradient, mask in zip(gradients, masks, strict=True):
            clear_unselected(gradient, mask)
        self.selected = dict(zip(parameters, masks, strict=True))
        self._masked_gradients = gradients
        sizes = [mask.numel() for mask in masks]
        self.total_entries = sum(parameter.numel() for parameter in with_gradients)
        ranked_together = [sum(sizes)] if rule.scope == "global" else sizes
        self.updated_entries = self.total_entries - sum(removed_count(size, rule.ratio) for size in ranked_together)

    def give(self, selected: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Sets the selection for the step to come, where more is known than the gradients here; then at every step.

        Args:
            selected: By parameter a bool tensor, of the shape of what this process has of it; the gradients of all
                other entries are zero already.
        """
        self.selected, self._is_given = dict(selected), True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the selected entries, after selecting them if that was not done.

        Args:
            closure: Not supported: it would compute gradients after they were selected.

        Raises:
            TrainingError: A closure is given, or a gradient is sparse or partitioned.
            MaskingError: A gradient holds NaN.
        """
        if closure is not None:
            raise TrainingError(
                "A masked optimizer takes no closure: it selects from gradients that are already there.",
                hint="call backward() before step()",
            )
        self.select()
        if self.rule.unselected == "momentum":
            self.inner.param_groups = self.param_groups  # DeepSpeed gives a step one group at a time
            self.inner.step()
        else:
            for group, parameter in self._with_gradients():
                if parameter in self._excluded and not self._is_given:
                    self._step_alone(group, parameter)
                    continue
                selected = self.selected.pop(parameter)
                if self._is_updated_in_parts(parameter):
                    self._update_in_parts(group, parameter, selected)
                else:
                    self._update(group, parameter, selected)
        self._steps += 1
        self._forget_selection()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, and the selection that was made from them."""
        super().zero_grad(set_to_none)
        self._forget_selection()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters to the inner optimizer, and so to this one."""
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimizer and the number of steps taken, which decides random selections."""
        return {**self.inner.state_dict(), STEPS_KEY: self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state that `state_dict` gave.

        Raises:
            TrainingError: It is the state of another optimizer.
        """
        if STEPS_KEY not in state_dict:
            raise TrainingError(
                "This is the state of an optimizer that updates all entries.",
                key=STEPS_KEY,
                expected="the state of a masked optimizer",
                actual=", ".join(map(str, state_dict)),
                hint="resume with the method that the training was started with",
            )
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != STEPS_KEY})
        self._steps = state_dict[STEPS_KEY]
        self._forget_selection()
        self._share("state", "param_groups")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule}, {self.inner!r})"

    def _forget_selection(self) -> None:
        if self._is_given:
            return
        self.selected = {}
        self._masked_gradients = []

    def _with_gradients(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield group, parameter

    def _is_updated_in_parts(self, parameter: torch.Tensor) -> bool:
        """Whether a step may treat the parameter as several small ones."""
        entries = self._entry_state(parameter)
        return (
            type(self.inner) in _BY_ENTRY
            and parameter.numel() > 0
            and len(entries) > 0  # the first step makes the state, for the whole parameter
            and parameter.grad is not None
            and all(is_flat(tensor) for tensor in (parameter, parameter.grad, *entries.values()))
        )

    def _update_in_parts(self, group: dict[str, Any], parameter: torch.Tensor, selected: torch.Tensor) -> None:
        """What `_update` does, with a few megabytes of copies however large the parameter is."""
        state = self.state[parameter]
        entries = {key: value.view(-1) for key, value in self._entry_state(parameter).items()}
        counters = {key: value for key, value in state.items() if key not in entries}
        weight, gradient = parameter.detach().view(-1), cast("torch.Tensor", parameter.grad).view(-1)
        for part in parts(weight.numel(), _PART_ENTRIES):
            small = weight[part]
            small.grad = gradient[part]
            small_entries = {key: value[part] for key, value in entries.items()}
            held = HeldEntries([small, *small_entries.values()], selected.view(-1)[part])
            self.state[small] = {key: value.clone() for key, value in counters.items()} | small_entries
            try:
                self._step_alone(group, small)
            finally:
                stepped = self.state.pop(small)
            held.put_back()
            state.update({key: stepped[key] for key in counters})

    def _update(self, group: dict[str, Any], parameter: torch.Tensor, selected: torch.Tensor) -> None:
        """One step of the inner optimizer on a parameter, after which entries that are not selected are put back."""
        weight = parameter.clone()
        before = {key: value.clone() for key, value in self._entry_state(parameter).items()}
        self._step_alone(group, parameter)
        after = self._entry_state(parameter)
        if after.keys() - before.keys():
            before = {**self._untouched_state(group, parameter), **before}
        _put_back(parameter, weight, selected)
        for key, value in after.items():
            _put_back(value, before[key], selected)

    def _entry_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state tensors that hold one number for each entry of the parameter."""
        return {
            key: value
            for key, value in self.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and key != "step"
        }

    def _untouched_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state that a first step creates for entries it does not select: from a gradient and a weight of zero.

        With the weight itself, weight decay that is added to the gradient would enter the momentum.
        """
        weight, gradient, state = parameter.clone(), parameter.grad, self.state.pop(parameter)
        parameter.zero_()
        parameter.grad = torch.zeros_like(parameter)
        self._step_alone(group, parameter)
        untouched = self._entry_state(parameter)
        parameter.copy_(weight)
        parameter.grad, self.state[parameter] = gradient, state
        return untouched

    def _step_alone(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        """A step of the inner optimizer that sees this parameter only, so that one tensor is copied at a time."""
        groups, parameters = self.inner.param_groups, group["params"]
        group["params"] = [parameter]
        self.inner.param_groups = [group]
        try:
            self.inner.step()
        finally:
            group["params"] = parameters
            self.inner.param_groups = groups


def _check_whole(gradient: torch.Tensor) -> None:
    if type(gradient) is not torch.Tensor or gradient.layout != torch.strided:
        raise TrainingError(
            "Entries can be selected only from gradients that are dense and whole in every process.",
            expected="plain tensors",
            actual=f"{type(gradient).__name__} of layout {gradient.layout}",
            hint="train with DDP or one process, and embeddings without sparse=True",
        )


def _put_back(changed: torch.Tensor, before: torch.Tensor, selected: torch.Tensor) -> None:
    changed, before = local_part(changed), local_part(before)
    torch.where(selected, changed, before, out=changed)
