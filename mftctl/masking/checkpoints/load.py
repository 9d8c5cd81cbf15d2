"""Loads checkpoints and tokenizers, with one clear error where something does not match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mftctl.errors import MaskingError, ModelError
from mftctl.masking.checkpoints.load_weights import attention_settings, load_weights, stored_dtype
from mftctl.masking.checkpoints.locate import is_adapter, local_folder
from mftctl.masking.checkpoints.model_failures import model_failures
from mftctl.masking.checkpoints.remote_code import require_trusted_code, trusts_code
from mftctl.masking.checkpoints.vision_language import processor_template
from mftctl.runtime.devices import best_device, has_bf16, record_attention
from mftctl.runtime.torch_failures import gpu_failures

_COPY_HINT = "copy tokenizer.json and tokenizer_config.json from the base model into this folder"
_HUB_HINT = "check the spelling and the network; for a private or gated model, log in with: hf auth login"


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device | None = None,
    device_map: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """The language or vision-language model in a checkpoint folder, in evaluation mode.

    Args:
        folder: Contains `config.json` and safetensors, or an adapter, which is merged in memory.
        dtype: Dtype of the weights in memory; `auto` keeps the checkpoint's.
        device: Device to load onto; by default the device in use.
        device_map: GPU of each part of the model, by its path, instead of one device; not for adapters.

    Raises:
        ConfigError: The requested attention implementation does not support the dtype.
        ModelError: transformers cannot load it, or a tensor is missing from its files.
    """
    device = device or best_device()
    with gpu_failures("loading the model"):
        if device_map is not None:
            return _load(folder, dtype, device, device_map)
        places = {} if device.type == "cpu" else {"": device}
        return _load(folder, dtype, device, places).to(device)  # type: ignore[arg-type,no-any-return]


def load_to_share(folder: Path, *, dtype: torch.dtype, note: Callable[[str], None]) -> PreTrainedModel:
    """The model in a checkpoint folder, for sharding: without values where its files can be read in parts.

    Args:
        folder: Contains `config.json` and safetensors.
        dtype: Dtype of its parameters.
        note: Receives the reason if each process has to load the whole model.

    Raises:
        ModelError: transformers does not know the model, or a weight is missing from the files.
    """
    from mftctl.masking.checkpoints.outlines import build_outline

    try:
        return build_outline(folder, dtype)
    except MaskingError as error:
        note(f"Each process loads the whole model into main memory before it is sharded. {error}")
        return load_model(folder, dtype=dtype, device=torch.device("cpu"))


def _load(folder: Path, dtype: torch.dtype | str, device: torch.device, places: Mapping[str, Any]) -> PreTrainedModel:
    """The model; its weights move tensor by tensor to their device, so the CPU never holds all of them for a GPU."""
    if is_adapter(folder):
        from mftctl.masking.checkpoints.adapters import load_adapter

        merged: PreTrainedModel = load_adapter(folder, dtype=dtype, device=device).merge_and_unload()
        return merged.requires_grad_(True)  # peft froze the base
    settings = attention_settings(folder, dtype)
    model = load_weights(folder, dtype=dtype, device_map=dict(places) or None, **settings)
    record_attention(model)
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder.

    Raises:
        ModelError: transformers cannot load it, or it needs untrusted code.
    """
    require_trusted_code(folder)
    found = checked_tokenizer(folder, folder, local_files_only=True)
    found.chat_template = processor_template(folder) or found.chat_template
    return found


def model_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which needs no weights: of a hub model, only the tokenizer's files are downloaded.

    Args:
        model: A local folder, the built-in name "quickstart", or a model on the hub.
        revision: Branch, tag or commit on the hub; ignored for the other two.

    Raises:
        ModelError: transformers cannot load it, or it needs untrusted code.
    """
    folder = local_folder(model)
    return checked_tokenizer(model, model, revision=revision) if folder is None else load_tokenizer(folder)


def checked_tokenizer(source: Path | str, path: Path | str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub model, after checking that its chat templates are strings.

    Args:
        source: As accepted by `from_pretrained`.
        path: Passed to the error.
        options: Passed to `from_pretrained`.

    Raises:
        ModelError: transformers cannot load it, or a chat template is not a string.
    """
    with model_failures(
        "The tokenizer cannot be loaded.",
        path=path,
        hint=_COPY_HINT if isinstance(source, Path) else _HUB_HINT,
    ):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trusts_code(), **options
        )
    template: object = found.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if template is not None and not (texts and all(isinstance(text, str) for text in texts)):
        raise ModelError(
            "The tokenizer's chat template is not text.",
            path=path,
            key="chat_template",
            expected="a Jinja template, or several by name",
            actual=type(template).__name__,
        )
    return found


def evaluation_dtype(folder: Path) -> torch.dtype | str:
    """The checkpoint's own dtype on a GPU that supports it; otherwise fp32, which is fastest on a CPU.

    Args:
        folder: The checkpoint.
    """
    if best_device().type == "cpu" or (stored_dtype(folder) == torch.bfloat16 and not has_bf16()):
        return torch.float32
    return "auto"
