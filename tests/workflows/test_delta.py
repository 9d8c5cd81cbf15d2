"""Delta files as stages of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftctl.data.prepared.load import load_examples
from mftctl.errors import ConfigError
from mftctl.experiments.combined_results import DeltaResult
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.results import EvalResult, Outcome
from mftctl.experiments.run_folder import Run
from mftctl.masking.delta.delta import open_delta
from mftctl.progress import Silence
from mftctl.reporting.report import make_report
from mftctl.workflows.delta import store_delta
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.run import plan_experiment, run_experiment
from tests.masking.built_checkpoints import stored_tensors
from tests.workflow_fixtures import encode_records, make_recipe, open_run

SHARES = {"delta.ratio": [0.5, 0.9]}
STAGES: dict[str, Any] = {
    "fft": {"command": "fft"},
    "whole": {"command": "delta", "after": "fft"},
    "half": {"command": "mask-train", "after": "fft", "set": {"mask_train.method": "drop", "mask_train.ratio": 0.5}},
    "masked": {"command": "delta", "after": "half"},
    "small": {"command": "delta", "after": "fft", "set": {"delta.values": "int8"}, "sweep": SHARES},
    "applied": {"command": "apply", "after": "whole"},
    "results": {"command": "eval", "of": ["fft", "whole", "half", "masked", "small", "applied"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs by stage; those of `eval` by the evaluated stage with the prefix `eval `."""
    root = tmp_path_factory.mktemp("experiment") / "runs"
    recipe = make_recipe(workspace, stages=STAGES, eval={"generate": False})
    found = run_experiment(plan_experiment(recipe, "r", root), "r", root, Silence())
    return {("eval " if run.record.command == "eval" else "") + str(run.record.stage): run for run in found}


def loss(run: Run) -> float:
    return next(one.value for one in run.result(EvalResult).datasets[0].metrics if one.name == "loss")


