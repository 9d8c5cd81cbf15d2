"""Applies masks to a loaded model: parameter names, the check that it is the right model, and the removal."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mftctl.errors import MaskingError, MaskMismatchError, ModelError
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.mask_match import masked_tensors, require_digest
from mftctl.masking.checkpoints.tensors import read_tensor, tensor_digest
from mftctl.masking.dtypes import TORCH_DTYPES, bits, can_hold
from mftctl.masking.mask import Mask
from mftctl.masking.masked_values import finite_rescaled, mask_in_place
from mftctl.masking.parameter_layout import stored_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mftctl.masking.targets import MaskTarget


def checkpoint_names(model_names: Iterable[str], index: Container[str], base_model_prefix: str) -> dict[str, str]:
    """Maps each parameter in memory to its name in the checkpoint.

    Args:
        model_names: Names as in `model.named_parameters()`.
        index: The tensor names in the checkpoint.
        base_model_prefix: The model's `base_model_prefix`, which may be present on only one side: GPT-2 files on the
            hub have `h.0.attn.c_attn.weight` for `transformer.h.0.attn.c_attn.weight`.

    Raises:
        MaskMismatchError: A parameter is not in the checkpoint under either name.
    """
    return {name: _counterpart(name, index, base_model_prefix) for name in model_names}


def target_names(targets: Sequence[MaskTarget], model: PreTrainedModel, index: Container[str]) -> dict[str, str]:
    """Maps each target's name to its weight's name in the checkpoint.

    Args:
        targets: From `find_targets` on this model.
        model: Loaded from the checkpoint.
        index: The tensor names in the checkpoint.

    Raises:
        MaskMismatchError: A weight is not in the checkpoint.
        MaskingError: A weight is stored as several tensors.
    """
    prefix = model.base_model_prefix
    unknown = [target for target in targets if not _candidates(target.weight_name, index, prefix)]
    parts = stored_parts(model, {target.weight_name: target.weight for target in unknown if target.fused is None})
    for name, stored in parts.items():
        if len(stored) != 1:
            raise MaskingError(
                "A projection is stored as several tensors, which is supported only for fused experts.",
                key=name,
                expected="one tensor",
                actual=", ".join(part.name for part in stored),
                hint="leave it out (--target, or a ratio by projection)",
            )
    renamed = {
        target.name: parts[target.weight_name][0].name if target.weight_name in parts else target.weight_name
        for target in targets
    }
    names = checkpoint_names(renamed.values(), index, prefix)
    return {target: names[weight] for target, weight in renamed.items()}


def apply_mask(model: torch.nn.Module, mask: Mask, base: Path | None = None) -> None:
    """Sets the removed weights of a loaded model to +0.0, or to the base's values for a delta mask, in place.

    Everything is checked before the first weight changes, except that rescaled weights are finite. If a parameter's
    dtype can hold every value of the checkpoint's dtype, its values must be those that the mask was made for; in a
    narrower dtype, such as BF16 for a checkpoint in F32, only its name and shape can be checked. A parameter whose
    removed weights are already all zero is left unchanged, so applying the same weight mask twice has no further
    effect; applying a delta mask twice is refused.

    Args:
        model: A transformers model, or any module with parameters under checkpoint names: the base for a weight mask,
            the tuned model for a delta mask. Experts may be fused in memory but separate in the mask.
        mask: The mask.
        base: Folder of the base, for a delta mask only. One of its tensors is in memory at a time.

    Raises:
        MaskMismatchError: The model or the base is not the one the mask was made for, no base is given for a delta
            mask, or one is given for a weight mask.
        MaskingError: A masked tensor is not a parameter, and the model's storage layout cannot be determined; or a
            rescaled weight is not finite.
        ModelError: The base cannot be read.
    """
    _require_base_for_delta(mask, base)
    targets = stored_parameters(model, mask.names())
    for name, parameter in targets.items():
        _require_model(name, parameter, mask)
    originals = {} if base is None else masked_tensors(mask, base, "base")
    for name, stored in originals.items():
        require_digest(tensor_digest(stored), stored, name, mask, "base")
    scaled: set[int] = set()
    for name, parameter in targets.items():
        original = read_tensor(originals[name]).to(parameter.device) if originals else None
        # A tied output head may have a second name for the same weights, which are scaled once.
        if original is not None and mask.metadata.scale is not None and parameter.data_ptr() not in scaled:
            scaled.add(parameter.data_ptr())
            # In the checkpoint's dtype, so that a model in a wider one equals the applied checkpoint.
            tuned = parameter.to(original.dtype)
            parameter.copy_(finite_rescaled(tuned, original, mask.metadata.scale, name))
        mask_in_place(parameter, mask[name].to(parameter.device), None if original is None else original.to(parameter))


def base_folder(mask: Mask) -> Path | None:
    """The folder of the base that a delta mask names, for `apply_mask`; None for a weight mask.

    Raises:
        ModelError: There is no such model.
    """
    metadata = mask.metadata
    if metadata.kind != "delta":
        return None
    try:
        return resolve_checkpoint(metadata.base_model, metadata.base_revision)
    except ModelError as error:
        raise ModelError(
            "A delta mask needs the model before fine-tuning, which is missing.",
            path=error.path,
            key=metadata.base_model,
            expected="the model that the mask was learned with",
            actual=error.actual,
            hint="mftctl apply BASE MASK --tuned TUNED names it, and its result needs no base",
        ) from error


def stored_parameters(model: torch.nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The parameter for each checkpoint name, or a view of the part stored under that name.

    Args:
        model: A transformers model, or any module with parameters under checkpoint names.
        names: Names of tensors in a checkpoint.

    Raises:
        MaskMismatchError: A tensor is not in the model.
        MaskingError: A tensor is not a parameter, and the model's storage layout cannot be determined.
    """
    prefix = getattr(model, "base_model_prefix", "")
    tensors: dict[str, torch.Tensor] = {
        name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    if not all(_candidates(name, tensors, prefix) for name in names):
        for name, parts in stored_parts(model, tensors).items():
            tensors |= {part.name: part.of(tensors[name]) for part in parts}
    return {name: tensors[found] for name, found in checkpoint_names(names, tensors, prefix).items()}


def _require_base_for_delta(mask: Mask, base: Path | None) -> None:
    if mask.metadata.kind == "delta" and base is None:
        raise MaskMismatchError(
            "A delta mask needs the base in addition to the tuned model.",
            key="base",
            expected=mask.metadata.base_label,
            actual="only the tuned model",
            hint=f"give {mask.metadata.base_label} as the base",
        )
    if mask.metadata.kind == "weight" and base is not None:
        raise MaskMismatchError(
            "A weight mask applies to its model only, but a base was given.",
            path=base,
            key="base",
            expected="no base",
            hint="omit the base, or give a delta mask",
        )


def _counterpart(name: str, names: Container[str], prefix: str) -> str:
    found = _candidates(name, names, prefix)
    if found:
        return found[0]
    raise MaskMismatchError(
        "A masked tensor is not in the model.",
        key=name,
        expected=" or ".join(spellings(name, prefix)),
        hint="use the mask with the model it was learned on (shown by mftctl mask info FILE)",
    )


def _candidates(name: str, names: Container[str], prefix: str) -> list[str]:
    return [spelling for spelling in spellings(name, prefix) if spelling in names]


def spellings(name: str, prefix: str) -> list[str]:
    """Possible checkpoint names of a weight, with and without the model's `base_model_prefix`, unchanged name first."""
    if not prefix:
        return [name]
    return list(dict.fromkeys([name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]))


def _require_model(name: str, parameter: torch.Tensor, mask: Mask) -> None:
    record = mask.records[name]
    metadata = mask.metadata
    if tuple(parameter.shape) != record.shape or not parameter.is_floating_point() or parameter.is_meta:
        raise MaskMismatchError(
            "A masked tensor has a different shape or dtype in this model.",
            key=name,
            expected=f"{record.shape}, floating point",
            actual=f"{tuple(parameter.shape)}, {parameter.dtype} on {parameter.device}",
            hint=f"load {metadata.tuned_label or metadata.base_label}",
        )
    stored_dtype, sha256 = TORCH_DTYPES[record.dtype], record.tuned_sha256 or record.sha256
    if not can_hold(parameter.dtype, stored_dtype) or _is_stored(parameter.detach(), stored_dtype, sha256):
        return
    if metadata.kind == "weight" and record.removed and not bits(parameter)[~mask[name].to(parameter.device)].any():
        return
    raise MaskMismatchError(
        "The model is not the one this mask was made for: the values of a tensor differ.",
        key=name,
        expected=f"SHA-256 {sha256} as {record.dtype}",
        actual="different values",
        hint=f"load {metadata.tuned_label or metadata.base_label}; "
        "a model that another mask was applied to is not the same model",
    )


def _is_stored(parameter: torch.Tensor, stored_dtype: torch.dtype, sha256: str) -> bool:
    narrow = parameter.to(stored_dtype)
    # Rounding could hide a small change, so converting back must reproduce the parameter.
    if narrow.dtype != parameter.dtype and not torch.equal(narrow.to(parameter.dtype), parameter):
        return False
    stored = narrow.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(stored.data).hexdigest() == sha256
