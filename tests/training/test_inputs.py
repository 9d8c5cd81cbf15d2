"""Preparation of training data for the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mftctl.errors import ConfigError, ModelError
from mftctl.training.inputs import prepare_training
from tests.workflow_fixtures import make_recipe


def test_separate_validation_data(workspace: Path) -> None:
    inputs = prepare_training(make_recipe(workspace), str(workspace / "tiny"), max_length_tokens=64)
    assert (len(inputs.train), len(inputs.validation)) == (48, 12)
    assert inputs.summary()["train_answer_tokens"] == sum(record.answer_tokens for record in inputs.train)


@pytest.mark.slow
def test_validation_split_off(workspace: Path) -> None:
    recipe = make_recipe(workspace, val_data=[], val_fraction=0.25)
    inputs = prepare_training(recipe, str(workspace / "tiny"), max_length_tokens=64)
    whole = prepare_training(make_recipe(workspace), str(workspace / "tiny"), max_length_tokens=64)
    assert (len(inputs.train), len(inputs.validation)) == (36, 12)
    places = {record.where for record in (*inputs.train, *inputs.validation)}
    assert places == {record.where for record in whole.train}


def test_a_fraction_is_of_the_training_part_alone(workspace: Path) -> None:
    recipe = make_recipe(workspace)
    inputs = prepare_training(recipe, str(workspace / "tiny"), max_length_tokens=64, data_fraction=0.25)
    assert (len(inputs.train), len(inputs.validation)) == (12, 12)


def test_a_mixture_with_counts(workspace: Path) -> None:
    recipe = make_recipe(workspace, data=[f"{workspace}/train.jsonl=5", f"{workspace}/test.jsonl=3"])
    inputs = prepare_training(recipe, str(workspace / "tiny"), max_length_tokens=64)
    assert [Path(record.where.split(":")[0]).name for record in inputs.train] == ["train.jsonl"] * 5 + [
        "test.jsonl"
    ] * 3


def test_no_data(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="needs data"):
        prepare_training(make_recipe(workspace, data=[]), str(workspace / "tiny"), max_length_tokens=64)


def test_no_model(workspace: Path) -> None:
    with pytest.raises(ModelError):
        prepare_training(make_recipe(workspace), str(workspace / "missing"), max_length_tokens=64)
