"""Lets the temperature of a soft mask fall in training, so that its multipliers end as 0 or 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mftctl.masking.layers import masked_layers
from mftctl.masking.soft_mask import LEAST_TEMPERATURE, SoftRule

_SOFT_SHARE: Final = 0.5
"""Share of the steps at temperature 1."""


class Hardening(TrainerCallback):
    """Sets the temperature of each step; between steps it is 0, so that what is measured and kept is a hard mask.

    Args:
        model: A model with soft masks.
        steps: Optimizer steps of the training.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self._model = model
        self._steps = steps
        self._set(0.0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the temperature of the step."""
        self._set(temperature(state.global_step, self._steps))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hardens the mask."""
        self._set(0.0)

    def _set(self, value: float) -> None:
        for _, module in masked_layers(self._model):
            if isinstance(module.rule, SoftRule):
                module.rule = replace(module.rule, temperature=value)


def temperature(step: int, steps: int) -> float:
    """The temperature of a step: 1 in the first half, then falling by the same factor in each step to the least one.

    Args:
        step: Number of steps before it.
        steps: Number of all steps.
    """
    soft = _SOFT_SHARE * steps
    progress = max(step + 1 - soft, 0.0) / (steps - soft)
    return float(LEAST_TEMPERATURE**progress)
