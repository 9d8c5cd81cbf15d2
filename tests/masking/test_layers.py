"""MaskedLinear compared with the paper's equations in numpy, a manual gradient, and sorting at each forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from mftctl.masking import rule as rule_module
from mftctl.masking import selection
from mftctl.masking.layers import (
    MaskedLinear,
    attach_masks,
    detach_masks,
    initial_scores,
    kaiming_bound,
    keep_no_products,
    masked_layers,
    unmasked,
)
from mftctl.masking.rule import MaskRule
from mftctl.masking.targets import MaskTarget, find_targets
from tests.conftest import build_llama
from tests.masking.test_selection import keep_by_sorting

RULES = [
    MaskRule(ratio=0.3),
    MaskRule(ratio=0.3, ranking="signed"),
    MaskRule(ratio=None, threshold=-0.1),
    MaskRule(ratio=0.0),
]


def numpy_keep(scores: np.ndarray, rule: MaskRule) -> np.ndarray:
    if rule.ratio is None:
        return ~(scores < rule.threshold)
    return keep_by_sorting(np.abs(scores) if rule.ranking == "absolute" else scores, rule.ratio)


def make(rule: MaskRule, *, transposed: bool = False, bias: bool = True) -> tuple[MaskedLinear, torch.Tensor]:
    torch.manual_seed(0)
    linear = Conv1D(5, 7) if transposed else nn.Linear(7, 5, bias=bias)
    scores = torch.randn(linear.weight.shape)
    return MaskedLinear(linear, scores.clone(), rule), torch.randn(2, 3, 7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_forward_equals_the_equations(rule: MaskRule, transposed: bool) -> None:
    """Equation 4: y = x (W * M)^T + b."""
    layer, x = make(rule, transposed=transposed)
    weight, scores = layer.weight.detach().numpy(), layer.scores.detach().numpy()
    masked = weight * numpy_keep(scores, rule)
    expected = x.numpy() @ (masked if transposed else masked.T) + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_equal_the_formula(rule: MaskRule, transposed: bool) -> None:
    """Equation 5: dL/dS = dL/d(W * M) * W, times sign(S) if |S| is ranked; dL/dx goes through the masked weight."""
    layer, x = make(rule, transposed=transposed)
    x.requires_grad_()
    upstream = torch.randn(2, 3, 5)
    layer(x).backward(upstream)
    weight, scores = layer.weight.detach().numpy(), layer.scores.detach().numpy()
    grad_y, rows = upstream.numpy().reshape(-1, 5), x.detach().numpy().reshape(-1, 7)
    grad_masked = rows.T @ grad_y if transposed else grad_y.T @ rows
    sign = np.sign(scores) if rule.ratio is not None and rule.ranking == "absolute" else 1.0
    np.testing.assert_allclose(layer.scores.grad.numpy(), grad_masked * weight * sign, rtol=1e-4, atol=1e-6)
    masked = weight * numpy_keep(scores, rule)
    expected = (grad_y @ (masked.T if transposed else masked)).reshape(2, 3, 7)
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert layer.weight.grad is None


class SortingLinear(nn.Module):
    """The reference implementation, for this test only: sorts at every forward pass, with a detach-trick gradient."""

    def __init__(self, linear: nn.Linear, scores: torch.Tensor, ratio: float) -> None:
        super().__init__()
        self.weight = linear.weight.detach()
        self.scores = nn.Parameter(scores)
        self.ratio = ratio

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ranked = self.scores.abs()
        hard = torch.from_numpy(keep_by_sorting(ranked.detach().numpy(), self.ratio)).float()
        straight_through = hard + ranked - ranked.detach()
        return F.linear(x, self.weight * straight_through)


def test_training_steps_equal_a_sort_at_each_forward() -> None:
    """Several full Adam steps on a Llama give the same losses and the same masks."""
    input_ids = torch.randint(6, 102, (2, 12), generator=torch.Generator().manual_seed(0))
    outcomes = []
    for kind in ("engine", "reference"):
        model = build_llama()
        targets = find_targets(model, [1, 2])
        scores = {target.name: initial_scores(target, "kaiming", seed=3) for target in targets}
        attach_masks(model, targets, scores, MaskRule(ratio=0.1))
        if kind == "reference":
            for name, module in list(masked_layers(model)):
                parent, _, attribute = name.rpartition(".")
                replacement = SortingLinear(module.original(), module.scores.detach().clone(), 0.1)
                setattr(model.get_submodule(parent), attribute, replacement)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=0.05)
        losses = []
        for _ in range(4):
            loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        keep = [keep_by_sorting(parameter.detach().abs().numpy(), 0.1) for parameter in trainable]
        outcomes.append((losses, keep))
    (losses, masks), (reference_losses, reference_masks) = outcomes
    assert losses[0] != losses[-1]
    np.testing.assert_allclose(losses, reference_losses, rtol=1e-5)
    assert all(np.array_equal(mask, other) for mask, other in zip(masks, reference_masks, strict=True))


@pytest.mark.parametrize("keeps_product", [True, False])
def test_the_mask_is_selected_once_an_optimizer_step(monkeypatch: pytest.MonkeyPatch, keeps_product: bool) -> None:
    layer, x = make(MaskRule(ratio=0.3))
    layer.keeps_product = keeps_product
    selections = []
    original = selection.ratio_cut

    def counted(scores: torch.Tensor, ratio: float, ranking: selection.Ranking = "signed") -> selection.Cut | None:
        selections.append(1)
        return original(scores, ratio, ranking)

    monkeypatch.setattr(selection, "ratio_cut", counted)
    monkeypatch.setattr(rule_module, "ratio_cut", counted)
    optimizer = torch.optim.AdamW([layer.scores], lr=0.1)
    for step in range(1, 4):
        for _ in range(3):
            layer(x).sum().backward()
        assert len(selections) == step
        optimizer.step()


@pytest.mark.parametrize("rule", [MaskRule(0.3), MaskRule(None, 0.01), MaskRule(0.0)], ids=str)
def test_recomputing_the_product_in_each_pass_gives_the_same(rule: MaskRule) -> None:
    kept, x = make(rule)
    anew, _ = make(rule)
    anew.keeps_product = False
    layers = (kept, anew)
    optimizers = [torch.optim.AdamW([layer.scores], lr=0.1) for layer in layers]
    for _ in range(3):
        inputs = [x.clone().requires_grad_() for _ in layers]
        for layer, value, optimizer in zip(layers, inputs, optimizers, strict=True):
            optimizer.zero_grad()
            layer(value).square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
        assert torch.equal(kept.scores.grad, anew.scores.grad)  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_every_kind_of_optimizer_step_renews_the_mask(options: dict[str, bool]) -> None:
    layer, x = make(MaskRule(ratio=0.3))
    optimizer = torch.optim.AdamW([layer.scores], lr=0.5, **options)
    for _ in range(5):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = layer.weight.detach() * layer.mask()
        assert torch.equal(layer.masked_weight(), expected)


def test_weights_are_never_modified_and_are_restored() -> None:
    model = build_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(input_ids=torch.arange(6, 16)[None]).logits
    targets = find_targets(model)
    attach_masks(model, targets, {item.name: initial_scores(item, "kaiming") for item in targets}, MaskRule())
    optimizer = torch.optim.AdamW([module.scores for _, module in masked_layers(model)], lr=0.1)
    model(input_ids=torch.arange(6, 16)[None], labels=torch.arange(6, 16)[None]).loss.backward()
    optimizer.step()
    detach_masks(model)
    assert {name: id for name in model.state_dict()}.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=torch.arange(6, 16)[None]).logits, logits)


@pytest.mark.parametrize("keeps", [True, False])
def test_masks_can_be_disabled_temporarily(keeps: bool) -> None:
    model = build_llama()
    ids = torch.arange(6, 16)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        targets = find_targets(model)
        attach_masks(model, targets, {item.name: initial_scores(item, "kaiming") for item in targets}, MaskRule())
        if not keeps:
            keep_no_products(model)
        masked = model(input_ids=ids).logits
        with unmasked(model):
            assert torch.equal(model(input_ids=ids).logits, logits)
        assert torch.equal(model(input_ids=ids).logits, masked)
    assert not torch.equal(masked, logits)


def test_only_scores_are_trainable() -> None:
    model = build_llama()
    targets = find_targets(model, [2], "mlp")
    attach_masks(model, targets, {item.name: initial_scores(item, "constant") for item in targets}, MaskRule())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"model.layers.2.mlp.{name}_proj.scores" for name in ("gate", "up", "down")}


def test_gpt2_with_conv1d_equals_a_masked_copy() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    targets = find_targets(model)
    scores = {item.name: initial_scores(item, "kaiming", seed=1) for item in targets}
    keep = {name: keep_by_sorting(value.abs().numpy(), 0.2) for name, value in scores.items()}
    attach_masks(model, targets, scores, MaskRule(ratio=0.2))
    ids = torch.arange(20)[None]
    logits = model(ids).logits
    detach_masks(model)
    with torch.no_grad():
        for target in targets:
            target.module.weight.mul_(torch.from_numpy(keep[target.name]))
    torch.testing.assert_close(logits, model(ids).logits)


def test_gradient_checkpointing_changes_nothing() -> None:
    layer, x = make(MaskRule(ratio=0.3))
    layer(x).square().sum().backward()
    plain = layer.scores.grad.clone()
    layer.scores.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.scores.grad, plain)


def test_bf16_weights_with_fp32_scores() -> None:
    layer, x = make(MaskRule(ratio=0.3))
    layer.weight.data = layer.weight.data.bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()
    y = layer(x.bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.scores.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_bias_rounds_as_in_the_layer_without_scores(transposed: bool, dtype: torch.dtype) -> None:
    """Sizes at which adding the bias afterwards changes the last bits."""
    torch.manual_seed(0)
    linear = (Conv1D(96, 576) if transposed else nn.Linear(576, 96)).to(dtype)
    nn.init.normal_(linear.bias)
    layer = MaskedLinear(linear, torch.randn(linear.weight.shape), MaskRule(ratio=0.3))
    x = torch.randn(4, 16, 576).to(dtype)
    y = layer(x)
    linear.weight.data = layer.masked_weight()
    assert torch.equal(y, linear(x))


def test_autocast_computes_in_its_dtype() -> None:
    layer, x = make(MaskRule(ratio=0.3))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.scores.grad.dtype == torch.float32


def test_the_magnitude_start_removes_what_training_carries_through_zero() -> None:
    """Compared with Adam in numpy on the weights: a weight is removed while its trained value has the opposite sign."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 6)) * 0.1
    inputs, wanted = generator.normal(size=(30, 5, 6)), generator.normal(size=(30, 5, 4))
    linear = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
    start = initial_scores(MaskTarget("linear", 0, "mlp", linear), "weights").double()
    layer = MaskedLinear(linear, start, MaskRule(None, 0.0))
    optimizer = torch.optim.AdamW([layer.scores], lr=0.01, eps=1e-20, weight_decay=0.0)
    trained = weight.astype(np.float32).astype(np.float64)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    turned = set()
    for step, (x, y) in enumerate(zip(inputs, wanted, strict=True), start=1):
        optimizer.zero_grad()
        (layer(torch.from_numpy(x)) - torch.from_numpy(y)).square().sum().backward()
        optimizer.step()
        gradient = 2 * (x @ (weight * (trained * weight >= 0)).T - y).T @ x
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        trained -= 0.01 * (mean / (1 - 0.9**step)) / np.sqrt(square / (1 - 0.999**step))
        np.testing.assert_allclose(layer.scores.detach().numpy(), trained * np.sign(weight), atol=1e-9)
        assert ((trained * weight >= 0) == layer.mask().numpy()).all()
        turned.add(int((~layer.mask()).sum()))
    assert len(turned) > 3


