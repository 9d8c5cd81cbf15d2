"""Adapters on frozen weights, through peft: a new one for each method, and merging."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mftctl.experiments.fft_options import FftOptions
from mftctl.masking.checkpoints.mask_support import kept_positions, read_support
from mftctl.masking.checkpoints.quantization import is_quantized, merge_into_dequantized
from mftctl.masking.checkpoints.sparse_adapters import ADAPTER
from mftctl.training.updates.lora import add_lora
from mftctl.training.updates.sparse_adapter import (
    add_sparse_adapter,
    add_without_data,
    choose_positions,
    trained_counts,
)


def add_adapter(
    model: PreTrainedModel, options: FftOptions, *, base: str, seed: int, mask: Path | None = None
) -> PeftModel:
    """Adds a new adapter to the attention and MLP projections; only the adapter is trainable.

    Args:
        model: A whole model; modified in place.
        options: The method and its options.
        base: The model's name or folder, recorded as the adapter's base.
        seed: Decides initial values or, with SHiRA, which weights are trained.
        mask: For SHiRA and Super-Tuning, a mask that keeps the weights to train, and no others.

    Raises:
        ConfigError: The model has no projections of the kind that the method adapts, or too few weights in one.
        MaskMismatchError: The mask covers no projection, or peft cannot store the weights that it keeps.
    """
    if options.method == "lora":
        adapted = add_lora(model, options, seed=seed)
    elif mask is None:
        adapted = add_sparse_adapter(model, options, choose_positions(model, options, seed))
    else:
        adapted = add_sparse_adapter(model, options, kept_positions(mask, read_support(mask, model)))
    # peft records the folder that the weights were loaded from, which for a hub model is in this machine's cache.
    adapted.peft_config[ADAPTER].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    return adapted


def plan_adapter(model: PreTrainedModel, options: FftOptions, mask: Path | None = None) -> None:
    """Adds the same adapter to a model without data.

    Args:
        model: A model on the meta device; modified in place.
        options: The method and its options.
        mask: The mask that keeps the weights to train, if there is one.

    Raises:
        ConfigError: As for `add_adapter`.
        MaskMismatchError: The mask covers no projection.
    """
    if options.method == "lora":
        add_lora(model, options, seed=0)
        return
    counts = trained_counts(model, options) if mask is None else read_support(mask, model).counts
    add_without_data(model, options, counts)


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
