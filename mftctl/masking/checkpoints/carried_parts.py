"""Parts of a checkpoint other than the language model, such as a vision tower, and carrying them over on writing."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel

from mftctl.errors import MaskingError, ModelError
from mftctl.files.regular import read_regular
from mftctl.masking.checkpoints.apply_in_memory import spellings
from mftctl.masking.checkpoints.tensors import INDEX_FILE, WEIGHTS_FILE, StoredTensor, read_chunks, tensor_index
from mftctl.masking.parameter_layout import stored_parts
from mftctl.text import counted

_OTHER_PARTS: Final = ("vision_config", "audio_config", "video_config")
_BESIDE: Final = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_COMPUTED: Final = ("inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
"""Suffixes of tensors that old checkpoints store and models recompute."""

_SCALES: Final = ("_scale_inv", "_scale", "input_scale", "activation_scale")
_OTHER_FILE: Final = "model-other-parts.safetensors"
_WHOLE_FILE: Final = "model-whole.safetensors"


def parts_left_out(folder: Path, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint that its language model does not use, by name: a vision tower, extra heads.

    Args:
        folder: The checkpoint.
        model: Loaded from it, or without weights.

    Raises:
        ModelError: They cannot be carried over to the checkpoint that is written.
    """
    stored = tensor_index(folder)
    try:
        layout = stored_parts(model, dict(model.state_dict(keep_vars=True)))
    except MaskingError:
        return {}  # an unsupported layout, for which no other parts are known
    written = {part.name: part.parameter for parts in layout.values() for part in parts}
    read = {name for part in written for name in spellings(part, model.base_model_prefix)}
    is_quantised = "quantization_config" in json.loads(read_regular(folder / "config.json"))
    passed_over = (*_COMPUTED, *_SCALES) if is_quantised else _COMPUTED
    found = {name: tensor for name, tensor in stored.items() if name not in read and not name.endswith(passed_over)}
    if not found:
        return {}
    eight_bits = next((name for name, tensor in found.items() if tensor.dtype.startswith("F8")), None)
    strange = next((name for name, own in written.items() if name not in stored and not _is_tied(own, model)), None)
    if eight_bits is not None or strange is not None:
        raise ModelError(
            "Parts of the model other than its language model cannot be carried over.",
            path=folder,
            key=eight_bits or strange,
            expected="a language model under the parameter names of transformers, and other parts in bf16, fp16 or "
            "fp32",
            actual=f"{counted(len(found), 'tensor')} such as {next(iter(found))}",
            hint="save the language model on its own with AutoModelForCausalLM, and use that",
        )
    return found


def is_composite(config: Mapping[str, Any]) -> bool:
    """True if a configuration describes a model with image, audio or video input."""
    return any(part in config for part in _OTHER_PARTS)


def carry_over(source: Path, folder: Path, parts: Mapping[str, StoredTensor]) -> None:
    """Adds the other parts of a model to a checkpoint of its language model, with the configuration of the whole model.

    Args:
        source: The checkpoint that holds the parts.
        folder: The new checkpoint, as saved by transformers.
        parts: From `parts_left_out`.
    """
    written = tensor_index(folder)
    if (folder / WEIGHTS_FILE).is_file():
        _write_file(folder / _WHOLE_FILE, [*written.values(), *parts.values()])
        (folder / _WHOLE_FILE).replace(folder / WEIGHTS_FILE)
    else:
        _write_file(folder / _OTHER_FILE, list(parts.values()))
        files = {name: tensor.path.name for name, tensor in written.items()} | dict.fromkeys(parts, _OTHER_FILE)
        total = sum(tensor.length_bytes for tensor in (*written.values(), *parts.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    whole = json.loads(read_regular(source / "config.json"))
    if is_composite(whole):
        _write_whole(whole, folder)
        copy_processor(source, folder)


def copy_processor(source: Path, folder: Path) -> None:
    """Copies the files that describe a model's processor of images, audio and video, if it has any.

    Args:
        source: The checkpoint with them.
        folder: The new checkpoint.
    """
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_whole(config: dict[str, Any], folder: Path) -> None:
    """Writes the configuration of the whole model, in the dtype of the language model that was written."""
    written = json.loads(read_regular(folder / "config.json"))
    config.pop("quantization_config", None)
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            place.pop("torch_dtype", None)
            place["dtype"] = written.get("dtype")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """Copies tensors of other files into one, byte for byte; the widest dtypes come first, which aligns all of them."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.length_bytes // max(1, math.prod(tensor.shape)), tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.length_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            with tensor.path.open("rb") as source:
                source.seek(tensor.offset_bytes)
                for chunk in read_chunks(source, tensor.length_bytes, tensor.path):
                    stream.write(chunk)


def _is_tied(name: str, model: PreTrainedModel) -> bool:
    """True if a parameter may be tied to another one, such as an output head tied to the embeddings."""
    return any(re.search(pattern, name) for pattern in model._tied_weights_keys or ())
