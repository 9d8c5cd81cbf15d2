"""The estimates of a fast probe, compared with a separate computation, actual removal and trained probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.data.batching import PaddingCollator
from mftctl.data.encoding import Encoded
from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.training.mask_search import load_frozen_model, prepare_mask_training
from mftctl.training.schedule import schedule_factors, total_steps
from mftctl.workflows.fast_probe import promised_changes
from mftctl.workflows.planning.allocation_meter import AllocationMeter, add_up
from mftctl.workflows.probe import probe
from tests.workflow_fixtures import encode_records, make_recipe, open_run

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def estimate(workspace: Path, root: Path, **changes: Any) -> tuple[Run, dict[str, Any]]:
    changes = {"probe__fast": True, "probe__groups": [1], "probe__data_fraction": 1.0, **changes}
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(root, "probe", recipe)
    run.finish(probe(recipe, source, run, Silence()))
    return run, run.record.result


def encoded_records(workspace: Path) -> list[Encoded]:
    examples = load_examples([DataSource(str(workspace / "train.jsonl"))])
    return encode_records(examples, load_tokenizer(workspace / "tiny")).records


def gains_by_projection(workspace: Path) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """Weight and weight times gradient of each projection, from one record at a time with torch's own loss."""
    model = load_model(workspace / "tiny", dtype=torch.float32)
    records = encoded_records(workspace)
    total = sum(record.answer_tokens for record in records)
    for record in records:
        batch = PaddingCollator(0)([record])
        loss = model(**batch).loss * record.answer_tokens / total
        loss.backward()
    found = {}
    for layer in range(4):
        for name, module in model.model.layers[layer].named_modules():
            if name.rpartition(".")[2] in PROJECTIONS:
                found[layer, name] = (module.weight.detach(), module.weight.detach() * module.weight.grad)
    return found


@pytest.mark.slow
def test_with_a_threshold_the_estimate_covers_what_scores_can_reach(workspace: Path, tmp_path: Path) -> None:
    _, result = estimate(workspace, tmp_path, mask_train__preset="default", fft__learning_rate=1e-3)
    options = make_recipe(workspace, mask_train__preset="default").mask_train
    reach = 4e-3 * sum(schedule_factors(total_steps(48, options), options))
    expected = dict.fromkeys(range(4), 0.0)
    for (layer, _), (weight, gains) in gains_by_projection(workspace).items():
        removed = (weight.abs() < reach) & (gains > 0)
        assert 0 < removed.sum() < removed.numel() / 2
        expected[layer] -= float(gains[removed].sum())
    found = {int(group["layers"]): group["change"] for group in result["groups"]}
    assert found == pytest.approx(expected, rel=1e-3)
    assert [group["change"] for group in result["groups"]] == sorted(found.values())
    assert result["recommended_layers"] == result["groups"][0]["layers"]
    assert result["fast"] is True


@pytest.mark.slow
def test_with_a_ratio_the_estimate_covers_the_weights_that_lower_the_loss_most(workspace: Path, tmp_path: Path) -> None:
    _, result = estimate(workspace, tmp_path, mask_train__ratio={"up_proj": 0.1, "o_proj": 0.3})
    expected = dict.fromkeys(range(4), 0.0)
    for (layer, name), (_, gains) in gains_by_projection(workspace).items():
        ratio = {"up_proj": 0.1, "o_proj": 0.3}.get(name.rpartition(".")[2])
        if ratio is not None:
            highest = gains.flatten().sort(descending=True).values[: removed_count(gains.numel(), ratio)]
            expected[layer] -= float(highest.sum())
    assert {int(group["layers"]): group["change"] for group in result["groups"]} == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_removing_few_weights_changes_the_loss_as_estimated(workspace: Path) -> None:
    """The first-order estimate holds for few weights: compares the loss with and without a layer's ten best weights."""
    model = load_model(workspace / "tiny", dtype=torch.float32)
    records = encoded_records(workspace)
    before = mean_loss(sample_losses(model, records, pad_token_id=0))
    _, gains = gains_by_projection(workspace)[2, "mlp.up_proj"]
    best = gains.flatten().topk(10)
    weight = model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(-1)[best.indices] = 0.0
    after = mean_loss(sample_losses(model, records, pad_token_id=0))
    assert before - after == pytest.approx(float(best.values.sum()), rel=0.2)


