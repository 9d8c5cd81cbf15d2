"""Whether a checkpoint is what its configuration says, before any of its weights is read."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mftctl.errors import ModelError
from mftctl.masking.checkpoint_source import is_adapter
from mftctl.masking.safetensors_files import INDEX_FILE, WEIGHTS_FILE, StoredTensor, tensor_index
from mftctl.regular_files import read_regular

_TRAINABLE_QUANTIZATION = ("fp8", "fbgemm_fp8")
_DEQUANTIZED_IN = torch.bfloat16
_MOST_NAMED = 3
_COMPARED_ROWS = 4096
_OTHER_PARTS = ("vision_config", "audio_config", "video_config")
_LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "wpe_embeddings")


@dataclass(frozen=True, slots=True)
class CheckpointCheck:
    """What is to be known of a checkpoint that can be used.

    Attributes:
        remarks: What a user should know, a sentence each.
        max_positions: The longest sequence that has learned positions; None where positions are computed.
    """

    remarks: tuple[str, ...]
    max_positions: int | None


def check_checkpoint(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, *, trust_remote_code: bool = False
) -> CheckpointCheck:
    """What is to be known of a checkpoint, from its files' headers alone.

    Args:
        folder: With `config.json` and safetensors; of a LoRA adapter nothing is checked, its base has been.
        tokenizer: The model's.
        trust_remote_code: Whether code in the folder may be run.

    Raises:
        ModelError: A file is damaged or none, weights are quantised so that they cannot be trained, the code is not
            trusted, tensors are missing, unexpected or of another shape, or the tokenizer has more tokens than the
            model.
    """
    if is_adapter(folder):
        return CheckpointCheck((), None)
    config = _configuration(folder)
    _check_quantization(folder, config)
    _check_code(folder, config, trusted=trust_remote_code)
    _check_index(folder)
    stored = tensor_index(folder)
    model = _skeleton(folder, trust_remote_code)
    _check_tokenizer(folder, model, tokenizer)
    remarks = [*_untied(config, stored), *_left_out(config, stored, model)]
    if config.get("quantization_config"):
        remarks.append(f"the weights are stored in 8 bits; they are trained and written in {_name(_DEQUANTIZED_IN)}")
    return CheckpointCheck(tuple(remarks), _max_positions(model))


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError("The configuration of the model cannot be read.", path=path, actual=str(error)) from error
    if not isinstance(config, dict):
        raise ModelError("The configuration of the model is no JSON object.", path=path, actual=type(config).__name__)
    return config


def _check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return
    method = str(quantization.get("quant_method", "unknown"))
    if method not in _TRAINABLE_QUANTIZATION:
        raise ModelError(
            "The weights of the model are quantised, and can be neither fine-tuned nor masked.",
            path=folder,
            key="quantization_config.quant_method",
            expected="weights in bf16, fp16, fp32 or fp8",
            actual=method,
            hint="use the model that it was made from; to fine-tune with 4-bit weights: "
            "fft --method lora --quantize nf4 on that model",
        )


def _check_code(folder: Path, config: Mapping[str, Any], *, trusted: bool) -> None:
    code = config.get("auto_map")
    if not code or trusted or _is_known(config):
        return
    files = sorted({f"{str(name).rpartition('--')[2].split('.')[0]}.py" for name in dict(code).values()})
    raise ModelError(
        "The model brings code of its own, which loading it would run.",
        path=folder,
        key="auto_map",
        expected="a model that transformers knows",
        actual=", ".join(files),
        hint="read these files; if you trust them: --trust-remote-code",
    )


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the model itself, so that it needs no code from the folder."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def _check_index(folder: Path) -> None:
    """Nothing, if the index has the metadata that transformers reads beside the map."""
    path = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not path.is_file():
        return
    try:
        index = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return  # for tensor_index to tell
    if isinstance(index, dict) and "metadata" not in index:
        raise ModelError(
            "The index of the checkpoint has no metadata, which transformers asks for.",
            path=path,
            key="metadata",
            expected='a block such as {"total_size": 1234} beside weight_map',
            actual=f"the keys {', '.join(map(str, index))}",
            hint='add "metadata": {} to the index',
        )


def _skeleton(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model without its weights, for which every tensor was found.

    Raises:
        ModelError: transformers cannot load it, or tensors do not fit.
    """
    with _quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                device_map="meta",
                dtype=_DEQUANTIZED_IN,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(
                "transformers cannot load the model.", path=folder, actual=str(error).splitlines()[0]
            ) from error
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(
        f"{name} {_shape(found)} for {_shape(wanted)}" for name, found, wanted in report["mismatched_keys"]
    )
    if missing or unexpected or mismatched:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)]
        raise ModelError(
            "The checkpoint does not hold the tensors of the model that its configuration describes.",
            path=folder,
            expected="each tensor of the model once, and no others",
            actual="; ".join(f"{len(names)} {word}: {_listed(names)}" for word, names in parts if names),
            hint="download or save the checkpoint again; a part of a larger model is to be saved by itself first",
        )
    loaded: PreTrainedModel = model
    return loaded


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
    """Whether there is a head of its own where the configuration shares it with the embeddings."""
    embeddings = next((name for name in stored if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    head = next((name for name in stored if name.endswith("lm_head.weight")), None)
    tied = config.get("tie_word_embeddings", dict(config.get("text_config") or {}).get("tie_word_embeddings"))
    if tied and embeddings is not None and head is not None and not _same(stored[embeddings], stored[head]):
        yield (
            f"tie_word_embeddings is set, but {head} differs from {embeddings}: the two are not tied, and "
            "both are used and written"
        )


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same values, read some rows at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    with safe_open(one.path, framework="pt") as first, safe_open(other.path, framework="pt") as second:
        rows, others = first.get_slice(one.name), second.get_slice(other.name)
        starts = range(0, one.shape[0], _COMPARED_ROWS)
        return all(torch.equal(rows[i : i + _COMPARED_ROWS], others[i : i + _COMPARED_ROWS]) for i in starts)


def _left_out(config: Mapping[str, Any], stored: Mapping[str, StoredTensor], model: PreTrainedModel) -> Iterator[str]:
    """What of a model for images or sounds the language model does without."""
    if not any(part in config for part in _OTHER_PARTS):
        return
    held = math.fsum(parameter.numel() for parameter in model.parameters())
    there = math.fsum(math.prod(tensor.shape) for tensor in stored.values())
    names = [name for name in stored if any(word in name for word in ("visual", "vision", "audio", "multi_modal"))]
    if names and there > held:
        yield (
            f"{len(names)} tensors of other parts than the language model, such as {names[0]}, are left out: what is "
            "written is a model of text alone"
        )


def _max_positions(model: PreTrainedModel) -> int | None:
    """The rows of a table of learned positions, if the model has one."""
    for name, parameter in model.named_parameters():
        if any(f".{part}." in f".{name}" for part in _LEARNED_POSITIONS):
            return min(
                int(parameter.shape[0]), int(getattr(model.config, "max_position_embeddings", parameter.shape[0]))
            )
    return None


def check_lengths(check: CheckpointCheck, lengths: Sequence[int], folder: Path) -> None:
    """Nothing, if every record fits the positions that the model has learned.

    Args:
        check: Of the model.
        lengths: The records', in tokens.
        folder: The model's, for the error.

    Raises:
        ModelError: One is longer.
    """
    longest = max(lengths, default=0)
    if check.max_positions is not None and longest > check.max_positions:
        raise ModelError(
            "A record is longer than the positions that the model has learned.",
            path=folder,
            expected=f"at most {check.max_positions:,} tokens",
            actual=f"{longest:,}",
            hint=f"--max-length {check.max_positions}",
        )


def _shape(size: Any) -> str:
    return str(tuple(size))


def _listed(names: Collection[str]) -> str:
    shown = list(names)[:_MOST_NAMED]
    return ", ".join(shown) + (" …" if len(names) > len(shown) else "")


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16"}.get(dtype, str(dtype))


@contextmanager
def _quiet() -> Iterator[None]:
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
