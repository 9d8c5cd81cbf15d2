"""Models without weights, and weights loaded in parts: the same as transformers loads as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mftctl.errors import MaskingError, ModelError
from mftctl.masking.checkpoints.load import load_model, load_to_share
from mftctl.masking.checkpoints.outlines import StoredWeights, build_outline
from tests.conftest import build_llama
from tests.masking.architectures import ARCHITECTURES


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_parts_are_those_of_the_whole_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ARCHITECTURES[family].build().save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    outline = build_outline(tmp_path, dtype)
    weights = StoredWeights(tmp_path, outline)
    found = dict(outline.named_parameters())
    assert list(found) == [name for name, _ in whole.named_parameters()]  # tied weights are one parameter
    assert outline.config.to_dict() == whole.config.to_dict()
    assert outline.generation_config.to_dict() == whole.generation_config.to_dict()
    assert not outline.training
    for name, value in whole.named_parameters():
        assert found[name].is_meta
        assert found[name].dtype == value.dtype
        assert torch.equal(weights.rows(name), value)
        middle = len(value) // 3
        assert torch.equal(weights.rows(name, middle, len(value) - 1), value[middle:-1])
    for (name, buffer), (expected, value) in zip(outline.named_buffers(), whole.named_buffers(), strict=True):
        assert name == expected
        assert torch.equal(buffer, value)


def test_a_missing_weight(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks a weight") as caught:
        load_to_share(tmp_path, dtype=torch.float32, note=pytest.fail)
    assert caught.value.key == "model.layers.2.mlp.up_proj.weight"


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))
    with pytest.raises(ModelError, match="does not have the shape") as caught:
        build_outline(tmp_path, torch.float32)
    assert caught.value.actual == (64, 32)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelError, match="model cannot be loaded"):
        build_outline(tmp_path, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("alike", [True, False])
def test_tied_weights_that_are_stored_twice(tmp_path: Path, alike: bool) -> None:
    build_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if alike else 1.0)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    notes: list[str] = []
    model = load_to_share(tmp_path, dtype=torch.float32, note=notes.append)
    assert model.get_input_embeddings().weight.is_meta == alike
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == alike
    assert bool(notes) != alike  # if they differ, transformers loads both
    if not alike:
        assert "Each process loads the whole model" in notes[0]
        with pytest.raises(MaskingError, match="different values"):
            build_outline(tmp_path, torch.float32)
        whole = load_model(tmp_path, dtype=torch.float32)
        assert torch.equal(model.get_output_embeddings().weight, whole.get_output_embeddings().weight)
