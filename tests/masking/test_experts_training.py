"""The workflows on decoders with experts that are fused in memory and separate on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mftctl.errors import Interrupted
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.apply_in_memory import apply_mask
from mftctl.masking.checkpoints.delta_mask import drop_mask
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.mask import load_mask
from mftctl.masking.overlap import diff
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.training.updates.hft import hft_frozen_names
from mftctl.workflows.apply import apply
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_exchange.exchange import export_mask, import_mask
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from mftctl.workflows.validate import validate
from tests.conftest import build_tokenizer
from tests.masking.architectures import EXPERTS, build
from tests.masking.built_checkpoints import stored_tensors, write_tuned
from tests.workflow_fixtures import Interrupter, make_recipe, make_workspace, open_run
from tests.workflows.test_mask_train import learn

LAYER_1 = {"mask_train__layers": "1", "mask_train__target": "mlp"}
IDS = torch.arange(6, 40)[None]


@pytest.fixture(scope="module", params=EXPERTS)
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose model has four experts in each of two layers."""
    folder = make_workspace(tmp_path_factory.mktemp(request.param))
    shutil.rmtree(folder / "tiny")
    build(request.param).save_pretrained(folder / "tiny")
    build_tokenizer().save_pretrained(folder / "tiny")
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32)(input_ids=IDS).logits


def applied(result: dict[str, Any], run: Run, root: Path) -> Path:
    source = ModelSource(str(run.record.inputs["model"]), mask=result["mask"])
    apply_run = create_run(root, "apply", {}, inputs=source.as_inputs())
    return Path(apply(source, apply_run, Silence()).document()["model"])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "default"])
def test_a_mask_is_learned_and_applied(experts: Path, tmp_path: Path, preset: str) -> None:
    run, result, mask = learn(
        experts, tmp_path, **LAYER_1, mask_train__preset=preset, mask_train__learning_rate=1e-2, mask_train__ratio=0.1
    )
    assert len(mask) == result["tensors"] == 12
    assert result["layers"] == "1"
    for name in mask.names():
        assert mask.records[name].removed == removed_count(mask[name].numel(), 0.1)
    output = applied(result, run, tmp_path)
    in_memory = load_model(experts / "tiny", dtype=torch.float32)
    apply_mask(in_memory, mask)
    with torch.no_grad():
        assert torch.equal(in_memory(input_ids=IDS).logits, logits(output))
    assert not torch.equal(logits(experts / "tiny"), logits(output))
    before, after = stored_tensors(experts / "tiny"), stored_tensors(output)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(mask.names())