def test_kaiming_start_is_uniform_within_its_bound() -> None:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)); the fan-in of a Conv1D is its first dimension."""
    model = build_llama(hidden_size=64, intermediate_size=256)
    target = next(item for item in find_targets(model) if item.name.endswith("down_proj"))
    scores = initial_scores(target, "kaiming")
    bound = 1 / np.sqrt(256)
    assert kaiming_bound(target) == pytest.approx(bound)
    assert kaiming_bound(MaskTarget("conv", 0, "mlp", Conv1D(5, 7))) == pytest.approx(1 / np.sqrt(7))
    assert scores.abs().max() <= bound
    assert scores.std().item() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert abs(scores.mean().item()) < bound / 20


def test_a_start_depends_on_seed_and_name_alone() -> None:
    model = build_llama()
    every, few = find_targets(model), find_targets(model, [3])
    by_name = {item.name: initial_scores(item, "kaiming", seed=5) for item in every}
    assert all(torch.equal(by_name[item.name], initial_scores(item, "kaiming", seed=5)) for item in few)
    assert not torch.equal(by_name[few[0].name], initial_scores(few[0], "kaiming", seed=6))
    same_shape = [item for item in every if item.name.endswith("q_proj")]
    assert not torch.equal(by_name[same_shape[0].name], by_name[same_shape[1].name])


def test_a_constant_start() -> None:
    target = find_targets(build_llama())[0]
    assert initial_scores(target, "constant", constant=0.25).unique().tolist() == [0.25]


@pytest.mark.parametrize("options", [{"ratio": 0.1, "threshold": 0.0}, {"ratio": None}])
def test_an_indicator_needs_either_ratio_or_threshold(options: dict[str, float | None]) -> None:
    with pytest.raises(ValueError, match="either a ratio, a threshold or a pattern"):
        MaskRule(**options)
