"""The temperature of soft masks in training."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from mftctl.masking.layers import attach_masks, initial_scores, masked_layers
from mftctl.masking.soft_mask import LEAST_TEMPERATURE, SoftRule
from mftctl.masking.targets import find_targets
from mftctl.training.learn_mask import Hardening, temperature
from tests.conftest import build_llama


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_temperature_never_rises_and_ends_at_the_least_one(steps: int) -> None:
    found = [temperature(step, steps) for step in range(steps)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(LEAST_TEMPERATURE)
    assert all(value == 1.0 for value in found[: steps // 2])


def test_masks_are_soft_in_a_step_and_hard_between_steps() -> None:
    model = build_llama(layers=1)
    targets = find_targets(model)
    attach_masks(
        model, targets, {one.name: initial_scores(one, "identity") for one in targets}, SoftRule(dtype=torch.bfloat16)
    )
    hardening, state = Hardening(model, 4), TrainerState(global_step=0)
    event = (TrainingArguments(), state, TrainerControl())

    def rules() -> set[SoftRule]:
        return {module.rule for _, module in masked_layers(model)}

    assert rules() == {SoftRule(1, 0.0, torch.bfloat16)}
    hardening.on_step_begin(*event)
    assert rules() == {SoftRule(1, 1.0, torch.bfloat16)}
    hardening.on_step_end(*event)
    assert rules() == {SoftRule(1, 0.0, torch.bfloat16)}
    state.global_step = 3
    hardening.on_step_begin(*event)
    assert rules() == {SoftRule(1, temperature(3, 4), torch.bfloat16)}
