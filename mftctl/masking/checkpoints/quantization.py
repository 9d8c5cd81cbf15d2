"""A base model in 4 bits per weight under a LoRA adapter, as in QLoRA, through bitsandbytes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from mftctl.errors import ConfigError, ModelError
from mftctl.files.json_files import read_json_object
from mftctl.masking.checkpoints.load_weights import load_weights, read_configuration
from mftctl.masking.targets import decoder_layers

QUANTIZED_FILE: Final = "quantized_base.json"
"""File next to an adapter that records how its base was quantised during training."""

_NF4: Final = {"type": "nf4", "double_quantization": True, "dtype": "bfloat16"}
QUANTIZATION: Final = json.dumps(_NF4, indent=2) + "\n"
_BLOCK_WEIGHTS: Final = 64  # bitsandbytes' default: consecutive weights with one scale


def load_quantized(folder: Path, device: torch.device) -> PreTrainedModel:
    """The frozen causal language model in a checkpoint folder, with linear layers in nf4 and everything else in fp32.

    Args:
        folder: A whole checkpoint.
        device: Device to load onto; the model cannot be moved afterwards.

    Raises:
        ConfigError: bitsandbytes is not installed.
        ModelError: Some weights of the decoder do not belong to linear layers, or bitsandbytes cannot dequantise them
            on a CPU.

    Source: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), section 3.
    """
    require_bitsandbytes("fft.quantize", "nf4")
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    if getattr(read_configuration(folder), "quantization_config", None):
        raise ModelError(
            "The weights are already in 8 bits and cannot be quantised again.",
            path=folder,
            expected="a checkpoint in bf16, fp16 or fp32",
            hint="--method lora without --quantize",
        )
    model = load_weights(folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": _indexed(device)})
    _require_linear_layers(model, folder)
    if device.type == "cpu":
        _require_whole_blocks(model, folder)
    _keep_layout(model)
    return prepare_model_for_kbit_training(  # type: ignore[no-any-return,no-untyped-call]
        model, use_gradient_checkpointing=False
    )


def dequantize(model: PreTrainedModel, dtype: torch.dtype | str) -> PreTrainedModel:
    """The same model with ordinary linear layers that hold the dequantised values.

    Args:
        model: From `load_quantized`; modified in place.
        dtype: Dtype of all its weights afterwards; `auto` is bf16, the dtype they were dequantised to in training.
    """
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            model.set_submodule(name, _plain(module, _dequantized(module)))
    _forget_quantization(model)
    return model.to(torch.bfloat16 if dtype == "auto" else dtype)  # type: ignore[arg-type,no-any-return]


def merge_into_dequantized(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Merges an adapter into its dequantised base, layer by layer in fp32; the result is on the CPU.

    Args:
        model: An adapter on a base from `load_quantized`; modified in place.
        dtype: Dtype of the merged weights.
    """
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            weight = _dequantized(module).float()
            wrapper = model.get_submodule(name.rpartition(".")[0])
            if isinstance(wrapper, LoraLayer):
                weight += wrapper.get_delta_weight("default")  # type: ignore[operator]
            model.set_submodule(name, _plain(module, weight.to("cpu", dtype)))
    whole: PreTrainedModel = model.unload()
    _forget_quantization(whole)
    return whole.to("cpu")  # type: ignore[arg-type,no-any-return]


def is_quantized(module: nn.Module) -> bool:
    """True if a module is a linear layer with 4-bit weights."""
    return isinstance(module, nn.Linear) and getattr(module.weight, "quant_state", None) is not None


def has_quantized_base(folder: Path) -> bool:
    """True if the adapter in a folder was trained on a quantised base.

    Raises:
        ModelError: The record of the quantisation cannot be read or is not supported.
    """
    path = folder / QUANTIZED_FILE
    if not path.is_file():
        return False
    try:
        found = read_json_object(path)
    except (OSError, ValueError) as error:
        raise ModelError("The quantisation of the adapter's base cannot be read.", path=path, actual=error) from error
    if found != _NF4:
        raise ModelError("The adapter's base has an unsupported quantisation.", path=path, expected=_NF4, actual=found)
    return True


def _require_whole_blocks(model: PreTrainedModel, folder: Path) -> None:
    """Checks that no block of weights with one scale extends over two outputs.

    bitsandbytes' CPU kernels for AVX-512 take the scale of another block otherwise.
    """
    for name, module in model.named_modules():
        if is_quantized(module) and module.in_features % _BLOCK_WEIGHTS:
            raise ModelError(
                "The CPU kernels of bitsandbytes cannot dequantise this model.",
                path=folder,
                key=name,
                expected=f"a multiple of {_BLOCK_WEIGHTS} inputs to every linear layer",
                actual=module.in_features,
                hint="--method lora without --quantize, or a GPU",
            )


def _keep_layout(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking weights at the first evaluation on a CPU with AVX512-BF16.

    Its packed layout rounds the scales to bf16 for good, so training after a validation would continue from other
    weights, and it does not allow inputs that are not a multiple of 64.
    """
    for module in model.modules():
        if is_quantized(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _indexed(device: torch.device) -> str:
    """The device with its index, as accelerate expects for comparison."""
    if device.type == "cpu" or device.index is not None:
        return str(device)
    return f"{device.type}:{torch.accelerator.current_device_index()}"


def _require_linear_layers(model: PreTrainedModel, folder: Path) -> None:
    """Checks that all matrices of the decoder belong to linear layers.

    Unquantised matrices would take 4 bytes per weight, and layers that a checkpoint stores transposed (GPT-2) would be
    written back untransposed.
    """
    for layer in decoder_layers(model)[1]:
        for name, module in layer.named_modules():
            if is_quantized(module) and getattr(module, "source_cls", nn.Linear) is not nn.Linear:
                raise _not_linear(folder, name, module.source_cls.__name__)
        for name, parameter in layer.named_parameters():
            if parameter.dim() > 1 and getattr(parameter, "quant_state", None) is None:
                raise _not_linear(folder, name, f"a tensor of shape {tuple(parameter.shape)}")


def _not_linear(folder: Path, name: str, found: str) -> ModelError:
    return ModelError(
        "This model cannot be stored entirely in 4 bits per weight.",
        path=folder,
        key=name,
        expected="linear layers, each a separate module",
        actual=found,
        hint="--method lora without --quantize",
    )


def _dequantized(module: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight


def _plain(module: Any, weight: torch.Tensor) -> nn.Linear:
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.to(weight.device, weight.dtype), requires_grad=False)
    return plain


def _forget_quantization(model: Any) -> None:
    """Makes transformers treat and save the model as unquantised."""
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False


def require_bitsandbytes(key: str, wanted: str) -> None:
    """Checks that bitsandbytes is installed.

    Args:
        key: The recipe key that requires it.
        wanted: The value of that key.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{wanted} needs bitsandbytes.",
            key=key,
            expected="an environment with bitsandbytes 0.49 or later",
            actual="not installed",
            hint='pip install "mftctl[bitsandbytes]"',
        )
