"""Soft masks: multipliers in 8 bits, compared with plain numpy, autograd and separate experts."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from mftctl.errors import MaskingError
from mftctl.masking.layers import MaskedLinear, attach_masks, detach_masks, initial_scores, masked_layers
from mftctl.masking.soft_mask import IDENTITY_CODES, LEAST_TEMPERATURE, SoftRule, largest_code, multiplied
from mftctl.masking.targets import find_targets
from tests.conftest import build_llama

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FINITE = st.floats(-1e3, 1e3, width=32)


def make(rule: SoftRule, *, transposed: bool = False) -> tuple[MaskedLinear, torch.Tensor]:
    torch.manual_seed(0)
    linear = Conv1D(5, 7) if transposed else nn.Linear(7, 5)
    scores = torch.rand(linear.weight.shape) * 0.9 * rule.limit + 0.02
    return MaskedLinear(linear, scores, rule), torch.randn(2, 3, 7)


@given(st.lists(FINITE, min_size=1, max_size=20), st.sampled_from([1, 2]), st.data())
def test_products_equal_numpy(weights: list[float], limit: int, data: st.DataObject) -> None:
    codes = data.draw(
        st.lists(st.integers(0, limit * IDENTITY_CODES[limit]), min_size=len(weights), max_size=len(weights))
    )
    found = multiplied(torch.tensor(weights), torch.tensor(codes, dtype=torch.uint8), limit)
    for weight, code, product in zip(np.float32(weights), codes, found.numpy(), strict=True):
        if code == 0:
            assert struct.pack("<f", product) == b"\0" * 4  # +0.0
        elif code == IDENTITY_CODES[limit]:
            assert struct.pack("<f", product) == struct.pack("<f", weight)
        else:
            assert product == weight * (np.float32(code) / np.float32(IDENTITY_CODES[limit]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multipliers_0_1_and_2_are_exact_in_all_dtypes(dtype: torch.dtype) -> None:
    weight = torch.tensor([-0.0, 0.0, 1.5, -3.0, 65504.0 / 4]).to(dtype)
    for limit, multiplier in ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2)):
        codes = torch.full(weight.shape, multiplier * IDENTITY_CODES[limit], dtype=torch.uint8)
        found = multiplied(weight, codes, limit)
        expected = torch.zeros_like(weight) if multiplier == 0 else weight * multiplier
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@given(st.sampled_from([1, 2]), st.integers(0, 255))
def test_a_code_is_the_nearest_multiplier(limit: int, code: int) -> None:
    code = min(code, largest_code(limit))
    scores = torch.tensor([code / IDENTITY_CODES[limit]])
    rule = SoftRule(limit)
    assert rule.codes(scores).item() == code
    nearby = scores + 0.49 / IDENTITY_CODES[limit] * torch.tensor([-1.0, 1.0])
    assert rule.codes(nearby).tolist() == [code, code]


@pytest.mark.parametrize("limit", [1, 2])
def test_scores_beyond_the_ends_give_the_ends(limit: int) -> None:
    assert SoftRule(limit).codes(torch.tensor([-5.0, 9.0])).tolist() == [0, largest_code(limit)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rule", [SoftRule(1), SoftRule(2), SoftRule(1, 0.3)], ids=str)
def test_outputs_and_gradients_equal_those_of_autograd(rule: SoftRule, transposed: bool) -> None:
    """Straight through the rounding: the gradient is that of the multiplier before it."""
    layer, x = make(rule, transposed=transposed)
    scores = layer.scores.detach().clone().requires_grad_()
    exact = ((scores - 0.5) / rule.temperature + 0.5).clamp(0, rule.limit)
    rounded = exact + (rule.codes(scores).float() / IDENTITY_CODES[rule.limit] - exact).detach()
    weight = layer.weight.detach() * rounded
    upstream = torch.randn(2, 3, 5)
    expected = x @ (weight if transposed else weight.T) + layer.bias
    expected.backward(upstream)
    found = layer(x)
    found.backward(upstream)
    torch.testing.assert_close(found, expected)
    inside = (exact > 0) & (exact < rule.limit)
    assert inside.any()
    torch.testing.assert_close(layer.scores.grad[inside], scores.grad[inside])


@pytest.mark.parametrize(
    ("score", "gradient", "moves"), [(0.0, 1.0, False), (0.0, -1.0, True), (2.0, 1.0, True), (2.0, -1.0, False)]
)
def test_gradients_at_the_ends_only_lead_inwards(score: float, gradient: float, moves: bool) -> None:
    one = torch.ones(1)
    found = SoftRule(2).score_gradient(gradient * one, score * one, one, None)
    assert found.item() == (gradient if moves else 0.0)


@pytest.mark.parametrize(
    ("temperature", "multipliers"), [(1.0, [0.2, 0.4, 0.6]), (0.5, [0.0, 0.3, 0.7]), (0.0, [0, 0, 1])]
)
def test_a_falling_temperature_drives_multipliers_apart(temperature: float, multipliers: list[float]) -> None:
    codes = SoftRule(1, temperature).codes(torch.tensor([0.2, 0.4, 0.6]))
    assert (codes.double() / 255).tolist() == pytest.approx(multipliers, abs=1 / 255)


def test_at_temperature_0_every_multiplier_is_0_or_1() -> None:
    scores = torch.linspace(-1, 2, 301)
    codes = SoftRule(1, 0.0).codes(scores)
    assert codes.tolist() == [255 if score >= 0.5 else 0 for score in scores.tolist()]
    gradient = SoftRule(1, 0.0).score_gradient(torch.ones(1), torch.ones(1), torch.ones(1), None)
    assert gradient.item() == pytest.approx(1 / LEAST_TEMPERATURE)


def test_products_are_rounded_to_the_dtype_of_the_checkpoint() -> None:
    weight, codes = torch.randn(200).bfloat16(), torch.randint(0, 256, (200,), dtype=torch.uint8)
    wide = SoftRule(dtype=torch.bfloat16).masked(weight.float(), codes)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, multiplied(weight, codes, 1).float())


def test_a_layer_follows_its_scores_and_its_rule() -> None:
    layer, x = make(SoftRule())
    before = layer(x)
    with torch.no_grad():
        layer.scores.mul_(0.5)
    changed = layer(x)
    assert not torch.equal(before, changed)
    layer.rule = SoftRule(temperature=0.0)
    assert not torch.equal(changed, layer(x))


def test_masks_are_stored_as_codes_and_read_back() -> None:
    layer, _ = make(SoftRule(2))
    stored = layer.stored_mask()
    assert stored.shape == (35,)
    assert torch.equal(layer.rule.mask(stored, layer.weight.shape), layer.mask())
    assert not layer.rule.keeps_all(stored, 35)
    start = SoftRule(2).stored(torch.ones(5, 7))
    assert layer.rule.keeps_all(start, 35)
    assert start.strides == (0,)  # the start takes no memory, however many weights it has
    assert layer.rule.mask(start, layer.weight.shape).eq(127).all()


def test_the_expected_change_of_the_loss_is_first_order() -> None:
    rule, gradient = SoftRule(2), torch.tensor([1.0, -2.0, 3.0])
    old, new = rule.codes(torch.tensor([1.0, 1.0, 0.5])), rule.codes(torch.tensor([0.0, 2.0, 0.5]))
    assert rule.promised(gradient, gradient, old, new) == pytest.approx(1.0 * 1 + -2.0 * -1)


def test_a_model_starts_as_it_is() -> None:
    model = build_llama()
    input_ids = torch.randint(6, 102, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=input_ids).logits
    targets = find_targets(model, [1, 2])
    attach_masks(model, targets, {one.name: initial_scores(one, "identity") for one in targets}, SoftRule(2))
    assert torch.equal(model(input_ids=input_ids).logits, expected)
    assert all(module.mask().eq(127).all() for _, module in masked_layers(model))
    detach_masks(model)


def test_a_nan_score_is_an_error() -> None:
    with pytest.raises(MaskingError, match="A score is NaN"):
        SoftRule().codes(torch.tensor([0.5, float("nan")]))


@pytest.mark.parametrize(("limit", "temperature"), [(2, 0.5), (1, -0.1), (1, 1.5)])
def test_an_impossible_temperature_is_an_error(limit: int, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        SoftRule(limit, temperature)


def test_a_soft_mask_between_two_models_is_an_error() -> None:
    model = build_llama(layers=1)
    targets = find_targets(model)
    scores = {one.name: initial_scores(one, "identity") for one in targets}
    with pytest.raises(MaskingError, match="cannot return them to a model before fine-tuning"):
        attach_masks(model, targets, scores, SoftRule(), {one.name: one.weight for one in targets})
