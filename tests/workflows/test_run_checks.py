"""Problems found before an experiment's first training starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.errors import ConfigError, ModelError
from mftctl.experiments.jobs import spell_out
from mftctl.experiments.run_folder import list_runs
from mftctl.masking.mask import save_mask
from mftctl.progress import Silence
from mftctl.workflows.run import plan_experiment, run_experiment
from mftctl.workflows.run_checks import check_jobs
from tests.masking.mask_files import build_mask
from tests.workflow_fixtures import make_recipe

FFT: dict[str, Any] = {"command": "fft"}
BETWEEN: dict[str, Any] = {"fft": FFT, "between": {"command": "interpolate", "after": "fft"}}


def problems_of(workspace: Path, stages: dict[str, Any], **changes: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError, match="cannot be completed") as caught:
        check_jobs(spell_out(make_recipe(workspace, stages=stages, **changes)), Silence())
    return caught.value.problems


def test_a_sound_experiment_passes(workspace: Path) -> None:
    stages = {
        "fft": FFT,
        "probe": {"command": "probe", "after": "fft"},
        "mft": {"command": "mask-train", "after": "fft", "layers_from": "probe", "set": {"mask_train.layers": "0-99"}},
        "drop": {"command": "mask-train", "after": "fft", "set": {"mask_train.method": "drop"}},
        "results": {"command": "eval", "of": ["fft", "mft"]},
    }
    check_jobs(spell_out(make_recipe(workspace, stages=stages)), Silence())


def test_layers_beyond_the_model(workspace: Path) -> None:
    stages = {"fft": FFT, "mft": {"command": "mask-train", "after": "fft", "set": {"mask_train.layers": "2-4"}}}
    assert problems_of(workspace, stages) == (
        "mft: The model does not have that many layers. Expected layers 0 to 3, got 2-4.",
    )


def test_groups_larger_than_the_model(workspace: Path) -> None:
    stages = {"fft": FFT, "probe": {"command": "probe", "after": "fft", "set": {"probe.groups": [2, 5]}}}
    assert problems_of(workspace, stages) == (
        "probe: A group cannot have that many layers. Expected 1 to 4, or all, got 5.",
    )


def test_a_recipe_for_another_model_family(workspace: Path) -> None:
    assert problems_of(workspace, {"fft": FFT}, model_type="mistral") == (
        f"fft: the recipe is for models of type mistral, but {workspace / 'tiny'} is llama",
    )


def test_a_drop_without_its_base(workspace: Path) -> None:
    stages = {"drop": {"command": "mask-train", "set": {"mask_train.method": "drop"}}}
    (problem,) = problems_of(workspace, stages)
    assert "needs the model before fine-tuning" in problem


@pytest.mark.parametrize("command", ["mask-train", "probe"])
def test_a_delta_mask_without_its_base(workspace: Path, command: str) -> None:
    stages: dict[str, Any] = {"delta": {"command": command, "set": {"mask_train.kind": "delta"}}}
    assert problems_of(workspace, stages) == (
        "delta: kind delta needs the model before fine-tuning: put it after an fft stage, or set mask_train.base",
    )
    after = {"fft": FFT, "delta": {**stages["delta"], "after": "fft"}}
    check_jobs(spell_out(make_recipe(workspace, stages=after)), Silence())
    check_jobs(spell_out(make_recipe(workspace, stages=stages, mask_train__base="base")), Silence())


def test_a_fast_probe_of_delta_masks(workspace: Path) -> None:
    changes = {"probe.fast": True, "mask_train.kind": "delta"}
    stages = {"fft": FFT, "probe": {"command": "probe", "after": "fft", "set": changes}}
    (problem,) = problems_of(workspace, stages)
    assert problem.startswith("probe: A fast probe predicts weight masks only.")


def test_layers_from_a_probe_of_heads(workspace: Path) -> None:
    stages = {
        "fft": FFT,
        "heads": {"command": "probe", "after": "fft", "set": {"probe.unit": "head", "probe.fast": True}},
        "mft": {"command": "mask-train", "after": "fft", "layers_from": "heads"},
    }
    problems = problems_of(workspace, stages, probe={})
    assert problems == ("mft: The stage heads probes heads and recommends no layers.",)


def test_a_mask_on_an_adapter(workspace: Path) -> None:
    lora = {"command": "fft", "set": {"fft.method": "lora"}}
    mask = {"command": "mask-train", "after": "lora", "set": {"mask_train.layers": "all"}}
    assert problems_of(workspace, {"lora": lora, "mft": mask}) == (
        "mft: a mask needs a full model, but lora writes an adapter (fft.merge)",
    )
    merged = {"command": "fft", "set": {"fft.method": "lora", "fft.merge": True}}
    check_jobs(spell_out(make_recipe(workspace, stages={"lora": merged, "mft": mask})), Silence())


def test_an_adapter_of_another_method(workspace: Path) -> None:
    shira = {"command": "fft", "set": {"fft.method": "shira", "fft.lora_rank": 2}}
    lora = {"command": "fft", "after": "shira", "set": {"fft.method": "lora"}}
    assert problems_of(workspace, {"shira": shira, "lora": lora}) == (
        "lora: shira writes an adapter of another method. Expected shira, got lora.",
    )
    check_jobs(
        spell_out(make_recipe(workspace, stages={"shira": shira, "again": {**shira, "after": "shira"}})), Silence()
    )


def test_a_support_that_does_not_fit(workspace: Path, tmp_path: Path) -> None:
    options = {"fft.method": "supertuning", "fft.support": str(tmp_path / "mask.bits")}
    stages = {"sparse": {"command": "fft", "set": options}}
    assert "cannot be read" in problems_of(workspace, stages)[0]
    keep = torch.ones(4, 4, dtype=torch.bool)
    save_mask(build_mask(**{"model.layers.0.mlp.up_proj.weight": keep}), tmp_path / "mask.bits")
    assert problems_of(workspace, stages) == (
        "sparse: A masked tensor has another shape. Expected (4, 4), got (64, 32).",
    )


def test_an_interpolation_without_its_base(workspace: Path) -> None:
    (problem,) = problems_of(workspace, {"between": {"command": "interpolate"}})
    assert "needs the model before fine-tuning" in problem
    check_jobs(spell_out(make_recipe(workspace, stages=BETWEEN)), Silence())


def test_an_interpolation_to_an_adapter(workspace: Path) -> None:
    lora = {"command": "fft", "set": {"fft.method": "lora"}}
    assert problems_of(workspace, {**BETWEEN, "fft": lora}) == (
        "between: interpolate needs a full model, but fft writes an adapter (fft.merge)",
    )


def test_an_interpolation_to_a_mask(workspace: Path) -> None:
    mask = {"command": "mask-train", "set": {"mask_train.layers": "all"}}
    (problem,) = problems_of(workspace, {**BETWEEN, "fft": mask})
    assert problem == "between: interpolate needs a checkpoint, but fft makes a mask (put an apply stage between them)"


def test_an_interpolation_without_data(workspace: Path) -> None:
    problems = problems_of(workspace, BETWEEN, data=[])
    assert "between: there is no training data (key data)" in problems


def test_no_training_data(workspace: Path) -> None:
    assert problems_of(workspace, {"fft": FFT}, data=[]) == ("fft: there is no training data (key data)",)


def test_nothing_to_measure(workspace: Path) -> None:
    (problem,) = problems_of(workspace, {"pretrained": {"command": "eval"}}, test_data=[])
    assert "There is nothing to evaluate" in problem


def test_all_problems_are_listed_at_once(workspace: Path) -> None:
    stages = {
        "fft": FFT,
        "far": {"command": "mask-train", "after": "fft", "set": {"mask_train.layers": "9"}},
        "odd": {"command": "mask-train", "after": "fft", "set": {"mask_train.layers": "7-4"}},
    }
    assert [problem.split(":")[0] for problem in problems_of(workspace, stages)] == ["far", "odd"]


def test_a_missing_model(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = make_recipe(workspace, stages={"fft": FFT}, model="./nowhere/at all")
    with pytest.raises(ModelError, match="no such model"):
        check_jobs(spell_out(recipe), Silence())


def test_a_configuration_that_is_not_json(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="configuration cannot be read"):
        check_jobs(spell_out(make_recipe(workspace, stages={"fft": FFT}, model=str(tmp_path))), Silence())


def test_nothing_is_run_before_a_problem_is_reported(workspace: Path, tmp_path: Path) -> None:
    stages = {"fft": FFT, "mft": {"command": "mask-train", "after": "fft", "set": {"mask_train.layers": "9"}}}
    plan = plan_experiment(make_recipe(workspace, stages=stages), "test", tmp_path)
    with pytest.raises(ConfigError):
        run_experiment(plan, "test", tmp_path, Silence())
    assert list_runs(tmp_path)[0] == []
