"""Every untrusted checkpoint is loaded or refused by name, whatever its files contain."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mftctl.errors import MftError, ModelError
from mftctl.masking.checkpoints.check import check_checkpoint
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.masking.checkpoints.load_weights import stored_dtype
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.meta_models import build_skeleton, read_config
from mftctl.masking.checkpoints.outlines import build_outline
from mftctl.masking.checkpoints.tensors import tensor_index

CONFIGS: dict[str, dict[str, Any]] = {
    "model type as list": {"model_type": ["llama"]},
    "model type as mapping": {"model_type": {"a": 1}},
    "layers as text": {"num_hidden_layers": "8"},
    "layers without end": {"num_hidden_layers": 10**9},
    "no heads": {"num_attention_heads": 0},
    "hidden size without end": {"hidden_size": 10**30},
    "labels without end": {"num_labels": 10**9},
    "unknown quantisation": {"quantization_config": {"quant_method": "zzz"}},
    "quantisation as list": {"quantization_config": ["x"]},
    "token as mapping": {"bos_token_id": {"a": 1}},
    "token as text": {"eos_token_id": "x"},
    "token without end": {"eos_token_id": 10**30},
    "activation": {"hidden_act": ["x"]},
    "positions as text": {"rope_parameters": "x"},
    "dtype": {"dtype": {"a": 1}},
    "text configuration as text": {"text_config": "x"},
}
UNREAD = ("unknown quantisation", "quantisation as list", "text configuration as text", "dtype")
"""What this model does without."""
TEXTS = {
    "deep": "[" * 100_000,
    "list": "[]",
    "null": "null",
    "latin": b"\xff",
    "number": '{"hidden_size": ' + "9" * 5000 + "}",
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "class as list": {"tokenizer_class": ["x"]},
    "pad as number": {"pad_token": 5},
    "added tokens": {"added_tokens_decoder": {"x": 1}},
    "template as number": {"chat_template": 1},
    "template as list": {"chat_template": []},
    "named template as number": {"chat_template": [{"name": "default", "template": 1}]},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank as text": {"r": "x"},
    "pattern": {"target_modules": "(a+"},
    "base as number": {"base_model_name_or_path": 5},
    "base with a long name": {"base_model_name_or_path": "a" * 5000},
    "other kind": {"peft_type": "VERA"},
    "kind as list": {"peft_type": ["LORA"]},
    "module to import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
}


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **keys: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **keys}))


def write(file: Path, content: str | bytes) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(use: Callable[[], object]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        use()
    assert len(str(caught.value)) < 2000
    return caught.value


def load(folder: Path) -> object:
    return load_model(folder, dtype=torch.float32)


def skeleton(folder: Path) -> object:
    return build_skeleton(read_config(str(folder)), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name: str, model: Path) -> None:
    change(model / "config.json", **CONFIGS[name])
    outcomes = []
    for use in (load, check_checkpoint, skeleton, lambda folder: build_outline(folder, torch.float32)):
        try:
            use(model)
        except MftError as error:
            outcomes.append(error)
    assert outcomes or name in UNREAD


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_configuration_that_is_not_an_object(content: str | bytes, model: Path) -> None:
    write(model / "config.json", content)
    for use in (load, check_checkpoint, skeleton):
        refused(lambda use=use: use(model))  # type: ignore[misc]


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"eos_token_id": {"a": 1}}'])
def test_generation_settings(content: str, model: Path) -> None:
    write(model / "generation_config.json", content)
    refused(lambda: load(model))


@pytest.mark.parametrize("keys", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizer(keys: dict[str, Any], model: Path) -> None:
    change(model / "tokenizer_config.json", **keys)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    refused(lambda: load_tokenizer(model))


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[]", b"\xff"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_that_is_not_json(file: str, content: str | bytes, model: Path) -> None:
    write(model / file, content)
    if (file, content) == ("tokenizer_config.json", "{}"):
        load_tokenizer(model)
    else:
        refused(lambda: load_tokenizer(model))


def test_weights_without_a_tensor(model: Path) -> None:
    write(model / "model.safetensors", struct.pack("<Q", 2) + b"{}")
    assert "holds no tensors" in refused(lambda: stored_dtype(model)).message


@pytest.mark.parametrize("shard", ["n" * 300, "a\0b", ".", ""])
def test_index_that_names_no_file(shard: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    change(model / "model.safetensors.index.json", weight_map={"x": shard}, metadata={})
    refused(lambda: tensor_index(model))
    refused(lambda: load(model))


def make_adapter(folder: Path, base: Path, **keys: Any) -> None:
    folder.mkdir()
    known = {"base_model_name_or_path": str(base), "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2}
    change(folder / "adapter_config.json", **{**known, "target_modules": ["q_proj"], **keys})
    weights = {}
    for name, stored in tensor_index(base).items():
        if name.endswith("q_proj.weight"):
            place, (rows, columns) = f"base_model.model.{name.removesuffix('.weight')}", stored.shape
            weights[f"{place}.lora_A.weight"] = torch.zeros(2, columns)
            weights[f"{place}.lora_B.weight"] = torch.zeros(rows, 2)
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("keys", ADAPTERS.values(), ids=ADAPTERS)
def test_adapter(keys: dict[str, Any], model: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", model, **keys)
    refused(lambda: load(tmp_path / "adapter"))


def test_adapter_that_is_a_pickle_is_never_opened(model: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", model)
    load(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert "no weights" in refused(lambda: load(tmp_path / "adapter")).message
    write(tmp_path / "adapter" / "adapter_model.bin", b"\x80\x02cos\ngetcwd\n)R.")
    assert "pickle" in refused(lambda: load(tmp_path / "adapter")).message
    write(tmp_path / "adapter" / "adapter_config.json", "[" * 100_000)
    assert "cannot be read" in refused(lambda: load(tmp_path / "adapter")).message


def test_model_with_a_name_that_no_folder_can_have() -> None:
    refused(lambda: resolve_checkpoint("a" * 5000))
