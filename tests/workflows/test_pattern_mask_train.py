"""`mask-train --pattern`: every method keeps N of each M inputs, on both layouts of a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mftctl.errors import ConfigError, MaskingError
from mftctl.experiments.recipe_files import parse_recipe, with_changes
from mftctl.masking.mask import Mask
from mftctl.masking.pattern import Pattern
from mftctl.masking.targets import find_targets
from mftctl.workflows.planning.mask_sizes import masked_tensors
from tests.conftest import build_llama, build_tokenizer
from tests.masking.test_pattern import keep_by_sorting
from tests.workflow_fixtures import make_recipe
from tests.workflows.test_mask_train import learn, validation_loss

SHORT: dict[str, Any] = {"mask_train__max_steps": 4, "mask_train__val_steps": 2, "mask_train__preset": "default"}


def require_blocks(mask: Mask, pattern: Pattern, inputs_dim: int = -1) -> None:
    for name in mask.names():
        kept = pattern.blocks(mask[name], inputs_dim).sum(-1)
        assert (kept == pattern.kept).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"preset": "paper"}, {"low_memory": True}], ids=str)
def test_a_learned_mask(workspace: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    changes = {**SHORT, **{f"mask_train__{key}": value for key, value in settings.items()}}
    _, result, mask = learn(workspace, tmp_path, mask_train__pattern="2:4", **changes)
    require_blocks(mask, Pattern(2, 4))
    assert (mask.ratio, mask.metadata.ratio, mask.metadata.threshold) == (0.5, 0.5, None)
    assert validation_loss(workspace, workspace / "tiny", mask) == pytest.approx(result["best_loss"], abs=1e-6)
    assert result["best_loss"] <= result["start_loss"]


def test_the_smallest_weights_of_each_block(workspace: Path, tmp_path: Path) -> None:
    _, _, mask = learn(workspace, tmp_path, mask_train__method="magnitude", mask_train__pattern="1:4", **SHORT)
    model = build_llama()
    for name in mask.names():
        weight = model.get_parameter(name).detach().abs().numpy()
        assert torch.equal(mask[name], torch.from_numpy(keep_by_sorting(weight, Pattern(1, 4))))


def test_random_weights_of_each_block(workspace: Path, tmp_path: Path) -> None:
    changes = {**SHORT, "mask_train__method": "random", "mask_train__pattern": "4:8"}
    masks = [learn(workspace, tmp_path / str(seed), seed=seed, **changes) for seed in (0, 1)]
    for _, _, mask in masks:
        require_blocks(mask, Pattern(4, 8))
    first, second = (mask for _, _, mask in masks)
    assert any(not torch.equal(first[name], second[name]) for name in first.names())


@pytest.mark.slow
def test_weights_stored_with_their_inputs_first(workspace: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=102, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save_pretrained(tmp_path / "gpt2")
    changes = {**SHORT, "model": str(tmp_path / "gpt2"), "mask_train__layers": "all"}
    _, _, mask = learn(workspace, tmp_path, mask_train__pattern="2:4", **changes)
    require_blocks(mask, Pattern(2, 4), inputs_dim=-2)


def test_a_pattern_that_does_not_divide_a_tensor_ends_it_before_training(workspace: Path, tmp_path: Path) -> None:
    for method in ("learned", "magnitude"):
        with pytest.raises(MaskingError, match="a multiple of 5 inputs, for the pattern 2:5") as error:
            learn(workspace, tmp_path / method, mask_train__method=method, mask_train__pattern="2:5", **SHORT)
        assert error.value.key == "model.layers.1.self_attn.q_proj"
    options = make_recipe(workspace, mask_train__pattern="2:5", **SHORT).mask_train
    with pytest.raises(MaskingError, match="5 inputs") as error:  # as `validate` says
        masked_tensors(find_targets(build_llama()), options)
    assert error.value.key == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"ratio": 0.1}, "either a ratio, a threshold or a pattern"),
        ({"threshold": 0.0}, "either a ratio, a threshold or a pattern"),
        ({"method": "drop"}, "applies only to masks of kind weight"),
        ({"kind": "delta"}, "applies only to masks of kind weight"),
        ({"method": "magnitude", "unit": "row"}, "does not apply to unit: row"),
        ({"pattern": "4:2"}, "a pattern is N:M with N below M"),
    ],
    ids=str,
)
def test_settings_that_exclude_a_pattern(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_recipe({"mask_train": {"pattern": "2:4", **settings}})


def test_a_ratio_takes_the_place_of_a_recipes_pattern() -> None:
    recipe = parse_recipe({"mask_train": {"pattern": "2:4"}})
    changed = with_changes(recipe, {"mask_train.ratio": 0.2}).mask_train
    assert (changed.pattern, changed.ratio) == (None, 0.2)
    back = with_changes(parse_recipe({"mask_train": {"ratio": 0.2}}), {"mask_train.pattern": "2:4"}).mask_train
    assert (back.ratio, back.threshold, str(back.blocks)) == (None, None, "2:4")
