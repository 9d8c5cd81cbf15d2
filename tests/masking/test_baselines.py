"""Masks that need no training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mftctl.masking.baselines import magnitude_mask, random_mask, row_mask
from mftctl.masking.layers import initial_scores
from mftctl.masking.selection import keep_highest, removed_count
from mftctl.masking.targets import MaskTarget, find_targets
from tests.conftest import build_llama
from tests.masking.architectures import ARCHITECTURES
from tests.masking.test_selection import keep_by_sorting


def test_magnitude_removes_the_smallest_weights() -> None:
    target = find_targets(build_llama())[0]
    weight = target.module.weight.detach().numpy()
    assert np.array_equal(magnitude_mask(target, 0.25).numpy(), keep_by_sorting(np.abs(weight), 0.25))


def removed_rows(target: MaskTarget, weight: np.ndarray, ratio: float) -> np.ndarray:
    """The removed outputs according to an independent version: a stable sort of the means."""
    means = np.abs(weight.astype(np.float64)).mean(target.inputs_dim).astype(np.float32).reshape(-1)
    chosen = np.argsort(means, kind="stable")[: int(ratio * means.size + 0.5)]
    return np.isin(np.arange(means.size), chosen)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_rows_removed_are_whole_outputs_with_the_smallest_mean(family: str) -> None:
    torch.manual_seed(0)
    for target in find_targets(ARCHITECTURES[family].build(), [0]):
        keep = row_mask(target, 0.2).numpy()
        assert keep.shape == tuple(target.weight.shape)
        by_output = np.moveaxis(keep, target.inputs_dim, 0)
        assert (by_output == by_output[0]).all()
        expected = removed_rows(target, target.weight.detach().numpy(), 0.2)
        assert np.array_equal(~by_output[0].reshape(-1), expected)
        assert expected.sum() == removed_count(expected.size, 0.2)


def test_an_output_of_a_conv1d_is_a_column_and_that_of_a_linear_a_row() -> None:
    for family, name, expected in (("llama", "q_proj", [1, 0]), ("gpt2", "c_attn", [0, 1])):
        target = next(item for item in find_targets(ARCHITECTURES[family].build(), [0]) if item.projection == name)
        outputs = 1 if expected[0] == 0 else 0
        with torch.no_grad():
            target.weight.fill_(1.0)
            target.weight.select(outputs, 3).fill_(0.1)
        removed = ~row_mask(target, 1.0 / target.weight.shape[outputs])
        assert removed.select(outputs, 3).all()
        assert int(removed.sum()) == target.fan_in


def test_of_equal_rows_the_first_are_removed() -> None:
    [target] = find_targets(build_llama(), [0], projections=["q_proj"])
    with torch.no_grad():
        target.weight.fill_(-0.5)
        target.weight[:, ::2] = 0.5
    rows = len(target.weight)
    assert row_mask(target, 0.25).all(dim=1).nonzero().squeeze(1).tolist() == list(
        range(removed_count(rows, 0.25), rows)
    )


def test_rows_are_the_same_whatever_order_they_are_summed_in() -> None:
    [target] = find_targets(build_llama(hidden_size=256), [0], projections=["q_proj"])
    with torch.no_grad():
        target.weight[7] = target.weight[3].flip(0)
        target.weight[3:8:4] *= 0.01
    assert not row_mask(target, 1 / 256)[3].any()  # as large as row 7 and before it
    assert row_mask(target, 1 / 256)[7].all()


def test_random_is_exact_seeded_and_independent_of_the_weights() -> None:
    target = find_targets(build_llama())[0]
    first = random_mask(target, 0.25, seed=1)
    assert int((~first).sum()) == round(0.25 * first.numel())
    with torch.no_grad():
        target.module.weight.zero_()
    assert torch.equal(first, random_mask(target, 0.25, seed=1))
    assert not torch.equal(first, random_mask(target, 0.25, seed=2))


def test_random_spreads_over_rows_and_columns() -> None:
    target = find_targets(build_llama(hidden_size=64, intermediate_size=256))[-1]
    removed = (~random_mask(target, 0.5, seed=0)).float()
    assert abs(removed.mean(0) - 0.5).max() < 0.3
    assert abs(removed.mean(1) - 0.5).max() < 0.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_mask_is_independent_of_the_random_start(seed: int) -> None:
    [target] = find_targets(build_llama(hidden_size=256), [0], projections=["q_proj"])
    removed = ~random_mask(target, 0.1, seed)
    start = initial_scores(target, "kaiming", seed=seed).abs()
    begun = ~keep_highest(start, 0.1)
    both = int((removed & begun).sum())
    # Both masks remove a tenth of 65,536 weights: 655 in common by chance, with a standard deviation of 24.
    assert abs(both - 655) < 5 * 24
