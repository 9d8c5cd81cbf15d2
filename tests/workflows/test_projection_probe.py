"""`probe --unit projection`: one group for each kind, trained or estimated, and the mask that follows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import ConfigError, Interrupted
from mftctl.experiments.model_source import Recommendation, recommendation_of
from mftctl.experiments.recipe_files import parse_recipe, with_changes
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.meta_models import count_layers, read_config
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.planning.command_memory import CommandMemory
from mftctl.workflows.planning.planned_device import PlannedDevice
from mftctl.workflows.probe import probe
from tests.workflow_fixtures import Interrupter, make_recipe, open_run
from tests.workflows.test_fast_probe import PROJECTIONS, gains_by_projection

TWO: dict[str, Any] = {
    "probe": {"unit": "projection", "data_fraction": 1.0, "layers": "1-3"},
    "mask_train__ratio": {"q_proj": 0.2, "up_proj": 0.1},
    "mask_train__max_steps": 4,
    "mask_train__val_steps": 2,
}


def probed(workspace: Path, root: Path, **changes: Any) -> tuple[Run, dict[str, Any]]:
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(root, "probe", recipe)
    run.finish(probe(recipe, source, run, Silence()))
    return run, run.record.result


@pytest.mark.slow
def test_a_kind_is_what_mask_train_learns_for_it(workspace: Path, tmp_path: Path) -> None:
    run, result = probed(workspace, tmp_path, **TWO)
    found = {group["projection"]: group for group in result["groups"]}
    assert set(found) == {"q_proj", "up_proj"}
    assert {group["layers"] for group in result["groups"]} == {"1-3"}
    assert (found["q_proj"]["weights"], found["up_proj"]["weights"]) == (3 * 32 * 32, 3 * 64 * 32)
    changes = [group["change"] for group in result["groups"]]
    assert changes == sorted(changes)
    best = result["groups"][0]["projection"]
    assert (result["recommended_layers"], result["recommended_projection"]) == ("1-3", best)
    recipe = make_recipe(workspace, **{**TWO, "mask_train__ratio": {"up_proj": 0.1}, "mask_train__layers": "1-3"})
    masked, source = open_run(tmp_path, "mask-train", recipe)
    assert found["up_proj"]["best_loss"] == mask_train(recipe, source, masked, Silence()).document()["best_loss"]
    assert recommendation_of(run) == Recommendation("1-3", run.name, best, "both")


@pytest.mark.slow
def test_a_finished_kind_is_not_trained_again(workspace: Path, tmp_path: Path) -> None:
    class InSecondGroup(Interrupter):
        def note(self, text: str) -> None:
            self.step = 1 if text == "Group 2 of 2: up_proj" else -1

    recipe = make_recipe(workspace, **TWO)
    run, source = open_run(tmp_path, "probe", recipe)
    with pytest.raises(Interrupted):
        probe(recipe, source, run, InSecondGroup(-1))
    stored = run.folder / "groups" / "q_proj" / "outcome.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "start_loss": 123.0}))
    groups = probe(recipe, source, run, Silence(), resume=True).document()["groups"]
    starts = {group["projection"]: group["start_loss"] for group in groups}
    assert starts["q_proj"] == 123.0
    assert starts["up_proj"] < 100


@pytest.mark.slow
def test_the_estimate_adds_up_each_kind(workspace: Path, tmp_path: Path) -> None:
    probe_options = {"unit": "projection", "fast": True, "data_fraction": 1.0, "layers": "0,2"}
    _, result = probed(workspace, tmp_path, probe=probe_options, mask_train__ratio=0.2)
    expected = dict.fromkeys(PROJECTIONS, 0.0)
    for (layer, name), (_, gains) in gains_by_projection(workspace).items():
        if layer in (0, 2):
            highest = gains.flatten().sort(descending=True).values[: removed_count(gains.numel(), 0.2)]
            expected[name.rpartition(".")[2]] -= float(highest.sum())
    found = {group["projection"]: group["change"] for group in result["groups"]}
    assert found == pytest.approx(expected, rel=1e-3)
    assert [group["change"] for group in result["groups"]] == sorted(found.values())


def test_the_memory_of_a_probe_is_that_of_the_largest_kind(workspace: Path) -> None:
    config = read_config(str(workspace / "tiny"))
    memory = CommandMemory("probe", config, count_layers(config), PlannedDevice("cuda", has_bf16=False))
    found = memory.estimate(make_recipe(workspace, probe={"unit": "projection"}, mask_train__preset="paper"))
    assert found.scores_bytes == 4 * 4 * 64 * 32
    fast = memory.estimate(make_recipe(workspace, probe={"unit": "head", "fast": True}))
    assert fast.gradients_bytes == 4 * 4 * (2 * 32 * 32 + 2 * 16 * 32)


def test_options_that_name_projections_take_precedence() -> None:
    found = Recommendation("0-3", "002-probe", "q_proj", "both")
    options = parse_recipe({}).mask_train
    assert found.settings(options) == {"mask_train.layers": "0-3", "mask_train.projections": ["q_proj"]}
    for section in ({"projections": ["v_proj"]}, {"ratio": {"v_proj": 0.1}}, {"target": "mlp"}, {"method": "drop"}):
        own = parse_recipe({"mask_train": section}).mask_train
        assert found.settings(own) == {"mask_train.layers": "0-3"}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"probe": {"unit": "head"}}, "probe.unit: head needs probe.fast"),
        ({"probe": {"unit": "neuron"}}, "probe.unit: neuron needs probe.fast"),
        ({"probe": {"unit": "projection", "groups": [4]}}, "probe.groups applies only to unit layer"),
        ({"mask_train": {"projections": []}}, "at least 1 value expected"),
        ({"mask_train": {"projections": ["q_proj"], "ratio": {"q_proj": 0.1}}}, "either mask_train.projections or"),
        ({"mask_train": {"projections": ["q_proj"], "method": "drop"}}, "does not apply to the method drop"),
    ],
    ids=str,
)
def test_settings_that_exclude_each_other(document: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_recipe(document)


def test_a_unit_takes_the_place_of_a_recipes_groups() -> None:
    recipe = with_changes(parse_recipe({"probe": {"groups": [8]}}), {"probe.unit": "projection"})
    assert recipe.probe.unit == "projection"
    assert with_changes(parse_recipe({"probe": {"groups": [8]}}), {"probe.unit": "layer"}).probe.groups == (8,)
    back = with_changes(recipe, {"probe.groups": [2]}).probe
    assert (back.unit, back.groups) == ("layer", (2,))
