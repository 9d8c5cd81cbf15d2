"""Fused experts compared with a model with a separate tensor per projection and expert, using plain autograd."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mftctl.errors import TrainingError
from mftctl.masking.experts import MaskedExperts
from mftctl.masking.layers import (
    attach_masks,
    detach_masks,
    initial_scores,
    kaiming_bound,
    masked_layers,
    masked_products,
    share_weights,
)
from mftctl.masking.rule import MaskRule
from mftctl.masking.selection import removed_count
from mftctl.masking.targets import MaskTarget, find_targets
from tests.masking.architectures import build
from tests.masking.test_selection import keep_by_sorting

IDS = torch.randint(6, 102, (3, 11), generator=torch.Generator().manual_seed(0))
RULES = [
    MaskRule(ratio=0.3),
    MaskRule(ratio=0.3, ranking="signed"),
    MaskRule(ratio=None, threshold=-0.1),
    MaskRule(ratio=0.0),
]
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def straight_through(weight: torch.Tensor, scores: torch.Tensor, rule: MaskRule) -> torch.Tensor:
    """Equation 5 via the detach trick: forward with the hard mask, backward with the score or its magnitude."""
    values = scores.detach().numpy()
    if rule.ratio is None:
        return weight * (torch.from_numpy(values >= rule.threshold).float() + scores - scores.detach())
    soft = scores.abs() if rule.ranking == "absolute" else scores
    hard = torch.from_numpy(keep_by_sorting(soft.detach().numpy(), rule.ratio)).float()
    return weight * (hard + soft - soft.detach())


@dataclass
class Routed:
    """The experts of one layer, with inputs and routes for them."""

    model: PreTrainedModel
    targets: list[MaskTarget]
    scores: dict[str, torch.Tensor]
    inputs: torch.Tensor
    chosen: torch.Tensor
    shares: torch.Tensor

    @property
    def experts(self) -> nn.Module:
        return self.model.model.layers[1].mlp.experts

    def run(self) -> torch.Tensor:
        return self.experts(self.inputs, self.chosen, self.shares)


def make(family: str = "mixtral", *, kernel: str = "grouped_mm") -> Routed:
    """Routes each token to two of four experts, and none to the last one."""
    model = build(family)
    model.set_experts_implementation(kernel)
    generator = torch.Generator().manual_seed(1)
    targets = find_targets(model, [1], "mlp")
    scores = {target.name: torch.randn(target.weight.shape, generator=generator) * 0.3 for target in targets}
    inputs = torch.randn(10, 32, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(10)])
    return Routed(model, targets, scores, inputs, chosen, torch.rand(10, 2, generator=generator))


def separate_experts(
    made: Routed,
    family: str,
    scores: dict[str, torch.Tensor],
    rule: MaskRule,
    base: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The output of the experts, computed token by token with one tensor per projection."""
    weights = {target.name: target.weight.detach().clone() for target in made.targets}
    start = made.targets[0].name.rpartition(".experts.")[0] + ".experts"
    zero = dict.fromkeys(weights, torch.zeros(()))
    masked = {
        name: its + straight_through(weights[name] - its, scores[name], rule) for name, its in (base or zero).items()
    }
    gate, up, down = NAMES[family]
    rows = []
    for x, chosen, shares in zip(made.inputs, made.chosen.tolist(), made.shares, strict=True):
        outputs = []
        for expert, share in zip(chosen, shares, strict=True):
            hidden = F.silu(masked[f"{start}.{expert}.{gate}"] @ x) * (masked[f"{start}.{expert}.{up}"] @ x)
            outputs.append(share * (masked[f"{start}.{expert}.{down}"] @ hidden))
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_outputs_and_gradients_equal_those_of_separate_experts(family: str, rule: MaskRule, kernel: str) -> None:
    made = make(family, kernel=kernel)
    apart = {name: value.clone().requires_grad_() for name, value in made.scores.items()}
    made.inputs.requires_grad_()
    expected = separate_experts(made, family, apart, rule)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected.backward(upstream)
    expected_inputs, made.inputs.grad = made.inputs.grad, None

    attach_masks(made.model, made.targets, made.scores, rule)
    found = made.run()
    found.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.inputs.grad, expected_inputs, rtol=1e-4, atol=1e-6)
    for name, module in masked_layers(made.model):
        reference = apart[name].grad
        if reference is None:
            reference = torch.zeros_like(module.scores)  # gradient of an expert without tokens
        torch.testing.assert_close(module.scores.grad, reference, rtol=1e-4, atol=1e-6)
    assert made.model.model.layers[1].mlp.experts.experts.gate_up_proj.grad is None


def test_each_stored_tensor_loses_its_own_share() -> None:
    """The ratio holds per stored tensor and not per fused parameter: low scores in one expert do not affect another."""
    made = make()
    low = made.targets[0].name
    made.scores[low] = made.scores[low] * 1e-6
    attach_masks(made.model, made.targets, made.scores, MaskRule(0.137))
    for _, module in masked_layers(made.model):
        keep = module.mask().numpy()
        assert (keep == keep_by_sorting(module.scores.detach().abs().numpy(), 0.137)).all()
        assert (~keep).sum() == removed_count(keep.size, 0.137)