@pytest.mark.slow
def test_a_delta_stage_changes_the_base_to_the_model_of_the_stage_before(runs: dict[str, Run]) -> None:
    whole = runs["whole"].result(DeltaResult)
    assert (whole.model, whole.state) == (runs["fft"].record.inputs["model"], "delta exact")
    assert loss(runs["eval whole"]) == loss(runs["eval fft"]) == loss(runs["eval applied"])
    assert loss(runs["eval masked"]) == loss(runs["eval half"]) != loss(runs["eval fft"])
    sizes = [runs[name].result(DeltaResult).file_bytes for name in ("whole", "small[ratio=0.5]", "small[ratio=0.9]")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_the_report_compares_delta_files_with_the_fine_tuning(runs: dict[str, Run]) -> None:
    report = make_report(runs["fft"].folder.parent, Silence())
    states = [row.state for table in report.tables for row in table.rows]
    assert any("small[ratio=0.9]" in state for state in states)


@pytest.mark.slow
def test_finished_stages_are_recognised(runs: dict[str, Run], workspace: Path) -> None:
    recipe = make_recipe(workspace, stages=STAGES, eval={"generate": False})
    plan = plan_experiment(recipe, "r", runs["fft"].folder.parent)
    assert {planned.state for planned in plan} == {"done"}


@pytest.mark.slow
def test_a_mask_is_learned_as_by_mask_train(runs: dict[str, Run], workspace: Path, tmp_path: Path) -> None:
    source = ModelSource(runs["fft"].result(Outcome).model or "", origin=str(workspace / "tiny"))
    common = {"mask_train.preset": "default", "mask_train.layers": "all"}
    training = with_changes(make_recipe(workspace), {**common, "mask_train.kind": "delta", "mask_train.ratio": 0.8})
    root, made = tmp_path / "runs", []
    mask = mask_train(training, source, open_run(root, "mask-train", training)[0], Silence()).mask
    for changes in ({"delta.select": "learned"}, {"delta.mask": mask}):
        recipe = with_changes(make_recipe(workspace), {**common, "delta.ratio": 0.8, **changes})
        result = store_delta(recipe, source, open_run(root, "delta", recipe)[0], Silence())
        with open_delta(result.mask) as delta:
            made.append(delta.contents)
    assert made[0].tensors == made[1].tensors
    assert [one.metadata.method for one in made] == ["learned", "mask learned"]
    matrices = [record for record in made[0].tensors.values() if len(record.shape) > 1]
    assert all(record.kept <= record.weights - round(0.8 * record.weights) for record in matrices)


@pytest.mark.slow
def test_fisher_keeps_the_largest_squared_gradient_times_squared_change(
    runs: dict[str, Run], workspace: Path, tmp_path: Path
) -> None:
    """Against gradients of plain autograd, batch by batch."""
    tuned = Path(runs["fft"].result(Outcome).model or "")
    source = ModelSource(str(tuned), origin=str(workspace / "tiny"))
    changes = {"delta.ratio": 0.7, "delta.select": "fisher", "mask_train.learn_from": "all"}
    recipe = with_changes(make_recipe(workspace), changes)
    result = store_delta(recipe, source, open_run(tmp_path, "delta", recipe)[0], Silence())
    squares = plain_squared_gradients(tuned, recipe)
    before, after = stored_tensors(workspace / "tiny"), stored_tensors(tuned)
    with open_delta(result.mask) as delta:
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
            change = after[name] - before[name]
            importance = (squares[name] * change.square()).flatten()
            kept = importance.topk(change.numel() - round(0.7 * change.numel())).indices
            expected = torch.zeros(change.numel(), dtype=torch.bool)
            expected[kept] = True
            found = torch.from_numpy(delta.bits(name).part(0, change.numel()))
            assert (found != (expected & (change.flatten() != 0))).sum() <= 2  # sums in another order


def plain_squared_gradients(folder: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The sum over batches of the squared gradients of their answer tokens' loss."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = encode_records(list(load_examples(recipe.data)), tokenizer).records
    order = sorted(range(len(records)), key=lambda number: -len(records[number].input_ids))
    squares = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    size = recipe.mask_train.batch_size
    for start in range(0, len(order), size):
        model.zero_grad()
        for number in order[start : start + size]:
            ids, labels = (torch.tensor([part]) for part in (records[number].input_ids, records[number].labels))
            logits = model(input_ids=ids).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100).backward()
        for name, one in model.named_parameters():
            squares[name] += one.grad.square()
    return squares


@pytest.mark.parametrize(
    "changes", [{"delta.ratio": 0.0}, {"delta.ratio": 0.5, "delta.mask": "m.bits"}], ids=["no ratio", "a mask"]
)
@pytest.mark.parametrize("select", ["learned", "fisher"])
def test_data_decides_about_a_share_without_a_mask(select: str, changes: dict[str, Any], workspace: Path) -> None:
    with pytest.raises(ConfigError, match="needs a ratio above 0, and no mask"):
        with_changes(make_recipe(workspace), {"delta.select": select, **changes})


def test_a_delta_stage_needs_a_base_and_a_whole_model(workspace: Path, tmp_path: Path) -> None:
    alone: dict[str, Any] = {"small": {"command": "delta"}}
    with pytest.raises(ConfigError) as caught:
        run_experiment(plan_experiment(make_recipe(workspace, stages=alone), "r", tmp_path), "r", tmp_path, Silence())
    assert "put it after an fft stage, or set delta.base" in str(caught.value)
    adapter: dict[str, Any] = {
        "lora": {"command": "fft", "set": {"fft.method": "lora"}},
        "small": {"command": "delta", "after": "lora"},
    }
    with pytest.raises(ConfigError) as caught:
        run_experiment(plan_experiment(make_recipe(workspace, stages=adapter), "r", tmp_path), "r", tmp_path, Silence())
    assert "delta needs a full model, but lora writes an adapter" in str(caught.value)
