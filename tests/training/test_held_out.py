"""Which validation records decide and which confirm, and a mask applied to a model's own weights."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from mftctl.experiments.training_options import MaskTrainOptions
from mftctl.masking.targets import find_targets
from mftctl.training.held_out import masked, split_validation_records
from tests.masking.architectures import ARCHITECTURES, build


def test_too_few_records_for_two_parts_all_decide() -> None:
    records: Any = list(range(7))
    assert split_validation_records(records, MaskTrainOptions()) == (records, [])
    assert split_validation_records(records * 2, MaskTrainOptions(method="random")) == (records * 2, [])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mask_is_applied_to_the_weights_and_undone_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    targets = find_targets(model)
    targets[0].weight.detach().flatten()[:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    keep = {target.name: torch.rand(target.weight.shape) < 0.7 for target in targets}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with suppress(KeyboardInterrupt), masked(targets, keep):
        for target in targets:
            assert not target.weight[~keep[target.name]].signbit().any()
            assert not target.weight[~keep[target.name]].any()
        raise KeyboardInterrupt
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)), key
