"""Every decoder family: train scores, save and apply a mask, and get the same logits from the new checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.apply_in_memory import apply_mask
from mftctl.masking.checkpoints.build_mask import build_mask
from mftctl.masking.layers import ScoreStart, attach_masks, detach_masks, initial_scores, masked_layers
from mftctl.masking.mask import Mask, load_mask, save_mask
from mftctl.masking.rule import MaskRule
from mftctl.masking.selection import removed_count
from mftctl.masking.targets import find_targets
from tests.masking.architectures import ARCHITECTURES, build
from tests.masking.built_checkpoints import stored_tensors
from tests.masking.mask_files import METADATA

IDS = torch.randint(6, 102, (3, 11), generator=torch.Generator().manual_seed(0))
RATIO = 0.137  # not a whole number of weights for any shape
THRESHOLDS: dict[ScoreStart, float] = {"kaiming": -0.1, "constant": 0.01, "weights": 0.0}
RULES = ["absolute", "signed", "threshold"]


def indicator_of(rule: str, start: ScoreStart) -> MaskRule:
    if rule == "threshold":
        return MaskRule(None, THRESHOLDS[start])
    return MaskRule(RATIO, ranking="signed" if rule == "signed" else "absolute")


def train_scores(model: PreTrainedModel, start: ScoreStart, rule: MaskRule, steps: int = 2) -> None:
    """Masks layer 1 and trains the scores for some steps."""
    targets = find_targets(model, [1])
    scores = {target.name: initial_scores(target, start, constant=0.01, seed=3) for target in targets}
    attach_masks(model, targets, scores, rule)
    optimizer = torch.optim.AdamW([module.scores for _, module in masked_layers(model)], lr=0.02)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def mask_of(model: PreTrainedModel, base: Path) -> Mask:
    keep = {name: module.mask() for name, module in masked_layers(model)}
    detach_masks(model)
    mask = build_mask(keep, find_targets(model, [1]), model, base, METADATA)
    assert len(mask) == len(keep)
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", THRESHOLDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_applied_checkpoint_gives_the_masked_logits(
    name: str, start: ScoreStart, rule: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    build(name).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    train_scores(model, start, indicator_of(rule, start))
    masked = logits(model)
    assert not torch.equal(masked, before)

    save_mask(mask_of(model, base), tmp_path / "mask.bits")
    mask = load_mask(tmp_path / "mask.bits")
    apply_to_checkpoint(base, mask, tmp_path / "out", mask_path=None, base_model="base")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), masked)
    untouched = AutoModelForCausalLM.from_pretrained(base)
    apply_mask(untouched, mask)
    assert torch.equal(logits(untouched), masked)

    stored, applied = stored_tensors(base), stored_tensors(tmp_path / "out")
    family = ARCHITECTURES[name]
    expected = {family.start + tensor: shape for tensor, shape in {**family.attention, **family.mlp}.items()}
    assert {tensor: mask.records[tensor].shape for tensor in mask.names()} == expected
    for tensor, values in stored.items():
        kept = mask[tensor] if tensor in mask else torch.ones_like(values, dtype=torch.bool)
        assert torch.equal(applied[tensor], torch.where(kept, values, 0.0)), tensor
        if tensor in mask and rule != "threshold":
            assert int((~kept).sum()) == removed_count(values.numel(), RATIO), tensor
    assert mask.removed


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_gives_the_same_logits_too(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build(name).bfloat16().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    train_scores(model, "kaiming", MaskRule(RATIO))
    masked = logits(model)
    apply_to_checkpoint(base, mask_of(model, base), tmp_path / "out", mask_path=None, base_model="base")
    applied = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert applied.dtype == torch.bfloat16
    assert torch.equal(logits(applied), masked)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_projections_of_the_target_carry_a_mask(name: str, part: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    family = ARCHITECTURES[name]
    expected = family.attention if part == "attn" else family.mlp
    targets = find_targets(model, [1], part)
    keep = {target.name: torch.ones(target.weight.shape, dtype=torch.bool) for target in targets}
    mask = build_mask(keep, targets, model, tmp_path, METADATA)
    assert {tensor.removeprefix(family.start) for tensor in mask.names()} == set(expected)
