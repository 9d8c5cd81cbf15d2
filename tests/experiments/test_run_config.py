from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe, parse_recipe
from mftctl.experiments.run_config import NOT_GIVEN, as_given, in_force, to_document
from mftctl.experiments.run_folder import create_run, load_run

EARLIER = {
    "model": "m",
    "fft": {"method": "gmt", "eval_steps": 8},
    "probe": {"fast": False},
    "mask_train": {"preset": "paper", "eval_every": 5, "eval_limit": 7, "threshold": -0.1},
}
"""A configuration as earlier versions wrote it: what was given, in other names."""


def write_earlier(root: Path, config: dict[str, Any]) -> Path:
    """A run folder with the given configuration."""
    folder = create_run(root, "mask-train", {}).folder
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "config": config}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_document_has_all_settings_and_names_the_defaults() -> None:
    document = to_document(parse_recipe({"mask_train": {"preset": "paper", "keep": "best"}, "fft": {"method": "gmt"}}))
    section = document["mask_train"]
    assert (section["start"], section["ranking"], section["ratio"]) == ("normal", "absolute", 0.1)
    assert (document["fft"]["ratio"], document["probe"]["groups"]) == (0.2, [4])
    assert document[NOT_GIVEN] == [
        "fft.ratio",
        "fft.learning_rate",
        "probe.groups",
        "mask_train.kind",
        "mask_train.learn_from",
        "mask_train.ratio",
        "mask_train.ranking",
        "mask_train.start",
        "mask_train.travel",
    ]


def test_given_settings_are_read_back_from_a_document() -> None:
    recipe = parse_recipe({"mask_train": {"preset": "paper", "start": "normal"}, "probe": {"groups": [8]}})
    again = parse_recipe(to_document(recipe))
    assert again == recipe
    for name, keys in (("mask_train", {"start"}), ("probe", {"groups"}), ("fft", set())):
        section = getattr(again, name)
        assert section.model_fields_set & {"start", "ranking", "ratio", "threshold", "groups"} == keys


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "in_force"),
    [
        ({"mask_train.preset": "paper"}, ("normal", None, 0.1)),
        ({"mask_train.method": "random"}, ("weights", None, 0.1)),
        ({"mask_train.start": "kaiming"}, ("kaiming", None, 0.1)),
        ({"mask_train.ratio": 0.4}, ("weights", None, 0.4)),
        ({}, ("weights", 0.0, None)),
    ],
    ids=str,
)
def test_a_command_that_continues_a_configuration_can_change_the_preset(
    tmp_path: Path, options: dict[str, Any], in_force: tuple[object, ...]
) -> None:
    run = create_run(tmp_path, "mask-train", to_document(Recipe()))
    for recipe in (
        load_recipe(base=load_run(run.folder).record.config, options=options),
        load_recipe(str(run.folder / "config.yaml"), options=options),
    ):
        options_in_force = recipe.mask_train
        assert (options_in_force.start, options_in_force.threshold, options_in_force.ratio) == in_force


def test_a_value_that_was_changed_by_hand_counts_as_given() -> None:
    document = to_document(parse_recipe({"mask_train": {"preset": "paper"}}))
    document["mask_train"]["ratio"] = 0.3
    recipe = parse_recipe(document)
    assert recipe.mask_train.ratio == 0.3
    assert "ratio" in recipe.mask_train.given()
    assert "start" not in recipe.mask_train.given()


@pytest.mark.parametrize("listed", ["mask_train.start", [1], {"mask_train.start": True}])
def test_settings_not_given_are_a_list_of_keys(listed: object) -> None:
    with pytest.raises(ConfigError, match="must be a list of keys") as caught:
        as_given({NOT_GIVEN: listed})
    assert caught.value.key == NOT_GIVEN


def test_unknown_keys_among_those_not_given_change_nothing() -> None:
    assert as_given({NOT_GIVEN: ["model", "fft.epochs", "a.b"], "model": "m", "fft": {"epochs": 2.0}}) == {
        "model": "m",
        "fft": {"epochs": 2.0},
    }


def test_an_invalid_configuration_is_left_to_the_recipe_check() -> None:
    document = {NOT_GIVEN: ["mask_train.start"], "mask_train": {"start": "normal", "epochs": -1.0}}
    assert as_given(document) == {"mask_train": {"start": "normal", "epochs": -1.0}}
    assert in_force({"mask_train": {"epochs": -1.0}}) == {"mask_train": {"epochs": -1.0}}
    assert in_force({"mask_train": None, "fft": "x"}) == {"mask_train": None, "fft": "x"}


def test_an_older_run_is_read_with_its_settings_under_current_names(tmp_path: Path) -> None:
    folder = write_earlier(tmp_path, EARLIER)
    config = load_run(folder).record.config
    assert config["fft"] == {"method": "gmt", "val_steps": 8, "ratio": 0.2, "learning_rate": 2e-5}
    assert config["mask_train"] == {
        "preset": "paper",
        "benchmark_every": 5,
        "benchmark_limit": 7,
        "threshold": -0.1,
        "kind": "weight",
        "learn_from": "all",
        "ranking": "absolute",
        "start": "normal",
        "keep": "best",
        "travel": 1.6,
    }
    assert config["probe"]["groups"] == [4]
    resumed, again = load_recipe(base=config), load_recipe(str(folder / "config.yaml"))
    assert resumed == again == parse_recipe(config)
    assert resumed.mask_train.given().keys() == {"preset", "benchmark_every", "benchmark_limit", "threshold"}


def test_older_values_of_start_and_ranking_are_read_under_current_names(tmp_path: Path) -> None:
    given = {"preset": "reference", "start": "magnitude", "ranking": "magnitude", "method": "learned"}
    config = load_run(write_earlier(tmp_path, {"mask_train": given})).record.config
    assert (config["mask_train"]["start"], config["mask_train"]["ranking"]) == ("weights", "absolute")
    baseline = {"mask_train": {"method": "magnitude"}}
    assert load_run(write_earlier(tmp_path, baseline)).record.config["mask_train"]["method"] == "magnitude"


def test_a_recipe_outside_a_run_folder_has_current_names_only(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(EARLIER))
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(tmp_path / "config.yaml"))
    assert "fft.eval_steps: unknown key; did you mean val_steps?" in caught.value.problems


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"fft": {"eval_steps": 1}}, "fft.eval_steps: unknown key; did you mean val_steps?"),
        ({"mask_train": {"eval_every": 1}}, "mask_train.eval_every: unknown key; did you mean benchmark_every?"),
        ({"fft": {"eval_limit": 1}}, "fft.eval_limit: unknown key; did you mean benchmark_limit?"),
        (
            {"mask_train": {"start": "magnitude"}},
            "mask_train.start: input should be 'weights', 'normal', 'kaiming', 'constant' or 'identity', "
            "got 'magnitude'; "
            "did you mean weights?",
        ),
        (
            {"mask_train": {"ranking": "magnitude"}},
            "mask_train.ranking: input should be 'absolute' or 'signed', got 'magnitude'; did you mean absolute?",
        ),
    ],
)
def test_an_old_name_in_a_recipe_is_refused_with_the_current_one(document: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(document)
    assert caught.value.problems == (problem,)
