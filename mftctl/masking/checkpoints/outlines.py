"""Models without weights, for processes that each then read only their part from the checkpoint's files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel

from mftctl.errors import MaskingError, ModelError
from mftctl.masking.checkpoints.apply_in_memory import spellings
from mftctl.masking.checkpoints.load_weights import attention_settings, read_configuration
from mftctl.masking.checkpoints.model_failures import model_failures
from mftctl.masking.checkpoints.remote_code import trusts_code
from mftctl.masking.checkpoints.tensors import StoredTensor, tensor_digest, tensor_index
from mftctl.masking.checkpoints.vision_language import auto_class
from mftctl.masking.parameter_layout import StoredPart, stored_parts
from mftctl.runtime.devices import record_attention

Rows = Callable[[str, int, int | None], torch.Tensor]
"""Returns, on the CPU, a range of a parameter's first dimension, end excluded or None for all the rest."""


def build_outline(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint, with buffers on the CPU and parameters on the meta device, for `StoredWeights`.

    Args:
        folder: Contains `config.json` and safetensors.
        dtype: Dtype of its parameters.

    Raises:
        ModelError: transformers does not know the model, or a weight is missing in the files.
        MaskingError: The weights are stored in a form that cannot be read in parts.
    """
    config, settings = read_configuration(folder), attention_settings(folder, dtype)
    if getattr(config, "quantization_config", None):
        raise MaskingError("8-bit weights cannot be read in parts.", path=folder, expected="bf16, fp16 or fp32")
    with model_failures("The model cannot be loaded.", path=folder):
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=trusts_code(), **settings
            )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    record_attention(model)
    model.tie_weights()  # the meta device untied them
    _keep_in_fp32(model)
    weights = StoredWeights(folder, model)
    for name, buffer in model.state_dict(keep_vars=True).items():
        if not buffer.is_meta:
            buffer.copy_(weights.rows(name))
    model.eval()  # type: ignore[no-untyped-call]
    return model


class StoredWeights:
    """The values of a model's parameters and stored buffers in a checkpoint's files.

    Args:
        folder: The checkpoint.
        model: From `build_outline`; masks may be attached to it afterwards.

    Raises:
        ModelError: A weight is missing or has the wrong shape.
        MaskingError: A weight is stored in a form that cannot be read in parts.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        index = tensor_index(folder)
        tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        shared: defaultdict[torch.Tensor, list[str]] = defaultdict(list)
        for name, tensor in tensors.items():
            shared[tensor].append(name)
        layout = stored_parts(model, tensors)
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self._parts: dict[str, list[tuple[StoredPart, StoredTensor]]] = {}
        for names in shared.values():
            found = [parts for name in names if (parts := _find(layout[name], index, model.base_model_prefix))]
            if not found:
                raise ModelError(
                    "The checkpoint lacks a weight of the model.", path=folder, key=names[0], actual="no such tensor"
                )
            _require_alike(names, found)
            self._parts.update(dict.fromkeys(names, found[0]))
        for name, parts in self._parts.items():
            self._require_shapes(folder, name, parts)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """A range of a weight's first dimension, or all of it, on the CPU and in the model's dtype.

        Args:
            name: Name in the model's state.
            first: Start of the range.
            last: End of the range, excluded.
        """
        shape, dtype, parts = self._shapes[name], self._dtypes[name], self._parts[name]
        if len(parts) == 1 and parts[0][0].index == ():
            return _read(parts[0][1], first, last).to(dtype)
        last = shape[0] if last is None else last
        rows = torch.empty((last - first, *shape[1:]), dtype=dtype)
        for part, stored in parts:
            outer, *inner = part.index
            if isinstance(outer, int):  # an expert
                if first <= outer < last:
                    rows[(outer - first, *inner)] = _read(stored)
                continue
            begin, end = max(first, outer.start), min(last, outer.stop)
            if begin < end:
                rows[begin - first : end - first] = _read(stored, begin - outer.start, end - outer.start)
        return rows

    def _require_shapes(self, folder: Path, name: str, parts: list[tuple[StoredPart, StoredTensor]]) -> None:
        whole = torch.empty(self._shapes[name], device="meta")
        for part, stored in parts:
            if part.of(whole).shape != stored.shape:
                raise ModelError(
                    "A weight in the checkpoint does not have the shape that the model expects.",
                    path=folder,
                    key=stored.name,
                    expected=tuple(part.of(whole).shape),
                    actual=stored.shape,
                )


def _find(
    parts: list[StoredPart], index: Mapping[str, StoredTensor], prefix: str
) -> list[tuple[StoredPart, StoredTensor]] | None:
    """The stored tensors of a weight's parts; None if one of them is missing."""
    found = []
    for part in parts:
        name = next((name for name in spellings(part.name, prefix) if name in index), None)
        if name is None:
            return None
        found.append((part, index[name]))
    return found


def _require_alike(names: list[str], found: list[list[tuple[StoredPart, StoredTensor]]]) -> None:
    """Checks that tied weights stored more than once are identical."""
    digests = {tuple(tensor_digest(stored) for _, stored in parts) for parts in found} if len(found) > 1 else set()
    if len(digests) > 1:
        raise MaskingError(
            "Weights tied by the configuration are stored with different values.",
            key=", ".join(names),
            expected="the same bytes",
            actual=f"{len(digests)} different tensors",
        )


def _read(stored: StoredTensor, first: int = 0, last: int | None = None) -> torch.Tensor:
    with safe_open(stored.path, framework="pt") as file:
        if not stored.shape or (first, last or stored.shape[0]) == (0, stored.shape[0]):
            whole: torch.Tensor = file.get_tensor(stored.name)
            return whole
        rows: torch.Tensor = file.get_slice(stored.name)[first:last]
        return rows


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Converts the parameters that transformers always keeps in fp32 to fp32."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if any(part in f"{module_name}.{name}".split(".") for part in kept):
                setattr(module, name, torch.nn.Parameter(parameter.float(), requires_grad=parameter.requires_grad))
