"""Adapters in a folder (LoRA, SHiRA and Super-Tuning), loaded through peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from mftctl.errors import ModelError
from mftctl.masking.checkpoints.load_weights import attention_settings, load_weights
from mftctl.masking.checkpoints.locate import ADAPTER_FILE, _adapter_settings, adapter_base, resolve_checkpoint
from mftctl.masking.checkpoints.model_failures import model_failures
from mftctl.masking.checkpoints.quantization import (
    dequantize,
    has_quantized_base,
    load_quantized,
)
from mftctl.masking.checkpoints.sparse_adapters import check_positions, require_positions, trim_padding
from mftctl.runtime.devices import record_attention

METHODS: Final = {"LORA": "lora", "SHIRA": "shira", "SUPERTUNING": "supertuning"}
"""Training method by the `peft_type` of an adapter."""

_LONGEST_SHOWN = 200


def load_adapter(
    folder: Path,
    *,
    dtype: torch.dtype | str,
    trainable: bool = False,
    quantize: bool = False,
    device: torch.device | None = None,
) -> PeftModel:
    """Loads the adapter in a folder onto its base model.

    Args:
        folder: Contains `adapter_config.json`. An adapter trained on a quantised base is loaded onto that base again,
            dequantised unless `quantize` is set.
        dtype: Dtype of the base's weights in memory; `auto` keeps the checkpoint's.
        trainable: Whether the adapter will be trained further.
        quantize: Whether to keep the base in 4 bits per weight.
        device: Device to quantise the base on; by default the CPU.

    Raises:
        ConfigError: The base is quantised, and bitsandbytes is not installed.
        ModelError: The base cannot be found, or peft cannot load the adapter.
    """
    base = adapter_base(folder)
    require_positions(folder, _plain_settings(folder))
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
            # Weights that peft does not find keep their initial values: without effect, or random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # By default, peft would move the adapter to any available GPU.
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, torch_device=str(model.device if quantize else "cpu")
            )
    except UserWarning as error:
        raise ModelError(
            "The adapter lacks weights.",
            path=folder,
            expected="the weights of every layer named in adapter_config.json",
            actual=str(error),
            hint="download or save the adapter again",
        ) from error
    check_positions(adapted, folder)
    if trainable:
        trim_padding(adapted)
    return adapted


def adapter_method(folder: Path) -> str:
    """The method that trained the adapter in a folder, as `fft --method` calls it.

    Raises:
        ModelError: The adapter cannot be loaded safely, or is of another type.
    """
    return METHODS[_plain_settings(folder)["peft_type"]]


def _plain_settings(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter that peft can load without a pickle and without imports that it names."""
    settings = _adapter_settings(folder)
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS or settings.get("megatron_config"):
        raise ModelError(
            "This type of adapter is not supported.",
            path=folder / ADAPTER_FILE,
            key="peft_type",
            expected=f"{', '.join(METHODS)}, without Megatron",
            actual=repr(kind)[:_LONGEST_SHOWN],
        )
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickled = (folder / WEIGHTS_NAME).is_file()
        raise ModelError(
            "The adapter's weights are a pickle, which can run code when opened; mftctl only reads safetensors."
            if pickled
            else "The adapter has no weights.",
            path=folder,
            expected=SAFETENSORS_WEIGHTS_NAME,
            actual=WEIGHTS_NAME if pickled else "no such file",
            hint="save the adapter again as safetensors",
        )
    return settings
