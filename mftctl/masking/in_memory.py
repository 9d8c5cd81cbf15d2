"""Masks on a model that is loaded: parameter names, the check that it is the right base, and the zeros."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from typing import Final

import torch

from mftctl.errors import MaskMismatchError
from mftctl.masking.bits import Mask, TensorRecord
from mftctl.masking.dtypes import INTEGER_VIEWS, TORCH_DTYPES, can_hold

DELTA_MESSAGE: Final = (
    "A delta mask needs the tuned checkpoint beside the base, and this version of apply takes the base alone"
)


def checkpoint_names(model_names: Iterable[str], index: Container[str], base_model_prefix: str) -> dict[str, str]:
    """The name in the checkpoint of each parameter in memory.

    Args:
        model_names: Names as in `model.named_parameters()`.
        index: The names in the checkpoint.
        base_model_prefix: The model's `base_model_prefix`, which one side may have and the other lack: GPT-2 files on
            the hub say `h.0.attn.c_attn.weight` for `transformer.h.0.attn.c_attn.weight`.

    Raises:
        MaskMismatchError: A parameter is not in the checkpoint under either name.
    """
    return {name: _counterpart(name, index, base_model_prefix) for name in model_names}


def apply_mask(model: torch.nn.Module, mask: Mask) -> None:
    """Sets the removed weights of a loaded model to +0.0, in place.

    Everything is checked before the first weight changes. Where a parameter's dtype holds every value of the base's
    dtype, its values must be those that the mask was learned on; in a narrower dtype, such as BF16 for a base in F32,
    only its name and shape can be checked. A parameter whose removed weights are all zero already is left as it is, so
    a second application of the same mask changes nothing.

    Args:
        model: A transformers model, or any module with parameters under checkpoint names.
        mask: A mask of kind "weight".

    Raises:
        MaskMismatchError: The mask is of another kind, or the model is not the one it was learned on.
    """
    if mask.metadata.kind != "weight":
        raise MaskMismatchError(
            DELTA_MESSAGE, key="kind", expected="weight", actual=mask.metadata.kind, hint="use a weight mask"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = getattr(model, "base_model_prefix", "")
    targets = {name: parameters[found] for name, found in checkpoint_names(mask.names(), parameters, prefix).items()}
    for name, parameter in targets.items():
        _require_base(name, parameter, mask)
    for name, parameter in targets.items():
        _bits(parameter).masked_fill_(~mask[name].to(parameter.device), 0)


def _counterpart(name: str, names: Container[str], prefix: str) -> str:
    candidates = [name]
    if prefix:
        candidates += [name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
    for candidate in candidates:
        if candidate in names:
            return candidate
    raise MaskMismatchError(
        "A masked tensor is not in the model",
        key=name,
        expected=" or ".join(dict.fromkeys(candidates)),
        hint="use the mask with the model it was learned on (mftctl mask info FILE names it)",
    )


def _require_base(name: str, parameter: torch.Tensor, mask: Mask) -> None:
    record = mask.records[name]
    if tuple(parameter.shape) != record.shape or not parameter.is_floating_point() or parameter.is_meta:
        raise MaskMismatchError(
            "A masked tensor has another form in this model",
            key=name,
            expected=f"{record.shape}, floating point",
            actual=f"{tuple(parameter.shape)}, {parameter.dtype} on {parameter.device}",
            hint=_base_hint(mask),
        )
    base_dtype = TORCH_DTYPES[record.dtype]
    if not can_hold(parameter.dtype, base_dtype) or _is_base(parameter.detach(), base_dtype, record):
        return
    if record.removed and not _bits(parameter)[~mask[name].to(parameter.device)].any():
        return
    raise MaskMismatchError(
        "The model is not the one this mask was learned on: a tensor has other values",
        key=name,
        expected=f"SHA-256 {record.sha256} as {record.dtype}",
        actual="other values",
        hint=f"{_base_hint(mask)}; a model that another mask was applied to is another model",
    )


def _is_base(parameter: torch.Tensor, base_dtype: torch.dtype, record: TensorRecord) -> bool:
    narrow = parameter.to(base_dtype)
    # Rounding could hide a small change, so the way back must give the parameter again.
    if narrow.dtype != parameter.dtype and not torch.equal(narrow.to(parameter.dtype), parameter):
        return False
    stored = narrow.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(stored.data).hexdigest() == record.sha256


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's own memory as integers: zero bits are +0.0 in every maskable dtype."""
    return parameter.detach().view(INTEGER_VIEWS[parameter.element_size()])


def _base_hint(mask: Mask) -> str:
    revision = mask.metadata.base_revision
    return f"load {mask.metadata.base_model}" + (f" at revision {revision}" if revision else "")
