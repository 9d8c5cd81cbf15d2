"""Learning a mask by evidence: rounds that validation accepts, resumption, and what confirms the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.config import MaskTrainOptions
from mftctl.errors import Interrupted
from mftctl.mask_training import mask_train
from mftctl.mask_validation import split_validation_records
from mftctl.masking.bits import Mask, load_mask
from mftctl.masking.selection import removed_count
from mftctl.preparation import prepare_training
from mftctl.progress import Silence
from mftctl.runs import Run
from tests.test_mask_training import CONFIRMING, learn, validation_loss
from tests.workflow_fixtures import Interrupter, make_recipe, open_run

EVIDENCE = {"mask_train__preset": "evidence", "mask_train__batch_size": 2, "mask_train__max_steps": 24}


@pytest.fixture(scope="module")
def undisturbed(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], Mask]:
    return learn(workspace, tmp_path_factory.mktemp("evidence"), **EVIDENCE)


def test_each_round_stays_only_if_the_loss_fell(undisturbed: tuple[Run, dict[str, Any], Mask]) -> None:
    run, result, mask = undisturbed
    losses = {line["step"]: line["eval_loss"] for line in run.training.metrics() if "eval_loss" in line}
    assert losses[0] == result["start_loss"] == result["unmasked_loss"]
    best, removed = losses[0], 0
    for turned in result["flips"]["rounds"]:
        loss = losses[turned["step"]]
        assert turned["measured"] == pytest.approx(best - loss)
        assert turned["stays"] == (loss < best)
        if turned["stays"]:
            best, removed = loss, removed + turned["removed"] - turned["restored"]
    assert result["flips"]["rounds"]
    assert mask.removed == removed > 0
    assert best == result["best_loss"] < result["unmasked_loss"]
    assert losses[result["best_step"]] == best


def test_the_flips_are_told(undisturbed: tuple[Run, dict[str, Any], Mask]) -> None:
    _, result, mask = undisturbed
    told = result["flips"]
    rounds = told["rounds"]
    assert told["turned"] == sum(turned["removed"] + turned["restored"] for turned in rounds)
    assert told["turned"] * (1 - told["undone_share"]) == pytest.approx(mask.removed)
    assert told["promised"] == pytest.approx(sum(turned["promised"] for turned in rounds))
    assert result["ratio"] == mask.removed / mask.weights
    assert mask.metadata.ratio is None
    assert mask.metadata.method == "learned"


def test_other_records_confirm_the_mask(undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path) -> None:
    _, result, mask = undisturbed
    found = result["confirmation"]
    recipe = make_recipe(workspace)
    records = prepare_training(recipe, str(recipe.model), max_length_tokens=1024).validation
    deciding, confirming = split_validation_records(records, MaskTrainOptions())
    assert found["records"] == len(confirming) == len(deciding) == 6
    assert not {id(record) for record in deciding} & {id(record) for record in confirming}
    for name, applied in (("unmasked_loss", None), ("masked_loss", mask)):
        expected = validation_loss(workspace, workspace / "tiny", applied, CONFIRMING)
        assert found[name] == pytest.approx(expected, abs=1e-6)
    assert found["change"] == pytest.approx(found["masked_loss"] - found["unmasked_loss"], abs=1e-6)
    assert found["confirmed"] == (found["high"] < 0)


@pytest.mark.parametrize("step", [3, 8, 13])
def test_resuming_gives_the_identical_mask(
    undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path, tmp_path: Path, step: int
) -> None:
    _, expected, mask = undisturbed
    recipe = make_recipe(workspace, **EVIDENCE)
    run, source = open_run(tmp_path, "mask-train", recipe)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, run, Interrupter(step))
    result = mask_train(recipe, source, run, Silence(), resume=True)
    resumed = load_mask(Path(result["mask"]))
    assert all(torch.equal(resumed[name], mask[name]) for name in mask.names())
    for key in ("unmasked_loss", "start_loss", "best_loss", "best_step", "steps", "tokens", "flips", "confirmation"):
        assert result[key] == expected[key], key


def test_a_ratio_is_kept_exactly(workspace: Path, tmp_path: Path) -> None:
    _, result, mask = learn(workspace, tmp_path, **EVIDENCE, mask_train__ratio=0.1)
    for name in mask.names():
        assert mask.records[name].removed == removed_count(mask[name].numel(), 0.1)
    assert mask.metadata.ratio == 0.1
    assert result["best_loss"] < result["start_loss"]


def test_without_a_gain_the_mask_removes_nothing(workspace: Path, tmp_path: Path) -> None:
    """No evidence can be worth a million standard errors."""
    recipe = make_recipe(workspace, **EVIDENCE, mask_train__significance=1e6)
    run, source = open_run(tmp_path, "mask-train", recipe)
    listener = Interrupter(-1)
    result = mask_train(recipe, source, run, listener)
    assert (result["removed"], result["best_step"], result["helps"], result["confirmation"]) == (0, 0, False, None)
    assert result["best_loss"] == result["unmasked_loss"]
    assert listener.validations == 1  # where nothing is turned, the loss is known
    assert any("No mask was better" in note for note in listener.notes)
    assert any("gathering evidence" in note for note in listener.notes)


def test_it_stops_when_nothing_has_lowered_the_loss_for_a_while(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **EVIDENCE, mask_train__significance=1e6, mask_train__patience=2)
    run, source = open_run(tmp_path, "mask-train", recipe)
    assert mask_train(recipe, source, run, Silence())["steps"] == 8
