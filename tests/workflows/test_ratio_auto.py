"""`mask-train --ratio auto`: an exact budget over all tensors, by gains computed separately, resumed identically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.errors import ConfigError, Interrupted, RunError
from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.recipe_files import parse_recipe, with_changes
from mftctl.masking.checkpoints.meta_models import count_layers, read_config
from mftctl.masking.mask import load_mask
from mftctl.masking.selection import removed_count
from mftctl.masking.targets import find_targets
from mftctl.progress import Silence
from mftctl.training.mask_search import load_frozen_model, prepare_mask_training
from mftctl.workflows.mask_train import _ratios, mask_train
from mftctl.workflows.planning.command_memory import CommandMemory
from mftctl.workflows.planning.planned_device import PlannedDevice
from tests.masking.test_budget import counts_by_sorting
from tests.workflow_fixtures import Interrupter, make_recipe, open_run
from tests.workflows.test_fast_probe import gains_by_projection
from tests.workflows.test_mask_train import learn

AUTO: dict[str, Any] = {"mask_train__ratio": "auto", "mask_train__preset": "default", "mask_train__layers": "1-2"}


@pytest.mark.slow
def test_the_budget_is_exact_and_follows_the_gains(workspace: Path, tmp_path: Path) -> None:
    changes = {**AUTO, "mask_train__max_steps": 2, "mask_train__val_steps": 1, "mask_train__budget": 0.17}
    run, result, mask = learn(workspace, tmp_path, **changes)
    gains = {
        f"model.layers.{layer}.{name}.weight": gains
        for (layer, name), (_, gains) in gains_by_projection(workspace).items()
        if layer in (1, 2)
    }
    expected = dict(zip(gains, counts_by_sorting(list(gains.values()), 0.17), strict=True))
    removed = {name: mask[name].numel() - int(mask[name].sum()) for name in mask.names()}
    assert sum(removed.values()) == removed_count(mask.weights, 0.17) == mask.removed
    for name, count in expected.items():  # sums of gradients in another order differ in the last digits
        assert removed[name] == pytest.approx(count, abs=3)
    assert len(set(result["layer_ratios"].values())) == 2
    ratios = result["tensor_ratios"]
    assert {name: removed_count(mask[name].numel(), ratios[name]) for name in mask.names()} == removed
    assert max(ratios.values()) <= 0.5
    numbers = [removed[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (1, 2)]
    assert result["projection_ratios"]["up_proj"] == sum(numbers) / (2 * 64 * 32)
    assert mask.metadata.ratio is None
    assert run.record.config["mask_train"]["ratio"] == "auto"


@pytest.mark.slow
def test_a_mask_is_resumed_bit_for_bit_with_the_stored_ratios(workspace: Path, tmp_path: Path) -> None:
    _, _, expected = learn(workspace, tmp_path / "whole", **AUTO)
    recipe = make_recipe(workspace, **AUTO)
    run, source = open_run(tmp_path / "stopped", "mask-train", recipe)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, run, Interrupter(6))
    stored = (run.folder / "ratios.json").read_bytes()
    listener = Interrupter(-1)
    resumed = load_mask(Path(mask_train(recipe, source, run, listener, resume=True).document()["mask"]))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected.names())
    assert (run.folder / "ratios.json").read_bytes() == stored


@pytest.mark.slow
def test_ratios_of_other_tensors_are_refused(workspace: Path, tmp_path: Path) -> None:
    changes = {**AUTO, "mask_train__method": "magnitude"}
    run, result, mask = learn(workspace, tmp_path, **changes)
    assert mask.removed == removed_count(mask.weights, 0.1)
    weights = {name: mask[name].numel() for name in mask.names()}
    assert {name: removed_count(weights[name], result["tensor_ratios"][name]) for name in weights} == {
        name: weights[name] - int(mask[name].sum()) for name in weights
    }
    path = run.folder / "ratios.json"
    path.write_text(json.dumps({"ratios": {"other": 0.1}}))
    recipe = make_recipe(workspace, **changes)
    again, source = open_run(tmp_path, "mask-train", recipe)
    (again.folder / "ratios.json").write_bytes(path.read_bytes())
    with pytest.raises(RunError, match="of other projections"):
        mask_train(recipe, source, again, Silence())
    (again.folder / "ratios.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        mask_train(recipe, source, again, Silence())


@pytest.mark.slow
def test_processes_that_share_their_weights(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **AUTO)
    run, source = open_run(tmp_path, "mask-train", recipe)
    prepared = prepare_mask_training(recipe, source, run, Silence(), 1.0)
    model = load_frozen_model(prepared.inputs, recipe.mask_train)
    targets = find_targets(model, [1])
    with pytest.raises(ConfigError, match="needs whole weights") as error:
        _ratios(model, targets, recipe.mask_train, prepared, run, Silence(), has_values=False)
    assert error.value.key == "mask_train.ratio"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"threshold": 0.0}, "either a ratio, a threshold or a pattern"),
        ({"pattern": "2:4"}, "either a ratio, a threshold or a pattern"),
        ({"method": "drop"}, "methods learned and magnitude; the method is drop"),
        ({"method": "random"}, "methods learned and magnitude; the method is random"),
        ({"kind": "delta"}, "applies only to kind weight"),
        ({"method": "magnitude", "unit": "row"}, "does not apply to unit: row"),
        ({"budget": 0.6}, "less than or equal to 0.5"),
        ({"ratio": 0.2, "budget": 0.1}, "budget applies only to ratio auto"),
    ],
    ids=str,
)
def test_settings_that_exclude_a_budget(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_recipe({"mask_train": {"ratio": "auto", **settings}})


def test_a_ratio_takes_the_place_of_a_budget() -> None:
    recipe = parse_recipe({"mask_train": {"ratio": "auto", "budget": 0.2}})
    for changes in ({"ratio": 0.3}, {"threshold": 0.0}, {"pattern": "2:4"}):
        changed = with_changes(recipe, {f"mask_train.{key}": value for key, value in changes.items()}).mask_train
        assert (changed.budget, changed.shared_budget) == (None, None)
    again = with_changes(recipe, {"mask_train.ratio": "auto"}).mask_train
    assert (again.budget, again.shared_budget, again.threshold) == (0.2, 0.2, None)
    assert parse_recipe({"mask_train": {"ratio": "auto"}}).mask_train.shared_budget == 0.1


def test_keys_of_earlier_runs_are_unchanged() -> None:
    recipe = parse_recipe({"model": "m"})
    assert {"budget", "projections"}.isdisjoint(deciding_keys(recipe, "mask-train")["mask_train"])
    assert "unit" not in deciding_keys(recipe, "probe")["probe"]
    changed = with_changes(recipe, {"mask_train.ratio": "auto", "mask_train.budget": 0.2})
    assert deciding_keys(changed, "mask-train")["mask_train"]["budget"] == 0.2


@pytest.mark.slow
def test_the_memory_of_the_gradient_pass_counts(workspace: Path) -> None:
    config = read_config(str(workspace / "tiny"))
    memory = CommandMemory("mask-train", config, count_layers(config), PlannedDevice("cuda", has_bf16=False))
    magnitude = make_recipe(workspace, mask_train__method="magnitude", mask_train__layers="all")
    auto = with_changes(magnitude, {"mask_train.ratio": "auto"})
    without, found = memory.estimate(magnitude), memory.estimate(auto)
    assert found.gradients_bytes > 0
    assert found.peak_bytes > without.peak_bytes
    learned = with_changes(auto, {"mask_train.method": "learned"})
    assert [plan.adds_up for plan in memory.plans(learned)] == [True, False]
    uniform = with_changes(learned, {"mask_train.ratio": 0.1})
    assert memory.estimate(learned).peak_bytes >= memory.estimate(uniform).peak_bytes
