"""Loads weights through transformers and makes sure that none is left randomly initialised."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mftctl.errors import ModelError
from mftctl.files.json_files import read_json_object
from mftctl.masking.checkpoints.locate import is_adapter, resolve_checkpoint
from mftctl.masking.checkpoints.model_failures import model_failures
from mftctl.masking.checkpoints.remote_code import require_trusted_code, trusts_code
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.masking.checkpoints.vision_language import auto_class
from mftctl.masking.dtypes import TORCH_DTYPES
from mftctl.runtime.devices import attention_in_use

_MOST_NAMED = 3
_MOST_LAYERS = 2_000
_MOST_LABELS = 1_000_000
_MOST_TOKENS = 2**31
_LONGEST_SHOWN = 200


def read_configuration(folder: Path) -> PreTrainedConfig:
    """The configuration in a checkpoint folder; 8-bit weights are set to be loaded in bf16.

    Raises:
        ModelError: It needs untrusted code, transformers cannot read it, or it specifies an implausible number of
            layers.
    """
    require_trusted_code(folder)
    require_few_labels(folder)
    with model_failures("The model cannot be loaded.", path=folder):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusts_code()
        )
    require_few_layers(config, folder)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "fp8":
        # transformers does this by default only on a CPU; on a GPU the layers would stay in 8 bits and learn nothing.
        config.quantization_config = {**quantization, "dequantize": True}
    return config


def load_weights(folder: Path, **options: Any) -> PreTrainedModel:
    """The language or vision-language model in a checkpoint folder, after checking that its files hold every tensor.

    Args:
        folder: Contains `config.json` and safetensors.
        options: Passed to `from_pretrained`.

    Raises:
        ModelError: transformers cannot load it, tensors are missing, unexpected or of the wrong shape, or it needs
            untrusted code.
    """
    config = read_configuration(folder)
    with quiet_transformers(), model_failures("The model cannot be loaded.", path=folder):
        loaded: Any = auto_class(config).from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report then lists them
            trust_remote_code=trusts_code(),
            **options,
        )
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(
        f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in report["mismatched_keys"]
    )
    if missing or unexpected or mismatched:
        parts = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", mismatched)]
        raise ModelError(
            "The checkpoint's tensors do not match the model that its configuration describes.",
            path=folder,
            expected="every tensor of the model once, and no others",
            actual="; ".join(f"{len(names)} {word}: {listed(names)}" for word, names in parts if names),
            hint="download or save the checkpoint again; save a part of a larger model on its own first",
        )
    _require_token_ids(model, folder)
    if getattr(config, "quantization_config", None):
        # Tensors stored in 8 bits were loaded in the dtype of their scales, all others in bf16.
        dtype = options.get("dtype")
        with model_failures("The model cannot be loaded.", path=folder):
            model.to(dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)  # type: ignore[arg-type]
        # Otherwise transformers would write codes and scales again, with the configuration of an unquantised model.
        model._weight_conversions = None  # type: ignore[assignment]
    return model


def _require_token_ids(model: PreTrainedModel, folder: Path) -> None:
    """Checks that the BOS, EOS and padding tokens are given as token ids."""
    for settings in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = vars(settings).get(name)  # not properties, such as a deprecated alias of the text configuration
            tokens = value if isinstance(value, list) else [value]
            if not all(token is None or (type(token) is int and abs(token) < _MOST_TOKENS) for token in tokens):
                raise ModelError(
                    "The configuration gives a special token as something other than its id.",
                    path=folder,
                    key=name,
                    expected="a number or a list of numbers",
                    actual=repr(value)[:_LONGEST_SHOWN],
                )


def require_few_labels(folder: Path) -> None:
    """Checks that a configuration does not specify so many labels that transformers would hang listing them.

    Raises:
        ModelError: It specifies too many labels.
    """
    try:
        labels = read_json_object(folder / "config.json").get("num_labels")
    except (OSError, ValueError):
        return  # transformers reports it
    if isinstance(labels, int) and labels > _MOST_LABELS:
        raise _unheard_of(folder, "num_labels", labels, _MOST_LABELS)


def require_few_layers(config: PreTrainedConfig, folder: Path | str) -> None:
    """Checks that a model with that many layers can be built in reasonable time.

    Args:
        config: The model's configuration.
        folder: The model's folder, for the error.

    Raises:
        ModelError: There are too many layers or experts.
    """
    for name in ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts"):
        count = getattr(config.get_text_config(), name, None)
        if isinstance(count, int) and count > _MOST_LAYERS:
            raise _unheard_of(folder, name, count, _MOST_LAYERS)


def _unheard_of(folder: Path | str, key: str, count: int, most: int) -> ModelError:
    return ModelError(
        "The configuration describes an implausibly large model.",
        path=folder,
        key=key,
        expected=f"at most {most:,}",
        actual=f"{count:,}" if count < 2**63 else "more",
    )


def listed(names: Collection[str]) -> str:
    """The first few names, joined by commas."""
    shown = list(names)[:_MOST_NAMED]
    return ", ".join(shown) + (" …" if len(names) > len(shown) else "")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context in which transformers prints no report of its own and shows no progress bar."""
    verbosity = transformers_logging.get_verbosity()
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def attention_settings(folder: Path, dtype: torch.dtype | str) -> dict[str, str]:
    """The attention arguments for `from_pretrained`; empty where transformers chooses.

    Args:
        folder: The checkpoint.
        dtype: Dtype it is loaded in.

    Raises:
        ConfigError: The requested attention implementation does not support the dtype.
    """
    attention = attention_in_use(dtype if isinstance(dtype, torch.dtype) else stored_dtype(folder))
    return {} if attention == "auto" else {"attn_implementation": attention}


def whole_checkpoint(folder: Path) -> Path:
    """The checkpoint folder itself, or that of an adapter's base."""
    if not is_adapter(folder):
        return folder
    from mftctl.masking.checkpoints.locate import adapter_base

    return resolve_checkpoint(adapter_base(folder))


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most weights of a checkpoint or of an adapter's base; bf16 for 8-bit weights, as in memory."""
    weights: dict[str, int] = {}
    for stored in tensor_index(whole_checkpoint(folder)).values():
        weights[stored.dtype] = weights.get(stored.dtype, 0) + math.prod(stored.shape)
    most = max(weights, key=weights.__getitem__)
    return torch.bfloat16 if most.startswith("F8") else TORCH_DTYPES.get(most, torch.float32)
