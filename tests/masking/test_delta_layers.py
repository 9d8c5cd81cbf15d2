"""Layers with a base, compared with fp64 autograd on base + M * (W - base) and with a selection in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from mftctl.masking.experts import MaskedExperts
from mftctl.masking.layers import (
    MaskedLinear,
    attach_masks,
    detach_masks,
    initial_scores,
    masked_layers,
    unmasked,
)
from mftctl.masking.rule import MaskRule
from mftctl.masking.targets import MaskTarget, find_targets
from tests.conftest import build_llama
from tests.masking.test_experts import make as make_experts
from tests.masking.test_experts import separate_experts
from tests.masking.test_layers import RULES, numpy_keep


def change(weight: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """The weight before a small change to about half of its entries."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.randn(weight.shape, generator=generator) * 1e-2
    return (weight.detach() - moved * (torch.rand(weight.shape, generator=generator) < 0.5)).to(weight.dtype)


def make(rule: MaskRule, *, transposed: bool = False, dtype: torch.dtype = torch.float32) -> MaskedLinear:
    torch.manual_seed(0)
    linear = (Conv1D(5, 7) if transposed else nn.Linear(7, 5)).to(dtype)
    nn.init.normal_(linear.bias)
    scores = torch.randn(linear.weight.shape, dtype=torch.promote_types(dtype, torch.float32))
    return MaskedLinear(linear, scores, rule, change(linear.weight))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("keeps_product", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_outputs_and_gradients_equal_those_of_autograd(rule: MaskRule, keeps_product: bool, transposed: bool) -> None:
    layer = make(rule, transposed=transposed, dtype=torch.float64)
    layer.keeps_product = keeps_product
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    y = layer(x)
    y.backward(upstream)

    scores = layer.scores.detach().clone().requires_grad_()
    again = x.detach().clone().requires_grad_()
    soft = scores.abs() if rule.uses_magnitude else scores
    hard = torch.from_numpy(numpy_keep(scores.detach().numpy(), rule)).double()
    weight, base = layer.weight.detach(), layer.base.detach()
    effective = base + (hard + soft - soft.detach()) * (weight - base)
    expected = F.linear(again, effective.t() if transposed else effective, layer.bias)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.scores.grad, scores.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-10, atol=1e-12)
    assert layer.base.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_are_those_of_the_selected_weight_to_the_last_bit(transposed: bool, dtype: torch.dtype) -> None:
    layer = make(MaskRule(0.3), transposed=transposed, dtype=dtype)
    keep = numpy_keep(layer.scores.detach().numpy(), layer.rule)
    chosen = np.where(keep, layer.weight.detach().float().numpy(), layer.base.detach().float().numpy())
    assert np.array_equal(layer.masked_weight().float().numpy(), chosen)
    plain = layer.original()
    x = torch.randn(4, 7).to(dtype)
    y = layer(x)
    plain.weight.data = torch.from_numpy(chosen).to(dtype)
    assert torch.equal(y, plain(x))


def test_a_kept_and_a_base_value_are_never_computed_with() -> None:
    """Arithmetic would turn infinities into NaN and round small changes away."""
    layer = make(MaskRule(0.5, ranking="signed"))
    layer.weight.data.flatten()[:4] = torch.tensor([float("inf"), float("inf"), 1e-30, 1e-30])
    layer.base.data.flatten()[:4] = torch.tensor([float("inf"), float("-inf"), 1e30, 1e30])
    layer.scores.data = -torch.ones(5, 7)
    layer.scores.data.flatten()[[0, 2]] = 2.0
    assert layer.masked_weight().flatten()[:4].tolist() == [
        float("inf"),
        float("-inf"),
        layer.weight.flatten()[2].item(),
        layer.base.flatten()[3].item(),
    ]


def test_the_start_is_the_size_of_the_change_and_keeps_all_of_it() -> None:
    model = build_llama()
    target = find_targets(model)[0]
    base = change(target.weight)
    scores = initial_scores(target, "weights", base=base)
    expected = np.abs(target.weight.detach().numpy().astype(np.float64) - base.numpy())
    np.testing.assert_allclose(scores.numpy(), expected.astype(np.float32), rtol=0, atol=0)
    assert scores.dtype == torch.float32
    assert MaskRule(None, 0.0).keep(scores).all()
    assert torch.equal(initial_scores(target, "normal", base=base), initial_scores(target, "normal"))


def test_the_start_in_bf16_is_computed_in_fp32() -> None:
    linear = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    linear.weight.data = torch.tensor([[1.0, -1.0]]).bfloat16()
    base = torch.tensor([[2.0**-20, 1.0]]).bfloat16()
    assert initial_scores(MaskTarget("linear", 0, "mlp", linear), "weights", base=base).tolist() == [[1 - 2**-20, 2.0]]


def test_bf16_weights_have_the_gradient_of_the_change_in_fp32() -> None:
    layer = make(MaskRule(0.3, ranking="signed"), dtype=torch.bfloat16)
    x = torch.randn(4, 7).bfloat16()
    layer(x).float().sum().backward()
    grad_weight = (torch.ones(4, 5).bfloat16().t() @ x).float()
    assert torch.equal(layer.scores.grad, grad_weight * (layer.weight.float() - layer.base.float()))


def test_scores_start_at_the_change_and_training_lowers_the_loss_of_a_llama() -> None:
    """Models, masks and bases are restored; only scores are trained, and the base is followed by no gradient."""
    model = build_llama()
    ids = torch.randint(6, 102, (2, 12), generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    targets = find_targets(model)
    base = {item.name: change(item.weight, seed) for seed, item in enumerate(targets)}
    originals = {name: tensor.clone() for name, tensor in base.items()}
    scores = {item.name: initial_scores(item, "weights", base=base[item.name]) for item in targets}
    attach_masks(model, targets, scores, MaskRule(None, 0.0), base)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{item.name}.scores" for item in targets}
    optimizer = torch.optim.AdamW([module.scores for _, module in masked_layers(model)], lr=1e-2, eps=1e-20)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with unmasked(model), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
    detach_masks(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(base[name], originals[name]) for name in base)


def test_gradient_checkpointing_changes_nothing() -> None:
    layer, x = make(MaskRule(ratio=0.3)), torch.randn(2, 3, 7)
    layer(x).square().sum().backward()
    plain = layer.scores.grad.clone()
    layer.scores.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.scores.grad, plain)


@pytest.mark.parametrize("rule", [MaskRule(0.3), MaskRule(None, -0.1)], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_equal_separate_experts_with_autograd(family: str, rule: MaskRule) -> None:
    made = make_experts(family)
    base = {target.name: change(target.weight, seed) for seed, target in enumerate(made.targets)}
    apart = {name: value.clone().requires_grad_() for name, value in made.scores.items()}
    made.inputs.requires_grad_()
    expected = separate_experts(made, family, apart, rule, base)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected.backward(upstream)
    expected_inputs, made.inputs.grad = made.inputs.grad, None

    attach_masks(made.model, made.targets, made.scores, rule, base)
    found = made.run()
    found.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.inputs.grad, expected_inputs, rtol=1e-4, atol=1e-6)
    experts = made.experts
    assert isinstance(experts, MaskedExperts)
    for name, module in masked_layers(made.model):
        reference = apart[name].grad
        if reference is None:
            reference = torch.zeros_like(module.scores)  # gradient of an expert without tokens
        torch.testing.assert_close(module.scores.grad, reference, rtol=1e-4, atol=1e-8)
        product = module.target.part_of(experts.product(module.target.parameter))
        assert torch.equal(product, torch.where(module.mask(), module.weight, base[name]))
