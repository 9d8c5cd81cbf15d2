"""Which validation records decide and which confirm, and a mask applied to a model's own weights."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.targets import find_targets
from mftctl.training.held_out import masked, split_validation_records
from tests.masking.architectures import ARCHITECTURES, build


def test_too_few_records_for_two_parts_all_decide() -> None:
    records: Any = list(range(7))
    assert split_validation_records(records, MaskTrainOptions()) == (records, [])
    assert split_validation_records(records * 2, MaskTrainOptions(method="random")) == (records * 2, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weight", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mask_is_applied_to_the_weights_and_undone_bit_for_bit(name: str, dtype: torch.dtype, kind: str) -> None:
    model = build(name).to(dtype)
    targets = find_targets(model)
    targets[0].weight.detach().flatten()[:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    keep = {target.name: torch.rand(target.weight.shape) < 0.7 for target in targets}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = {target.name: torch.randn(target.weight.shape).to(dtype) for target in targets}
    zero = {target.name: torch.zeros_like(target.weight) for target in targets}
    with suppress(KeyboardInterrupt), masked(targets, keep, base=None if kind == "weight" else base):
        for target in targets:
            expected = (zero if kind == "weight" else base)[target.name][~keep[target.name]]
            removed = target.weight[~keep[target.name]]
            assert torch.equal(removed.view(torch.uint8), expected.view(torch.uint8))
        raise KeyboardInterrupt
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)), key
