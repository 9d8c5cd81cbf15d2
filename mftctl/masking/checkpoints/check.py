"""Checks a checkpoint against its configuration before any weights are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mftctl.errors import ModelError
from mftctl.files.json_files import read_json_object
from mftctl.files.regular import read_regular
from mftctl.masking.checkpoints.carried_parts import is_composite, parts_left_out
from mftctl.masking.checkpoints.load_weights import load_weights
from mftctl.masking.checkpoints.locate import is_adapter, resolve_checkpoint
from mftctl.masking.checkpoints.remote_code import require_trusted_code
from mftctl.masking.checkpoints.tensors import INDEX_FILE, WEIGHTS_FILE, StoredTensor, tensor_index
from mftctl.masking.towers import language_model
from mftctl.progress import Listener
from mftctl.text import counted

_TRAINABLE_QUANTIZATION = ("fp8",)
_COMPARED_ROWS = 4096
_LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "wpe_embeddings")


@dataclass(frozen=True, slots=True)
class CheckpointCheck:
    """Facts about a usable checkpoint.

    Attributes:
        remarks: Remarks for the user, one sentence each.
        max_positions: Number of learned positions; None where positions are computed.
    """

    remarks: tuple[str, ...] = ()
    max_positions: int | None = None


def check_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> CheckpointCheck:
    """Checks a checkpoint, reading only the headers of its files, and returns facts about it.

    Args:
        folder: Contains `config.json` and safetensors; for an adapter, its base is checked.
        tokenizer: The model's tokenizer.

    Raises:
        ModelError: A file is damaged or missing, the weights are in a quantised form that cannot be trained, the model
            needs untrusted code, tensors are missing, unexpected or of the wrong shape, or the tokenizer has more
            tokens than the model.
    """
    if is_adapter(folder):
        from mftctl.masking.checkpoints.locate import adapter_base

        folder = resolve_checkpoint(adapter_base(folder))
    config = _configuration(folder)
    require_trusted_code(folder)
    _check_quantization(folder, config)
    _check_index(folder)
    stored = tensor_index(folder)
    model = _skeleton(folder, config)
    _check_tokenizer(folder, model, tokenizer)
    remarks = [*_untied(config, stored), *_left_out(folder, model)]
    if config.get("quantization_config"):
        remarks.append("the weights are stored in 8 bits; they are trained and written in bf16")
    return CheckpointCheck(tuple(remarks), learned_positions(model))


def tell_remarks(check: CheckpointCheck, listener: Listener) -> None:
    """Shows the remarks on a checkpoint, once each.

    Args:
        check: The checked checkpoint.
        listener: Receives the remarks as warnings.
    """
    for remark in check.remarks:
        listener.warn(f"Model: {remark}.")


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ModelError("The configuration of the model cannot be read.", path=path, actual=error) from error


def _check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return
    method = str(quantization.get("quant_method", "unknown"))
    if method not in _TRAINABLE_QUANTIZATION:
        raise ModelError(
            "The model's weights are quantised and can be neither fine-tuned nor masked.",
            path=folder,
            key="quantization_config.quant_method",
            expected="weights in bf16, fp16, fp32 or fp8",
            actual=method,
            hint="use the model before quantisation; to fine-tune with 4-bit weights, run "
            "fft --method lora --quantize nf4 on that model",
        )


def _check_index(folder: Path) -> None:
    """Checks that the index has the metadata block that transformers reads in addition to the weight map."""
    path = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not path.is_file():
        return
    try:
        index = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return  # tensor_index reports it
    if isinstance(index, dict) and "metadata" not in index:
        raise ModelError(
            "The checkpoint's index has no metadata block, which transformers requires.",
            path=path,
            key="metadata",
            expected='a block such as {"total_size": 1234} next to weight_map',
            actual=f"the keys {', '.join(map(str, index))}",
            hint='add "metadata": {} to the index',
        )


def _skeleton(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
    """The model without its weights, after checking that every tensor is in the files.

    Raises:
        ModelError: transformers cannot load it, or tensors do not fit.
    """
    try:
        return load_weights(folder, device_map="meta", dtype=torch.bfloat16)
    except ModelError as error:
        if is_composite(config) and "AutoModelFor" in str(error.actual):
            raise ModelError(
                "transformers has no standalone language model for this model type.",
                path=folder,
                key="model_type",
                expected="a causal language model",
                actual=config.get("model_type"),
                hint="save its language model on its own as the causal language model of the same family, or use a "
                "published one",
            ) from error
        raise


def _check_tokenizer(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    rows = cast("torch.Tensor", model.get_input_embeddings().weight).shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise ModelError(
            "The tokenizer has more tokens than the model.",
            path=folder,
            expected=f"at most {rows:,}",
            actual=f"{len(tokenizer):,}",
            hint="use the tokenizer that belongs to the model, or resize the model's embeddings",
        )


def _untied(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yields a remark if the checkpoint stores a separate output head although the configuration ties it."""
    embeddings = next((name for name in stored if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    head = next((name for name in stored if name.endswith("lm_head.weight")), None)
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    tied = config.get("tie_word_embeddings", inner)
    if tied and embeddings is not None and head is not None and not _same(stored[embeddings], stored[head]):
        yield (
            f"tie_word_embeddings is set, but {head} differs from {embeddings}; they are treated as untied, and "
            "both are used and written"
        )


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """True if two tensors hold the same values; they are read a few rows at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    with safe_open(one.path, framework="pt") as first, safe_open(other.path, framework="pt") as second:
        rows, others = first.get_slice(one.name), second.get_slice(other.name)
        starts = range(0, one.shape[0], _COMPARED_ROWS)
        return all(torch.equal(rows[i : i + _COMPARED_ROWS], others[i : i + _COMPARED_ROWS]) for i in starts)


def _left_out(folder: Path, model: PreTrainedModel) -> Iterator[str]:
    """Yields a remark on the tensors of a checkpoint that the model in memory does not have."""
    parts = parts_left_out(folder, model)
    if parts:
        yield (
            "not trained, but carried over unchanged to the checkpoint that is written: "
            f"{counted(len(parts), 'tensor')} that the model in memory does not have, such as {next(iter(parts))}"
        )


def learned_positions(model: PreTrainedModel) -> int | None:
    """The number of learned positions of the language model, or None if positions are computed."""
    for name, parameter in (language_model(model) or model).named_parameters():
        if any(f".{part}." in f".{name}" for part in _LEARNED_POSITIONS):
            return min(
                int(parameter.shape[0]), int(getattr(model.config, "max_position_embeddings", parameter.shape[0]))
            )
    return None


def check_lengths(check: CheckpointCheck, lengths: Sequence[int], folder: Path) -> None:
    """Checks that every record fits within the model's learned positions.

    Args:
        check: The model's check.
        lengths: The lengths of the records in tokens.
        folder: The model's folder, for the error.

    Raises:
        ModelError: A record is longer.
    """
    longest = max(lengths, default=0)
    if check.max_positions is not None and longest > check.max_positions:
        raise ModelError(
            "A record is longer than the model's learned positions.",
            path=folder,
            expected=f"at most {check.max_positions:,} tokens",
            actual=f"{longest:,}",
            hint=f"--max-length {check.max_positions}",
        )
