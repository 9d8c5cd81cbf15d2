"""A wrapper for any optimizer that updates selected entries of the parameters and leaves all others unchanged."""

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
    """True if the entries are contiguous in CPU memory and as large as some integer type."""
    is_whole = local_part(tensor) is tensor
    return is_whole and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.element_size() in _INTEGERS


def parts(numel: int, size: int) -> Iterator[slice]:
    """Consecutive slices of a flat tensor, all of the same size except the last."""
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def clear_unselected(tensor: torch.Tensor, selected: torch.Tensor) -> None:
    """Sets every entry that is not selected to zero, including infinite ones.

    Args:
        tensor: A floating-point tensor.
        selected: Bool, of its shape and on its device.
    """
    if not is_flat(tensor):
        tensor.masked_fill_(~selected, 0.0)
        return
    int_dtype = _INTEGERS[tensor.element_size()]
    bits, flat_selected = tensor.view(-1).view(int_dtype), selected.reshape(-1).view(torch.int8)
    for part in parts(bits.numel(), torch.get_num_threads() << 16):  # fits in the cores' caches
        bits[part].bitwise_and_(flat_selected[part].neg().to(int_dtype))


class HeldEntries:
    """The unselected entries of some tensors, saved so that they can be restored bit by bit.

    Args:
        tensors: Flat tensors of the same size.
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
        """Restores the saved entries; the selected ones keep their current values."""
        for tensor, held in zip(self._tensors, self._held, strict=True):
            if self._are_few:
                tensor.index_copy_(0, self._places, held)
            else:
                tensor.copy_(held.index_copy_(0, self._places, tensor.take(self._places)))


STEPS_KEY = "masked_steps"
"""Key of the number of steps taken in the state of a masked optimizer."""

_BY_ENTRY = (Adagrad, Adam, AdamW, RMSprop, SGD)
"""Optimizers that update each entry independently of others, with state that is changed in place."""

_PART_ENTRIES = 1 << 20


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """The rule for which entries an optimizer step updates and what happens to the others.

    Attributes:
        method: `gmt`: entries with the largest |gradient|; `random`: random entries, drawn again at each step.
        ratio: Share of entries that are not updated, in [0, 1).
        scope: Whether the share applies to each tensor or to all parameters together.
        unselected: `unchanged`: weights and optimizer state of unselected entries stay bit-identical; `momentum`: their
            gradient is set to zero, so that momentum and weight decay still move them.
        seed: Together with the step number, decides random entries; at least 0.

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
    """Applies the inner optimizer only to the entries that a rule selects at each step.

    The inner optimizer must treat each parameter independently, as those of torch do. State without the shape of its
    parameter (a step counter, Adafactor's factors) is not restored; it is updated from the masked gradient.

    Gradients must be whole and already reduced over processes, as with DDP. If they are sharded, as with FSDP and ZeRO,
    pass `give` a selection made from the gradients of all processes.

    Args:
        inner: The wrapped optimizer.
        rule: The rule for which entries are updated.
        excluded: Parameters whose entries are all updated; the rule and its ratio apply only to the others.

    Attributes:
        inner: The wrapped optimizer; it shares `param_groups` and `state` with this one.
        rule: The rule for which entries are updated.
        selected: The selection for the next step, a bool tensor per parameter; empty except between `select` and
            `step`.
        updated_entries: Number of entries that the last selection updates.
        total_entries: Number of entries of all parameters that had a gradient at that point.

    Source: GMT, section 2, equations 3 and 4, and algorithm 1. The paper's update is plain gradient descent;
        `unchanged` preserves its meaning for optimizers with state, `momentum` is the direct combination.
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
        # As in unpickling: shares existing groups and state, where Optimizer.__init__ would create new ones.
        self.__setstate__({name: getattr(self.inner, name) for name in names})

    @torch.no_grad()
    def select(self) -> None:
        """Selects the entries to update and sets the gradient of all others to zero, once per step.

        Must be called after the last backward pass of a step and before gradients are clipped, so that their norm is
        that of the masked gradient. Further calls before `step` have no effect.

        Raises:
            MaskingError: A gradient contains NaN.
            TrainingError: A gradient is sparse or sharded.
        """
        if self._is_given:
            return
        with_gradients = [parameter for _, parameter in self._with_gradients()]
        parameters = [parameter for parameter in with_gradients if parameter not in self._excluded]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # Compared by identity, since a skipped step (as in mixed precision) leaves a selection for old gradients.
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
        """Sets the selection for the next step, instead of `select`; if used, it must be called before every step.

        Args:
            selected: A bool tensor per parameter, of the shape of this process's part; the gradients of all other
                entries must already be zero.
        """
        self.selected, self._is_given = dict(selected), True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the selected entries, and selects them first if necessary.

        Args:
            closure: Not supported, since it would compute gradients after the selection.

        Raises:
            TrainingError: A closure is given, or a gradient is sparse or sharded.
            MaskingError: A gradient contains NaN.
        """
        if closure is not None:
            raise TrainingError(
                "A masked optimizer takes no closure, because it selects from existing gradients.",
                hint="call backward() before step()",
            )
        self.select()
        if self.rule.unselected == "momentum":
            self.inner.param_groups = self.param_groups  # DeepSpeed passes one group at a time to a step
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
        """Resets the gradients and the selection made from them."""
        super().zero_grad(set_to_none)
        self._forget_selection()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the inner optimizer, and so to this one."""
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimizer and the number of steps taken, which decides random selections."""
        return {**self.inner.state_dict(), STEPS_KEY: self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state from `state_dict`.

        Raises:
            TrainingError: It is not the state of a masked optimizer.
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
        """True if a step may process the parameter in several small parts."""
        entries = self._entry_state(parameter)
        return (
            type(self.inner) in _BY_ENTRY
            and parameter.numel() > 0
            and len(entries) > 0  # the first step creates the state for the whole parameter
            and parameter.grad is not None
            and all(is_flat(tensor) for tensor in (parameter, parameter.grad, *entries.values()))
        )

    def _update_in_parts(self, group: dict[str, Any], parameter: torch.Tensor, selected: torch.Tensor) -> None:
        """Equivalent to `_update`, but copies only a few megabytes at a time, regardless of the parameter's size."""
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
        """Runs one step of the inner optimizer on a parameter, then restores the entries that are not selected."""
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
        """The state tensors with one number per entry of the parameter."""
        return {
            key: value
            for key, value in self.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and key != "step"
        }

    def _untouched_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state that a first step creates for unselected entries, computed with a gradient and a weight of zero.

        With the actual weight, weight decay that is added to the gradient would enter the momentum.
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
        """Runs a step of the inner optimizer on this parameter only, so that one tensor is copied at a time."""
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
            "Entries can only be selected from gradients that are dense and whole in every process.",
            expected="plain tensors",
            actual=f"{type(gradient).__name__} of layout {gradient.layout}",
            hint="train with DDP or a single process, and use embeddings without sparse=True",
        )


def _put_back(changed: torch.Tensor, before: torch.Tensor, selected: torch.Tensor) -> None:
    changed, before = local_part(changed), local_part(before)
    torch.where(selected, changed, before, out=changed)
