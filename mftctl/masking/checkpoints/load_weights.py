"""Weights through transformers, of which none is ever left random."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from mftctl.errors import ModelError
from mftctl.files.json_files import read_json_object
from mftctl.masking.checkpoints.locate import is_adapter, resolve_checkpoint
from mftctl.masking.checkpoints.model_failures import model_failures
from mftctl.masking.checkpoints.remote_code import require_trusted_code, trusts_code
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.masking.dtypes import TORCH_DTYPES
from mftctl.runtime.devices import attention_in_use

_MOST_NAMED = 3
_MOST_LAYERS = 2_000
_MOST_LABELS = 1_000_000
_MOST_TOKENS = 2**31
_LONGEST_SHOWN = 200


def read_configuration(folder: Path) -> PreTrainedConfig:
    """The configuration in a checkpoint folder; one of weights in 8 bits asks for them in bf16.

    Raises:
        ModelError: It needs code that is not trusted, transformers cannot read it, or it asks for more layers than any
            model has.
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
        # By itself transformers does so on a CPU alone: on a GPU the layers would stay in 8 bits and learn nothing.
        config.quantization_config = {**quantization, "dequantize": True}
    return config


def load_weights(folder: Path, **options: Any) -> PreTrainedModel:
    """The causal language model in a checkpoint folder, each tensor of which was found in its files.

    Args:
        folder: With `config.json` and safetensors.
        options: For `from_pretrained`.

    Raises:
        ModelError: transformers cannot load it, tensors are missing, unexpected or of another shape, or it needs code
            that is not trusted.
    """
    config = read_configuration(folder)
    with quiet_transformers(), model_failures("The model cannot be loaded.", path=folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which the report then names
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
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)]
        raise ModelError(
            "The checkpoint does not hold the tensors of the model that its configuration describes.",
            path=folder,
            expected="each tensor of the model once, and no others",
            actual="; ".join(f"{len(names)} {word}: {listed(names)}" for word, names in parts if names),
            hint="download or save the checkpoint again; a part of a larger model is to be saved by itself first",
        )
    _require_token_ids(model, folder)
    if getattr(config, "quantization_config", None):
        # What was in 8 bits has come in the dtype of its scales, and all else in bf16.
        dtype = options.get("dtype")
        with model_failures("The model cannot be loaded.", path=folder):
            model.to(dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)  # type: ignore[arg-type]
        # By these transformers would write codes and scales again, beside a configuration of a plain model.
        model._weight_conversions = None  # type: ignore[assignment]
    return model


def _require_token_ids(model: PreTrainedModel, folder: Path) -> None:
    """Nothing, if the tokens that begin, end and fill a text are named by their ids."""
    for settings in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(settings, name, None)
            tokens = value if isinstance(value, list) else [value]
            if not all(token is None or (type(token) is int and abs(token) < _MOST_TOKENS) for token in tokens):
                raise ModelError(
                    "The configuration names a token by something else than its id.",
                    path=folder,
                    key=name,
                    expected="a number, or several",
                    actual=repr(value)[:_LONGEST_SHOWN],
                )


def require_few_labels(folder: Path) -> None:
    """Nothing, if the configuration in a folder has no number of labels that transformers would write out.

    Raises:
        ModelError: It has.
    """
    try:
        labels = read_json_object(folder / "config.json").get("num_labels")
    except (OSError, ValueError):
        return  # for transformers to tell
    if isinstance(labels, int) and labels > _MOST_LABELS:
        raise _unheard_of(folder, "num_labels", labels, _MOST_LABELS)


def require_few_layers(config: PreTrainedConfig, folder: Path | str) -> None:
    """Nothing, if a model of that many layers can be built in a time that ends.

    Args:
        config: Of a model.
        folder: The model's, for the error.

    Raises:
        ModelError: There are too many.
    """
    for name in ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts"):
        count = getattr(config.get_text_config(), name, None)
        if isinstance(count, int) and count > _MOST_LAYERS:
            raise _unheard_of(folder, name, count, _MOST_LAYERS)


def _unheard_of(folder: Path | str, key: str, count: int, most: int) -> ModelError:
    return ModelError(
        "The configuration asks for a model that nobody has.",
        path=folder,
        key=key,
        expected=f"at most {most:,}",
        actual=f"{count:,}" if count < 2**63 else "more",
    )


def listed(names: Collection[str]) -> str:
    """The first few of some names."""
    shown = list(names)[:_MOST_NAMED]
    return ", ".join(shown) + (" …" if len(names) > len(shown) else "")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside it, transformers writes no report of its own and shows no bar."""
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
    """What `from_pretrained` is to be told of attention: nothing where transformers chooses.

    Args:
        folder: The checkpoint.
        dtype: As it is loaded.

    Raises:
        ConfigError: The attention asked for does not go with the dtype.
    """
    attention = attention_in_use(dtype if isinstance(dtype, torch.dtype) else stored_dtype(folder))
    return {} if attention == "auto" else {"attn_implementation": attention}


def whole_checkpoint(folder: Path) -> Path:
    """A checkpoint folder, or that of an adapter's base."""
    if not is_adapter(folder):
        return folder
    from mftctl.masking.checkpoints.locate import adapter_base

    return resolve_checkpoint(adapter_base(folder))


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most weights of a checkpoint, or of an adapter's base; where it has 8 bits, bf16, as in memory."""
    weights: dict[str, int] = {}
    for stored in tensor_index(whole_checkpoint(folder)).values():
        weights[stored.dtype] = weights.get(stored.dtype, 0) + math.prod(stored.shape)
    most = max(weights, key=weights.__getitem__)
    return torch.bfloat16 if most.startswith("F8") else TORCH_DTYPES.get(most, torch.float32)
