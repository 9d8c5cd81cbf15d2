"""Running averages: their values, their exchange with the weights, and trainings that keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mftctl.errors import ConfigError, Interrupted
from mftctl.experiments.mask_results import MeasuredMask
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import FftResult
from mftctl.experiments.run_folder import Run
from mftctl.masking.mask import open_mask
from mftctl.progress import Silence
from mftctl.training.weight_averages import WeightAverages
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from tests.workflow_fixtures import Interrupter, make_recipe, open_run, tuned

AVERAGES: dict[str, Any] = {"fft__average": "ema", "fft__average_horizons": [0.25, 0.75]}


def expected_average(values: np.ndarray, horizon_steps: float) -> np.ndarray:
    """The average of values `(1 + steps, ...)`, the initial ones first, from the weight of each of them, in fp64."""
    share = 1 / max(1.0, horizon_steps)
    ages = np.arange(len(values))[::-1]
    weights = np.where(ages == len(values) - 1, 1.0, share) * (1 - share) ** ages
    assert weights.sum() == pytest.approx(1)
    return np.tensordot(weights, values, axes=1)


def averages_of(horizons: list[float], path: np.ndarray, steps: int) -> list[np.ndarray]:
    """The averages after all values of a path, the initial ones first."""
    value = torch.from_numpy(path[0].copy())
    averages = WeightAverages(horizons, steps, seed=0)
    averages.start([value])
    for step in range(1, len(path)):
        averages.update([value.copy_(torch.from_numpy(path[step]))], step)
    found = [held(averages, index, [value])[0].numpy() for index in range(len(horizons))]
    assert torch.equal(value, torch.from_numpy(path[-1]))
    return found


def held(averages: WeightAverages, index: int, values: list[torch.Tensor]) -> list[torch.Tensor]:
    with averages.exchanged(index, values):
        return [value.clone() for value in values]


@given(
    steps=st.integers(1, 12),
    horizons=st.lists(st.sampled_from([0.01, 0.2, 0.5, 1.0]), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 9),
)
def test_averages_equal_weighted_sums(steps: int, horizons: list[float], seed: int) -> None:
    path = np.random.default_rng(seed).normal(size=(1 + steps, 3, 5)).astype(np.float32)
    for found, horizon in zip(averages_of(horizons, path, 12), horizons, strict=True):
        assert found == pytest.approx(expected_average(path.astype(np.float64), 12 * horizon), abs=1e-5)


def test_a_horizon_of_one_step_is_the_latest_value() -> None:
    path = np.array([[1.0], [2.0], [5.0]], dtype=np.float32)
    assert averages_of([0.1, 1.0], path, 2) == [pytest.approx(5.0), pytest.approx(3.25)]


def test_averages_in_bf16_are_unbiased() -> None:
    steps, value = 64, torch.full((20_000,), 1.0, dtype=torch.bfloat16)
    averages = WeightAverages([0.5], steps, seed=3)
    averages.start([value])
    path = [1.0] * (1 + steps // 2) + [1.0078125] * (steps // 2)  # neighbours in bf16
    for step in range(1, steps + 1):
        averages.update([value.fill_(path[step])], step)
    (found,) = held(averages, 0, [value])
    assert found.dtype == torch.bfloat16
    assert set(found.unique().tolist()) == {1.0, 1.0078125}
    assert found.float().mean().item() == pytest.approx(expected_average(np.array(path), steps / 2).item(), abs=1.5e-4)


def test_noise_differs_between_horizons_and_is_the_same_for_the_same_seed() -> None:
    def averaged(seed: int) -> list[torch.Tensor]:
        value = torch.linspace(0.5, 2, 999).bfloat16()
        averages = WeightAverages([0.5, 0.6], 10, seed=seed)
        averages.start([value])
        for step in range(1, 9):
            averages.update([value.mul_(1.01)], step)
        return [held(averages, index, [value])[0] for index in (0, 1)]

    one, again, other = averaged(1), averaged(1), averaged(2)
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))


def test_averages_can_be_held_elsewhere_and_of_tensors_that_are_not_contiguous() -> None:
    value = torch.arange(6.0).view(2, 3).t()
    averages = WeightAverages([0.5], 4, seed=0, device=torch.device("cpu"))
    averages.start([value])
    averages.update([value.add_(1)], 1)
    before = value.clone()
    assert torch.equal(held(averages, 0, [value])[0], before - 0.5)
    assert torch.equal(value, before)


def test_the_model_is_refreshed_after_each_exchange() -> None:
    value, copies = torch.ones(1), []
    averages = WeightAverages([0.5], 4, seed=0)
    averages.start([value])
    averages.update([value.fill_(3)], 1)
    with averages.exchanged(0, [value], lambda: copies.append(value.item())):
        pass
    assert copies == [2.0, 3.0]


def stored(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fft__low_memory": True},
        {"fft__method": "lora", "fft__merge": True},
        {"fft__method": "shira", "fft__lora_rank": 2, "fft__merge": True},
        {"fft__keep": "last"},
    ],
    ids=["full", "low memory", "lora", "shira", "last"],
)
def test_a_resumed_training_keeps_the_identical_average(
    workspace: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {**AVERAGES, "fft__max_steps": 6, "fft__val_steps": 2, "fft__schedule": "constant", **changes}
    undisturbed = tuned(workspace, tmp_path / "a", **changes)
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(tmp_path / "b", "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(3))
    result = fine_tune(recipe, source, run, Silence(), resume=True)
    expected = undisturbed.result(FftResult)
    assert (result.best_loss, result.kept_average) == (expected.best_loss, expected.kept_average)
    assert [line.average_losses for line in run.training.metrics()] == [
        line.average_losses for line in undisturbed.training.metrics()
    ]
    after = stored(run)
    assert all(torch.equal(tensor, after[name]) for name, tensor in stored(undisturbed).items())


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_average_with_the_lowest_loss_is_written(workspace: Path, tmp_path: Path, keep: str) -> None:
    # At this rate the weights swing about so much that an average is better.
    changes = {**AVERAGES, "fft__learning_rate": 2e-2, "fft__schedule": "constant", "fft__keep": keep}
    run = tuned(workspace, tmp_path, **changes)
    result = run.result(FftResult)
    lines = [line for line in run.training.metrics() if line.eval_loss is not None]
    assert lines[0].average_losses == {}
    assert all(set(line.average_losses) == {"0.25", "0.75"} for line in lines[1:])
    lowest = {line.step: min(line.eval_loss or 0.0, *line.average_losses.values()) for line in lines[1:]}
    step = lines[-1].step if keep == "last" else min(lowest, key=lambda step: lowest[step])
    [kept] = [line for line in lines if line.step == step]
    assert result.kept_average is not None
    assert kept.average_losses[str(result.kept_average)] == lowest[step] < (kept.eval_loss or 0.0)
    again = tuned(workspace, tmp_path / "again", model=result.model, fft__max_steps=1)
    assert again.result(FftResult).start_loss == lowest[step]


@pytest.mark.slow
def test_weights_better_than_their_averages_are_kept(workspace: Path, tmp_path: Path) -> None:
    run = tuned(workspace, tmp_path / "averages", **AVERAGES, fft__learning_rate=1e-4)
    alone = tuned(workspace, tmp_path / "alone", fft__learning_rate=1e-4)
    result = run.result(FftResult)
    assert result.kept_average is None
    assert "kept_average" not in run.record.result
    assert result.best_loss == alone.result(FftResult).best_loss
    assert all(torch.equal(tensor, stored(run)[name]) for name, tensor in stored(alone).items())


@pytest.mark.slow
def test_a_mask_of_averaged_scores(workspace: Path, tmp_path: Path) -> None:
    changes = {"mask_train__average": "ema", "mask_train__average_horizons": [0.5], "mask_train__keep": "last"}
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(tmp_path, "mask-train", recipe)
    result = mask_train(recipe, source, run, Silence())
    assert isinstance(result, MeasuredMask)
    last = run.training.metrics()[-2]
    losses = {None: last.eval_loss, 0.5: last.average_losses["0.5"]}
    assert result.best_loss == min(filter(None, losses.values()))
    assert losses[result.kept_average] == result.best_loss
    with open_mask(run.folder / "mask.bits") as mask:
        assert mask.removed == result.removed > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fft": {"average": "swa"}}, "fft.average"),
        ({"fft": {"average_horizons": []}}, "fft.average_horizons"),
        ({"fft": {"average_horizons": [0.1] * 5}}, "fft.average_horizons"),
        ({"fft": {"average_horizons": [0.1, 0.1]}}, "must differ"),
        ({"fft": {"average_horizons": [0.0]}}, "fft.average_horizons"),
        ({"mask_train": {"method": "random", "average": "ema"}}, "applies only to learned masks"),
    ],
)
def test_options_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({"model": "m", **changes})
    assert message in str(caught.value)
