"""LoRA of experts that are fused in memory: training, saving, loading, merging and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mftctl.errors import ConfigError, Interrupted
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.model_source import source_of_run
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.checkpoints.load import load_model
from mftctl.progress import Silence
from mftctl.workflows.fft import fine_tune
from tests.conftest import build_tokenizer
from tests.masking.architectures import EXPERTS, STORED_FUSED, build
from tests.masking.built_checkpoints import stored_tensors
from tests.workflow_fixtures import Interrupter, make_recipe, make_workspace, open_run, tuned

IDS = torch.arange(6, 40)[None]
OPTIONS = {
    "fft__method": "lora",
    "fft__lora_experts": True,
    "fft__lora_rank": 2,
    "fft__learning_rate": 1e-2,
    "fft__max_steps": 4,
    "fft__val_steps": 2,
}


@pytest.fixture(scope="module", params=EXPERTS | STORED_FUSED)
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose model has four experts in each of two layers."""
    folder = make_workspace(tmp_path_factory.mktemp(request.param))
    shutil.rmtree(folder / "tiny")
    build(request.param).save_pretrained(folder / "tiny")
    build_tokenizer().save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def adapter(experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tuned(experts, tmp_path_factory.mktemp("runs"), **OPTIONS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.slow
def test_every_expert_is_adapted(adapter: Run, experts: Path) -> None:
    described = json.loads((adapter.folder / "model" / "adapter_config.json").read_text())
    assert sorted(described["target_parameters"]) == [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("down_proj", "gate_up_proj")
    ]
    assert "| Experts | adapted too |" in (adapter.folder / "model" / "README.md").read_text()
    before, after = (
        dict(load_model(folder, dtype=torch.float32).named_parameters())
        for folder in (experts / "tiny", adapter.folder / "model")
    )
    for name, tensor in before.items():
        is_adapted = "_proj" in name and "bias" not in name
        assert bool((tensor != after[name]).any()) == is_adapted, name
        if is_adapted and tensor.dim() == 3:
            assert (tensor != after[name]).flatten(1).any(dim=1).all()
    assert adapter.record.result["best_loss"] < adapter.record.result["start_loss"]


@pytest.mark.slow
def test_the_merged_model_is_the_adapter(adapter: Run, experts: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(experts / "tiny", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, str(adapter.folder / "model"))
    expected = logits(adapted)
    torch.testing.assert_close(logits(load_model(adapter.folder / "model", dtype=torch.float32)), expected)
    merged = tuned(experts, tmp_path, **OPTIONS, fft__merge=True)
    torch.testing.assert_close(logits(load_model(merged.folder / "model", dtype=torch.float32)), expected)
    assert stored_tensors(merged.folder / "model").keys() == stored_tensors(experts / "tiny").keys()


@pytest.mark.slow
def test_it_resumes_to_the_identical_adapter(adapter: Run, experts: Path, tmp_path: Path) -> None:
    recipe = make_recipe(experts, **OPTIONS)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(3))
    fine_tune(recipe, source, run, Silence(), resume=True)
    before, after = (load_file(made.folder / "model" / "adapter_model.safetensors") for made in (adapter, run))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
def test_it_continues(adapter: Run, experts: Path, tmp_path: Path) -> None:
    recipe = make_recipe(experts, **{**OPTIONS, "fft__max_steps": 1})
    run = create_run(tmp_path, "fft", {}, inputs=source_of_run(adapter).as_inputs())
    result = fine_tune(recipe, source_of_run(adapter), run, Silence()).document()
    assert result["start_loss"] == pytest.approx(adapter.record.result["best_loss"], abs=1e-5)
    assert result["trained_parameters"] == adapter.record.result["trained_parameters"]


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_adapter(adapter: Run, experts: Path, tmp_path: Path) -> None:
    run = tuned(experts, tmp_path, **OPTIONS, fft__gradient_checkpointing=True)
    before, after = (load_file(made.folder / "model" / "adapter_model.safetensors") for made in (adapter, run))
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_without_fused_experts(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no fused experts") as caught:
        tuned(workspace, tmp_path, **OPTIONS)
    assert caught.value.hint == "--set fft.lora_experts=false"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lora_dropout": 0.1}, "nothing can be dropped before it; fft.lora_dropout must be 0, not 0.1"),
        ({"quantize": "nf4"}, "bitsandbytes quantises linear layers only, not fused experts"),
        ({"method": "full"}, "applies only to the method lora; the method is full"),
    ],
)
def test_where_peft_cannot(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FftOptions.model_validate({"method": "lora", "lora_experts": True, **options})
    assert problem in str(caught.value)