def test_among_equal_scores_the_lowest_index_of_each_stored_tensor_goes() -> None:
    made = make()
    scores = {target.name: torch.ones_like(target.weight) for target in made.targets}
    attach_masks(made.model, made.targets, scores, MaskRule(0.1))
    for _, module in masked_layers(made.model):
        keep = module.mask().flatten()
        count = removed_count(keep.numel(), 0.1)
        assert not keep[:count].any()
        assert keep[count:].all()


def test_products_are_computed_once_an_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    attach_masks(made.model, made.targets, made.scores, MaskRule(0.3))
    selections = []
    original = MaskRule.keep
    monkeypatch.setattr(MaskRule, "keep", lambda self, scores: selections.append(1) or original(self, scores))
    optimizer = torch.optim.AdamW([module.scores for _, module in masked_layers(made.model)], lr=0.1)
    for step in range(1, 4):
        for _ in range(3):
            made.run().sum().backward()
        assert len(selections) == step * len(made.targets)
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_every_kind_of_optimizer_step_renews_the_products(options: dict[str, bool]) -> None:
    made = make()
    attach_masks(made.model, made.targets, made.scores, MaskRule(0.3))
    optimizer = torch.optim.AdamW([module.scores for _, module in masked_layers(made.model)], lr=0.5, **options)
    for _ in range(3):
        made.run().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        experts = made.experts
        assert isinstance(experts, MaskedExperts)
        for _, module in masked_layers(made.model):
            product = module.target.part_of(experts.product(module.target.parameter))
            assert torch.equal(product, module.weight * module.mask())


def test_weights_are_never_modified_and_are_restored() -> None:
    made = make()
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    logits, experts = made.model(input_ids=IDS).logits, made.experts
    attach_masks(made.model, made.targets, made.scores, MaskRule())
    optimizer = torch.optim.AdamW([module.scores for _, module in masked_layers(made.model)], lr=0.1)
    made.model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    detach_masks(made.model)
    assert made.experts is experts
    assert made.model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert torch.equal(made.model(input_ids=IDS).logits, logits)


def test_weights_that_are_sharded_over_processes() -> None:
    made = make()
    attach_masks(made.model, made.targets, made.scores, MaskRule())
    with pytest.raises(TrainingError, match="Fused experts cannot be masked") as caught:
        share_weights(made.model)
    assert caught.value.key == "model.layers.1.mlp.experts"


def test_only_scores_are_trainable() -> None:
    made = make()
    attach_masks(made.model, made.targets, made.scores, MaskRule())
    trainable = [parameter for parameter in made.model.parameters() if parameter.requires_grad]
    assert len(trainable) == len(made.targets) == 12
    assert {id(item) for item in trainable} == {id(module.scores) for _, module in masked_layers(made.model)}
    assert [name for name, _ in masked_layers(made.model)] == [target.name for target in made.targets]


def test_projections_without_scores_use_their_weights() -> None:
    """Gate and up projections share a parameter, and only one of them is masked here."""
    made = make()
    made.targets = find_targets(made.model, [1], "mlp", ["w3"])
    attach_masks(made.model, made.targets, made.scores, MaskRule(0.3))
    (product,) = masked_products(made.model)
    original = made.experts.experts.gate_up_proj
    assert torch.equal(product[:, :48], original[:, :48])
    assert int((product[:, 48:] == 0).sum()) == 4 * removed_count(48 * 32, 0.3)
    made.run().sum().backward()
    assert all(module.scores.grad is not None for _, module in masked_layers(made.model))


def test_gradient_checkpointing_changes_nothing() -> None:
    made = make()
    attach_masks(made.model, made.targets, made.scores, MaskRule(0.3))
    made.inputs.requires_grad_()
    gradients = []
    for again in (False, True):
        arguments = (made.inputs, made.chosen, made.shares)
        y = checkpoint(made.experts, *arguments, use_reentrant=False) if again else made.experts(*arguments)
        y.square().sum().backward()
        gradients.append([module.scores.grad.clone() for _, module in masked_layers(made.model)])
        made.model.zero_grad()
    assert all(torch.equal(plain, other) for plain, other in zip(*gradients, strict=True))


def test_bf16_weights_with_fp32_scores() -> None:
    made = make()
    made.model.bfloat16()
    attach_masks(made.model, made.targets, made.scores, MaskRule(0.3))
    made.inputs, made.shares = made.inputs.bfloat16(), made.shares.bfloat16()
    y = made.run()
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {module.scores.grad.dtype for _, module in masked_layers(made.model)} == {torch.float32}


def test_kaiming_start_depends_on_the_inputs_of_each_projection() -> None:
    made = make()
    for target in made.targets:
        bound = 1 / np.sqrt(48 if target.projection == "w2" else 32)
        assert kaiming_bound(target) == pytest.approx(bound)
        assert initial_scores(target, "kaiming").abs().max() <= bound
        assert torch.equal(initial_scores(target, "weights"), target.weight.abs())
