"""LoRA on a base in 4 bits and on one in bf16: trained, resumed, and loaded and merged as trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import LlamaForCausalLM

from mftctl.errors import ConfigError, Interrupted, ModelError
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.model_source import source_of_run
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.checkpoints import quantization
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.quantization import (
    QUANTIZED_FILE,
    dequantize,
    has_quantized_base,
    is_quantized,
    load_quantized,
)
from mftctl.progress import Silence
from mftctl.training.flops import flops_per_token
from mftctl.training.loop import SftTrainer
from mftctl.workflows.fft import fine_tune
from tests.conftest import build_llama
from tests.masking.architectures import build
from tests.workflow_fixtures import Interrupter, make_recipe, make_workspace, open_run, tuned
from tests.workflows.test_fft import encoded

LORA: dict[str, Any] = {"fft__method": "lora", "fft__learning_rate": 1e-2, "fft__max_steps": 6, "fft__val_steps": 3}
QLORA: dict[str, Any] = {**LORA, "fft__quantize": "nf4"}
CPU = torch.device("cpu")


def loss_of(folder: Path, workspace: Path) -> float:
    model = load_model(folder, dtype=torch.float32)
    return mean_loss(sample_losses(model, encoded(workspace / "val.jsonl", workspace / "tiny"), pad_token_id=0))


def wide_llama() -> LlamaForCausalLM:
    return build_llama(hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared workspace with a model of a width that bitsandbytes supports on every CPU."""
    folder = make_workspace(tmp_path_factory.mktemp("wide"))
    wide_llama().save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def quantized(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tuned(workspace, tmp_path_factory.mktemp("nf4"), **QLORA)


def test_a_base_in_4_bits(workspace: Path) -> None:
    model = load_quantized(workspace / "tiny", CPU)
    held = [module for module in model.modules() if is_quantized(module)]
    assert len(held) == 4 * 7
    state: Any = held[0].weight.quant_state
    assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16)
    assert sum(module.weight.numel() for module in held) * 2 == 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    others = [item for item in model.parameters() if getattr(item, "quant_state", None) is None]
    assert {item.dtype for item in others} == {torch.float32}
    assert not any(item.requires_grad for item in model.parameters())


def test_evaluation_leaves_the_quantised_weights_as_they_are(workspace: Path) -> None:
    """Bitsandbytes repacks them on some CPUs, with rounded scales."""
    model = load_quantized(workspace / "tiny", CPU).eval()
    module: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    before = module.weight.data.clone(), module.weight.quant_state.absmax.clone()
    with torch.no_grad():
        model(input_ids=torch.arange(4, 20)[None])
    torch.testing.assert_close((module.weight.data, module.weight.quant_state.absmax), before, rtol=0, atol=0)
    layers = [item for item in model.modules() if is_quantized(item)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_blocks_over_two_outputs_are_refused_on_a_cpu(tiny_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)multiple of 64 inputs.*got: 32") as error:
        load_quantized(tiny_checkpoint, CPU)
    assert "q_proj" in str(error.value)


def test_a_dequantised_model_is_a_plain_one_with_the_same_values(workspace: Path, tmp_path: Path) -> None:
    model, input_ids = load_quantized(workspace / "tiny", CPU), torch.arange(4, 20)[None]
    with torch.no_grad():
        before = model(input_ids=input_ids).logits
        plain = dequantize(model, torch.float32)
        after = plain(input_ids=input_ids).logits
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)  # 4-bit layers compute in bf16
    assert {item.dtype for item in plain.parameters()} == {torch.float32}
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    original = load_model(workspace / "tiny", dtype=torch.float32).get_parameter("model.layers.0.mlp.up_proj.weight")
    rounded = plain.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert 0.02 < (rounded - original).norm() / original.norm() < 0.2


@pytest.mark.slow
def test_a_weight_of_4_bits_counts_as_one(workspace: Path, quantized: Run, tmp_path: Path) -> None:
    plain = tuned(workspace, tmp_path, **{**LORA, "fft__max_steps": 1})
    for key in ("trained_parameters", "flops_per_token"):
        assert quantized.record.result[key] == plain.record.result[key]
    linear = [module for module in wide_llama().modules() if isinstance(module, torch.nn.Linear)]
    assert flops_per_token(load_quantized(workspace / "tiny", CPU)) == 2 * sum(item.weight.numel() for item in linear)


@pytest.mark.slow
def test_an_adapter_records_that_its_base_was_quantised(quantized: Run, workspace: Path) -> None:
    folder = quantized.folder / "model"
    assert has_quantized_base(folder)
    assert json.loads((folder / QUANTIZED_FILE).read_text())["type"] == "nf4"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        workspace / "tiny"
    )
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}
    card = (folder / "README.md").read_text()
    assert "mftctl dequantises the nf4 weights" in card
    assert "| Base during training | nf4 with double quantisation, computing in bf16 |" in card