@pytest.mark.slow
def test_resuming_gives_the_identical_mask(experts: Path, tmp_path: Path) -> None:
    _, expected, mask = learn(experts, tmp_path / "a", **LAYER_1)
    recipe = make_recipe(experts, **LAYER_1)
    run, source = open_run(tmp_path / "b", "mask-train", recipe)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, run, Interrupter(5))
    result = mask_train(recipe, source, run, Silence(), resume=True).document()
    resumed = load_mask(Path(result["mask"]))
    assert resumed.names() == mask.names()
    assert all(torch.equal(resumed[name], mask[name]) for name in mask.names())
    assert (result["best_loss"], result["flips"]) == (expected["best_loss"], expected["flips"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_masks_without_training(experts: Path, tmp_path: Path, method: str) -> None:
    _, result, mask = learn(experts, tmp_path, **LAYER_1, mask_train__method=method, mask_train__ratio=0.2)
    stored = stored_tensors(experts / "tiny")
    for name in mask.names():
        assert mask.records[name].removed == removed_count(mask[name].numel(), 0.2)
        if method == "magnitude":
            sizes = stored[name].abs()
            assert sizes[~mask[name]].max() <= sizes[mask[name]].min()
    assert result["start_loss"] == result["best_loss"]


@pytest.mark.slow
def test_a_ratio_per_projection_by_its_name_on_disk(experts: Path, tmp_path: Path) -> None:
    gate, down = ("w1", "w2") if "mixtral" in experts.name else ("gate_proj", "down_proj")
    ratios = {gate: 0.3, down: 0.05}
    _, _, mask = learn(experts, tmp_path, mask_train__layers="1", mask_train__ratio=ratios, mask_train__max_steps=2)
    assert len(mask) == 8
    for name in mask.names():
        ratio = ratios[name.split(".")[-2]]
        assert mask.records[name].removed == removed_count(mask[name].numel(), ratio)


@pytest.mark.slow
def test_masks_are_compared_exported_and_imported(experts: Path, tmp_path: Path) -> None:
    options = {**LAYER_1, "mask_train__method": "random"}
    first, second = (learn(experts, tmp_path / str(seed), **options, seed=seed)[2] for seed in (0, 1))
    found = diff(first, second)
    assert (len(found.tensors), found.only_a, found.only_b) == (12, (), ())
    assert 0 < found.total.jaccard < 0.2
    for suffix in (".pt", ".npz"):
        export_mask(first, tmp_path / f"masks{suffix}")
        back = import_mask(tmp_path / f"masks{suffix}", experts / "tiny", base_model="tiny")
        assert all(torch.equal(back[name], first[name]) for name in first.names())


@pytest.mark.slow
def test_a_delta_mask_resets_experts_on_disk_and_in_memory(experts: Path, tmp_path: Path) -> None:
    base, tuned = experts / "tiny", write_tuned(experts / "tiny", tmp_path / "tuned", shards=2)
    mask = drop_mask(base, tuned, 0.3, "trivial", base_model="base", tuned_model="tuned", seed=0)
    assert set(mask.names()) == set(stored_tensors(base))
    apply_to_checkpoint(base, mask, tmp_path / "out", mask_path=None, base_model="base", tuned=tuned)
    model = AutoModelForCausalLM.from_pretrained(tuned)
    apply_mask(model, mask, base)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits(tmp_path / "out"))
    assert not torch.equal(logits(tuned), logits(tmp_path / "out"))


@pytest.mark.slow
def test_probing(experts: Path, tmp_path: Path) -> None:
    recipe = make_recipe(experts, **{**LAYER_1, "mask_train__layers": None}, probe__groups=[1], mask_train__max_steps=2)
    run, source = open_run(tmp_path, "probe", recipe)
    run.update(inputs=source.as_inputs())
    assert {group["layers"] for group in probe(recipe, source, run, Silence()).document()["groups"]} == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "gmt", "random", "hft", "lora"])
def test_fine_tuning(experts: Path, tmp_path: Path, method: str) -> None:
    """Updates apply to weights in memory: GMT's ratio holds per fused parameter; LoRA adapts the attention."""
    merge = {"fft__merge": True} if method == "lora" else {}
    recipe = make_recipe(experts, fft__method=method, fft__max_steps=1, fft__keep="last", **merge)
    run, source = open_run(tmp_path, "fft", recipe)
    fine_tune(recipe, source, run, Silence())
    before, after = (
        dict(load_model(folder, dtype=torch.float32).named_parameters())
        for folder in (experts / "tiny", run.folder / "model")
    )
    assert before.keys() == after.keys()
    assert stored_tensors(run.folder / "model").keys() == stored_tensors(experts / "tiny").keys()
    changed = {name: int((tensor != after[name]).sum()) for name, tensor in before.items()}
    fused = {name: count for name, count in changed.items() if "experts" in name}
    assert len(fused) == 4
    if method == "lora":
        assert not any(fused.values())
        assert all(count for name, count in changed.items() if "_proj.weight" in name)
    elif method == "hft":
        frozen = hft_frozen_names(load_model(experts / "tiny", dtype=torch.float32), 0)
        assert {name for name, count in changed.items() if count == 0} == set(frozen)
        assert any("experts" in name for name in frozen)
    elif method == "full":
        assert all(fused.values())
    else:
        ratio = recipe.fft.ratio
        for name, count in fused.items():
            assert 0 < count <= before[name].numel() - removed_count(before[name].numel(), ratio)


@pytest.mark.slow
def test_validate_plans_what_training_does(experts: Path, tmp_path: Path) -> None:
    changes = {**LAYER_1, "mask_train__ratio": 0.1, "mask_train__max_steps": 1}
    found = validate(make_recipe(experts, **changes), None)
    assert (found.problems, found.not_checked) == ([], [])
    planned = {tensor.name: tensor for tensor in found.masks["mask-train"].tensors}
    _, _, mask = learn(experts, tmp_path, **changes)
    assert planned.keys() == set(mask.names())
    for name, tensor in planned.items():
        assert (tensor.shape, tensor.removed) == (mask.records[name].shape, mask.records[name].removed)
    memory = found.memory[-1].estimate
    weights = sum(tensor.weights for tensor in planned.values())
    assert (memory.scores_bytes, memory.masked_weights_bytes, memory.gradients_bytes) == (4 * weights,) * 3
    assert memory.peak_bytes > memory.weights_bytes
