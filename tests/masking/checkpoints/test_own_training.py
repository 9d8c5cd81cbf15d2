"""Masks trained in a loop of one's own, with transformers' Trainer and with TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from mftctl import apply_mask, attach_masks, collect_mask, detach_masks, load_mask, save_mask
from mftctl.errors import ConfigError, MaskingError
from mftctl.masking.layers import masked_layers
from tests.conftest import build_llama


@pytest.fixture
def model(workspace: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(workspace / "tiny")


def forward(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=torch.arange(6, 30)[None]).logits
    return logits


def test_only_scores_are_trainable(model: LlamaForCausalLM) -> None:
    before = forward(model)
    scores = attach_masks(model, layers="1-2", target="attn")
    assert {id(item) for item in model.parameters() if item.requires_grad} == {id(item) for item in scores}
    assert len(scores) == 2 * 4
    assert torch.equal(forward(model), before)  # scores start at |weight|, which no threshold of 0 removes


def test_the_collected_mask_is_what_the_model_computes_with(model: LlamaForCausalLM, tmp_path: Path) -> None:
    attach_masks(model, ratio=0.3, start="normal", ranking="absolute", seed=4)
    masked = forward(model)
    mask = collect_mask(model)
    assert mask.ratio == pytest.approx(0.3, abs=0.01)
    save_mask(mask, tmp_path / "mask.bits")
    detach_masks(model)
    assert not torch.equal(forward(model), masked)
    apply_mask(model, load_mask(tmp_path / "mask.bits"))
    torch.testing.assert_close(forward(model), masked)


def test_gradients_are_straight_through(model: LlamaForCausalLM) -> None:
    """The gradient of a score is the weight times the gradient of the masked weight (MFT, equation 5)."""
    plain = build_llama().train()
    attach_masks(model, layers="0", target="mlp", ratio=0.2)
    masks = {name: module.mask() for name, module in masked_layers(model)}
    weights = {name: plain.get_parameter(f"{name}.weight").detach().clone() for name in masks}
    for name, keep in masks.items():
        plain.get_parameter(f"{name}.weight").data.mul_(keep)
    ids = torch.arange(6, 30)[None]
    for one in (plain, model.train()):
        one(input_ids=ids, labels=ids).loss.backward()
    for name, module in masked_layers(model):
        gradient = plain.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        torch.testing.assert_close(module.scores.grad, weights[name] * gradient)


@pytest.mark.slow
def test_transformers_trainer(model: LlamaForCausalLM, tmp_path: Path) -> None:
    attach_masks(model, ratio=0.2, start="normal", ranking="absolute")
    before, weights = collect_mask(model), {name: one.clone() for name, one in build_llama().state_dict().items()}
    records = [{"input_ids": [6 + n % 9, 20, 30, 6 + n % 9], "labels": [-100, 20, 30, 6 + n % 9]} for n in range(32)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=0.05, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, adam_epsilon=1e-20,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(records)).train()
    after = collect_mask(model)
    assert any(not torch.equal(before[name], after[name]) for name in before.names())
    assert after.ratio == pytest.approx(0.2, abs=0.01)
    detach_masks(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trls_sft_trainer(model: LlamaForCausalLM, workspace: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    attach_masks(model, ratio=0.2, start="normal", ranking="absolute")
    before = collect_mask(model)
    records = [{"prompt": f"{n}+{n}?", "completion": f" {2 * n}"} for n in range(32)]
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=6, learning_rate=0.05, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, adam_epsilon=1e-20, bf16=False, max_length=64,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(workspace / "tiny"),
    )
    trainer.train()
    after = collect_mask(model)
    assert any(not torch.equal(before[name], after[name]) for name in before.names())


def test_masks_twice(model: LlamaForCausalLM) -> None:
    attach_masks(model)
    with pytest.raises(MaskingError, match="has masks already"):
        attach_masks(model)


def test_a_ratio_and_a_threshold(model: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="either a ratio, a threshold or a pattern"):
        attach_masks(model, ratio=0.1, threshold=0.0)


def test_a_model_without_masks(model: LlamaForCausalLM) -> None:
    with pytest.raises(MaskingError, match="has no masks"):
        collect_mask(model)


def test_a_pattern(model: LlamaForCausalLM) -> None:
    attach_masks(model, layers="1", pattern="2:4")
    mask = collect_mask(model)
    assert (mask.ratio, mask.metadata.ratio, mask.metadata.threshold) == (0.5, 0.5, None)
    assert all((mask[name].view(-1, 4).sum(-1) == 2).all() for name in mask.names())


@pytest.mark.parametrize("given", [{"pattern": "2:4", "ratio": 0.1}, {"pattern": "4:2"}], ids=str)
def test_a_pattern_that_cannot_be_meant(model: LlamaForCausalLM, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        attach_masks(model, **given)