@pytest.mark.slow
def test_groups_add_up_their_layers_and_are_ranked_within_a_size(workspace: Path, tmp_path: Path) -> None:
    _, result = estimate(workspace, tmp_path, probe__groups=[2, 1, "all"])
    changes = {group["layers"]: group["change"] for group in result["groups"]}
    assert [group["size"] for group in result["groups"]] == [2, 2, 1, 1, 1, 1, 4]
    assert changes["0-1"] == pytest.approx(changes["0"] + changes["1"])
    assert changes["0-3"] == pytest.approx(sum(changes[str(layer)] for layer in range(4)))
    assert result["recommended_layers"] in ("0-1", "2-3")
    assert make_recipe(workspace, probe={"fast": True}, mask_train__preset="default").probe.groups == (4,)


@pytest.mark.slow
def test_the_model_is_unchanged(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "probe", recipe)
    inputs = prepare_mask_training(recipe, source, run, Silence(), 1.0).inputs
    model = load_frozen_model(inputs, recipe.mask_train)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    for _ in range(2):
        found = promised_changes(model, [1, 2, 3], recipe.mask_train, inputs, Silence(), fft_learning_rate=1e-3, seed=0)
        assert [item.target.layer for item in found] == [layer for layer in (1, 2, 3) for _ in PROJECTIONS]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None


@pytest.mark.slow
def test_gradient_checkpointing_keeps_less_for_the_same_gradients(workspace: Path, tmp_path: Path) -> None:
    peaks, found = [], []
    for checkpointing in (False, True):
        recipe = make_recipe(workspace, mask_train__gradient_checkpointing=checkpointing)
        run, source = open_run(tmp_path, "probe", recipe)
        inputs = prepare_mask_training(recipe, source, run, Silence(), 1.0).inputs
        model = load_frozen_model(inputs, recipe.mask_train)
        meter = AllocationMeter(model.parameters())
        with meter:
            changes = promised_changes(
                model, [1, 2, 3], recipe.mask_train, inputs, Silence(), fft_learning_rate=1e-3, seed=0
            )
        found.append([item.change for item in changes])
        peaks.append(add_up(meter.events).peak_bytes)
        assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    assert found[0] == found[1]
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.slow
def test_it_is_compared_with_the_newest_trained_probe_of_the_model(workspace: Path, tmp_path: Path) -> None:
    _, alone = estimate(workspace, tmp_path)
    assert alone["agreement"] is None  # an estimate is not a trained probe
    recipe = make_recipe(workspace, probe__groups=[1], mask_train__max_steps=2)
    run, source = open_run(tmp_path, "probe", recipe)
    run.finish(probe(recipe, source, run, Silence()))
    trained = run.record.result
    _, result = estimate(workspace, tmp_path)
    order = [group["layers"] for group in result["groups"]]
    ranks = [order.index(group["layers"]) for group in sorted(trained["groups"], key=lambda group: group["change"])]
    squares = sum((mine - its) ** 2 for mine, its in enumerate(ranks))
    assert result["agreement"]["run"] == run.name
    assert result["agreement"]["groups"] == 4
    assert result["agreement"]["rank_correlation"] == pytest.approx(1 - 6 * squares / (4 * 15))
    _, few = estimate(workspace, tmp_path, probe__layers="0-1")
    assert few["agreement"] is None


@pytest.mark.slow
def test_a_token_budget_does_not_change_the_estimate(workspace: Path, tmp_path: Path) -> None:
    (_, alone), (_, together) = (
        estimate(workspace, tmp_path / str(budget), mask_train__batch_tokens=budget) for budget in (1, 200)
    )
    changes = [{group["layers"]: group["change"] for group in result["groups"]} for result in (alone, together)]
    assert changes[1] == pytest.approx(changes[0], rel=1e-3)
