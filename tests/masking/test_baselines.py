"""The masks that need no training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mftctl.masking.baselines import magnitude_mask, random_mask
from mftctl.masking.layers import initial_scores
from mftctl.masking.selection import keep_highest
from mftctl.masking.targets import find_targets
from tests.conftest import build_llama
from tests.masking.test_selection import keep_by_sorting


def test_magnitude_removes_the_smallest_weights() -> None:
    target = find_targets(build_llama())[0]
    weight = target.module.weight.detach().numpy()
    assert np.array_equal(magnitude_mask(target, 0.25).numpy(), keep_by_sorting(np.abs(weight), 0.25))


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
def test_a_random_mask_does_not_know_where_training_starts(seed: int) -> None:
    [target] = find_targets(build_llama(hidden_size=256), [0], projections=["q_proj"])
    removed = ~random_mask(target, 0.1, seed)
    start = initial_scores(target, "kaiming", seed=seed).abs()
    begun = ~keep_highest(start, 0.1)
    both = int((removed & begun).sum())
    # Of 65,536 weights both take a tenth: by chance 655, give or take 24.
    assert abs(both - 655) < 5 * 24
