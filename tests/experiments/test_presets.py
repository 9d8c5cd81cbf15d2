from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.presets import (
    DEFAULT_FROZEN_RATIO,
    DEFAULT_PATIENCE,
    DEFAULT_RATIO,
    DEFAULT_SOFT_TRAVEL,
    DEFAULT_TRAVEL,
    DEFAULT_UPDATE_RATIO,
    SETTLED,
)
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe, with_changes
from mftctl.experiments.run_config import as_given, to_document


def test_a_null_leaves_an_option_unset() -> None:
    for section, keys in SETTLED.items():
        recipe = Recipe.model_validate({section: dict.fromkeys(keys)})
        assert recipe == Recipe()
        assert getattr(recipe, section).model_fields_set == set()


def test_defaults_do_not_count_as_given() -> None:
    options = MaskTrainOptions(preset="paper", patience=3)
    assert options.ratio == DEFAULT_RATIO
    assert options.given() == {"preset": "paper", "patience": 3}


@pytest.mark.parametrize(
    ("changes", "in_force"),
    [
        ({"preset": "paper"}, ("normal", "absolute", None, DEFAULT_RATIO, None)),
        ({"start": "kaiming"}, ("kaiming", "signed", None, DEFAULT_RATIO, DEFAULT_PATIENCE)),
        ({"ratio": 0.3}, ("weights", "signed", None, 0.3, DEFAULT_PATIENCE)),
        ({"keep": "last"}, ("weights", "signed", 0.0, None, None)),
        ({"method": "random"}, ("weights", "signed", None, DEFAULT_RATIO, DEFAULT_PATIENCE)),
        ({"threshold": -0.1, "preset": "reference"}, ("normal", "absolute", -0.1, None, None)),
    ],
    ids=str,
)
def test_a_change_updates_options_that_were_not_given(changes: dict[str, Any], in_force: tuple[object, ...]) -> None:
    changed = with_changes(parse_recipe({}), {f"mask_train.{key}": value for key, value in changes.items()})
    options = changed.mask_train
    assert (options.start, options.ranking, options.threshold, options.ratio, options.patience) == in_force


@pytest.mark.parametrize(
    ("given", "in_force"),
    [
        ({}, (DEFAULT_PATIENCE, DEFAULT_SOFT_TRAVEL)),
        ({"harden": True}, (None, DEFAULT_TRAVEL)),
        ({"harden": True, "patience": 3, "travel": 0.7}, (3, 0.7)),
    ],
    ids=str,
)
def test_soft_masks_start_as_the_identity_without_a_ratio(given: dict[str, Any], in_force: tuple[object, ...]) -> None:
    options = MaskTrainOptions.model_validate({"mask": "soft", **given})
    assert (options.start, options.ratio, options.threshold) == ("identity", None, None)
    assert (options.patience, options.travel) == in_force
    assert options.writes_multipliers == (not options.harden)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": "hard", "harden": True}, "mask_train.harden applies only to soft masks"),
        ({"max_multiplier": 2}, "mask_train.max_multiplier applies only to soft masks"),
        ({"start": "identity"}, "start: identity applies only to soft masks"),
        ({"mask": "soft", "method": "random"}, "soft masks are learned; the method is random"),
        ({"mask": "soft", "kind": "delta"}, "it applies only to kind weight"),
        ({"mask": "soft", "preset": "paper"}, "does not apply to the preset paper"),
        ({"mask": "soft", "ratio": 0.1}, "mask_train.ratio decides which weights a hard mask removes"),
        ({"mask": "soft", "threshold": 0.0}, "mask_train.threshold decides which weights a hard mask removes"),
        ({"mask": "soft", "pattern": "2:4"}, "mask_train.pattern decides which weights a hard mask removes"),
        ({"mask": "soft", "start": "normal"}, "soft masks start as the identity, not as normal"),
        ({"mask": "soft", "harden": True, "max_multiplier": 2}, "does not apply to max_multiplier 2"),
        ({"mask": "soft", "max_multiplier": 3}, "1 or 2"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_soft_masks_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MaskTrainOptions.model_validate(given)


def test_a_change_of_the_preset_keeps_given_options() -> None:
    given = {"patience": DEFAULT_PATIENCE, "start": "weights", "keep": "best"}
    changed = with_changes(parse_recipe({"mask_train": given}), {"mask_train.preset": "reference"}).mask_train
    assert (changed.patience, changed.start, changed.keep) == (DEFAULT_PATIENCE, "weights", "best")
    assert (changed.ranking, changed.threshold, changed.ratio) == ("absolute", None, DEFAULT_RATIO)


def test_groups_follow_the_preset_of_the_masks_until_they_are_given() -> None:
    paper = with_changes(parse_recipe({}), {"mask_train.preset": "paper"})
    assert paper.probe.groups == (4,)
    assert with_changes(paper, {"mask_train.preset": "default"}).probe.groups == (4, "all")
    assert with_changes(paper, {"probe.groups": [4, "all"]}).probe.groups == (4, "all")


def test_a_method_that_chooses_no_weights_has_no_ratio() -> None:
    ratios = {
        method: FftOptions.model_validate({"method": method}).ratio for method in ("gmt", "random", "hft", "full")
    }
    assert ratios == {"gmt": DEFAULT_UPDATE_RATIO, "random": DEFAULT_UPDATE_RATIO, "hft": None, "full": None}
    chosen = with_changes(parse_recipe({"fft": {"method": "gmt"}}), {"fft.method": "full"})
    assert chosen.fft.ratio is None


def test_super_tuning_freezes_most_weights_unless_a_mask_chooses_them() -> None:
    recipe = parse_recipe({"fft": {"method": "supertuning"}})
    assert recipe.fft.ratio == DEFAULT_FROZEN_RATIO
    supported = with_changes(recipe, {"fft.support": "mask.bits"})
    assert supported.fft.ratio is None
    assert parse_recipe(as_given(to_document(supported))).fft == supported.fft


def test_a_method_without_training_keeps_no_last_mask() -> None:
    assert MaskTrainOptions(preset="reference").keeps_last
    assert not MaskTrainOptions(preset="reference", method="random").keeps_last
    assert not MaskTrainOptions(keep="last", method="random").keeps_last
    assert not MaskTrainOptions().keeps_last


def test_a_drop_is_a_delta_mask_whatever_it_inherits() -> None:
    assert MaskTrainOptions().kind == MaskTrainOptions(method="magnitude").kind == "weight"
    assert MaskTrainOptions(method="drop").kind == MaskTrainOptions(method="drop", kind="delta").kind == "delta"
    inherited = as_given(to_document(Recipe()))
    assert with_changes(parse_recipe(inherited), {"mask_train.method": "drop"}).mask_train.kind == "delta"
    dropped = parse_recipe(as_given(to_document(parse_recipe({"mask_train": {"method": "drop"}}))))
    assert dropped.mask_train.kind == "delta"
    assert with_changes(dropped, {"mask_train.method": "learned"}).mask_train.kind == "weight"


@pytest.mark.parametrize("given", [{}, {"harden": True}, {"max_multiplier": 2, "travel": 0.3}], ids=str)
def test_the_configuration_of_a_soft_mask_is_read_back(given: dict[str, Any]) -> None:
    recipe = parse_recipe({"mask_train": {"mask": "soft", **given}})
    assert parse_recipe(as_given(to_document(recipe))) == recipe
