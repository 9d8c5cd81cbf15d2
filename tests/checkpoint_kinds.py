"""Copies of a small checkpoint, each with one defect or unusual property."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PROJECTION = "model.layers.1.mlp.down_proj.weight"


def copied(checkpoint: Path, folder: Path) -> Path:
    """A copy that may be modified."""
    shutil.copytree(checkpoint, folder)
    return folder


def with_weights(
    checkpoint: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """A copy with different tensors."""
    copied(checkpoint, folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_config(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """The same folder with some configuration keys changed."""
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**document, **changes}))
    return folder


def in_8_bits(checkpoint: Path, folder: Path, scale: float = 0.5) -> Path:
    """Projections in FP8 with one scale per block, as in block-quantised releases."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stored = {}
        for name, tensor in weights.items():
            if "proj" not in name:
                stored[name] = tensor.to(torch.bfloat16)
                continue
            rows, columns = tensor.shape
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            blocks = torch.full(((rows + 15) // 16, (columns + 15) // 16), scale)
            stored[f"{name.removesuffix('weight')}weight_scale_inv"] = blocks
        return stored

    with_weights(checkpoint, folder, change)
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    return with_config(folder, quantization_config=quantization)


def with_own_code(folder: Path) -> Path:
    """The same folder as a model type that only its own code defines."""
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    return with_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=code)


def build_composite(folder: Path, tokenizer: Any) -> Path:
    """A small Qwen 3.5 with its vision tower, and with a head that transformers leaves out."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["mtp.fc.weight"] = torch.randn(32, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder
