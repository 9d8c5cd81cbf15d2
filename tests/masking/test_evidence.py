"""Turning mask entries by evidence: which ones, how many, and what becomes of them after the judgement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mftctl.masking import evidence
from mftctl.masking.evidence import EvidenceOptimizer
from mftctl.masking.layers import Indicator, MaskedLinear


def make_layer(scores: torch.Tensor) -> MaskedLinear:
    linear = nn.Linear(scores.shape[1], scores.shape[0], bias=False)
    return MaskedLinear(linear, scores.clone(), Indicator(None, 0.0))


def make_optimizer(*layers: MaskedLinear, **options: Any) -> EvidenceOptimizer:
    settled = {"budget": 0.1, "significance": 2.0, **options}
    optimizer = EvidenceOptimizer(list(layers), **settled)
    optimizer.judge(1.0)
    return optimizer


def gather(optimizer: EvidenceOptimizer, layer: MaskedLinear, gradients: np.ndarray, tokens: list[int]) -> None:
    """Steps with gradients `(steps, entries)`."""
    for gradient, count in zip(gradients, tokens, strict=True):
        layer.scores.grad = torch.tensor(gradient, dtype=torch.float32).view_as(layer.scores)
        optimizer.step_tokens = count
        optimizer.step()


def grown_by_numpy(
    gradients: np.ndarray, tokens: list[int], kept: np.ndarray, pool: np.ndarray, significance: float, budget: float
) -> tuple[set[int], float]:
    """The turned entries and their promise by the definition: the whole quadratic form anew for each candidate."""
    total = sum(tokens)
    summed = gradients.astype(np.float64) * np.array(tokens)[:, None] * np.where(kept, 1, -1)
    mean = summed.sum(axis=0) / total
    spread = summed - np.array(tokens)[:, None] * mean
    covariance = spread.T @ spread / total
    errors = np.sqrt(np.diag(covariance) / total)

    def promise(entries: list[int]) -> float:
        return float(mean[entries].sum() - covariance[np.ix_(entries, entries)].sum() / 2)

    chosen: list[int] = []
    while promise(chosen) < budget:
        adds = {entry: promise([*chosen, entry]) - promise(chosen) for entry in pool if entry not in chosen}
        best = max(adds, key=lambda entry: adds[entry] - significance * errors[entry], default=None)
        if best is None or adds[best] - significance * errors[best] <= 0:
            break
        if chosen and promise(chosen) + adds[best] > budget:
            break
        chosen.append(best)
    return set(chosen), promise(chosen)


def searched_by_numpy(gradients: np.ndarray, tokens: list[int], kept: np.ndarray, significance: float) -> np.ndarray:
    """What each entry alone promises at its worst."""
    summed = gradients.astype(np.float64) * np.array(tokens)[:, None] * np.where(kept, 1, -1)
    spread = np.sqrt((summed**2).sum(axis=0) - summed.sum(axis=0) ** 2 / len(tokens))
    return (summed.sum(axis=0) - (summed**2).sum(axis=0) / 2 - significance * spread) / sum(tokens)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), significance=st.sampled_from([0.0, 1.0, 2.0]), budget=st.floats(1e-3, 1.0))
def test_turns_what_promises_most_together(seed: int, significance: float, budget: float) -> None:
    """Against an independent implementation of both steps, with a pool of 10 of 24 entries."""
    rng = np.random.default_rng(seed)
    kept = rng.random(24) < 0.7
    gradients = rng.normal(rng.normal(0, 0.02, 24), 0.01, (14, 24)).astype(np.float32)
    gradients[:, 5] = gradients[:, 4]  # two that promise the same gain
    tokens = [int(count) for count in rng.integers(1, 9, 14)]
    layer = make_layer(torch.tensor(np.where(kept, 1.0, -1.0), dtype=torch.float32).view(4, 6))
    optimizer = make_optimizer(layer, budget=budget, significance=significance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_POOL", 10)
        gather(optimizer, layer, gradients[:6], tokens[:6])
        assert optimizer.flip().removed == 0  # the search ends, the trial begins
    gather(optimizer, layer, gradients[6:], tokens[6:])
    flips = optimizer.flip()

    worst = searched_by_numpy(gradients[:6], tokens[:6], kept, significance)
    pool = np.sort(np.argsort(-worst, kind="stable")[:10])
    expected, promise = grown_by_numpy(gradients[6:], tokens[6:], kept, pool, significance, budget)
    turned = np.flatnonzero((layer.scores.detach().numpy().ravel() > 0) != kept)
    assert set(turned) == expected
    assert flips.removed == sum(kept[entry] for entry in expected)
    assert flips.restored == len(expected) - flips.removed
    assert flips.promised == pytest.approx(promise, rel=1e-4, abs=1e-9)


ONE = np.tile(np.array([0.02, 0, 0, 0, 0, 0], dtype=np.float32), (4, 1))


def on_trial(**options: Any) -> tuple[MaskedLinear, EvidenceOptimizer]:
    """Six kept entries whose first promises 0.02, searched and tried in 4 steps of 2 tokens each."""
    layer = make_layer(torch.ones(2, 3))
    optimizer = make_optimizer(layer, **options)
    for _ in range(2):
        gather(optimizer, layer, ONE, [2] * 4)
        if len(optimizer.param_groups[0]["pools"][0]) == 0:
            optimizer.flip()
    return layer, optimizer


def test_entries_that_promise_the_same_gain_do_not_all_turn() -> None:
    """Three equal entries with more spread than one of them is worth twice."""
    rng = np.random.default_rng(0)
    gradient = rng.normal(0.02, 0.06, (40, 1)).astype(np.float32)
    layer = make_layer(torch.ones(1, 3))
    optimizer = make_optimizer(layer, significance=0.0, budget=10.0)
    gather(optimizer, layer, np.repeat(gradient, 3, axis=1), [10] * 40)
    optimizer.flip()
    gather(optimizer, layer, np.repeat(gradient, 3, axis=1), [10] * 40)
    assert optimizer.flip().removed == 1


def test_one_step_is_no_evidence() -> None:
    layer = make_layer(torch.ones(2, 3))
    optimizer = make_optimizer(layer)
    gather(optimizer, layer, ONE, [2] * 4)
    optimizer.flip()
    gather(optimizer, layer, ONE[:1], [2])
    flips = optimizer.flip()
    assert (flips.removed, flips.restored, flips.promised) == (0, 0, 0.0)
    assert (layer.scores == 1).all()


def test_what_lowers_the_loss_stays_and_the_earlier_search_counts_half() -> None:
    layer, optimizer = on_trial()
    assert optimizer.flip().removed == 1
    assert optimizer.judge(0.9)
    assert layer.scores.detach().tolist() == [[-1, 1, 1], [1, 1, 1]]
    group = optimizer.param_groups[0]
    assert (group["tokens"], group["steps"], optimizer.best_loss) == (8.0, 4.0, 0.9)
    assert optimizer.state[layer.scores]["sums"][0, 0] == pytest.approx(8 * 2 * 0.02 / 2)
    assert group["budget"] == pytest.approx(0.15)
    assert group["trial_tokens"] == []


def test_what_does_not_lower_the_loss_is_taken_back() -> None:
    layer, optimizer = on_trial()
    optimizer.flip()
    assert not optimizer.judge(1.0)
    assert (layer.scores == 1).all()
    group = optimizer.param_groups[0]
    assert (group["tokens"], group["steps"], optimizer.best_loss, group["budget"]) == (16.0, 8.0, 1.0, 0.05)
    assert len(group["trial_tokens"]) == 4


def test_a_loss_that_is_no_number_is_no_gain() -> None:
    layer, optimizer = on_trial()
    optimizer.flip()
    assert not optimizer.judge(float("nan"))
    assert (layer.scores == 1).all()


def test_a_removed_weight_whose_gradient_turns_comes_back() -> None:
    layer = make_layer(torch.tensor([[-1.0, 1.0, 1.0]]))
    optimizer = make_optimizer(layer)
    for _ in range(2):
        gather(optimizer, layer, -ONE[:, :3], [2] * 4)
        flips = optimizer.flip()
    assert (flips.removed, flips.restored) == (0, 1)
    assert (layer.scores > 0).all()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_counts_stay_where_they_are_to_be_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = [make_layer(torch.tensor(np.where(rng.random((4, 5)) < 0.6, 1.0, -1.0)).float()) for _ in range(2)]
    before = [int((layer.scores < 0).sum()) for layer in layers]
    optimizer = EvidenceOptimizer(layers, budget=1.0, significance=1.0, keeps_counts=True)
    optimizer.judge(1.0)
    for _ in range(2):
        for _ in range(5):
            for layer in layers:
                layer.scores.grad = torch.tensor(rng.normal(0.01, 0.02, (4, 5))).float()
            optimizer.step_tokens = 3
            optimizer.step()
        flips = optimizer.flip()
    assert [int((layer.scores < 0).sum()) for layer in layers] == before
    assert flips.removed == flips.restored
    optimizer.judge(2.0)
    assert [int((layer.scores < 0).sum()) for layer in layers] == before


def test_the_state_goes_on_where_it_was_saved() -> None:
    rng = np.random.default_rng(3)
    gradients = rng.normal(0.01, 0.02, (16, 6)).astype(np.float32)

    def run(split: int | None) -> np.ndarray:
        layer = make_layer(torch.ones(2, 3))
        optimizer = make_optimizer(layer, significance=0.5)
        for number, start in enumerate(range(0, 16, 4)):
            gather(optimizer, layer, gradients[start : start + 4], [2] * 4)
            optimizer.flip()
            if number:
                optimizer.judge(1.0 - number / 10)
            if number == split:
                other = make_layer(layer.scores.detach())
                fresh = EvidenceOptimizer([other], budget=9.0, significance=0.5)
                fresh.load_state_dict(optimizer.state_dict())
                layer, optimizer = other, fresh
        return layer.scores.detach().numpy()

    expected = run(None)
    assert (expected < 0).any()
    assert all(np.array_equal(run(split), expected) for split in range(3))


def test_a_pool_beyond_what_floats_count_survives_saving() -> None:
    layer = make_layer(torch.ones(2, 3))
    optimizer = make_optimizer(layer)
    optimizer.param_groups[0]["pools"] = [torch.tensor([2**24 + 1])]
    fresh = EvidenceOptimizer([make_layer(torch.ones(2, 3))], budget=9.0, significance=0.5)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["pools"][0].tolist() == [2**24 + 1]


def test_a_masked_layer_follows_its_scores() -> None:
    layer, optimizer = on_trial()
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), x @ layer.weight.t())
    optimizer.flip()
    expected = layer.weight.clone()
    expected[0, 0] = 0
    assert torch.equal(layer(x), x @ expected.t())
