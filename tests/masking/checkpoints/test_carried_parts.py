"""Parts of a model that are not trained are copied to the output unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3_5ForConditionalGeneration,
)

from mftctl.errors import ModelError
from mftctl.experiments.model_origin import origin_of
from mftctl.masking.checkpoints.carried_parts import parts_left_out
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.workflows.tuned_model import GoesWith, save_model
from tests.checkpoint_kinds import build_composite, with_weights


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for stored in tensor_index(folder).values():
        with safe_open(stored.path, framework="pt") as file:
            tensors[stored.name] = file.get_tensor(stored.name)
    return tensors


def trained(source: Path, folder: Path, tokenizer: Any, **options: Any) -> Path:
    """The language model of a checkpoint, changed and saved as `fft` saves it."""
    model = load_model(source, dtype=options.pop("dtype", torch.float32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    save_model(model, tokenizer, folder, GoesWith({}, origin_of("FFT", str(source), ""), source, ()))
    return folder


@pytest.mark.slow
def test_head_that_is_left_out_is_carried_over(tmp_path: Path, tokenizer: Any) -> None:
    source = build_composite(tmp_path / "m", tokenizer)
    (source / "preprocessor_config.json").write_text('{"size": 3}')
    before, after = read(source), read(trained(source, tmp_path / "t", tokenizer))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        wanted = tensor if "mtp" in name else tensor + 0.25
        assert torch.equal(after[name], wanted), name
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "t")
    assert isinstance(whole, Qwen3_5ForConditionalGeneration)
    again = load_model(tmp_path / "t", dtype=torch.float32)
    wanted = before["model.language_model.norm.weight"] + 0.25
    assert torch.equal(again.get_parameter("model.language_model.norm.weight"), wanted)
    assert json.loads((tmp_path / "t" / "preprocessor_config.json").read_text()) == {"size": 3}


@pytest.mark.slow
def test_sharded_model_gets_a_shard_of_other_parts(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_composite(tmp_path / "m", tokenizer)
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *args: save(*args, max_shard_size="40KB"))
    written = trained(source, tmp_path / "t", tokenizer)
    before, after = read(source), read(written)
    assert after.keys() == before.keys()
    assert torch.equal(after["mtp.fc.weight"], before["mtp.fc.weight"])
    assert load_model(written, dtype=torch.float32).dtype == torch.float32


def test_configuration_of_the_whole_names_the_dtype_written(tmp_path: Path, tokenizer: Any) -> None:
    source = build_composite(tmp_path / "m", tokenizer)
    written = trained(source, tmp_path / "t", tokenizer, dtype=torch.bfloat16)
    config = json.loads((written / "config.json").read_text())
    assert config["model_type"] == "qwen3_5"
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


def test_quantised_head_that_is_left_out_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = build_composite(tmp_path / "m", tokenizer)
    narrow = with_weights(
        source,
        tmp_path / "narrow",
        lambda weights: {k: v.to(torch.float8_e4m3fn) if "mtp" in k else v for k, v in weights.items()},
    )
    with pytest.raises(ModelError, match="cannot be carried over") as caught:
        parts_left_out(narrow, load_model(source, dtype=torch.float32))
    assert "AutoModelForCausalLM" in str(caught.value.hint)


def test_different_spelling_of_names_is_not_a_different_part(tmp_path: Path, tokenizer: Any) -> None:
    config = GPT2Config(vocab_size=102, n_embd=32, n_layer=1, n_head=2, n_positions=24, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    hub = with_weights(
        tmp_path / "m",
        tmp_path / "hub",
        lambda weights: {
            **{name.removeprefix("transformer."): tensor for name, tensor in weights.items()},
            "h.0.attn.bias": torch.ones(1),  # as in old files
        },
    )
    assert parts_left_out(hub, load_model(hub, dtype=torch.float32)) == {}


def test_plain_checkpoint_has_no_other_parts(tiny_checkpoint: Path, tmp_path: Path, tokenizer: Any) -> None:
    assert parts_left_out(tiny_checkpoint, load_model(tiny_checkpoint, dtype=torch.float32)) == {}
    trained(tiny_checkpoint, tmp_path / "t", tokenizer)
    assert [path.name for path in (tmp_path / "t").glob("*.safetensors*")] == ["model.safetensors"]
