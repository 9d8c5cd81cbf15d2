from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.evaluation.inference import evaluation_mode, length_batches
from tests.conftest import build_llama


def test_batches_hold_similar_lengths_longest_first() -> None:
    assert length_batches([3, 9, 4, 10, 3], budget_tokens=20) == [[3, 1], [2, 0, 4]]


def test_a_sample_longer_than_the_budget_gets_its_own_batch() -> None:
    assert length_batches([50, 5, 60], budget_tokens=10) == [[2], [0], [1]]


@given(st.lists(st.integers(1, 40)), st.integers(1, 100))
def test_every_sample_once_and_padding_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def test_each_module_returns_to_its_own_mode() -> None:
    model = build_llama(layers=2).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_the_mode_returns_after_an_error() -> None:
    model = build_llama(layers=1).train()
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert all(module.training for module in model.modules())
