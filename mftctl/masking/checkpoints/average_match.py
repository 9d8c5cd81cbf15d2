"""Checks that several checkpoints can be averaged: the same tensors, tokenizer and chat template, and not quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from mftctl.errors import ModelError
from mftctl.files.json_files import read_json_object
from mftctl.masking.checkpoints.mixture import MIXED_DTYPES, Parts
from mftctl.masking.checkpoints.tensors import StoredTensor, tensor_digest, tensor_index

_FLOATS: Final = ("F", "BF")
"""Starts of the names of floating-point dtypes, those of 8 bits included."""


def matching_parts(checkpoints: Sequence[Path]) -> Parts:
    """The tensors to average by name, after checking that all checkpoints have the same ones.

    Tensors that are not floating point are left out, after checking that they are equal.

    Args:
        checkpoints: Their folders, at least one; they may be sharded differently.

    Raises:
        ModelError: A tensor is missing or differs in dtype or shape, one that cannot be averaged has different values,
            a checkpoint is quantised, or one of them cannot be read.
    """
    for folder in checkpoints:
        require_plain_weights(folder)
    first, indexes = checkpoints[0], [tensor_index(folder) for folder in checkpoints]
    parts: dict[str, list[StoredTensor]] = {}
    for name in sorted({name for index in indexes for name in index}):
        for folder, index in zip(checkpoints[1:], indexes[1:], strict=True):
            _require_same_form(name, indexes[0], index, first, folder)
        found = [index[name] for index in indexes]
        if found[0].dtype in MIXED_DTYPES:
            parts[name] = found
        else:
            _require_same_values(found)
    return parts


def require_plain_weights(folder: Path) -> None:
    """Checks that the weights of a checkpoint are stored as they are, so that they can be summed.

    Raises:
        ModelError: They are quantised, or the checkpoint cannot be read.
    """
    path = folder / "config.json"
    try:
        quantization = read_json_object(path).get("quantization_config")
    except (OSError, ValueError) as error:
        raise ModelError("The configuration of the model cannot be read.", path=path, actual=error) from error
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise _quantized(folder, "quantization_config.quant_method", method)
    for stored in tensor_index(folder).values():
        if stored.dtype.startswith(_FLOATS) and stored.dtype not in MIXED_DTYPES:
            raise _quantized(folder, stored.name, stored.dtype)


def _quantized(folder: Path, key: str, actual: object) -> ModelError:
    return ModelError(
        "The weights of a checkpoint are quantised and cannot be combined with others.",
        path=folder,
        key=key,
        expected=f"weights in {', '.join(MIXED_DTYPES)}",
        actual=actual,
        hint="use the checkpoint from before quantisation",
    )


def _require_same_form(
    name: str, mine: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor], first: Path, other: Path
) -> None:
    if _form(mine.get(name)) != _form(theirs.get(name)):
        raise ModelError(
            "The checkpoints do not have the same tensors.",
            path=other,
            key=name,
            expected=f"{_form(mine.get(name))}, as in {first}",
            actual=_form(theirs.get(name)),
            hint="give checkpoints of the same model, saved in the same dtype",
        )


def _require_same_values(found: Sequence[StoredTensor]) -> None:
    digests = [tensor_digest(stored) for stored in found]
    for stored, digest in zip(found, digests, strict=True):
        if digest != digests[0]:
            raise ModelError(
                "A tensor that cannot be averaged differs between the checkpoints.",
                path=stored.path,
                key=stored.name,
                expected=f"the values in {found[0].path}, or a dtype of {', '.join(MIXED_DTYPES)}",
                actual=f"other values, in {stored.dtype}",
                hint="give checkpoints of the same model",
            )


def _form(stored: StoredTensor | None) -> str:
    return "no such tensor" if stored is None else f"{stored.dtype} {stored.shape}"
