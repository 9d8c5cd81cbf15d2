"""Low-rank adapters (LoRA) through peft: added, gone on with, and merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from mftctl.checkpoint_loading import load_weights
from mftctl.config import FftOptions
from mftctl.devices import record_attention
from mftctl.errors import ModelError
from mftctl.json_files import read_json_object
from mftctl.masking.checkpoint import resolve_checkpoint
from mftctl.masking.checkpoint_source import ADAPTER_FILE
from mftctl.masking.targets import linear_projections
from mftctl.model_failures import model_failures
from mftctl.models import attention_settings
from mftctl.tuning.quantization import (
    dequantize,
    has_quantized_base,
    is_quantized,
    load_quantized,
    merge_into_dequantized,
)

_LONGEST_SHOWN = 200


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


def load_adapter(
    folder: Path,
    *,
    dtype: torch.dtype | str,
    trainable: bool = False,
    quantize: bool = False,
    device: torch.device | None = None,
) -> PeftModel:
    """The adapter in a folder on its base model.

    Args:
        folder: With `adapter_config.json`. An adapter that was trained on a quantised base gets that base again,
            dequantised unless it is wanted as it was.
        dtype: Of the base's weights in memory; `auto` keeps the checkpoint's.
        trainable: Whether the adapter is to be trained further.
        quantize: Whether the base is held in 4 bits a weight.
        device: Where a base is quantised; by default on the CPU.

    Raises:
        ConfigError: The base is a quantised one, and bitsandbytes is not installed.
        ModelError: The base is not there, or peft cannot load the adapter.
    """
    base = adapter_base(folder)
    _require_plain_adapter(folder)
    checkpoint = resolve_checkpoint(base)
    settings = attention_settings(checkpoint, dtype)
    if quantize or has_quantized_base(folder):
        model = load_quantized(checkpoint, device or torch.device("cpu"))
        model = model if quantize else dequantize(model, dtype)
    else:
        model = load_weights(checkpoint, dtype=dtype, **settings)
    record_attention(model)
    try:
        with (
            model_failures("The adapter cannot be loaded.", path=folder, key=base, let_pass=UserWarning),
            warnings.catch_warnings(),
        ):
            # What peft does not find stays as new adapters are: without effect, or random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # peft would take the adapter to any GPU there is.
            return PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, torch_device=str(model.device if quantize else "cpu")
            )
    except UserWarning as error:
        raise ModelError(
            "The adapter lacks weights.",
            path=folder,
            expected="the weights of every layer that adapter_config.json names",
            actual=str(error),
            hint="download or save the adapter again",
        ) from error


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


def adapter_base(folder: Path) -> str:
    """The model that the adapter in a folder belongs to.

    Raises:
        ModelError: The adapter's configuration does not say.
    """
    base = _adapter_settings(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            "The adapter does not name its base model.",
            path=folder / ADAPTER_FILE,
            key="base_model_name_or_path",
            expected="a folder or a hub id",
            actual=repr(base)[:_LONGEST_SHOWN],
        )
    return base


def _adapter_settings(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_FILE
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ModelError("The adapter's configuration cannot be read.", path=path, actual=error) from error


def _require_plain_adapter(folder: Path) -> None:
    """Nothing, if peft would read an adapter without a pickle, and without importing what its configuration names."""
    settings = _adapter_settings(folder)
    if settings.get("peft_type") != "LORA" or settings.get("megatron_config"):
        raise ModelError(
            "The adapter is of a kind that mftctl does not read.",
            path=folder / ADAPTER_FILE,
            key="peft_type",
            expected="LORA, without Megatron",
            actual=repr(settings.get("peft_type"))[:_LONGEST_SHOWN],
        )
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickled = (folder / WEIGHTS_NAME).is_file()
        raise ModelError(
            "The adapter's weights are a pickle, which can run code when it is opened; mftctl reads safetensors."
            if pickled
            else "The adapter has no weights.",
            path=folder,
            expected=SAFETENSORS_WEIGHTS_NAME,
            actual=WEIGHTS_NAME if pickled else "no such file",
            hint="save the adapter again as safetensors",
        )
