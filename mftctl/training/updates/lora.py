"""Low-rank adapters (LoRA) through peft: adding, loading and merging."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from mftctl.experiments.training_options import FftOptions
from mftctl.masking.checkpoints.quantization import (
    is_quantized,
    merge_into_dequantized,
)
from mftctl.masking.targets import linear_projections


def add_adapter(model: PreTrainedModel, options: FftOptions, *, base: str, seed: int) -> PeftModel:
    """Adds a new adapter to every attention and MLP projection; only the adapter is trainable.

    Fused experts get no adapter.

    Args:
        model: A whole model; modified in place.
        options: Rank, scale and dropout.
        base: The model's name or folder, recorded as the adapter's base.
        seed: Decides the initial values of the adapter.

    Source: MFT, section 3.1, baseline 3 (LoRA).
    """
    projections = linear_projections(model)
    set_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=[name for name, _ in projections],
        fan_in_fan_out=isinstance(projections[0][1], Conv1D),
    )
    adapted = get_peft_model(model, config)
    # peft records the folder that the weights were loaded from, which for a hub model is in this machine's cache.
    adapted.peft_config["default"].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    return adapted


def merge_adapter(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Merges the adapter into the weights of its base.

    A quantised base is dequantised, since 4 bits cannot represent the sum with the adapter.

    Args:
        model: Modified in place.
        dtype: Dtype in which the merged weights will be written; the sum is computed with at least that precision.
    """
    if any(map(is_quantized, model.modules())):
        return merge_into_dequantized(model, dtype)
    if dtype == torch.float32 and model.get_base_model().dtype != dtype:
        model = model.to("cpu").float()  # the GPU that held the training may lack memory for wider weights
    merged: PreTrainedModel = model.merge_and_unload()
    return merged
