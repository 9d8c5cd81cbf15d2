"""Probing: every group once, best first, and no group repeated after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.errors import Interrupted, MaskingError
from mftctl.experiments.recipe import Recipe
from mftctl.progress import Silence
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from tests.workflow_fixtures import Interrupter, make_recipe, open_run


@pytest.mark.slow
def test_ranks_the_groups_and_recommends_the_best(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "probe", recipe)
    result = probe(recipe, source, run, Silence()).document()
    losses = [group["best_loss"] for group in result["groups"]]
    assert {group["layers"] for group in result["groups"]} == {"0-1", "2-3"}
    assert losses == sorted(losses)
    assert result["recommended_layers"] == result["groups"][0]["layers"]
    assert all(
        group["change"] == pytest.approx(group["best_loss"] - result["unmasked_loss"]) for group in result["groups"]
    )
    assert run.record.inputs["train_records"] == 24


@pytest.mark.slow
def test_a_group_is_what_mask_train_learns_on_the_same_data(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, probe__data_fraction=1.0, mask_train__layers="2-3")
    run, source = open_run(tmp_path, "probe", recipe)
    found = {
        group["layers"]: group["best_loss"] for group in probe(recipe, source, run, Silence()).document()["groups"]
    }
    run, source = open_run(tmp_path, "mask-train", recipe)
    assert found["2-3"] == mask_train(recipe, source, run, Silence()).document()["best_loss"]


@pytest.mark.slow
def test_groups_reuse_the_hidden_states_of_the_layers_below_them(workspace: Path, tmp_path: Path) -> None:
    found = []
    for limit_gb in (0.0, None):
        recipe = make_recipe(workspace, probe__groups=[1, 2], mask_train__prefix_cache_gb=limit_gb)
        run, source = open_run(tmp_path, "probe", recipe)
        found.append(probe(recipe, source, run, Silence()).document())
    assert found[0]["groups"] == found[1]["groups"]
    assert found[0]["prefix_reuse"]["reused"] == 0
    assert found[1]["prefix_reuse"]["reused"] > 0


@pytest.mark.slow
def test_a_finished_group_is_not_trained_again(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace)
    expected_run, source = open_run(tmp_path, "probe", recipe)
    expected = probe(recipe, source, expected_run, Silence()).document()

    class InSecondGroup(Interrupter):
        def note(self, text: str) -> None:
            self.step = 5 if text.startswith("Group 2") else -1

    run, source = open_run(tmp_path, "probe", recipe)
    with pytest.raises(Interrupted) as caught:
        probe(recipe, source, run, InSecondGroup(-1))
    assert str(caught.value.hint).startswith("mftctl probe --resume --runs ")
    first = run.folder / "groups" / "0-1" / "outcome.json"
    marked = {**json.loads(first.read_text()), "start_loss": 123.0}
    first.write_text(json.dumps(marked))
    resumed = probe(recipe, source, run, Silence(), resume=True).document()
    by_layers = {group["layers"]: group for group in resumed["groups"]}
    assert by_layers["0-1"]["start_loss"] == 123.0
    assert by_layers["2-3"] == next(group for group in expected["groups"] if group["layers"] == "2-3")


@pytest.mark.slow
def test_several_group_sizes_and_chosen_layers(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, probe__groups=[1, 2], probe__layers="2-3", mask_train__max_steps=2)
    run, source = open_run(tmp_path, "probe", recipe)
    result = probe(recipe, source, run, Silence()).document()
    assert sorted(group["layers"] for group in result["groups"]) == ["2", "2-3", "3"]


@pytest.mark.slow
def test_all_layers_are_among_the_groups_except_for_the_paper(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, probe__groups=[2, "all"], mask_train__max_steps=2)
    run, source = open_run(tmp_path, "probe", recipe)
    assert {group["layers"] for group in probe(recipe, source, run, Silence()).document()["groups"]} == {
        "0-1",
        "2-3",
        "0-3",
    }
    assert Recipe(probe={}).probe.groups == (4, "all")
    assert Recipe(mask_train={"preset": "paper"}).probe.groups == (4,)


@pytest.mark.slow
def test_a_group_larger_than_the_model(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, probe__groups=[8])
    run, source = open_run(tmp_path, "probe", recipe)
    with pytest.raises(MaskingError, match="cannot have that many"):
        probe(recipe, source, run, Silence())
