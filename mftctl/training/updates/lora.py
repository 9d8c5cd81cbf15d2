"""Low-rank adapters (LoRA) through peft: added, gone on with, and merged."""

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
    """The model with a new adapter on every attention and MLP projection; only the adapter is trainable.

    Experts that are fused in one module get none.

    Args:
        model: A whole model; changed in place.
        options: Rank, scale and dropout.
        base: The model's name or folder, which the adapter will name as its base.
        seed: Decides the adapter's start.

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
    # peft names the folder that the weights were loaded from, which for a hub model is in the cache of this machine.
    adapted.peft_config["default"].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    return adapted


def merge_adapter(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter in its weights: the model that was trained.

    A quantised base is dequantised, since its 4 bits could not hold what the adapter adds.

    Args:
        model: Changed in place.
        dtype: That the merged weights will be written in; they are added up in one that holds it.
    """
    if any(map(is_quantized, model.modules())):
        return merge_into_dequantized(model, dtype)
    if dtype == torch.float32 and model.get_base_model().dtype != dtype:
        model = model.to("cpu").float()  # a GPU that held the training may have no room for wider weights
    merged: PreTrainedModel = model.merge_and_unload()
    return merged
