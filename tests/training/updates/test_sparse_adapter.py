"""The weights that SHiRA and Super-Tuning train without a mask, compared with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mftctl.experiments.fft_options import FftOptions
from mftctl.masking.checkpoints.meta_models import build_skeleton
from mftctl.masking.checkpoints.sparse_adapters import trained_positions
from mftctl.masking.targets import linear_projections
from mftctl.training.updates.sparse_adapter import (
    MASK_TYPE,
    add_sparse_adapter,
    add_without_data,
    choose_positions,
    trained_counts,
)
from tests.conftest import build_llama

SHIRA = FftOptions(method="shira", lora_rank=2)


def test_each_projection_has_its_own_random_weights() -> None:
    model = build_llama(layers=2)
    found = choose_positions(model, SHIRA, seed=0)
    shapes = {name: module.weight.shape for name, module in linear_projections(model)}
    assert {name: len(positions) for name, positions in found.items()} == {
        name: 2 * sum(shape) for name, shape in shapes.items()
    }
    for name, positions in found.items():
        assert len(positions.unique()) == len(positions)
        assert torch.equal(positions.sort().values, positions)
        assert 0 <= int(positions[0]) <= int(positions[-1]) < shapes[name].numel()
    assert len({tuple(positions.tolist()) for positions in found.values()}) == len(found)


def test_the_seed_decides_the_random_weights() -> None:
    first, again, other = (choose_positions(build_llama(layers=2), SHIRA, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(positions, again[name]) for name, positions in first.items())
    assert not any(torch.equal(positions, other[name]) for name, positions in first.items())


@given(st.floats(0, 0.999), st.integers(0, 3))
def test_the_largest_weights_are_those_of_numpy(ratio: float, seed: int) -> None:
    model = build_llama(layers=2)
    projections = dict(linear_projections(model))
    with torch.no_grad():  # many equal values
        for module in projections.values():
            module.weight.copy_((module.weight * 50 + seed).round())
    for name, positions in choose_positions(model, FftOptions(method="supertuning", ratio=ratio), 0).items():
        sizes = np.abs(projections[name].weight.detach().numpy()).ravel()
        trained = sizes.size - int(np.floor(ratio * sizes.size + 0.5))
        order = np.argsort(sizes, kind="stable")  # of equal weights, the higher index comes later
        assert positions.tolist() == sorted(order[sizes.size - trained :].tolist())


@pytest.mark.parametrize("options", [SHIRA, FftOptions(method="supertuning", ratio=0.83)], ids=["shira", "supertuning"])
def test_an_adapter_has_exactly_these_weights(options: FftOptions) -> None:
    model = build_llama(layers=2)
    chosen = choose_positions(model, options, seed=0)
    adapted = add_sparse_adapter(model, options, chosen)
    found = trained_positions(adapted)
    assert all(torch.equal(positions, found[name]) for name, positions in chosen.items())
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert [parameter.numel() for parameter in trained] == [len(positions) for positions in chosen.values()]
    assert all(parameter.dtype == torch.float32 and not parameter.any() for parameter in trained)
    if options is SHIRA:
        assert adapted.peft_config["default"].mask_type == MASK_TYPE
    planned = build_skeleton(model.config, torch.float32)
    with torch.device("meta"):
        add_without_data(planned, options, trained_counts(planned, options))
    sizes = [parameter.numel() for parameter in planned.parameters() if parameter.requires_grad]
    assert sizes == [parameter.numel() for parameter in trained]


def test_other_weights_of_the_model_are_no_projections() -> None:
    found = choose_positions(build_llama(layers=2), SHIRA, seed=0)
    assert not any("embed" in name or "lm_head" in name for name in found)
    assert all(isinstance(module, nn.Linear) for _, module in linear_projections(build_llama(layers=2)))