@pytest.mark.slow
def test_loading_and_merging_give_the_model_that_was_trained(quantized: Run, workspace: Path, tmp_path: Path) -> None:
    merged = tuned(workspace, tmp_path, **QLORA, fft__merge=True)
    folder, whole = quantized.folder / "model", merged.folder / "model"
    best = quantized.record.result["best_loss"]
    assert best < quantized.record.result["start_loss"] - 0.05
    assert merged.record.result["best_loss"] == best
    assert loss_of(folder, workspace) == pytest.approx(best, abs=1e-3)
    assert loss_of(whole, workspace) == pytest.approx(loss_of(folder, workspace), abs=1e-6)
    one, other = load_model(folder, dtype=torch.float32), load_model(whole, dtype="auto")
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=0, atol=1e-6)
    assert not (whole / QUANTIZED_FILE).exists()
    assert "quantization_config" not in json.loads((whole / "config.json").read_text())
    card = (whole / "README.md").read_text()
    assert "Merging dequantised the model" in card
    assert f"base_model: {workspace / 'tiny'}" in card


@pytest.mark.slow
def test_a_merged_model_in_bf16(workspace: Path, quantized: Run, tmp_path: Path) -> None:
    merged = tuned(workspace, tmp_path, **QLORA, fft__merge=True, fft__save_dtype="bf16")
    stored, exact = (
        load_model(merged.folder / "model", dtype="auto"),
        load_model(quantized.folder / "model", dtype=torch.float32),
    )
    for name, parameter in exact.named_parameters():
        assert torch.equal(stored.get_parameter(name), parameter.bfloat16()), name


@pytest.mark.slow
def test_resuming_gives_the_identical_adapter(quantized: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **QLORA)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(4))
    fine_tune(recipe, source, run, Silence(), resume=True)
    file = Path("model") / "adapter_model.safetensors"
    assert (run.folder / file).read_bytes() == (quantized.folder / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["nf4", None])
def test_an_adapter_is_trained_further_on_the_base_it_has(
    quantized: Run, workspace: Path, tmp_path: Path, quantize: str | None
) -> None:
    recipe = make_recipe(workspace, **{**LORA, "fft__max_steps": 1, "fft__val_steps": 1}, fft__quantize=quantize)
    source = source_of_run(quantized)
    run = create_run(tmp_path, "fft", {}, inputs=source.as_inputs())
    result = fine_tune(recipe, source, run, Silence()).document()
    assert result["start_loss"] == pytest.approx(quantized.record.result["best_loss"], abs=1e-3)
    assert has_quantized_base(run.folder / "model")


def test_an_adapter_on_a_quantised_base_without_bitsandbytes(quantized: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="nf4 needs bitsandbytes"):
        load_model(quantized.folder / "model", dtype=torch.float32)


@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read"), ('{"type": "fp4"}', "unsupported quantisation")])
def test_an_invalid_quantisation_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / QUANTIZED_FILE).write_text(text)
    with pytest.raises(ModelError, match=words):
        has_quantized_base(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), [("qwen3_moe", "experts"), ("gpt2", "attn.c_attn")])
def test_layers_that_cannot_be_quantised(tmp_path: Path, name: str, key: str) -> None:
    build(name).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be stored entirely in 4 bits") as caught:
        load_quantized(tmp_path, CPU)
    assert key in str(caught.value.key)


@pytest.mark.slow
def test_a_base_in_bf16_with_an_adapter_in_fp32(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PeftModel] = []
    step = SftTrainer.training_step
    monkeypatch.setattr(
        SftTrainer,
        "training_step",
        lambda self, model, *args, **kwargs: (seen.append(model), step(self, model, *args, **kwargs))[1],
    )
    run = tuned(workspace, tmp_path / "adapter", **LORA, fft__precision="bf16")
    dtypes = {(item.requires_grad, item.dtype) for item in seen[0].parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    best = run.record.result["best_loss"]
    assert best == pytest.approx(tuned(workspace, tmp_path / "fp32", **LORA).record.result["best_loss"], abs=0.02)
    assert "| Base during training | bfloat16 |" in (run.folder / "model" / "README.md").read_text()
    merged = tuned(workspace, tmp_path / "merged", **LORA, fft__precision="bf16", fft__merge=True)
    assert loss_of(merged.folder / "model", workspace) == pytest.approx(best, abs=2e-3)
    with safe_open(merged.folder / "model" / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float()), "what the adapter adds was rounded away"
