"""Mask training with default settings: scores start at the weights' magnitudes, with a threshold of 0."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.errors import Interrupted
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.tensors import read_tensor, tensor_index
from mftctl.masking.mask import Mask, load_mask
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.training import loop
from mftctl.training.held_out import split_validation_records
from mftctl.training.inputs import prepare_training
from mftctl.workflows.mask_train import mask_train
from tests.workflow_fixtures import Interrupter, make_recipe, open_run
from tests.workflows.test_mask_train import CONFIRMING, learn, validation_loss

DEFAULT = {"mask_train__preset": "default", "mask_train__learning_rate": 3e-3}


@pytest.fixture(scope="module")
def undisturbed(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], Mask]:
    return learn(workspace, tmp_path_factory.mktemp("default"), **DEFAULT)


@pytest.mark.slow
def test_it_starts_unmasked_and_lowers_the_loss(undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path) -> None:
    _, result, mask = undisturbed
    assert result["start_loss"] == result["unmasked_loss"]
    assert validation_loss(workspace, workspace / "tiny", mask) == pytest.approx(result["best_loss"], abs=1e-6)
    assert result["best_loss"] < result["unmasked_loss"]
    assert result["removed"] == mask.removed > 0
    assert (mask.metadata.method, mask.metadata.ratio, mask.metadata.threshold) == ("learned", None, 0.0)
    assert result["learning_rate"] == pytest.approx(3e-3)


@pytest.mark.slow
def test_the_smallest_weights_are_removed_first(undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path) -> None:
    _, _, mask = undisturbed
    index = tensor_index(workspace / "tiny")
    for name in mask.names():
        sizes = read_tensor(index[name]).float().abs()
        # Adam moves about one learning rate per step; the schedule's mean is half of its peak.
        assert sizes[~mask[name]].max() < 12 * 3e-3
        assert sizes[~mask[name]].mean() < sizes.mean()


@pytest.mark.slow
def test_the_unmasked_model_is_measured_once(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **DEFAULT)
    run, source = open_run(tmp_path, "mask-train", recipe)
    listener = Interrupter(-1)
    result = mask_train(recipe, source, run, listener).document()
    assert result["confirmation"]
    assert listener.validations == 1 + 3 + 2  # one unmasked, three during training, two that confirm


@pytest.mark.slow
def test_other_records_confirm_the_mask(undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path) -> None:
    _, result, mask = undisturbed
    found = result["confirmation"]
    recipe = make_recipe(workspace)
    records = prepare_training(recipe, str(recipe.model), max_length_tokens=1024).validation
    deciding, confirming = split_validation_records(records, MaskTrainOptions())
    assert found["records"] == len(confirming) == len(deciding) == 6
    assert not {record.where for record in deciding} & {record.where for record in confirming}
    for name, applied in (("unmasked_loss", None), ("masked_loss", mask)):
        expected = validation_loss(workspace, workspace / "tiny", applied, CONFIRMING)
        assert found[name] == pytest.approx(expected, abs=1e-6)
    assert found["change"] == pytest.approx(found["masked_loss"] - found["unmasked_loss"], abs=1e-6)
    assert found["confirmed"] == (found["high"] < 0)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_resuming_gives_the_identical_mask(
    undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path, tmp_path: Path, step: int
) -> None:
    _, expected, mask = undisturbed
    recipe = make_recipe(workspace, **DEFAULT)
    run, source = open_run(tmp_path, "mask-train", recipe)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, run, Interrupter(step))
    result = mask_train(recipe, source, run, Silence(), resume=True).document()
    resumed = load_mask(Path(result["mask"]))
    assert all(torch.equal(resumed[name], mask[name]) for name in mask.names())
    for key in ("unmasked_loss", "start_loss", "best_loss", "best_step", "steps", "tokens", "flips", "confirmation"):
        assert result[key] == expected[key], key


@pytest.mark.slow
def test_a_ratio_is_kept_exactly(workspace: Path, tmp_path: Path) -> None:
    _, result, mask = learn(workspace, tmp_path, **DEFAULT, mask_train__ratio=0.1)
    for name in mask.names():
        assert mask.records[name].removed == removed_count(mask[name].numel(), 0.1)
    assert (mask.metadata.ratio, mask.metadata.threshold) == (0.1, None)
    assert result["start_loss"] != result["unmasked_loss"]


@pytest.fixture
def ever_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every validation worse than the previous one and than the unmasked model."""
    losses = count(100)
    monkeypatch.setattr(loop, "mean_loss", lambda _: float(next(losses)))


@pytest.mark.slow
@pytest.mark.usefixtures("ever_worse")
def test_without_a_gain_the_mask_removes_nothing(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **DEFAULT)
    run, source = open_run(tmp_path, "mask-train", recipe)
    listener = Interrupter(-1)
    result = mask_train(recipe, source, run, listener).document()
    assert (result["removed"], result["best_step"], result["helps"], result["confirmation"]) == (0, 0, False, None)
    assert result["best_loss"] == result["unmasked_loss"]
    assert result["flips"]["turned"] > 0
    assert any("No mask beat" in note for note in listener.notes)


@pytest.mark.slow
@pytest.mark.usefixtures("ever_worse")
def test_it_stops_early_when_the_loss_does_not_improve(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **DEFAULT, mask_train__patience=2)
    run, source = open_run(tmp_path, "mask-train", recipe)
    assert mask_train(recipe, source, run, Silence()).document()["steps"] == 8
